"""What changes over a run: learning rates and ramps, each a function of the share that is done.

Sources: cosine, SGDR (Loshchilov and Hutter, ICLR 2017, arXiv 1608.03983, equation 5); one-cycle, Super-Convergence
(Smith and Topin, 2018, arXiv 1708.07120); the sigmoid ramp, Temporal Ensembling (Laine and Aila, ICLR 2017, arXiv
1610.02242, section 2.1), which Mean Teacher took over.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

from embedkit.errors import ConfigError

__all__ = ["Schedule", "cosine_ramp", "linear_ramp", "lr_factor", "sigmoid_ramp"]

Schedule = Literal["cosine", "one_cycle", "constant", "step", "exponential"]

#: one-cycle starts at a 25th of the peak and ends at a 10,000th of that, as in fastai and PyTorch
_ONE_CYCLE_START = 1 / 25
_ONE_CYCLE_END = _ONE_CYCLE_START / 1e4


def lr_factor(
    schedule: str,
    step: int,
    total_steps: int | None,
    *,
    warmup_steps: int = 0,
    milestones: tuple[float, ...] = (),
    gamma: float = 0.1,
    end: float = 0.0,
) -> float:
    """The learning rate of step `step`, as a share of its peak.

    Args:
        schedule: `cosine`: linear warm-up, then half a cosine down to `end`. `one_cycle`: half a cosine up from 1/25,
            half a cosine down to nearly 0. `step`: times `gamma` at each milestone. `exponential`: falls by a constant
            factor a step, to `end`. `constant`.
        step: From 0.
        total_steps: Of the whole run (or stage); None while that is being measured, which is within the warm-up.
        warmup_steps: Of the rise, at most a third of all steps.
        milestones: Of `step`: shares of the run, rising.
        gamma: Of `step`.
        end: Share of the peak at the end, above 0 for `exponential`.

    Raises:
        ConfigError: An unknown schedule.
    """
    if schedule not in get_args(Schedule):
        raise ConfigError(
            f"optimizer.schedule: expected {', '.join(get_args(Schedule)[:-1])} or {get_args(Schedule)[-1]}, "
            f"found {schedule!r}"
        )
    one_cycle = schedule == "one_cycle"
    start, end = (_ONE_CYCLE_START, _ONE_CYCLE_END) if one_cycle else (0.0, end)
    warmup = warmup_steps if total_steps is None else min(warmup_steps, total_steps // 3)
    if step < warmup:
        done = (step + 1) / warmup
        return cosine_ramp(start, 1.0, done) if one_cycle else done
    if schedule == "constant" or total_steps is None:
        return 1.0
    if schedule == "step":
        return gamma ** sum(step >= milestone * total_steps for milestone in milestones)
    done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    if schedule == "exponential":
        return max(end, 1e-8) ** done
    return cosine_ramp(1.0, end, done)


def cosine_ramp(start: float, end: float, done: float) -> float:
    """From `start` to `end` along half a cosine, over `done` of 0 to 1."""
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2


def linear_ramp(start: float, end: float, done: float, over: tuple[float, float] = (0.0, 1.0)) -> float:
    """From `start` to `end` along a line, while `done` goes from `over[0]` to `over[1]`; constant before and after."""
    low, high = over
    if done >= high:
        return end
    return start + (end - start) * max(0.0, done - low) / (high - low)


def sigmoid_ramp(done: float) -> float:
    """exp(-5 (1 - done)^2): from 0.0067 at 0 to 1 at 1 and after, Mean Teacher's ramp-up."""
    return math.exp(-5 * (1 - min(1.0, max(0.0, done))) ** 2)
