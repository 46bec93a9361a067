"""What a run does between batches: checkpoints, the time budget, metrics and progress.

Checkpoints are taken when a batch begins, not when one ends: Lightning calls a module's own `on_train_batch_end`
(where a method moves its averages) after the callbacks', and a checkpoint between the two would hold half a step.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import lightning
import torch
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from embedkit.training.config import Facts
from embedkit.training.cost import Cost

__all__ = ["Budget", "Checkpoint", "Metrics", "ProgressLine", "Waiting", "write_checkpoint"]


def write_checkpoint(trainer: lightning.Trainer, path: Path, *, weights_only: bool = False) -> None:
    """Write a checkpoint on all ranks: to another file, on disk before it takes the name.

    Args:
        trainer: In training.
        path: The file.
        weights_only: Leave out optimizers and callbacks, so that it can be loaded and not gone on from.
    """
    partial = path.with_name(path.name + ".tmp")
    trainer.save_checkpoint(partial, weights_only=weights_only)
    if trainer.is_global_zero:
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)


class Checkpoint(lightning.Callback):
    """Write a checkpoint every so often; a reader finds a whole one whenever the run is killed.

    Args:
        path: The file.
        seconds: Time between two.
        every: Only after a multiple of so many batches: where gradients of several make one step.
    """

    def __init__(self, path: Path, seconds: float, every: int = 1) -> None:
        self.path, self.seconds, self.every = path, seconds, every
        self._last = time.monotonic()

    def on_train_batch_start(
        self, trainer: lightning.Trainer, method: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save what the batches before this one came to."""
        due = time.monotonic() - self._last >= self.seconds and method.batches_seen > 0
        due = due and method.batches_seen % self.every == 0
        # before the number of steps is fixed there is no plan that a resumed run could keep
        if trainer.strategy.broadcast(due) and method.total_steps is not None:
            self.save(trainer)

    def on_load_checkpoint(self, trainer: lightning.Trainer, method: Any, checkpoint: dict[str, Any]) -> None:
        """Open Lightning's one epoch again: after the last batch that a deadline allowed it counts as over."""
        progress = checkpoint["loops"]["fit_loop"]["epoch_progress"]
        for part in ("total", "current"):
            progress[part] = {**progress[part], "ready": 1, "started": 1, "processed": 0, "completed": 0}

    def save(self, trainer: lightning.Trainer) -> None:
        """Save now."""
        write_checkpoint(trainer, self.path)
        self._last = time.monotonic()


class Pauses(Protocol):
    """What takes time between steps, once before the first and then every so many.

    Attributes:
        every: Steps between two pauses.
        seconds: That all of them took.
        count: How many there were.
    """

    @property
    def every(self) -> int: ...

    seconds: float
    count: int

    def due(self, step: int) -> float:
        """Seconds that the pause before batch `step` will take; 0 where none is due."""
        ...


class Budget(lightning.Callback):
    """End the run after its steps, and plan them where a time is given instead.

    The first steps are timed and the rest of the budget is filled, with a margin; should the machine slow down,
    the run stops at the deadline with steps left.

    Args:
        deadline: On `time.monotonic`, for everything; None without a budget.
        planned: Told the facts when the number of steps is fixed.
        flops: Of the whole run; 0 for no such budget.
        cost: Where the operations of the steps are counted.
        most_steps: Steps at most, whatever the budget would allow.
        every: Batches whose gradients make one step: the run ends after a multiple of them.
        pauses: Evaluations, whose time is planned for too.
    """

    MEASURED = 50
    #: Not timed: memory is allocated and kernels are chosen.
    SKIPPED = 5
    #: Share of the remaining time that is planned for, the rest being margin.
    FILLED = 0.95

    def __init__(
        self,
        deadline: float | None,
        planned: Callable[[Facts], None],
        *,
        flops: float = 0.0,
        cost: Cost | None = None,
        most_steps: int | None = None,
        every: int = 1,
        pauses: Pauses | None = None,
    ) -> None:
        self.deadline, self.planned, self.every, self.pauses = deadline, planned, every, pauses
        self.flops, self.cost, self.most_steps = flops, cost, most_steps
        self._begun = 0.0
        self._timed: tuple[int, float] | None = None  # a step, and the time without pauses
        if deadline is not None:
            # the last checkpoint, the validation images and the encoder still take a moment
            self.deadline = deadline - min(5.0, 0.1 * (deadline - time.monotonic()))

    def on_train_start(self, trainer: lightning.Trainer, method: Any) -> None:
        """Take the time."""
        self._begun = time.monotonic()
        if method.total_steps is not None and method.batches_seen >= method.total_steps:
            trainer.should_stop = True

    def on_train_batch_start(
        self, trainer: lightning.Trainer, method: Any, batch: Any, batch_idx: int
    ) -> None:
        """Time the first steps, or count their operations, then fix the number of steps."""
        if method.total_steps is not None or (self.deadline is None and not self.flops):
            return
        by_flops = None
        if self.flops and self.cost is not None:
            if not self.cost.flops:
                return
            by_flops = max(1, int(self.flops / (self.cost.flops / method.batches_seen)))
            if self.deadline is None:
                self._plan(trainer, method, by_flops)
                return
        assert self.deadline is not None
        now, step = time.monotonic(), method.batches_seen
        working = now - (self.pauses.seconds if self.pauses is not None else 0.0)
        if step == self.SKIPPED:
            self._timed = step, working
        if self._timed is None or step == self._timed[0]:
            return
        # a quarter of the budget is enough to know the pace of slow steps
        enough = step >= self.MEASURED or now - self._begun > (self.deadline - self._begun) / 4
        if not trainer.strategy.broadcast(enough):
            return
        pace = (working - self._timed[1]) / (step - self._timed[0])  # seconds per step
        free = self.FILLED * (self.deadline - now)
        if self.pauses is not None and self.pauses.count:
            pause = self.pauses.seconds / self.pauses.count
            pace, free = pace + pause / self.pauses.every, free - pause  # the last is after the last step
        left = int(free / pace)
        self._plan(trainer, method, min(step + max(1, left), by_flops or sys.maxsize))

    def _plan(self, trainer: lightning.Trainer, method: Any, steps: int) -> None:
        """Fix the number of steps, on all ranks."""
        steps = max(method.batches_seen + 1, min(steps, self.most_steps or sys.maxsize))
        steps = max(self.every, steps // self.every * self.every)
        method.total_steps = trainer.strategy.broadcast(steps)
        method.facts = dataclasses.replace(method.facts, total_steps=method.total_steps)
        if trainer.is_global_zero:
            self.planned(method.facts)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, method: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop after the last step, or at the deadline."""
        pause = 0.0 if self.pauses is None else self.pauses.due(method.batches_seen)
        late = self.deadline is not None and trainer.strategy.broadcast(
            time.monotonic() + pause > self.deadline
        )
        spent = self.flops and self.cost is not None and self.cost.flops >= self.flops
        late = late or trainer.strategy.broadcast(bool(spent))
        whole = method.batches_seen % self.every == 0  # no gradient is left that a checkpoint would lose
        if (late and whole) or (method.total_steps is not None and method.batches_seen >= method.total_steps):
            trainer.should_stop = True


class Waiting(lightning.Callback):
    """`data/wait`: the share of the time in which training waited for a batch; stands before `Metrics`."""

    def on_train_batch_end(
        self, trainer: lightning.Trainer, method: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log it."""
        loader: Any = trainer.train_dataloader
        method.log("data/wait", loader.wait)


class Metrics(lightning.Callback):
    """`metrics.csv`: a row every so many steps of what the method logged.

    Args:
        path: The file; a resumed run drops the rows after its checkpoint and goes on.
        every: Steps between two rows.
    """

    def __init__(self, path: Path, every: int) -> None:
        self.path, self.every = path, every
        self.last: dict[str, float] = {}
        self._rows: list[dict[str, str]] = []
        self._columns: list[str] = []
        self._since = (0, 0.0)

    def on_train_start(self, trainer: lightning.Trainer, method: Any) -> None:
        """Take over the rows that the checkpoint covers."""
        self._since = method.batches_seen, time.monotonic()
        if trainer.is_global_zero and method.batches_seen and os.path.exists(self.path):
            with open(self.path, newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                self._rows = [row for row in reader if int(row["step"]) <= method.batches_seen]
            self._rewrite()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, method: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write a row when it is time."""
        step = method.batches_seen
        if step % self.every and step != method.total_steps:
            return
        now = time.monotonic()
        images = (step - self._since[0]) * method.facts.batch_size
        found = {name: float(value) for name, value in trainer.callback_metrics.items()}
        # a metric of labels is no number in a batch without any; a loss that is none is to be seen
        self.last = {name: value for name, value in found.items() if name == "loss" or not math.isnan(value)}
        pace = {
            "lr": f"{trainer.optimizers[0].param_groups[0]['lr']:.6g}",
            "images_per_second": f"{images / max(now - self._since[1], 1e-9):.1f}",
        }
        self._since = step, now
        if trainer.is_global_zero:
            self.add(method, self.last, pace)

    def add(self, method: Any, values: Mapping[str, float], pace: Mapping[str, str] | None = None) -> None:
        """Write values of the steps made so far: a row, or further columns of the row that is there."""
        step = method.batches_seen
        row = {
            "step": str(step),
            "epoch": f"{step / method.facts.steps_per_epoch:.3f}",
            **(pace or {}),
            **{name: f"{value:.6g}" for name, value in values.items()},
        }
        if self._rows and self._rows[-1]["step"] == row["step"]:
            self._rows[-1] |= row
            self._rewrite()
            return
        self._rows.append(row)
        if not set(row) <= set(self._columns):
            self._rewrite()
        else:
            with open(self.path, "a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self._columns).writerow(row)

    def _rewrite(self) -> None:
        self._columns = list(dict.fromkeys(name for row in self._rows for name in row))
        with open(self.path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(self._rows)


class ProgressLine(lightning.Callback):
    """Loss, images per second and time left, on stderr: a bar on a terminal, else a line every half minute."""

    LINE_SECONDS = 30.0

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bar = Bar(
            TextColumn("{task.fields[state]}"), BarColumn(), TimeRemainingColumn(), console=self._console
        )
        self._task: Any = None
        self._first = self._last = (0, 0.0)

    def on_train_start(self, trainer: lightning.Trainer, method: Any) -> None:
        """Show the bar."""
        self._first = self._last = method.batches_seen, time.monotonic()
        if trainer.is_global_zero and self._console.is_terminal:
            self._task = self._bar.add_task("", total=None, state="")
            self._bar.start()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, method: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Twice a second on a terminal."""
        now = time.monotonic()
        wait = 0.5 if self._task is not None else self.LINE_SECONDS
        if not trainer.is_global_zero or (now - self._last[1] < wait and not trainer.should_stop):
            return
        step, total = method.batches_seen, method.total_steps
        pace = (now - self._last[1]) / max(1, step - self._last[0])
        self._last = step, now
        loss = trainer.callback_metrics.get("loss", torch.tensor(float("nan")))
        state = f"step {step}/{total or '?'}  loss {float(loss):.4f}  {method.facts.batch_size / pace:.0f} images/s"
        if self._task is not None:
            self._bar.update(self._task, completed=step, total=total, state=state)
        else:
            left = "?" if total is None else f"{(total - step) * pace / 60:.1f}"
            self._console.print(f"{state}  {left} min left", highlight=False)

    def teardown(self, trainer: lightning.Trainer, method: Any, stage: str) -> None:
        """Leave the terminal as it was, also after an error."""
        self._bar.stop()
