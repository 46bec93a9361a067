"""The base of all methods: a LightningModule with backbones, a batch counter, optimizers by name and stages.

A method's randomness is a function of (seed, rank, `batches_seen`), where the counter is ours and stands in
the checkpoint: Lightning's `global_step` counts optimizer steps, of which a GAN takes two a batch. To
Lightning the whole run is one epoch; an epoch of the data is `facts.steps_per_epoch` batches of ours.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any, ClassVar

import lightning
import torch
from torch import Tensor, nn

from embedkit.model.preprocess import Preprocess
from embedkit.training.augment import Augmentation
from embedkit.training.augment.operations import resized
from embedkit.training.config import Facts
from embedkit.training.data import Batch
from embedkit.training.distributed import mean_over_ranks, rank
from embedkit.training.models.backbones import BackboneRequest
from embedkit.training.optim import Optimizer
from embedkit.training.stages import Plan, Stage, stage_at

__all__ = ["Facts", "Method", "float32_loss"]


class Method(lightning.LightningModule):
    """What every method is made of.

    A method defines `loss`; with several networks `automatic_optimization = False`, `networks` and `training_step`.
    It may define `build_backbone`, `plan`, `encoder`, `pretext_metric`, `pretext_chance`,
    `solved` and `files`.

    The class attributes are claims, to which one contract test holds every method.

    Attributes:
        uses_labels: Whether `batch.labels` or `batch.targets` may change the loss.
        streams: Purposes of `generator` that change the loss beside the augmentations: a draw, masks, a prior.
        stops_gradient: Whether part of the loss is held constant by design, so that the gradient is not the loss's.
        overfits: Whether the loss falls on one batch seen again and again; not so for an adversary's.
        compares_images: Whether the loss compares the images of a batch with each other, so that the mean over two
            batches is not the loss of both together.
        takes_weights: Whether the backbone may start from `RunConfig.init`; not one of an adversarial pair.
        inert: Numbers of the Config that change neither loss nor network in the recipe: of another form, or of a rate.
        backbone: In channels-last memory.
        config: The method's own `Config`.
        facts: What the run tells.
        total_steps: Batches of the run; None while a budget is still being measured.
        batches_seen: Batches begun; within a step it counts that step's batch.
    """

    uses_labels: ClassVar[bool] = False
    streams: tuple[str, ...] = ()
    stops_gradient: ClassVar[bool] = False
    overfits: ClassVar[bool] = True
    compares_images: ClassVar[bool] = False
    takes_weights: ClassVar[bool] = True
    inert: ClassVar[tuple[str, ...]] = ()

    mean: Tensor  # (1, C, 1, 1)
    std: Tensor

    def __init__(self, backbone: nn.Module, config: Any, facts: Facts) -> None:
        super().__init__()
        # Convolutions on (N, H, W, C) memory: 5.7 times the steps of the default on a CPU (r10, 28 px).
        self.backbone: Any = backbone.to(memory_format=torch.channels_last)
        self.config, self.facts = config, facts
        self.total_steps, self.batches_seen = facts.total_steps, 0
        self.entered: tuple[str, int] = ("", -1)
        for name in ("mean", "std"):
            values = torch.tensor(getattr(facts, name)).reshape(1, -1, 1, 1)
            self.register_buffer(name, values, persistent=False)

    @classmethod
    def build_backbone(cls, request: BackboneRequest, config: Any, facts: Facts) -> nn.Module:
        """The backbone that `__init__` gets: by default one for the data's channels and size.

        A method that sees tiles asks for `request(image_size=config.tile, norm="layer")`; one with several backbones
        returns them in an `nn.ModuleList` or a module of its own.
        """
        return request()

    @classmethod
    def contract(cls, config: Any) -> Preprocess | None:
        """The preprocess contract of an encoder that the method is given, which the run then takes over; else None."""
        return None

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """`loss`, a scalar that carries gradient, and whatever else is to be logged."""
        raise NotImplementedError

    def encoder(self) -> nn.Module:
        """What is exported: normalized images (N, C, H, W) -> embedding (N, D)."""
        return self.backbone

    def class_head(self) -> nn.Module | None:
        """The classifier on what `encoder` gives, (N, D) -> logits (N, K) of the data's classes; None without one."""
        return None

    def files(self) -> dict[str, bytes]:
        """What an entry of the encoder holds beside it, by file name: a mixture that was fitted to its embeddings."""
        return {}

    def pretext_metric(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """How well the pretext task is solved on held-out images, by name; {} where none is meant."""
        return {}

    def pretext_chance(self) -> dict[str, float]:
        """The values of `pretext_metric` for a network that has learned nothing, by the same names.

        Those that hang on the images stand among the metrics themselves, as `<name>_by_chance`.
        """
        return {}

    def solved(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """The pretext task on held-out images for people to look at: what is given, predicted and true.

        Called in eval mode, without gradient.

        Returns:
            Panels by title, of the batch's N images each: images (N, C, h, w), C of 1 or 3, or tiles (N, T, C, h, w) of
            a square grid, all in [0, 1]; {} where there is nothing to look at.
        """
        return {}

    def networks(self) -> dict[str, Sequence[nn.Module]]:
        """What is optimized apart, by name: each has an optimizer of its own, `RunConfig.optimizers[name]` if given."""
        return {"all": (self,)}

    def plan(self) -> Plan:
        """The stages of the run and their steps (see `stages.share_steps`); one stage by default."""
        return [("", self.total_steps)]

    def begin_stage(self, stage: Stage) -> None:
        """Called at the first batch of each stage, and once in a run that is killed and resumed."""

    def begin_epoch(self, epoch: int) -> None:
        """Called before each pass over the data, counted from 0."""

    @property
    def progress(self) -> float:
        """The share of the run that is done, in [0, 1]; 0 while its length is not known."""
        return self.batches_seen / self.total_steps if self.total_steps else 0.0

    @property
    def stage(self) -> Stage:
        """Of the batch that is being seen."""
        return stage_at(max(0, self.batches_seen - 1), self.plan())

    def kind_of(self, step: int) -> str:
        """Which kind of step `step` is, from 0: the name of its stage; the cost of each kind is counted apart."""
        return stage_at(step, self.plan()).name

    def generator(self, purpose: str = "views") -> torch.Generator:
        """Randomness of this batch and rank on the method's device; every `purpose` has a stream of its own."""
        return torch.Generator(self.device).manual_seed(self._seed(purpose))

    def view(
        self, images: Tensor, augment: Augmentation | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Images uint8 (N, C, H, W) -> [0, 1] -> through `augment` -> normalized float32, channels last."""
        return self.normalize(self.pixels(images, augment, generator))

    def pixels(
        self, images: Tensor, augment: Augmentation | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Images uint8 (N, C, H, W) -> [0, 1] -> through `augment`: a `view` before it is normalized.

        Images that are stored larger than the run's (`data.load_size`) come out at the run's size: the first crop of
        `augment` is cut out of the larger image; where `augment` crops nothing, it gets the whole image at that size.
        """
        # outside autocast: a crop is a product of matrices, and pixels need more than bfloat16's 8 bits
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            x = images.float().div_(255)
            size = (self.facts.image_shape[1], self.facts.image_shape[2])
            if x.shape[2] > size[0] or x.shape[3] > size[1]:
                cut = None if augment is None else augment.cut_to(size)
                x, augment = (resized(x, size), augment) if cut is None else (x, cut)
            return x if augment is None else augment(x, generator or self.generator())

    def normalize(self, pixels: Tensor) -> Tensor:
        """Pixels (N, C, H, W) in [0, 1] -> what the exported encoder is given, channels last."""
        return ((pixels - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def denormalize(self, x: Tensor) -> Tensor:
        """The inverse of `normalize`: (N, C, H, W) -> pixels within [0, 1]."""
        return (x.float() * self.std + self.mean).clamp(0, 1)

    def optimizer_of(self, name: str) -> Optimizer:
        """The settings of a network's optimizer: its own in the run's configuration, or the run's."""
        return self.facts.optimizers.get(name, self.facts.optimizer)

    def configure_optimizers(self) -> Any:
        """One optimizer for each of `networks`, over what is trainable in it."""
        found = [self.optimizer_of(name).create(*modules) for name, modules in self.networks().items()]
        return found[0] if len(found) == 1 else found

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """The loss of one batch."""
        outputs = self.loss(batch, self.generator())
        self.log_dict({name: value.detach() for name, value in outputs.items()})
        return outputs["loss"]

    def step(self, losses: Mapping[str, Tensor]) -> None:
        """With manual optimization: a step of each named network, by the gradient of its own loss and of no other.

        All gradients are taken before any network moves; networks that are not named stay. With several ranks the
        gradients are meaned over them.

        Args:
            losses: Scalars by name of `networks`. They may share a graph.
        """
        networks, optimizers = self.networks(), self.optimizers()
        by_name = dict(
            zip(networks, optimizers if isinstance(optimizers, list) else [optimizers], strict=True)
        )
        parameters = {
            name: list(dict.fromkeys(p for m in networks[name] for p in m.parameters() if p.requires_grad))
            for name in losses
        }
        for index, (name, loss) in enumerate(losses.items()):
            shared = index < len(losses) - 1
            found = torch.autograd.grad(loss, parameters[name], retain_graph=shared, allow_unused=True)
            for parameter, gradient in zip(parameters[name], found, strict=True):
                parameter.grad = None if gradient is None else mean_over_ranks(gradient)
        for name in losses:
            if self.optimizer_of(name).clip_norm:
                nn.utils.clip_grad_norm_(parameters[name], self.optimizer_of(name).clip_norm)
            by_name[name].step()
            by_name[name].zero_grad()

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        """With automatic optimization: no longer than the optimizer's `clip_norm`."""
        limit = self.optimizer_of(next(iter(self.networks()))).clip_norm
        if limit:
            scaler = getattr(self.trainer.precision_plugin, "scaler", None)
            # a fused optimizer is left to divide fp16's scale out by itself, which would be after the clipping
            if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
                scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], limit)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Count the batch, seed torch's own generator (dropout), set learning rates, begin epochs and stages."""
        step = self.batches_seen
        self.batches_seen += 1
        torch.manual_seed(self._seed("torch"))
        stage = self.stage
        for name, optimizer in zip_longest(self.networks(), self.trainer.optimizers, fillvalue=""):
            if optimizer:
                self.optimizer_of(str(name)).set_lr(optimizer, stage.step, stage.length)
        if step % self.facts.steps_per_epoch == 0:
            self.begin_epoch(step // self.facts.steps_per_epoch)
        if self.entered != stage[:2]:
            self.entered = stage[:2]
            self.begin_stage(stage)

    def get_extra_state(self) -> dict[str, Any]:
        """The batch counter and the stage, for the checkpoint."""
        return {"batches_seen": self.batches_seen, "entered": list(self.entered)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """And from it."""
        self.batches_seen = state["batches_seen"]
        self.entered = (state["entered"][0], state["entered"][1])

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
