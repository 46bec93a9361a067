"""Co-occurrence: the network tells whether two patches are from one image.

Its score is how much more often they meet than by chance, their pointwise mutual information; parts of one thing meet
often.

Source: Learning Visual Groups from Co-occurrences in Space and Time (Isola, Zoran, Krishnan and Adelson, ICLR 2016
workshop, arXiv 1511.06811): the binary classification, and its optimum. We had the abstract and the introduction; the
sizes of patches and network and the distances of pairs are ours.

Differences from the source (as far as it could be read), and what was chosen where it could not:
- Of the three domains (patches of an image, frames of a film, photographs of a place) the first.
- A patch is a quarter of the image's side. Two of a pair lie beside or below one another, 4 to 12 pixels apart: they
  share no pixel and no edge. The authors take adjacent patches, whose edges go on.
- A chance pair is the first patch of one pair with the second of another image's, so that both kinds have the same
  patches, each as often.
- The score is made symmetric: a small network on the sum and the distance of both projections.
- Positive and negative pairs count one half each, however many there are of either, so that the score is the mutual
  information itself and has no offset log(n_negative / n_positive).
- Against colors and light as the answer, each patch is jittered apart and brought to mean 0 and deviation 1. Pairs with
  a patch without content (a background) are left out.
- No BatchNorm: its statistics would join the patches. The exported encoder takes whole images, which are pooled.
- Proposals of objects by spectral clustering are downstream; `affinities` gives the matrix that they start from.

Recipe, expected metrics, data, time and command: `embedkit.training.recipes.cooccurrence`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.models.resnet import ResNet
from torch import Tensor, nn

from embedkit.errors import ConfigError
from embedkit.training.augment import (
    Augmentation,
    ColorJitter,
    Compose,
    RandomGrayscale,
    RandomHorizontalFlip,
)
from embedkit.training.config import Facts
from embedkit.training.data import Batch
from embedkit.training.data.targets import labeled_mean
from embedkit.training.method import Method, float32_loss
from embedkit.training.models.backbones import Backbone, BackboneRequest, StagedConvNet
from embedkit.training.models.tiles import overlapping_patches, standardize_tiles

__all__ = [
    "FAMILY",
    "SUMMARY",
    "Config",
    "Cooccurrence",
    "PairScore",
    "cooccurrence_loss",
    "cut",
    "draw_pairs",
]

#: The supervision that the method learns from.
FAMILY = "a pretext task"
#: The sentence that the card of an entry shows.
SUMMARY = (
    "Co-occurrence: the network predicts whether two patches come from one image. The network of "
    "one patch is exported, and takes whole images."
)

#: Standard deviation, in units of [0, 1], below which a patch has no content.
_FLAT = 0.02


@dataclass(frozen=True, kw_only=True)
class Config:
    """Of `cooccurrence`.

    Attributes:
        patch: Side of a patch in pixels.
        gap: Least distance of the edges of a pair, in pixels.
        reach: Greatest distance of the edges of a pair.
        pairs: Of each image in a step.
        negatives: Other images whose patches each patch is compared with.
        projection_dim: Width of what the score sees of a patch.
        hidden_dim: Of the score.
        augment: What a whole image goes through.
        patch_augment: What each patch goes through apart.
    """

    patch: int = 16
    gap: int = 4
    reach: int = 12
    pairs: int = 4
    negatives: int = 1
    projection_dim: int = 128
    hidden_dim: int = 256
    augment: Augmentation = Compose(steps=(RandomHorizontalFlip(),))
    patch_augment: Augmentation = Compose(
        steps=(
            ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.8),
            RandomGrayscale(p=0.5),
        )
    )


def draw_pairs(n: int, size: tuple[int, int], config: Config, generator: torch.Generator) -> Tensor:
    """Corners of both patches of n pairs: int64 (n, 2, 2), by patch and by row and column.

    Along one axis, drawn for each pair, the edges are `gap` to `reach` pixels apart, along the other corners differ by
    up to half a patch. Which of both comes first is drawn, and so is the place of the pair, evenly.
    """

    def uniform(low: int | Tensor, high: int | Tensor) -> Tensor:
        """Of low..high, both included."""
        share = torch.rand(n, generator=generator, device=generator.device, dtype=torch.float64)
        return (low + share * (high - low + 1)).floor().long()

    side, half = config.patch, config.patch // 2
    along = (side + uniform(config.gap, config.reach)) * (2 * uniform(0, 1) - 1)
    down = uniform(0, 1).bool()
    across = uniform(-half, half)
    step = torch.stack([along.where(down, across), across.where(down, along)], dim=1)  # (n, 2)
    room = torch.tensor(size, device=step.device) - side - step.abs()
    first = torch.stack([uniform(0 * room[:, axis], room[:, axis]) for axis in range(2)], dim=1)
    first = first + (-step).clamp(min=0)
    return torch.stack([first, first + step], dim=1)


def cut(x: Tensor, corners: Tensor, side: int) -> Tensor:
    """Images (N, C, H, W) and corners (N, P, 2) -> patches (N, P, C, side, side)."""
    steps = torch.arange(side, device=x.device)
    row = (corners[..., 0, None] + steps)[..., :, None]
    column = (corners[..., 1, None] + steps)[..., None, :]
    image = torch.arange(len(x), device=x.device)[:, None, None, None]
    return x.movedim(1, -1)[image, row, column].movedim(-1, 2)


@float32_loss
def cooccurrence_loss(positive: Tensor, negative: Tensor, keep: Tensor, keep_negative: Tensor) -> Tensor:
    """Logistic loss of true and chance pairs, one half each.

        L = (E_together softplus(-s) + E_by chance softplus(s)) / 2

    It is least where s(A, B) = log P(A, B together) / (P(A) P(B)).

    Args:
        positive: Scores s of pairs (M,) from one image.
        negative: Scores of pairs (M',) from two images.
        keep: bool (M,), whether a pair counts.
        keep_negative: bool (M',).

    Returns:
        A scalar, in nats; ln 2 for scores of 0.
    """
    together = labeled_mean(F.softplus(-positive), keep.long() - 1)
    by_chance = labeled_mean(F.softplus(negative), keep_negative.long() - 1)
    return (together + by_chance) / 2


class PairScore(nn.Module):
    """s(A, B) = s(B, A): a hidden layer on the sum and the absolute difference of both projections."""

    def __init__(self, dim: int, projection_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(dim, projection_dim)
        self.hidden = nn.Linear(2 * projection_dim, hidden_dim)
        self.score = nn.Linear(hidden_dim, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Features (..., D) of A and of B -> scores (...)."""
        a, b = self.project(a), self.project(b)
        return self.score(F.relu(self.hidden(torch.cat([a + b, (a - b).abs()], dim=-1))))[..., 0]


class Cooccurrence(Method):
    """Backbone on each patch, and the score of a pair."""

    streams = ("pairs", "patches", "others")

    @classmethod
    def build_backbone(cls, request: BackboneRequest, config: Config, facts: Facts) -> nn.Module:
        """One without statistics over a batch, for patches here and whole images later."""
        return request(norm="layer")

    def __init__(self, backbone: Backbone, config: Config, facts: Facts) -> None:
        super().__init__(backbone, config, facts)
        if not isinstance(backbone.net, (ResNet, StagedConvNet)):
            raise ConfigError(
                f"cooccurrence: expected a convolutional backbone, which takes patches and whole images, found "
                f"{backbone.architecture}; take r10, r18s, r50s, alexnet_bn or vgg11"
            )
        side, least = min(facts.image_shape[1:]), 2 * config.patch + config.reach
        if not 0 < config.gap <= config.reach or least > side:
            raise ConfigError(
                f"cooccurrence: expected a gap of 1 to the reach, and room for two patches and the reach ({least} "
                f"pixels) in images of {side}; found a gap of {config.gap} and a reach of {config.reach}"
            )
        if not 0 < config.negatives < facts.batch_size or config.pairs < 1:
            raise ConfigError(
                f"cooccurrence: expected 1 pair or more and negatives of 1 to below the batch of "
                f"{facts.batch_size}, found {config.pairs} and {config.negatives}"
            )
        self.score = PairScore(backbone.dim, config.projection_dim, config.hidden_dim)

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Logistic loss of pairs of each image, and of their first patches with second ones of other images."""
        x = self.pixels(batch.images, self.config.augment, generator)
        patches = self.pairs(x, self.generator("pairs"))
        shown = self.config.patch_augment(patches.flatten(0, 2), self.generator("patches"))
        features = self.patch_features(shown).unflatten(0, patches.shape[:3])
        positive, negative = self._pairs_of(features, patches, self.generator("others"))
        together, by_chance = self.score(*positive[:2]), self.score(*negative[:2])
        loss = cooccurrence_loss(together, by_chance, positive[2], negative[2])
        return {"loss": loss, "accuracy": _accuracy(together > 0, by_chance > 0, positive[2], negative[2])}

    def pairs(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Images (N, C, H, W) -> pairs of patches (N, P, 2, C, s, s)."""
        n, count = len(x), self.config.pairs
        corners = draw_pairs(n * count, (x.shape[2], x.shape[3]), self.config, generator)
        return cut(x, corners.view(n, 2 * count, 2), self.config.patch).unflatten(1, (count, 2))

    def patch_features(self, patches: Tensor) -> Tensor:
        """Patches (M, C, s, s) in [0, 1] -> features (M, D), each of its patch alone."""
        return self.backbone(standardize_tiles(self.normalize(patches)))

    def affinities(self, images: Tensor, stride: int) -> Tensor:
        """Mutual information of any two patches of an image: (N, L, L), symmetric, L patches every `stride` pixels."""
        return torch.stack(
            [
                self.score(f[:, None].expand(-1, len(f), -1), f[None].expand(len(f), -1, -1))
                for f in self._features(images, stride)
            ]
        )

    def pretext_metric(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Share of pairs that are told, true and chance ones half and half: 1/2 by chance.

        Beside it what the distance of both patches' mean colors tells, with the threshold that is best for this batch.
        """
        patches = self.pairs(self.pixels(batch.images), generator)
        features = self.patch_features(patches.flatten(0, 2)).unflatten(0, patches.shape[:3])
        seed = int(torch.randint(2**31, (1,), generator=generator, device=generator.device))
        found = {}
        for name, values in (("pair_accuracy", features), ("by_color", patches.mean((-2, -1)))):
            others = torch.Generator(patches.device).manual_seed(seed)
            positive, negative = self._pairs_of(values, patches, others)
            if name == "pair_accuracy":
                together, by_chance = (self.score(a, b) > 0 for a, b, _ in (positive, negative))
                found[name] = _accuracy(together, by_chance, positive[2], negative[2])
                continue
            near, far = ((a - b).norm(dim=-1) for a, b, _ in (positive, negative))
            limits = torch.cat([near, far])[:, None]
            found["pair_accuracy_by_color"] = _accuracy(
                near < limits, far < limits, positive[2], negative[2]
            ).max()
        return found

    def pretext_chance(self) -> dict[str, float]:
        """As many chance pairs as true ones."""
        return {"pair_accuracy": 1 / 2}

    def solved(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Images for people to look at.

        Returns:
            `image` (N, C, H, W) in [0, 1], and `affinity` (N, 1, h, w) in [0, 1]: how likely each patch is to be of one
            image with the patch in the middle.
        """
        stride = max(1, self.config.patch // 4)
        features = self._features(batch.images, stride)
        rows, columns = ((side - self.config.patch) // stride + 1 for side in self.facts.image_shape[1:])
        middle = features[:, rows // 2 * columns + columns // 2, None].expand_as(features)
        affinity = self.score(middle, features).sigmoid().unflatten(1, (rows, columns))
        return {"image": self.pixels(batch.images), "affinity": affinity[:, None]}

    def _features(self, images: Tensor, stride: int) -> Tensor:
        """Features (N, L, D) of the patches every `stride` pixels, row by row."""
        patches = overlapping_patches(self.pixels(images), self.config.patch, stride).flatten(1, 2)
        return self.patch_features(patches.flatten(0, 1)).unflatten(0, patches.shape[:2])

    def _pairs_of(
        self, values: Tensor, patches: Tensor, generator: torch.Generator
    ) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
        """Values (N, P, 2, ...) of patches -> A, B and whether both have content: of true pairs and of chance ones."""
        content = (patches.std((-2, -1), correction=0) > _FLAT).any(-1)  # (N, P, 2)
        shifts = 1 + torch.randperm(len(values) - 1, generator=generator, device=generator.device)
        a, b = values.unbind(2)
        there, other = content.unbind(2)
        shifts = shifts[: self.config.negatives].tolist()
        chance = (
            torch.cat([a] * len(shifts)).flatten(0, 1),
            torch.cat([b.roll(shift, 0) for shift in shifts]).flatten(0, 1),
            torch.cat([there & other.roll(shift, 0) for shift in shifts]).flatten(),
        )
        return (a.flatten(0, 1), b.flatten(0, 1), (there & other).flatten()), chance


def _accuracy(together: Tensor, by_chance: Tensor, keep: Tensor, keep_negative: Tensor) -> Tensor:
    """Mean of both shares that are told right: `together` (..., M) should be true, `by_chance` (..., M') false."""
    return ((together[..., keep]).float().mean(-1) + (~by_chance[..., keep_negative]).float().mean(-1)) / 2
