"""Ramps by hand."""

import math

import pytest

pytest.importorskip("torch")

from embedkit.training.schedules import cosine_ramp, linear_ramp, sigmoid_ramp


def test_ramps_by_hand():
    assert sigmoid_ramp(0) == pytest.approx(0.0067379, abs=1e-7) and sigmoid_ramp(1) == sigmoid_ramp(2) == 1
    assert sigmoid_ramp(0.5) == pytest.approx(math.exp(-1.25))
    # Pseudo-Label's alpha(t), with T1 at a tenth and T2 at six tenths of the run
    alphas = [linear_ramp(0.0, 3.0, done, over=(0.1, 0.6)) for done in (0.0, 0.1, 0.35, 0.6, 1.0)]
    assert alphas == pytest.approx([0, 0, 1.5, 3, 3])
    assert cosine_ramp(1.0, 0.0, 0.5) == pytest.approx(0.5)
