"""Stages: where a step stands, in plans with known and unknown lengths."""

import pytest

pytest.importorskip("torch")

from embedkit.training.stages import Stage, share_steps, stage_at


def test_a_step_has_its_stage():
    plan = [("a", 3), ("b", 2), ("a", 4)]
    found = [stage_at(step, plan) for step in range(10)]
    assert [(s.name, s.round, s.step) for s in found[:6]] == [
        ("a", 0, 0), ("a", 0, 1), ("a", 0, 2), ("b", 0, 0), ("b", 0, 1), ("a", 1, 0),
    ]  # fmt: skip
    assert found[8].left == 0 and found[9] == Stage("a", 1, 4, 4)  # behind the plan
    assert found[4].progress == 0.5 and stage_at(7, [("a", None)]) == Stage("a", 0, 7, None)


def test_shares_of_a_run():
    shares = (("codec", 0.6), ("none", 0.0), ("prior", 0.4))
    assert share_steps(11, shares) == [("codec", 7), ("prior", 4)]
    assert share_steps(None, shares) == [("codec", None)]
