"""Evaluates while training, keeps the best weights, and ends a run that stopped improving.

Evaluated is what the steps before a batch came to, for the reason that `callbacks` gives for checkpoints.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning

from embedkit.training.callbacks import Checkpoint, Metrics, write_checkpoint
from embedkit.training.config import Evaluation
from embedkit.training.evaluation.online import HeldOut

__all__ = ["Best"]


class Best(lightning.Callback):
    """Evaluate every so many steps; keep the weights of the best evaluation; stop when none was better for long.

    Its state stands in the checkpoint, so that a resumed run makes the choices of an uninterrupted one.

    Args:
        settings: Of the run.
        images: What is evaluated on.
        path: Where the best weights are kept.
        metrics: Gets a row of each evaluation.
        last: The last checkpoint, which must know of the weights that are kept.
        say: Told each evaluation in a sentence.
        reopened: Whether the run was lengthened, so that it goes on although it had stopped.
    """

    _STATE = ("best", "best_step", "evaluated", "without_better", "stopped")

    def __init__(
        self,
        settings: Evaluation,
        images: HeldOut,
        path: Path,
        metrics: Metrics,
        last: Checkpoint,
        *,
        say: Callable[[str], None] = lambda sentence: None,
        reopened: bool = False,
    ) -> None:
        self.settings, self.images, self.path = settings, images, path
        self.metrics, self.last, self.say, self.reopened = metrics, last, say, reopened
        self.best: float | None = None
        self.best_step = self.evaluated = -1
        self.without_better, self.stopped = 0, False
        #: Seconds that evaluations took in this process, and how many there were.
        self.seconds, self.count = 0.0, 0

    @property
    def every(self) -> int:
        """Steps between two evaluations."""
        return self.settings.every

    def on_train_start(self, trainer: lightning.Trainer, method: Any) -> None:
        """A run that had stopped stays so, unless it was lengthened."""
        if self.reopened:
            self.without_better, self.stopped = 0, False
        if self.stopped:
            trainer.should_stop = True

    def on_train_batch_start(
        self, trainer: lightning.Trainer, method: Any, batch: Any, batch_idx: int
    ) -> None:
        """Evaluate when it is time."""
        if method.batches_seen % self.every == 0 and method.batches_seen != self.evaluated:
            self.evaluate(trainer, method)
            self.stopped = 0 < self.settings.patience <= self.without_better
            if self.stopped:  # the batch that begins here is still trained on
                self.say(
                    f"stopped: no better {self.images.metric} in {self.without_better} evaluations since step "
                    f"{self.best_step}"
                )
                trainer.should_stop = True

    def on_train_end(self, trainer: lightning.Trainer, method: Any) -> None:
        """Evaluate what all steps came to; a run with steps left will do that when it has made them."""
        over = method.total_steps is None or method.batches_seen >= method.total_steps
        if over and not self.stopped and method.batches_seen != self.evaluated:
            self.evaluate(trainer, method)

    def evaluate(self, trainer: lightning.Trainer, method: Any) -> None:
        """Evaluate now, on the first rank, and keep the weights if they are the best so far."""
        started, step = time.monotonic(), method.batches_seen
        found: dict[str, float] = {}
        if trainer.is_global_zero:
            with trainer.precision_plugin.forward_context():
                found = self.images.evaluate(method)
        found = trainer.strategy.broadcast(found)
        value = found[self.images.metric]
        better = not math.isnan(value) and (self.best is None or value > self.best)
        self.evaluated = step
        if better:
            self.best, self.best_step, self.without_better = value, step, 0
        else:
            self.without_better += 1
        row = {f"validation_{name}": score for name, score in found.items()}
        if trainer.is_global_zero:
            self.metrics.add(method, row)
        for logger in trainer.loggers:
            logger.log_metrics(row, step=step)
        scores = ", ".join(f"{name} {score:.4f}" for name, score in found.items())
        self.say(f"step {step}: {scores}{' (best)' if better else ''}")
        if better:
            write_checkpoint(trainer, self.path, weights_only=True)
            if method.total_steps is not None and step:
                self.last.save(trainer)
        self.seconds, self.count = self.seconds + time.monotonic() - started, self.count + 1

    def due(self, step: int) -> float:
        """Seconds that the evaluation before batch `step` will take; 0 where none is due."""
        return self.seconds / self.count if self.count and step % self.every == 0 else 0.0

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {name: getattr(self, name) for name in self._STATE}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From the checkpoint."""
        for name, value in state_dict.items():
            setattr(self, name, value)
