"""The cost of a run: images, operations, time, and an estimate of energy and CO2."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

import lightning
import torch
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["Cost", "Power"]


@dataclass(frozen=True, kw_only=True)
class Power:
    """What the energy estimate assumes; nothing is metered.

    Attributes:
        watts_per_thread: A busy CPU core with its share of memory and board.
        watts_per_gpu: A busy accelerator.
        grams_per_kwh: CO2 equivalent of electricity, about the world's mean.
    """

    watts_per_thread: float = 10.0
    watts_per_gpu: float = 400.0
    grams_per_kwh: float = 480.0


class Cost(lightning.Callback):
    """Images seen, training FLOPs, seconds, and an estimate of energy and CO2.

    FLOPs are those of the first step, forward and backward, counted by torch's `FlopCounterMode` (two for each
    multiply-add of matrix products and convolutions), times the steps; of a method with several kinds of steps,
    so for each kind. Seconds are those between the start of training and the last checkpoint or the end, over all
    resumptions.
    """

    _STATE = ("seconds", "flops", "flops_per_step", "images", "steps")

    def __init__(self, power: Power | None = None) -> None:
        self.power = power or Power()
        self.seconds, self.images, self.steps, self.watts = 0.0, 0, 0, 0.0
        self.flops = 0
        self.flops_per_step: dict[str, int] = {}  # by kind of step
        self._counter: FlopCounterMode | None = None
        self._kind = ""
        self._now = 0.0

    def on_train_start(self, trainer: lightning.Trainer, method: Any) -> None:
        """Start the clock."""
        self._now = time.monotonic()
        gpu = method.device.type != "cpu"
        each = self.power.watts_per_gpu if gpu else torch.get_num_threads() * self.power.watts_per_thread
        self.watts = each * trainer.world_size

    def on_train_batch_start(
        self, trainer: lightning.Trainer, method: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the operations of the first step of its kind."""
        self._kind = method.kind_of(method.batches_seen)
        if self._kind not in self.flops_per_step:
            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, method: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the step."""
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self.flops_per_step[self._kind] = self._counter.get_total_flops() * trainer.world_size
            self._counter = None
        self.flops += self.flops_per_step[self._kind]
        now = time.monotonic()
        self.seconds, self._now = self.seconds + now - self._now, now
        self.steps = method.batches_seen
        self.images = self.steps * method.facts.batch_size

    def on_exception(self, trainer: lightning.Trainer, method: Any, exception: BaseException) -> None:
        """Stop counting: a counter left open would see every later operation of the process."""
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self._counter = None

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {name: getattr(self, name) for name in self._STATE}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From the checkpoint."""
        for name, value in state_dict.items():
            setattr(self, name, value)

    def to_json(self) -> dict[str, Any]:
        """`cost.json`."""
        kwh = self.watts * self.seconds / 3.6e6
        return {
            "images": self.images,
            "steps": self.steps,
            "seconds": round(self.seconds, 1),
            "flops_per_step": round(self.flops / max(1, self.steps)),
            "training_flops": self.flops,
            "energy_kwh": round(kwh, 6),
            "co2_grams": round(kwh * self.power.grams_per_kwh, 3),
            "watts": self.watts,
            "assumptions": dataclasses.asdict(self.power),
        }
