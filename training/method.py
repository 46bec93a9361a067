"""The base of all methods: a LightningModule with a backbone, a batch counter and a learning rate.

A method's randomness is a function of (seed, rank, `batches_seen`), where the counter is ours and stands in
the checkpoint: Lightning's `global_step` counts optimizer steps, of which a GAN takes two a batch. To
Lightning the whole run is one epoch; an epoch of the data is `facts.steps_per_epoch` batches of ours.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from embedkit.training.augment import View
from embedkit.training.config import Facts
from embedkit.training.data.images import Batch
from embedkit.training.distributed import rank
from embedkit.training.models.backbones import Backbone

__all__ = ["Facts", "Method", "float32_loss"]


class Method(lightning.LightningModule):
    """What every method is made of.

    A method defines `loss`, or, with several optimizers, `automatic_optimization = False`, `configure_optimizers` and
    `training_step`. Both may define `encoder` and `pretext_metric`.

    Attributes:
        backbone: In channels-last memory.
        config: The method's own `Config`.
        facts: What the run tells.
        total_steps: Batches of the run; None while a time budget is still being measured.
        batches_seen: Batches begun; within a step it counts that step's batch.
    """

    mean: Tensor  # (1, C, 1, 1)
    std: Tensor

    def __init__(self, backbone: Backbone, config: Any, facts: Facts) -> None:
        super().__init__()
        # Convolutions on (N, H, W, C) memory: 5.7 times the steps of the default on a CPU (r10, 28 px).
        self.backbone = backbone.to(memory_format=torch.channels_last)
        self.config, self.facts = config, facts
        self.total_steps, self.batches_seen = facts.total_steps, 0
        for name in ("mean", "std"):
            values = torch.tensor(getattr(facts, name)).reshape(1, -1, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """`loss`, a scalar that carries gradient, and whatever else is to be logged."""
        raise NotImplementedError

    def encoder(self) -> nn.Module:
        """What is exported: normalised pictures (N, C, H, W) -> embedding (N, D)."""
        return self.backbone

    def files(self) -> dict[str, bytes]:
        """What an entry of the encoder holds beside it, by file name: a mixture that was fitted to its embeddings."""
        return {}

    def pretext_metric(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """How well the pretext task is solved on held-out pictures, by name; {} where none is meant."""
        return {}

    def kind_of(self, step: int) -> str:
        """Which kind of step `step` is, from 0; the cost of each kind is counted apart."""
        return ""

    def begin_epoch(self, epoch: int) -> None:
        """Called before each pass over the data, counted from 0."""

    @property
    def progress(self) -> float:
        """The share of the run that is done, in [0, 1]; 0 while its length is not known."""
        return self.batches_seen / self.total_steps if self.total_steps else 0.0

    def generator(self, purpose: str = "views") -> torch.Generator:
        """Randomness of this batch and rank on the method's device; every `purpose` has a stream of its own."""
        return torch.Generator(self.device).manual_seed(self._seed(purpose))

    def view(
        self, images: Tensor, views: View | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Pictures uint8 (N, C, H, W) -> [0, 1] -> through `views` -> normalised float32, channels last."""
        # outside autocast: a crop is a product of matrices, and pixels need more than bfloat16's 8 bits
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            x = images.float().div_(255)
            if views is not None:
                x = views(x, generator or self.generator())
            return ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def configure_optimizers(self) -> Any:
        """One optimizer over everything that is trainable."""
        return self.facts.optimizer.create(self)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of one batch."""
        outputs = self.loss(batch, self.generator())
        self.log_dict({name: value.detach() for name, value in outputs.items()})
        return outputs["loss"]

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Count the batch, seed torch's own generator (dropout) and set the learning rate."""
        step = self.batches_seen
        self.batches_seen += 1
        torch.manual_seed(self._seed("torch"))
        for optimizer in self.trainer.optimizers:
            self.facts.optimizer.set_lr(optimizer, step, self.total_steps)
        if step % self.facts.steps_per_epoch == 0:
            self.begin_epoch(step // self.facts.steps_per_epoch)

    def get_extra_state(self) -> dict[str, int]:
        """The batch counter, for the checkpoint."""
        return {"batches_seen": self.batches_seen}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """And from it."""
        self.batches_seen = state["batches_seen"]

    def _seed(self, purpose: str) -> int:
        key = f"{self.facts.seed}/{rank()}/{self.batches_seen}/{purpose}".encode()
        return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big", signed=True)


def float32_loss(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorate a pure loss: outside autocast, its half-precision tensors in float32.

    Under bfloat16 autocast even a product of float32 matrices has 8 bits, too few for logits over a temperature.
    """

    @functools.wraps(loss)
    def wrapped(*args: Any, **kwargs: Any) -> Tensor:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        with torch.autocast(tensors[0].device.type, enabled=False):
            return loss(*map(_widen, args), **{name: _widen(value) for name, value in kwargs.items()})

    return wrapped


def _widen(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if half else value
