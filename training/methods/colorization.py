"""Colorization: from the lightness of an image the network tells its colors, as a distribution for every place.

Many colors are possible where one was seen, so that classes are predicted and not a mean, which would be gray; which
of them is likely hangs on what is seen there.

Sources: Colorful Image Colorization (Zhang, Isola and Efros, ECCV 2016, arXiv 1603.08511), equations 2 to 5: classes of
the ab plane. Learning Representations for Automatic Colorization (Larsson, Maire and Shakhnarovich, ECCV 2016, arXiv
1603.06668), section 3: hue, chroma and hypercolumns; the recipe `colorization:larsson`.

Differences from the sources:
- Zhang's soft targets and rebalancing are the recipe `colorization:eccv16`. The main recipe has one class a place and
  no weights, which their later comparison (split-brain, CVPR 2017) found as good for features or better.
- The prior is counted over the batches seen so far, not over the training images before the run, and smoothed by the
  soft targets themselves. Five neighbors, as the paper says; the released layer takes ten.
- Bins are those that sRGB reaches at a grid of 15; at the paper's 10 they are 260, where the authors' file lists 313.
  In the place of their network for 256 pixels, with its dilations, stands a backbone with one hidden layer on its last
  map, enlarged to a quarter of the image.
- Hue and chroma are angle and length of (a, b), chroma in units of 100, where Larsson takes hue and chroma of HSV, and
  the mean of RGB as input; the weight 5 of hue is the inverse of the mean chroma, near 1/5 in either unit.
- Hypercolumns hold the input and the map behind every stage; BatchNorm brings each channel to unit second moment, where
  they scale layers by constants. Nothing starts from a network that was trained for classes.
- The exported encoder takes RGB as all others do, and computes lightness itself.

Recipe, expected metrics, data, time and command: `embedkit.training.recipes.colorization`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedkit.errors import ConfigError
from embedkit.training.augment import Augmentation, Compose, RandomHorizontalFlip, RandomResizedCrop
from embedkit.training.config import Facts
from embedkit.training.data import Batch
from embedkit.training.data.targets import labeled_mean
from embedkit.training.distributed import mean_over_ranks
from embedkit.training.method import Method, float32_loss
from embedkit.training.models.backbones import Backbone, BackboneRequest
from embedkit.training.models.color import ABBins, LabInput, class_weights, is_gray, lab_to_rgb

__all__ = [
    "FAMILY",
    "SUMMARY",
    "ABClasses",
    "Colorization",
    "Config",
    "HueChroma",
    "class_loss",
    "hue_chroma_loss",
]

#: The supervision that the method learns from.
FAMILY = "a pretext task"
#: The sentence that the card of an entry shows.
SUMMARY = (
    "Colorization: from the lightness of an image the network predicts its colors. The network is "
    "exported; it takes color images and computes their lightness itself."
)


@dataclass(frozen=True, kw_only=True)
class ABClasses:
    """Zhang's: classes of the ab plane, from the last map.

    Attributes:
        grid: Distance of two bins.
        neighbors: Bins that share a soft target; 1: one class a place.
        sigma: Of their Gaussian, in units of a and b.
        mix: The paper's lambda of rebalancing, 1/2 there; 1: no weights.
        temperature: Of the annealed mean, for images that people look at.
    """

    grid: int = 15
    neighbors: int = 1
    sigma: float = 5.0
    mix: float = 1.0
    temperature: float = 0.38


@dataclass(frozen=True, kw_only=True)
class HueChroma:
    """Larsson's: histograms of hue and chroma, from hypercolumns.

    Attributes:
        bins: Of each histogram.
        locations: Places of an image that are taken in a step.
        hue_weight: lambda_H, which multiplies the chroma of a place.
    """

    bins: int = 32
    locations: int = 128
    hue_weight: float = 5.0


@dataclass(frozen=True, kw_only=True)
class Config:
    """Of `colorization`.

    Attributes:
        target: What is predicted, and from which maps.
        size: Side of the map of colors, in places.
        hidden_dim: Width of the layer between the backbone and the colors.
        augment: What an image goes through; it should leave colors as they are.
    """

    target: ABClasses | HueChroma = ABClasses()
    size: int = 16
    hidden_dim: int = 128
    augment: Augmentation = Compose(steps=(RandomResizedCrop(scale=(0.5, 1.0)), RandomHorizontalFlip()))


@float32_loss
def class_loss(logits: Tensor, target: Tensor, weights: Tensor, colored: Tensor) -> Tensor:
    """Cross-entropy with soft, weighted classes (equation 2), meaned over the places of images that have color.

        L = -mean_hw v(Z_hw) sum_q Z_hwq log softmax(logits_hw)_q,   v(Z) = w_(argmax_q Z_q)

    Args:
        logits: (N, Q, h, w).
        target: Z (N, Q, h, w), which sums to 1 over q.
        weights: w (Q,).
        colored: bool (N,); the others are left out.

    Returns:
        A scalar, in nats: ln Q for equal logits and weights of 1; 0 where no image has color.
    """
    each = -(target * logits.log_softmax(1)).sum(1) * weights[target.argmax(1)]  # (N, h, w)
    return labeled_mean(each.mean((1, 2)), colored.long() - 1)


@float32_loss
def hue_chroma_loss(hue: Tensor, chroma: Tensor, ab: Tensor, hue_weight: float, colored: Tensor) -> Tensor:
    """Kullback-Leibler divergence of chroma, and of hue times the chroma, whose hue is uncertain where it is small.

        L = KL(y_C || f_C) + lambda_H y_C KL(y_H || f_H),   one bin of each histogram y is 1

    Args:
        hue: Logits (N, B, ...) of equal parts of the circle, from -pi on.
        chroma: Logits (N, B, ...) of equal parts of 0 to 100.
        ab: (N, 2, ...).
        hue_weight: lambda_H.
        colored: bool (N,); the others are left out.

    Returns:
        A scalar, in nats.
    """
    hue_bin, chroma_bin = _bins(ab, hue.shape[1])
    weight = hue_weight * ab.norm(dim=1) / 100
    each = F.cross_entropy(chroma, chroma_bin, reduction="none")
    each = each + weight * F.cross_entropy(hue, hue_bin, reduction="none")
    return labeled_mean(each.flatten(1).mean(1), colored.long() - 1)


def _bins(ab: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Which bins of hue and chroma a and b (N, 2, ...) fall into."""
    turn = torch.atan2(ab[:, 1], ab[:, 0]) / (2 * math.pi) + 0.5
    shares = (turn, ab.norm(dim=1) / 100)
    hue, chroma = ((share * bins).long().clamp(0, bins - 1) for share in shares)
    return hue, chroma


class Colorization(Method):
    """Backbone on lightness; one hidden layer and the logits of colors as 1x1 convolutions."""

    prior: Tensor

    @classmethod
    def build_backbone(cls, request: BackboneRequest, config: Config, facts: Facts) -> nn.Module:
        """One for lightness."""
        return request(in_chans=1)

    def __init__(self, backbone: Backbone, config: Config, facts: Facts) -> None:
        super().__init__(backbone, config, facts)
        self.lightness = LabInput(facts.mean, facts.std, "l")
        self.columns = isinstance(config.target, HueChroma)
        if isinstance(config.target, HueChroma):
            self.streams = ("locations",)
            with torch.no_grad():
                maps = backbone.maps(torch.zeros(2, 1, *backbone.image_size))
            width, classes = 1 + sum(m.shape[1] for m in maps), 2 * config.target.bins
        else:
            self.bins = ABBins(config.target.grid)
            width, classes = backbone.dim, len(self.bins)
            self.register_buffer("prior", torch.zeros(classes))  # of the batches that were seen
        self.head = nn.Sequential(
            *([nn.BatchNorm2d(width)] if self.columns else []),
            nn.Conv2d(width, config.hidden_dim, 1, bias=False),
            nn.BatchNorm2d(config.hidden_dim),
            nn.ReLU(),
            nn.Conv2d(config.hidden_dim, classes, 1),
        )
        for parameter in self.head[-1].parameters():
            nn.init.zeros_(parameter)

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """What color the places of one view of each image have; images without color are left out."""
        x = self.view(batch.images, self.config.augment, generator)
        ab, colored = self.colors(x)
        if self.batches_seen <= 1 and not colored.any():
            raise ConfigError(
                "colorization: the first images are all gray, and there is nothing to be learned"
            )
        features, target = self.features(x), self.config.target
        if isinstance(target, HueChroma):
            place = self._locations(len(x))
            features, ab = (m.flatten(2).gather(2, place.expand(-1, m.shape[1], -1)) for m in (features, ab))
            hue, chroma = self.head(features[..., None])[..., 0].chunk(2, dim=1)
            return {"loss": hue_chroma_loss(hue, chroma, ab, target.hue_weight, colored)}
        soft = self.bins.soft(ab, target.neighbors, target.sigma)
        loss = class_loss(self.head(features), soft, self._weights(soft, colored), colored)
        return {"loss": loss, "colored": colored.float().mean()}

    @torch.no_grad()
    def colors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Normalized images -> a and b of each place (N, 2, size, size), and which images have color (N,)."""
        lab = self.lightness.lab(x)
        return F.adaptive_avg_pool2d(lab[:, 1:], self.config.size), ~is_gray(lab)

    def features(self, x: Tensor) -> Tensor:
        """Normalized images -> what the head gets of their lightness: (N, D, size, size)."""
        x, size = self.lightness(x), (self.config.size, self.config.size)
        maps = [x, *self.backbone.maps(x)] if self.columns else [self.backbone.forward_features(x)]
        return torch.cat([F.interpolate(m, size, mode="bilinear", align_corners=False) for m in maps], dim=1)

    def encoder(self) -> nn.Module:
        """The backbone behind the lightness of RGB."""
        return nn.Sequential(LabInput(self.facts.mean, self.facts.std, "l"), self.backbone)

    def pretext_metric(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Share of places whose bin is told, and that of the one bin which is most frequent in the batch.

        Bins are those of the ab plane, or of hue where chroma is above 5; images without color are left out.
        """
        x = self.view(batch.images)
        ab, colored = self.colors(x)
        logits = self.head(self.features(x))
        if isinstance(self.config.target, HueChroma):
            bins = self.config.target.bins
            seen, truth, told = ab.norm(dim=1) > 5, _bins(ab, bins)[0], logits[:, :bins].argmax(1)
        else:
            seen, truth, told = (
                torch.ones_like(ab[:, 0], dtype=torch.bool),
                self.bins.nearest(ab),
                logits.argmax(1),
            )
        seen = seen & colored[:, None, None]
        truth, told = truth[seen], told[seen]
        return {
            "color_accuracy": (truth == told).float().mean(),
            "color_accuracy_by_chance": torch.bincount(truth, minlength=1).max() / max(1, len(truth)),
        }

    def solved(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Images for people to look at.

        Returns:
            `gray`, `colored` and `true`: (N, 3, H, W) in [0, 1]: lightness alone, with colors as told, and as they are.
        """
        x = self.view(batch.images)
        lab, logits = self.lightness.lab(x), self.head(self.features(x))
        ab = F.interpolate(self.decode(logits), lab.shape[2:], mode="bilinear", align_corners=False)
        images = {"gray": torch.zeros_like(ab), "colored": ab, "true": lab[:, 1:]}
        return {name: lab_to_rgb(torch.cat([lab[:, :1], c], 1)).clamp(0, 1) for name, c in images.items()}

    def decode(self, logits: Tensor) -> Tensor:
        """Logits (N, K, h, w) -> a and b (N, 2, h, w): annealed mean, or median chroma in the mean direction of hue."""
        if not isinstance(self.config.target, HueChroma):
            return self.bins.decode(logits, self.config.target.temperature)
        hue, chroma = (part.float().softmax(1) for part in logits.chunk(2, dim=1))
        bins = self.config.target.bins
        middle = (torch.arange(bins, device=hue.device) + 0.5) / bins
        angle = 2 * math.pi * (middle - 0.5)
        direction = torch.einsum("nbhw,bc->nchw", hue, torch.stack([angle.cos(), angle.sin()], 1))
        median = middle[(chroma.cumsum(1) >= 0.5).int().argmax(1)]  # (N, h, w)
        return 100 * median[:, None] * F.normalize(direction, dim=1)

    def _locations(self, n: int) -> Tensor:
        generator, places = self.generator("locations"), self.config.size**2
        size = (n, 1, min(self.config.target.locations, places))
        return torch.randint(places, size, generator=generator, device=generator.device)

    @torch.no_grad()
    def _weights(self, soft: Tensor, colored: Tensor) -> Tensor:
        """Weights of classes by the prior of all batches, this one counted."""
        if self.training:
            self.prior += mean_over_ranks(soft[colored].sum((0, 2, 3)))
        return class_weights(self.prior + 1e-6, self.config.target.mix)
