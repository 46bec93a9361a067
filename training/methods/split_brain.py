"""Split-brain autoencoder: one half of the network predicts color from lightness, the other lightness from color.

Each half learns what its part of the image says of the other part, and both together have seen the whole image; an
autoencoder of all channels could copy them.

Source: Split-Brain Autoencoders: Unsupervised Learning by Cross-Channel Prediction (Zhang, Isola and Efros, CVPR 2017,
arXiv 1611.09842), equations 1 to 4, in the form with classes for both predictions.

Differences from the source:
- A half is the backbone with half of its channels, and not one group of each layer of an AlexNet.
- A and b have the bins that sRGB reaches at a grid of 15, where the authors have 313 at 10; 50 bins of lightness as in
  the source (the paper's prose can be read as 100). Nothing is rebalanced and no target is soft, as in the source.
- Targets are means over cells of 4 pixels, 16x16 of an image of 64; theirs are 12x12 of 180 pixels. The head of a half
  is one hidden layer on its last map, enlarged, for their dilated fc6 to fc8.
- Pooled features of the last stage of both halves are concatenated, where they probe each layer.
- The exported encoder takes RGB as all others do, and converts it itself.

Recipe, expected metrics, data, time and command: `embedkit.training.recipes.split_brain`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedkit.errors import ConfigError
from embedkit.training.augment import Augmentation, Compose, RandomHorizontalFlip, RandomResizedCrop
from embedkit.training.config import Facts
from embedkit.training.data import Batch
from embedkit.training.data.targets import labeled_mean
from embedkit.training.method import Method, float32_loss
from embedkit.training.models.backbones import Backbone, BackboneRequest
from embedkit.training.models.color import ABBins, LabInput, is_gray, lab_to_rgb

__all__ = [
    "FAMILY",
    "SUMMARY",
    "Config",
    "SplitBrain",
    "SplitBrainEncoder",
    "cross_channel_loss",
    "lightness_bins",
]

#: The supervision that the method learns from.
FAMILY = "a pretext task"
#: The sentence that the card of an entry shows.
SUMMARY = (
    "Split-brain autoencoder: one half of the network predicts color from lightness, the other "
    "lightness from color. The features of both halves are exported side by side."
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Of `split_brain`.

    Attributes:
        grid: Distance of two bins of the ab plane.
        lightness_bins: Bins of L, which runs from 0 to 100.
        size: Side of the maps that are predicted, in places.
        hidden_dim: Width of the layer between each half and its classes.
        lightness_weight: Of predicting lightness, where predicting color counts 1.
        augment: What an image goes through; it should leave colors as they are.
    """

    grid: int = 15
    lightness_bins: int = 50
    size: int = 16
    hidden_dim: int = 128
    lightness_weight: float = 1.0
    augment: Augmentation = Compose(steps=(RandomResizedCrop(scale=(0.5, 1.0)), RandomHorizontalFlip()))


def lightness_bins(lightness: Tensor, bins: int) -> Tensor:
    """L in [0, 100] -> floor(bins L / 100), 100 itself in the last bin: int64 of the same shape."""
    return (lightness * bins / 100).floor().long().clamp(0, bins - 1)


@float32_loss
def cross_channel_loss(logits: Tensor, classes: Tensor, colored: Tensor) -> Tensor:
    """Cross-entropy at every place, meaned over the places of images that have color.

    Args:
        logits: (N, K, h, w).
        classes: int64 (N, h, w).
        colored: bool (N,); the others are left out.

    Returns:
        A scalar, in nats: ln K for equal logits.
    """
    each = F.cross_entropy(logits, classes, reduction="none")  # (N, h, w)
    return labeled_mean(each.mean((1, 2)), colored.long() - 1)


class SplitBrainEncoder(nn.Module):
    """Normalized RGB -> the features of both halves, of lightness first: (N, D_1 + D_2)."""

    def __init__(self, to_lab: LabInput, halves: nn.ModuleList) -> None:
        super().__init__()
        self.to_lab, self.halves = to_lab, halves

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W), normalized."""
        lab = self.to_lab(x)
        return torch.cat([self.halves[0](lab[:, :1]), self.halves[1](lab[:, 1:])], dim=1)


class SplitBrain(Method):
    """Two backbones of half the width, of lightness and of color, and a head of each for the other's input."""

    @classmethod
    def build_backbone(cls, request: BackboneRequest, config: Config, facts: Facts) -> nn.Module:
        """Two that share nothing."""
        return nn.ModuleList([request(in_chans=1, width=0.5), request(in_chans=2, width=0.5)])

    def __init__(self, backbone: nn.ModuleList, config: Config, facts: Facts) -> None:
        super().__init__(backbone, config, facts)
        self.to_lab = LabInput(facts.mean, facts.std, "lab")
        self.bins = ABBins(config.grid)
        if config.lightness_bins < 2:
            raise ConfigError(
                f"split_brain: expected 2 lightness_bins or more, found {config.lightness_bins}"
            )
        classes = (len(self.bins), config.lightness_bins)
        self.heads = nn.ModuleList(
            self._head(half, k) for half, k in zip(backbone.children(), classes, strict=True)
        )

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Both predictions for one view of each image; images without color are left out."""
        x = self.view(batch.images, self.config.augment, generator)
        classes, colored = self.targets(x)
        if self.batches_seen <= 1 and not colored.any():
            raise ConfigError(
                "split_brain: the first images are all gray, and there is nothing to be learned"
            )
        color, lightness = (
            cross_channel_loss(logits, target, colored)
            for logits, target in zip(self.predict(self.to_lab(x)), classes, strict=True)
        )
        return {
            "loss": color + self.config.lightness_weight * lightness,
            "color": color,
            "lightness": lightness,
        }

    @torch.no_grad()
    def targets(self, x: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Normalized images -> bins of color and of lightness (N, size, size) each, and which have color (N,)."""
        lab = self.to_lab.lab(x)
        small = F.adaptive_avg_pool2d(lab, self.config.size)
        lightness = lightness_bins(small[:, 0], self.config.lightness_bins)
        return (self.bins.nearest(small[:, 1:]), lightness), ~is_gray(lab)

    def predict(self, lab: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled L, a, b (N, 3, H, W) -> logits of color from L alone, and of lightness from a and b alone."""
        size = (self.config.size, self.config.size)
        maps = (
            self.backbone[0].forward_features(lab[:, :1]),
            self.backbone[1].forward_features(lab[:, 1:]),
        )
        color, lightness = (
            head(F.interpolate(m, size, mode="bilinear", align_corners=False))
            for head, m in zip(self.heads, maps, strict=True)
        )
        return color, lightness

    def encoder(self) -> nn.Module:
        """Both halves, behind the conversion of RGB."""
        return SplitBrainEncoder(LabInput(self.facts.mean, self.facts.std, "lab"), self.backbone)

    def pretext_metric(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Shares of places whose bins are told, and those of the one bin that is most frequent in the batch."""
        x = self.view(batch.images)
        classes, colored = self.targets(x)
        found = {}
        for name, logits, truth in zip(
            ("color", "lightness"), self.predict(self.to_lab(x)), classes, strict=True
        ):
            truth, told = truth[colored].flatten(), logits.argmax(1)[colored].flatten()
            found[f"{name}_accuracy"] = (truth == told).float().mean()
            found[f"{name}_accuracy_by_chance"] = torch.bincount(truth, minlength=1).max() / max(
                1, len(truth)
            )
        return found

    def solved(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Images for people to look at.

        Returns:
            (N, 3, H, W) in [0, 1]: `true`; `colored`, its lightness with colors as told; `lit`, its colors with
            lightness as told.
        """
        x = self.view(batch.images)
        lab, (color, lightness) = self.to_lab.lab(x), self.predict(self.to_lab(x))
        centers = (torch.arange(lightness.shape[1], device=lab.device) + 0.5) * 100 / lightness.shape[1]
        told = torch.einsum("nkhw,k->nhw", lightness.float().softmax(1), centers)[:, None]
        ab, told = (
            F.interpolate(m, lab.shape[2:], mode="bilinear", align_corners=False)
            for m in (self.bins.decode(color), told)
        )
        images = {
            "true": lab,
            "colored": torch.cat([lab[:, :1], ab], 1),
            "lit": torch.cat([told, lab[:, 1:]], 1),
        }
        return {name: lab_to_rgb(image).clamp(0, 1) for name, image in images.items()}

    def _head(self, half: Backbone, classes: int) -> nn.Sequential:
        last = nn.Conv2d(self.config.hidden_dim, classes, 1)
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        hidden = nn.Conv2d(half.dim, self.config.hidden_dim, 1, bias=False)
        return nn.Sequential(hidden, nn.BatchNorm2d(self.config.hidden_dim), nn.ReLU(), last)
