"""UberNet: one trunk for tasks of low, middle and high level, of which an image may have labels for a few only.

Edges, color, a reconstruction, the turn of an image and any number of label columns share the features. Memory does
not grow with the tasks, and each task's head moves when it has seen enough labels of its own.

Source: UberNet: Training a Universal Convolutional Neural Network for Low-, Mid-, and High-Level Vision using Diverse
Datasets and Limited Memory (Kokkinos, CVPR 2017, arXiv 1609.02132), sections 3 (asynchronous updates) and 4 (memory).

Differences from the source:
- The feasible part: other tasks, made of the images themselves and of label columns, in place of seven dense ones with
  a data set each; no detection, no scales, and random weights to begin with in place of VGG's.
- Skip connections go to the edges and the color, fused by 1x1 convolutions to `hidden_dim` channels. The reconstruction
  has the pooled features alone, classes too: they are what is exported.
- Each image is shown in one form for all tasks, so that one pass of the trunk serves them: turned by its own quarter
  turns, and some of them gray. Color is a task of those alone, if they had any.
- GroupNorm: the statistics of one image do not mix data sets, and a trunk that is computed twice counts them once.
- Weights of tasks are 1 by default; the paper's effective batches (about 10 images) were told second hand. Ours are
  counted in images, and an update averages all that were counted, so that a batch need not divide them.
- The trunk is one checkpoint: nothing of it is held while heads are at work, and it is computed again for its one
  backward pass. The paper holds some activations.

Recipe, expected metrics, data, time and command: `embedkit.training.recipes.ubernet`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from embedkit.errors import ConfigError
from embedkit.training.augment import Augmentation, Compose, RandomHorizontalFlip, RandomResizedCrop
from embedkit.training.augment.operations import luma
from embedkit.training.config import Facts
from embedkit.training.data import Batch
from embedkit.training.data.targets import MISSING, accuracy, labeled_mean
from embedkit.training.distributed import mean_over_ranks, world
from embedkit.training.method import Method, float32_loss
from embedkit.training.models.backbones import Backbone, BackboneRequest
from embedkit.training.models.color import is_gray, lab_to_rgb, rgb_to_lab
from embedkit.training.models.heads import ConvDecoder

__all__ = ["FAMILY", "SUMMARY", "ClassHead", "Config", "DenseHead", "UberNet", "edge_strength", "task_values"]

#: The supervision that the method learns from.
FAMILY = "several tasks"
#: The sentence that the card of an entry shows.
SUMMARY = (
    "UberNet: one network serves several tasks at once, such as edges, color, reconstruction, "
    "rotation and labels. The shared trunk is exported."
)


#: Edges are told in units that make a first error of about 1, as a class's is.
_EDGE_UNIT = 5


@dataclass(frozen=True, kw_only=True)
class Config:
    """Of `ubernet`.

    Attributes:
        tasks: `edges`, `color`, `reconstruction`, `rotation`, `label` (the data's), and names of `data.targets`.
        weights: Of the tasks, in their order; 1 for all where none are given.
        gray_share: Share of images that are shown gray, whose color is to be told.
        hidden_dim: Channels of the fused maps.
        head_batch: Labeled images of its task after which a head moves.
        trunk_batch: Images after which the trunk moves.
        checkpointed: Whether the trunk is computed again for its backward pass.
        augment: Before the turn.
    """

    tasks: tuple[str, ...] = ("edges", "color", "reconstruction", "rotation", "label")
    weights: tuple[float, ...] = ()
    gray_share: float = 0.5
    hidden_dim: int = 32
    head_batch: int = 64
    trunk_batch: int = 64
    checkpointed: bool = True
    augment: Augmentation = Compose(steps=(RandomResizedCrop(scale=(0.4, 1.0)), RandomHorizontalFlip()))


def edge_strength(gray: Tensor) -> Tensor:
    """The length of Sobel's gradient, (N, 1, H, W) in [0, 1] -> the same shape; 1 for a step from black to white."""
    kernel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], device=gray.device) / 4
    kernels = torch.stack([kernel, kernel.mT])[:, None].to(gray.dtype)
    return F.conv2d(F.pad(gray, [1] * 4, mode="replicate"), kernels).norm(dim=1, keepdim=True)


@float32_loss
def task_values(predictions: Tensor, targets: Tensor) -> Tensor:
    """The loss of each image: cross-entropy of classes, the mean square of the error of maps.

    Args:
        predictions: Logits (N, K), or maps (N, C, h, w).
        targets: int64 (N,), -1 where there is none, or maps of the same shape.

    Returns:
        (N,); 0 for a class of -1. For logits that are equal, ln K.
    """
    if targets.dtype == torch.int64:
        return F.cross_entropy(predictions, targets, ignore_index=MISSING, reduction="none")
    return (predictions - targets).square().flatten(1).mean(1)


class DenseHead(nn.Module):
    """Maps of all stages -> a map of the first one's size: each by a 1x1 convolution, added, ReLU, 3x3."""

    def __init__(self, widths: Sequence[int], hidden: int, out_chans: int) -> None:
        super().__init__()
        self.fuse = nn.ModuleList(nn.Conv2d(width, hidden, 1) for width in widths)
        self.to_map = nn.Conv2d(hidden, out_chans, 3, padding=1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps (N, D_k, h_k, w_k) -> (N, out_chans, h_1, w_1)."""
        size = maps[0].shape[2:]
        fused = [
            F.interpolate(layer(one), size=size, mode="nearest")
            for layer, one in zip(self.fuse, maps, strict=True)
        ]
        return self.to_map(F.relu(torch.stack(fused).sum(0)))


class ClassHead(nn.Module):
    """The last map, pooled -> logits; all classes as likely to begin with."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.classify = nn.Linear(width, classes)
        nn.init.zeros_(self.classify.weight)
        nn.init.zeros_(self.classify.bias)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps -> (N, K)."""
        return self.classify(maps[-1].mean((2, 3)))


class _ImageHead(nn.Module):
    def __init__(self, width: int, hidden: int, channels: int, size: int) -> None:
        super().__init__()
        self.decode = ConvDecoder(
            width, out_chans=channels, image_size=size, width=max(4, hidden // 4), norm=False
        )

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.decode(maps[-1].mean((2, 3)))


class UberNet(Method):
    """The trunk (backbone), and a head for each task; exported is the trunk."""

    uses_labels = True
    streams = ("turns", "gray")
    inert = ("head_batch", "trunk_batch")

    counters: Tensor

    @classmethod
    def build_backbone(cls, request: BackboneRequest, config: Config, facts: Facts) -> nn.Module:
        """A network whose norm looks at one image."""
        return request(norm="group")

    def __init__(self, backbone: Backbone, config: Config, facts: Facts) -> None:
        super().__init__(backbone, config, facts)
        self.automatic_optimization = False
        channels, height, width = facts.image_shape
        classes = {"rotation": 4, "label": facts.num_classes, **facts.targets}
        known = ("edges", "color", "reconstruction", *classes)
        for task in config.tasks:
            if task not in known or classes.get(task, 2) < 2:
                raise ConfigError(
                    f"ubernet: task {task!r}: expected one of {', '.join(known)}, a column of two classes or more"
                )
        if not config.tasks or len(set(config.tasks)) < len(config.tasks):
            raise ConfigError(
                f"ubernet: expected tasks, each once; found {', '.join(config.tasks) or 'none'}"
            )
        if "color" in config.tasks and channels != 3:
            raise ConfigError("ubernet: one channel has no color to tell; leave the task color out")
        if height != width:
            raise ConfigError(f"ubernet: expected square images, which can be turned; found {height}x{width}")
        if config.weights and len(config.weights) != len(config.tasks):
            raise ConfigError(
                f"ubernet: expected {len(config.tasks)} weights, one a task; found {len(config.weights)}"
            )
        with torch.no_grad():
            example = backbone.eval().maps(torch.zeros(1, channels, height, width))
            backbone.train()
        widths = [one.shape[1] for one in example]
        self.map_size = example[0].shape[2:]
        self.heads = nn.ModuleDict()
        for task in config.tasks:
            if task in classes:
                self.heads[task] = ClassHead(backbone.dim, classes[task])
            elif task == "reconstruction":
                self.heads[task] = _ImageHead(backbone.dim, config.hidden_dim, channels, height)
            else:
                self.heads[task] = DenseHead(widths, config.hidden_dim, 2 if task == "color" else 1)
        self.weights = dict(zip(config.tasks, config.weights or (1.0,) * len(config.tasks), strict=True))
        # sums of gradients and counts of images since each network last moved; in the checkpoint, since a kill comes
        # between two updates
        self.register_buffer("counters", torch.zeros(1 + len(config.tasks)))
        for index, modules in enumerate(self.networks().values()):
            size = sum(p.numel() for module in modules for p in module.parameters())
            self.register_buffer(f"gradient_{index}", torch.zeros(size))

    def networks(self) -> dict[str, Sequence[nn.Module]]:
        """The trunk, and each task's head."""
        return {"trunk": (self.backbone,), **{task: (head,) for task, head in self.heads.items()}}

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """The joint loss: sum_t w_t 1/N sum_i d_ti l_t(i), d_ti = 1 where image i has a label of task t.

        A run takes its gradient task by task (`accumulate`); here it stands as a whole.
        """
        x, targets = self._prepare(batch, self.config.augment, generator)
        maps = self._trunk(x)
        loss, outputs = x.new_zeros(()), {}
        for task, head in self.heads.items():
            target, labels = targets[task]
            values = task_values(head(maps), target).masked_fill(labels == MISSING, 0.0)
            loss = loss + self.weights[task] * values.mean()
            outputs[f"{task}_loss"] = labeled_mean(values, labels)
        return {"loss": loss, **outputs}

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Add up the batch's gradients, then move the networks that have seen enough."""
        self.log_dict(self.accumulate(batch, self.generator()))
        self.update()

    def accumulate(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Add the gradients of one batch, summed over images, to those that wait.

        One forward pass of the trunk; then head by head, forward and backward to the maps, whose gradients add up in
        one place; then one backward pass of the trunk. No two heads are held at once.
        """
        x, targets = self._prepare(batch, self.config.augment, generator)
        maps = self._trunk(x)
        leaves = [one.detach().requires_grad_() for one in maps]
        toward_maps: list[Tensor | None] = [None] * len(maps)
        loss, outputs = x.new_zeros(()), {}
        seen = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for index, (task, head) in enumerate(self.heads.items(), start=1):
            target, labels = targets[task]
            known = labels != MISSING
            # views: counting a step's operations looks at what modules are given, and takes no leaf with a gradient
            values = task_values(head([leaf.view_as(leaf) for leaf in leaves]), target)
            values = values.masked_fill(~known, 0.0)
            total = self.weights[task] * values.sum()
            own = list(head.parameters())
            found = torch.autograd.grad(total, [*own, *leaves], allow_unused=True)
            self._add(index, own, found[: len(own)], known.sum())
            for place, gradient in enumerate(found[len(own) :]):
                if gradient is not None:
                    before = toward_maps[place]
                    toward_maps[place] = gradient if before is None else before.add_(gradient)
            seen |= known
            loss += total.detach() / len(x)
            outputs[f"{task}_loss"] = labeled_mean(values.detach(), labels)
            del values, total, found  # this head's graph is freed before the next one's is built
        own = list(self.backbone.parameters())
        reached = [k for k, gradient in enumerate(toward_maps) if gradient is not None]
        found = torch.autograd.grad(
            [maps[k] for k in reached], own, [toward_maps[k] for k in reached], allow_unused=True
        )
        self._add(0, own, found, seen.sum())
        return {"loss": loss, **outputs}

    @torch.no_grad()
    def update(self) -> None:
        """Move each network whose counter has reached its effective batch, by the mean over the images counted.

        The others stay as they are, bit by bit: no weight decay, no momentum.
        """
        optimizers = cast(Any, self.optimizers())
        for index, (name, modules) in enumerate(self.networks().items()):
            count = self.counters[index]
            if float(count) * world() < (self.config.head_batch if index else self.config.trunk_batch):
                continue
            waiting = self.get_buffer(f"gradient_{index}")
            parameters = [p for module in modules for p in module.parameters()]
            for p, part in zip(parameters, waiting.split([p.numel() for p in parameters]), strict=True):
                p.grad = (part / count).view_as(p)
            limit = self.optimizer_of(name).clip_norm
            if limit:
                nn.utils.clip_grad_norm_(parameters, limit)
            optimizers[index].step()
            optimizers[index].zero_grad()
            waiting.zero_()
            count.zero_()

    def pretext_metric(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """`<task>_accuracy` of classes; `<task>_unexplained` of maps: squared error over that of their mean.

        By chance the share of the most frequent class, and 1.
        """
        x, targets = self._prepare(batch, None, generator)
        maps, found = self.backbone.maps(x), {}
        for task, head in self.heads.items():
            target, labels = targets[task]
            told = head(maps).float()
            if target.dtype == torch.int64:
                found[f"{task}_accuracy"] = accuracy(told, target)
                known = target[target != MISSING]
                frequent = torch.bincount(known, minlength=1).max() / max(1, len(known))
                found[f"{task}_accuracy_by_chance"] = frequent
                continue
            spread = task_values(target.mean((0, 2, 3), keepdim=True).expand_as(target), target)
            error = labeled_mean(task_values(told, target), labels)
            found[f"{task}_unexplained"] = error / labeled_mean(spread, labels)
        return found

    def pretext_chance(self) -> dict[str, float]:
        """The mean of each map."""
        return {f"{task}_unexplained": 1.0 for task in self.heads}

    def solved(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Images as they are shown, some turned and gray, and the maps and images that the heads make of them."""
        x, targets = self._prepare(batch, None, generator)
        maps = self.backbone.maps(x)
        shown = self.denormalize(x)
        found = {"shown": shown}
        if "edges" in self.heads:
            found["predicted edges"] = (self.heads["edges"](maps).float() / _EDGE_UNIT).clamp(0, 1)
            found["edges"] = targets["edges"][0] / _EDGE_UNIT
        if "color" in self.heads:
            ab = F.interpolate(50 * self.heads["color"](maps).float(), shown.shape[2:], mode="bilinear")
            found["predicted color"] = lab_to_rgb(torch.cat([rgb_to_lab(shown)[:, :1], ab], 1)).clamp(0, 1)
        if "reconstruction" in self.heads:
            found["reconstructed"] = self.denormalize(self.heads["reconstruction"](maps))
        return found

    def _trunk(self, x: Tensor) -> list[Tensor]:
        if self.config.checkpointed and self.training:
            return cast(list[Tensor], checkpoint(self.backbone.maps, x, use_reentrant=False))
        return self.backbone.maps(x)

    @torch.no_grad()
    def _add(self, index: int, own: list[Tensor], found: Sequence[Tensor | None], count: Tensor) -> None:
        """Add gradients (None is zero) and a count to what waits; with several ranks, their means."""
        parts = [torch.zeros_like(p) if g is None else g for p, g in zip(own, found, strict=True)]
        flat = torch.cat([part.reshape(-1) for part in parts])
        self.get_buffer(f"gradient_{index}").add_(mean_over_ranks(flat))
        self.counters[index] += mean_over_ranks(count.to(self.counters.dtype))

    @torch.no_grad()
    def _prepare(
        self, batch: Batch, augment: Augmentation | None, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """The images as they are shown, normalized, and of each task the targets and labels (N,), -1 where none is."""
        with torch.autocast(self.device.type, enabled=False):
            pixels = self.pixels(batch.images, augment, generator)
            draws = self.generator("turns")
            turns = torch.randint(4, (len(pixels),), generator=draws, device=draws.device)
            turned = torch.stack([torch.rot90(pixels, k, (2, 3)) for k in range(4)])  # (4, N, C, H, W)
            pixels = turned[turns, torch.arange(len(turns), device=turns.device)]
            every = torch.zeros_like(turns)
            shown, targets = pixels, {"rotation": (turns, turns), "label": (batch.labels, batch.labels)}
            targets |= {name: (labels, labels) for name, labels in batch.targets.items()}
            if "color" in self.heads:
                draws = self.generator("gray")
                gray = torch.rand(len(turns), generator=draws, device=draws.device) < self.config.gray_share
                shown = torch.where(gray[:, None, None, None], luma(pixels), pixels)
                lab = rgb_to_lab(pixels)
                labels = torch.where(gray & ~is_gray(lab), every, MISSING)
                targets["color"] = (F.adaptive_avg_pool2d(lab[:, 1:] / 50, self.map_size), labels)
            x = self.normalize(shown)
            edges = F.adaptive_avg_pool2d(edge_strength(luma(pixels)), self.map_size)
            targets["edges"] = (_EDGE_UNIT * edges, every)
            targets["reconstruction"] = (x, every)
        return x, targets
