"""Triplet loss: an image must be nearer to every other image of its identity than to any of another one, by a margin.

Which negatives are taken decides whether anything is learned: easy ones have no loss, the hardest ones draw all images
to one point. Semi-hard ones, behind the positive but within the margin, teach from the start.

Source: FaceNet: A Unified Embedding for Face Recognition and Clustering (Schroff, Kalenichenko and Philbin, CVPR 2015,
arXiv 1503.03832), equations 1 to 4. `batch_hard` and the soft margin: In Defense of the Triplet Loss for Person
Re-Identification (Hermans, Beyer and Leibe, 2017, arXiv 1703.07737), equation 5 and section 2.

Differences from the source:
- FaceNet says which negatives may be taken and not which one is: `semi_hard` takes the nearest, `all_semi_hard` all of
  them, as PyTorch Metric Learning does. Where a pair has none, FaceNet is silent too: `fallback` takes the farthest
  negative, as TensorFlow Addons does, or leaves the pair out.
- The mean runs over triplets whose loss is above 0, as in PyTorch Metric Learning; the paper sums. A sum fades as
  triplets are satisfied, and its gradient with it.
- Batches of dozens of images, not 1,800; Adam with decoupled decay (AdamW), not SGD or AdaGrad. Views are those of
  `sphereface`; the paper augments by nothing that it names.
- Embeddings are unit vectors for `batch_hard` too; its authors leave them as they are.
- Distances are taken between images of all ranks, mined on the anchors of each.

Recipe, expected metrics, data, time and command: `embedkit.training.recipes.triplet`.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedkit.errors import ConfigError
from embedkit.training.augment import Augmentation, ColorJitter, Compose, RandomAffine
from embedkit.training.config import Facts
from embedkit.training.data import Batch
from embedkit.training.data.targets import MISSING, accuracy, labeled_mean
from embedkit.training.distributed import gather, rank
from embedkit.training.method import Method, float32_loss
from embedkit.training.models.backbones import Backbone
from embedkit.training.models.heads import l2_normalize

__all__ = ["FAMILY", "SUMMARY", "Config", "Triplet", "mine", "triplet_loss"]

#: The supervision that the method learns from.
FAMILY = "identities"
#: The sentence that the card of an entry shows.
SUMMARY = (
    "Triplet loss: an image must be nearer to the images of its identity than to those of any other "
    "one, by a margin. Backbone and embedding layer are exported."
)

#: Mean distance of unit vectors below which all images are at one point: a cosine of 0.99995.
_COLLAPSED = 1e-2


@dataclass(frozen=True, kw_only=True)
class Config:
    """Of `triplet`.

    Attributes:
        mining: `semi_hard`, `all_semi_hard`, or `batch_hard` (farthest positive and nearest negative of an anchor),
            which falls to one point when it starts from random weights with a hard margin.
        fallback: For pairs without a semi-hard negative: the `farthest` negative, or `skip`. Of `semi_hard` alone.
        margin: alpha, above 0, in units of the distance; without effect on the loss where `soft_margin` is on.
        squared: Squared distances, as in FaceNet; Hermans et al. found plain ones more stable.
        soft_margin: ln(1 + exp(.)) in place of max(0, margin + .), of Hermans et al.
        embed_dim: Width of the embedding.
        augment: What an image goes through.
    """

    mining: Literal["semi_hard", "all_semi_hard", "batch_hard"] = "semi_hard"
    fallback: Literal["farthest", "skip"] = "farthest"
    margin: float = 0.2
    squared: bool = True
    soft_margin: bool = False
    embed_dim: int = 128
    augment: Augmentation = Compose(
        steps=(
            RandomAffine(degrees=15.0, translate=(0.1, 0.1), scale=(0.8, 1.2), fill=1.0),
            ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.05),
        )
    )


@torch.no_grad()
def mine(
    distances: Tensor,
    same: Tensor,
    other: Tensor,
    margin: float,
    mining: str = "semi_hard",
    fallback: str = "farthest",
) -> tuple[Tensor, Tensor, Tensor]:
    """The triplets to learn from.

        semi-hard:  d(a, p) < d(a, n) < d(a, p) + margin

    Args:
        distances: (A, N), of anchors to all images.
        same: bool (A, N), where an image is another one of the anchor's identity.
        other: bool (A, N), where it is of another identity.
        margin: Of the distances' unit.
        mining: As `Config.mining`.
        fallback: As `Config.fallback`.

    Returns:
        Rows a and columns p and n of `distances`, int64 (T,) each.
    """
    if mining == "batch_hard":
        a = torch.nonzero(same.any(1) & other.any(1))[:, 0]
        p = distances.masked_fill(~same, -torch.inf)[a].argmax(1)
        return a, p, distances.masked_fill(~other, torch.inf)[a].argmin(1)
    a, p = torch.nonzero(same & other.any(1, keepdim=True), as_tuple=True)  # (M,), all pairs
    positive, negative = distances[a, p][:, None], distances[a]  # (M, 1), (M, N)
    semi_hard = other[a] & (negative > positive) & (negative < positive + margin)
    if mining == "all_semi_hard":
        pair, n = torch.nonzero(semi_hard, as_tuple=True)
        return a[pair], p[pair], n
    found = semi_hard.any(1)
    nearest = negative.masked_fill(~semi_hard, torch.inf).argmin(1)
    if fallback == "skip":
        return a[found], p[found], nearest[found]
    return a, p, torch.where(found, nearest, negative.masked_fill(~other[a], -torch.inf).argmax(1))


@float32_loss
def triplet_loss(
    z: Tensor,
    labels: Tensor,
    margin: float = 0.2,
    mining: str = "semi_hard",
    fallback: str = "farthest",
    squared: bool = True,
    soft_margin: bool = False,
) -> Tensor:
    """max(0, d(a, p) - d(a, n) + margin), d = |z_a - z_n|^2, meaned over mined triplets of a loss above 0 (equation 2).

    With several ranks the anchors are this rank's, positives and negatives those of all, with gradient; averaged over
    ranks that is the loss of the union batch.

    Args:
        z: Embeddings (N, D), unit vectors.
        labels: int64 (N,), identities; rows of -1 belong to none, and are in no triplet.
        margin: alpha, in the unit of the distance.
        mining: As in `Config`, and so are the next three.
        fallback: Of `semi_hard`.
        squared: The distance.
        soft_margin: ln(1 + exp(.)).

    Returns:
        (3,): the loss, the margin where all embeddings are equal (ln 2 with `soft_margin`); the share of mined triplets
        whose loss is above 0; and the mean distance between images, not squared, of which only the first has gradient.
    """
    everyone, their_labels = gather(z), gather(labels)
    # not by a matrix product: exact for near pairs, and a gradient of 0 where two embeddings are equal
    plain = torch.cdist(z, everyone, compute_mode="donot_use_mm_for_euclid_dist")  # (N, world * N)
    own = torch.arange(len(z), device=z.device)[:, None] + rank() * len(z)
    known = (labels != MISSING)[:, None] & (their_labels != MISSING)
    equal = labels[:, None] == their_labels
    same = (known & equal).scatter(1, own, False)  # an image is not its own positive
    distances = plain.square() if squared else plain
    a, p, n = mine(distances, same, known & ~equal, margin, mining, fallback)
    gap = distances[a, p] - distances[a, n]
    terms = F.softplus(gap) if soft_margin else F.relu(gap + margin)
    active = terms > 0
    loss = labeled_mean(terms, torch.where(active, 0, MISSING))
    spread = plain.detach().sum() / max(1, plain.numel() - len(z))
    return torch.stack([loss, active.sum() / max(1, len(terms)), spread])


class Triplet(Method):
    """Backbone and the linear embedding layer; embeddings are compared as unit vectors."""

    uses_labels = True
    compares_images = True

    def __init__(self, backbone: Backbone, config: Config, facts: Facts) -> None:
        super().__init__(backbone, config, facts)
        if facts.num_classes < 2:
            raise ConfigError(
                f"triplet: expected 2 or more identities, found {facts.num_classes}; "
                "name their column with --set data.label=COLUMN"
            )
        if config.margin <= 0 or config.embed_dim < 1:
            raise ConfigError(
                f"triplet: expected a margin above 0 and an embed_dim of 1 or more, "
                f"found {config.margin:g} and {config.embed_dim}"
            )
        kinds = {"mining": ("semi_hard", "all_semi_hard", "batch_hard"), "fallback": ("farthest", "skip")}
        for name, known in kinds.items():
            if getattr(config, name) not in known:
                raise ConfigError(
                    f"{name}: expected one of {', '.join(known)}, found {getattr(config, name)!r}"
                )
        self.embedding = nn.Linear(backbone.dim, config.embed_dim)

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """The loss of one view of each image, the share of triplets that still teach, and the mean distance."""
        c = self.config
        z = self._embed(self.view(batch.images, c.augment, generator))
        loss, active, spread = triplet_loss(
            z, batch.labels, c.margin, c.mining, c.fallback, c.squared, c.soft_margin
        )
        if spread < _COLLAPSED:  # the loss then stays at the margin, with next to no gradient
            warnings.warn(
                f"triplet: all embeddings are at one point, less than {_COLLAPSED} apart; "
                "start with mining=semi_hard, or with a lower learning rate",
                stacklevel=2,
            )
        return {"loss": loss, "active_triplets": active.detach(), "mean_distance": spread.detach()}

    def encoder(self) -> nn.Module:
        """Backbone and embedding layer; the runtime brings embeddings to length 1."""
        return nn.Sequential(OrderedDict(backbone=self.backbone.net, embedding=self.embedding))

    def pretext_metric(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Share of images, as they are, whose nearest other one in the batch is of their identity.

        Images that are alone with their identity are left out.
        """
        z, labels = self._embed(self.view(batch.images)), batch.labels
        nearest = (z @ z.T).fill_diagonal_(-torch.inf).argmax(1)
        paired = (labels[:, None] == labels).sum(1) > 1
        return {"nearest_is_same": accuracy(labels[nearest], torch.where(paired, labels, MISSING))}

    def _embed(self, x: Tensor) -> Tensor:
        return l2_normalize(self.embedding(self.backbone(x)))  # (N, D)
