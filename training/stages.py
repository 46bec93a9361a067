"""Stages: the parts of a run that do different things, one after another.

A method with stages returns a plan, and the house asks it which stage a step is in: learning rates are scheduled over
the stage, the cost of each kind of step is counted apart, and `Method.begin_stage` is called once, also where a run
was killed between two batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Plan", "Stage", "share_steps", "stage_at"]

#: Stages in their order, by name, with their steps; None for a length that is not known yet. Names may occur again.
Plan = Sequence[tuple[str, int | None]]


class Stage(NamedTuple):
    """Where a step stands.

    Attributes:
        name: Of the stage; empty for a method without stages.
        round: How often a stage of this name was there before.
        step: From 0, within the stage.
        length: Steps of the stage; None while that of the run is not known.
    """

    name: str
    round: int
    step: int
    length: int | None

    @property
    def left(self) -> int:
        """Steps of the stage after this one; -1 while its length is not known."""
        return -1 if self.length is None else self.length - 1 - self.step

    @property
    def progress(self) -> float:
        """The share of the stage that is done, in [0, 1]; 0 while its length is not known."""
        return self.step / self.length if self.length else 0.0


def stage_at(step: int, plan: Plan) -> Stage:
    """The stage of step `step`, from 0; steps behind the plan belong to its last stage."""
    place, seen = step, dict.fromkeys((name for name, _ in plan), -1)
    for index, (name, length) in enumerate(plan):
        seen[name] += 1
        if length is None or place < length or index == len(plan) - 1:
            return Stage(name, seen[name], place, length)
        place -= length
    raise ValueError("a plan has one stage or more")


def share_steps(total: int | None, shares: Sequence[tuple[str, float]]) -> Plan:
    """A plan of stages by their share of the run; the last takes what rounding leaves.

    Args:
        total: Steps of the run; None while a budget is being measured, which is within the first stage.
        shares: Names and shares, which sum to 1; a share of 0 leaves the stage out.
    """
    shares = [(name, share) for name, share in shares if share > 0]
    if total is None:
        return [(shares[0][0], None)]
    steps = [(name, round(total * share)) for name, share in shares[:-1]]
    return [*steps, (shares[-1][0], total - sum(length for _, length in steps))]
