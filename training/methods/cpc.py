"""CPC: from the upper rows of an image's patches the network tells the rows below them from all other patches.

Each patch is encoded alone. What helps to recognize patches further down is what the parts of one image share, and not
their pixels.

Sources: Representation Learning with Contrastive Predictive Coding (van den Oord, Li and Vinyals, 2018, arXiv
1807.03748), equation 4 and section 3.3 (v1); Data-Efficient Image Recognition with Contrastive Predictive Coding
(Henaff et al., ICML 2020, arXiv 1905.09272), sections 2 and 4.1, and the pseudo-code of its appendix (v2).

Differences from the source:
- Images of 64 pixels, patches of 16 every 8: 7x7, as in the code of Greedy InfoMax (Loewe et al., 2019), whose
  figures on small images are the nearest to compare with. r10 in place of the first three stages of a deep ResNet.
- Which rows are predicted follows from the patches: those that share no pixel with the context, and `steps` of them.
  The pseudo-code counts the rows that are skipped; v1 says nothing of it.
- One context network for both versions, v2's: residual blocks of 1x1, 1x3, 2x1 (padded above) and 1x1 convolutions. In
  a row it sees all columns, which v1's PixelCNN does not; the rows that are predicted are hidden from both.
- Both predict targets of `target_dim` values, as in v2; v1 has z itself. Each offset of rows has its own prediction.
- Negatives are all patches of the batch, of the same image and of all ranks, as in the pseudo-code.
- v2's policy of augmentations was found on ImageNet; ours are flips, color jitter and the color dropping. There the
  patch keeps one of its three channels; we write it into all three, so that the patch stays within the images' range.
  One channel is kept as it is.
- AdamW; the authors have Adam without decay.

Recipe, expected metrics, data, time and command: `embedkit.training.recipes.cpc`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from embedkit.errors import ConfigError
from embedkit.training.augment import Augmentation, ColorJitter, Compose, RandomHorizontalFlip
from embedkit.training.config import Facts
from embedkit.training.data import Batch
from embedkit.training.distributed import gather, rank
from embedkit.training.method import Method, float32_loss
from embedkit.training.models.backbones import Backbone, BackboneRequest
from embedkit.training.models.tiles import overlapping_patches

__all__ = ["CPC", "FAMILY", "SUMMARY", "Config", "Context", "KeepOneChannel", "PatchMean", "info_nce"]

#: The supervision that the method learns from.
FAMILY = "a pretext task"
#: The sentence that the card of an entry shows.
SUMMARY = (
    "CPC: from the upper rows of an image's patches the network picks the patches of the rows below "
    "among all others. The mean of the patch features is exported."
)


@dataclass(frozen=True, kw_only=True)
class KeepOneChannel(Augmentation):
    """One of three channels in the place of all, with probability `p`: the color dropping of CPC v2."""

    p: float = 0.5

    def __post_init__(self) -> None:
        self._need_chance()

    def draw(self, n: int, generator: Generator) -> dict[str, Tensor]:
        """Which patches, and which channel."""
        uniform = torch.rand(2, n, generator=generator, device=generator.device)
        return {"chosen": uniform[0] < self.p, "channel": uniform[1]}

    def apply(self, x: Tensor, parameters: Any) -> Tensor:
        """Keep one."""
        channel = (parameters["channel"] * x.shape[1]).long().clamp(max=x.shape[1] - 1).to(x.device)
        kept = x[torch.arange(len(x), device=x.device), channel][:, None].expand_as(x)
        return torch.where(parameters["chosen"].to(x.device)[:, None, None, None], kept, x)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Of `cpc`.

    Attributes:
        patch: Side of a patch in pixels.
        stride: Pixels from one patch to the next; half a patch in the source.
        steps: Rows that are predicted, from the first that shares no pixel with the context.
        directions: 1: downwards (v1); 2: also upwards; 4: also to the right and left (v2).
        norm: Of the patch encoder: `layer` (v2) or `none` (v1). BatchNorm would tell which patches are one batch.
        hidden_dim: Width of the context network's blocks.
        blocks: Of the context network; each sees one row more.
        target_dim: Width of what is predicted.
        scale: Of the predictions; v2's 0.1 keeps the first logits small.
        augment: Of the whole image.
        patch_augment: Of every patch on its own.
    """

    patch: int = 16
    stride: int = 8
    steps: int = 4
    directions: Literal[1, 2, 4] = 4
    norm: Literal["layer", "none"] = "layer"
    hidden_dim: int = 256
    blocks: int = 5
    target_dim: int = 64
    scale: float = 0.1
    augment: Augmentation = RandomHorizontalFlip()
    patch_augment: Augmentation = Compose(
        steps=(
            ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.05, p=0.8),
            KeepOneChannel(p=0.25),
        )
    )


@float32_loss
def info_nce(predictions: Tensor, targets: Tensor, positives: Tensor) -> Tensor:
    """InfoNCE (equation 4): -mean_m log( exp(p_m . t_pos(m)) / sum_l exp(p_m . t_l) ).

    log L minus the loss is a lower bound of the information between context and target.

    Args:
        predictions: (M, D).
        targets: (L, D), the positives and negatives of all.
        positives: int64 (M,), the row of each prediction's target.

    Returns:
        A scalar, in nats; log L for equal logits.
    """
    return F.cross_entropy(predictions @ targets.T, positives)


class Context(nn.Module):
    """A grid of features -> a grid of contexts: c_ij sees the rows 0 to i alone, exactly.

    Args:
        dim: Width of the features.
        hidden: Width within a block.
        blocks: Each sees one row above and one column to either side.
    """

    def __init__(self, dim: int, hidden: int, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(dim, hidden, 1),
                nn.ReLU(),
                nn.Conv2d(hidden, hidden, (1, 3), padding=(0, 1)),
                nn.ZeroPad2d((0, 0, 1, 0)),  # a row above: the 2x1 sees its own row and the one before
                nn.Conv2d(hidden, hidden, (2, 1)),
                nn.ReLU(),
                nn.Conv2d(hidden, dim, 1),
            )
            for _ in range(blocks)
        )

    def forward(self, z: Tensor) -> Tensor:
        """(N, D, rows, columns) -> the same shape."""
        for block in self.blocks:
            z = z + block(z)
        return F.relu(z)


class PatchMean(nn.Module):
    """Images -> the mean over the grid of the features of their patches.

    Args:
        backbone: Patches (N, C, p, p) -> (N, D).
        patch: Side of a patch in pixels.
        stride: Pixels from one patch to the next.
    """

    def __init__(self, backbone: Backbone, patch: int, stride: int) -> None:
        super().__init__()
        self.backbone, self.patch, self.stride = backbone, patch, stride

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W), normalized -> (N, D)."""
        patches = overlapping_patches(x, self.patch, self.stride)  # (N, rows, columns, C, p, p)
        rows, columns = patches.shape[1:3]
        return self.backbone(patches.flatten(0, 2)).unflatten(0, (-1, rows * columns)).mean(1)


class CPC(Method):
    """Patch encoder, a context network and predictions for each direction; exported is the mean of the patches' z."""

    streams = ("patches",)
    compares_images = True

    @classmethod
    def build_backbone(cls, request: BackboneRequest, config: Config, facts: Facts) -> nn.Module:
        """A network for one patch, without BatchNorm."""
        return request(image_size=config.patch, norm=config.norm)

    def __init__(self, backbone: Backbone, config: Config, facts: Facts) -> None:
        super().__init__(backbone, config, facts)
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in backbone.modules()):
            raise ConfigError(
                "cpc: BatchNorm would tell which patches stand in one batch; expected norm layer or none"
            )
        if config.directions not in (1, 2, 4):
            raise ConfigError(f"cpc: expected 1, 2 or 4 directions, found {config.directions}")
        sides = [(side - config.patch) // config.stride + 1 for side in facts.image_shape[1:]]
        #: Rows between a context and the first target that shares no pixel with it.
        self.first = math.ceil(config.patch / config.stride)
        if min(sides) <= self.first or config.steps < 1:
            raise ConfigError(
                f"cpc: patches of {config.patch} pixels every {config.stride} leave {min(sides)} rows; with one step "
                f"or more, {self.first + 1} are needed, so that one shares no pixel with the first"
            )
        self.context, self.predict = nn.ModuleList(), nn.ModuleList()
        self.offsets = []
        for rows in (sides * 2)[: config.directions]:  # a quarter turn exchanges rows and columns
            self.offsets.append(tuple(range(self.first, min(rows, self.first + config.steps))))
            self.context.append(Context(backbone.dim, config.hidden_dim, config.blocks))
            self.predict.append(
                nn.ModuleList(nn.Conv2d(backbone.dim, config.target_dim, 1) for _ in self.offsets[-1])
            )
        self.target = nn.Conv2d(backbone.dim, config.target_dim, 1)

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """InfoNCE, the mean over directions and offsets of rows."""
        grid = self._encode(self.view(batch.images, self.config.augment, generator), augment=True)
        losses = [info_nce(*pairs) for pairs in self._pairs(grid)]
        loss = torch.stack(losses).mean()
        patches = grid.shape[0] * grid.shape[2] * grid.shape[3]
        return {"loss": loss, "information": math.log(patches) - loss}

    def encoder(self) -> nn.Module:
        """The mean of z over the grid; c depends on the place, and is not exported."""
        return PatchMean(self.backbone, self.config.patch, self.config.stride)

    def pretext_metric(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Share of predictions that are nearest to their own target among all patches of 32 images."""
        found, patches = [], 1
        for images in batch.images.split(32):
            if len(images) < min(32, len(batch.images)):
                continue  # fewer patches would be easier
            for predictions, targets, positives in self._pairs(self._encode(self.view(images))):
                found.append(((predictions @ targets.T).argmax(1) == positives).float().mean())
                patches = len(targets)
        accuracy = torch.stack(found).mean()
        return {"patch_accuracy": accuracy, "patch_accuracy_by_chance": accuracy.new_tensor(1 / patches)}

    def solved(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Images whose upper rows are given, and below them the patches, of all these images, that are predicted."""
        x, size, stride = self.view(batch.images), self.config.patch, self.config.stride
        true, grid = self.denormalize(x), self._encode(x)
        n, _, rows, columns = grid.shape
        patches, targets = overlapping_patches(true, size, stride).flatten(0, 2), _rows(self.target(grid))
        last = rows - 1 - self.offsets[0][-1]  # the lowest context that all predicted rows lie below
        context = self.context[0](grid)[:, :, last : last + 1]
        given = true.clone()
        given[:, :, last * stride + size :] = 0
        predicted = given.clone()
        for k, layer in zip(self.offsets[0], self.predict[0], strict=True):
            nearest = (_rows(layer(context)) @ targets.T).argmax(1).reshape(n, columns)
            top = (last + k) * stride
            for column, left in enumerate(range(0, columns * stride, stride)):
                predicted[:, :, top : top + size, left : left + size] = patches[nearest[:, column]]
        return {"given": given, "nearest patches of all images": predicted, "true": true}

    def _encode(self, x: Tensor, augment: bool = False) -> Tensor:
        """Images (N, C, H, W), normalized -> z of their patches (N, D, rows, columns)."""
        patches = overlapping_patches(x, self.config.patch, self.config.stride)
        n, rows, columns = patches.shape[:3]
        patches = patches.flatten(0, 2)
        if augment:
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                pixels = self.denormalize(patches)
                patches = self.normalize(self.config.patch_augment(pixels, self.generator("patches")))
        z = self.backbone(patches.contiguous(memory_format=torch.channels_last))
        return z.unflatten(0, (n, rows, columns)).permute(0, 3, 1, 2)

    def _pairs(self, grid: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """For each direction and offset: predictions (M, D), targets (L, D) and the positives' rows (M,)."""
        pairs = []
        # down, up, right, left: turned so that every direction is downwards
        for turns, context, predict, offsets in zip(
            (0, 2, 3, 1), self.context, self.predict, self.offsets, strict=False
        ):
            turned = grid.rot90(turns, (2, 3))
            n, _, rows, columns = turned.shape
            c = context(turned)
            own = _rows(self.target(turned))
            targets = gather(own)
            numbers = torch.arange(len(own), device=own.device).reshape(n, rows, columns) + rank() * len(own)
            for k, layer in zip(offsets, predict, strict=True):
                predictions = self.config.scale * layer(
                    c[:, :, : rows - k]
                )  # (N, target_dim, rows - k, columns)
                pairs.append((_rows(predictions), targets, numbers[:, k:].flatten()))
        return pairs


def _rows(grid: Tensor) -> Tensor:
    """(N, D, rows, columns) -> (N * rows * columns, D)."""
    return grid.permute(0, 2, 3, 1).flatten(0, 2)
