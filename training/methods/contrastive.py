"""Contrastive loss: images of one identity are drawn together, those of two are pushed apart until a margin.

A pair beyond the margin has no loss, so that the space need not grow; a pair of one identity has none only at 0.

Source: Dimensionality Reduction by Learning an Invariant Mapping (Hadsell, Chopra and LeCun, CVPR 2006, doi
10.1109/CVPR.2006.100; not on arXiv), equation 4. The form `hinge` is that of PyTorch Metric Learning.

Differences from the source:
- Pairs are all those within a batch of P identities with K images each, in place of pairs that are given. The paper
  sums over its pairs; here similar and dissimilar ones are meaned apart, since of the second there are P times as many.
- Embeddings are unit vectors, so that a margin of 1 is an angle of 60 degrees; the paper's are free. `normalize=False`
  is the paper's.
- `hinge` has distances in place of half their squares, and means over the pairs of a loss above 0.
- Where two embeddings are equal the distance has no derivative; its gradient is taken as 0, for dissimilar pairs too.
- AdamW and a network with residual blocks; views are those of `sphereface`. The paper has a net of two convolutions.

Recipe, expected metrics, data, time and command: `embedkit.training.recipes.contrastive`.
"""

from __future__ import annotations

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

__all__ = ["FAMILY", "SUMMARY", "Config", "Contrastive", "contrastive_loss"]

#: The supervision that the method learns from.
FAMILY = "identities"
#: The sentence that the card of an entry shows.
SUMMARY = (
    "Contrastive loss: images of one identity are pulled together, and those of two identities are "
    "pushed apart up to a margin. Backbone and embedding layer are exported."
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Of `contrastive`.

    Attributes:
        form: `hadsell`, half of squared distances; `hinge`, distances.
        margin: m, the distance from which a dissimilar pair has no loss; at most 2 for unit vectors.
        dissimilar_weight: Of the mean over dissimilar pairs; that over similar ones has 1.
        normalize: Whether embeddings are compared as unit vectors.
        embed_dim: Width of the embedding.
        augment: What an image goes through.
    """

    form: Literal["hadsell", "hinge"] = "hadsell"
    margin: float = 1.0
    dissimilar_weight: float = 1.0
    normalize: bool = True
    embed_dim: int = 128
    augment: Augmentation = Compose(
        steps=(
            RandomAffine(degrees=15.0, translate=(0.1, 0.1), scale=(0.8, 1.2), fill=1.0),
            ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.05),
        )
    )


@float32_loss
def contrastive_loss(z: Tensor, labels: Tensor, margin: float = 1.0, form: str = "hadsell") -> Tensor:
    """The loss of similar and of dissimilar pairs (i, j), i != j, each meaned over its pairs (equation 4).

        hadsell:  D^2 / 2   and   max(0, m - D)^2 / 2,   D = |z_i - z_j|
        hinge:    D         and   max(0, m - D),   meaned over those above 0

    With several ranks i runs over the rows of this rank and j over those of all, with gradient; averaged over ranks
    that is the loss of the union batch.

    Args:
        z: Embeddings (N, D).
        labels: int64 (N,), identities; rows of -1 belong to none, and are in no pair.
        margin: m, above 0, in the unit of z.
        form: Which of the two.

    Returns:
        (2,): similar and dissimilar; 0 and m^2 / 2 (`hinge`: m) where all embeddings are equal.

    Raises:
        ConfigError: Another form.
    """
    if form not in ("hadsell", "hinge"):
        raise ConfigError(f"form: expected hadsell or hinge, found {form!r}")
    everyone, their_labels = gather(z), gather(labels)
    # the gradient of this distance is 0 where it is 0; that of a root of squares is not a number
    distances = torch.cdist(z, everyone, compute_mode="donot_use_mm_for_euclid_dist")  # (N, world * N)
    own = torch.arange(len(z), device=z.device)[:, None] + rank() * len(z)
    known = ((labels != MISSING)[:, None] & (their_labels != MISSING)).scatter(1, own, False)
    equal = labels[:, None] == their_labels
    means = []
    for terms, pairs in ((distances, known & equal), (F.relu(margin - distances), known & ~equal)):
        if form == "hadsell":
            terms = terms.square() / 2
        else:
            pairs = pairs & (terms > 0)
        means.append(labeled_mean(terms.flatten(), torch.where(pairs, 0, MISSING).flatten()))
    return torch.stack(means)


class Contrastive(Method):
    """Backbone and the linear embedding layer."""

    uses_labels = True
    compares_images = True

    def __init__(self, backbone: Backbone, config: Config, facts: Facts) -> None:
        super().__init__(backbone, config, facts)
        if facts.num_classes < 2:
            raise ConfigError(
                f"contrastive: expected 2 or more identities, found {facts.num_classes}; "
                "name their column with --set data.label=COLUMN"
            )
        if config.form not in ("hadsell", "hinge"):
            raise ConfigError(f"form: expected hadsell or hinge, found {config.form!r}")
        if config.margin <= 0 or config.embed_dim < 1 or (config.normalize and config.margin > 2):
            raise ConfigError(
                "contrastive: expected a margin above 0, at most 2 for unit vectors, and an embed_dim of 1 or more; "
                f"found {config.margin:g} and {config.embed_dim}"
            )
        self.embedding = nn.Linear(backbone.dim, config.embed_dim)

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Both means over pairs of views, one view of each image."""
        z = self._embed(self.view(batch.images, self.config.augment, generator))
        similar, dissimilar = contrastive_loss(z, batch.labels, self.config.margin, self.config.form)
        return {
            "loss": similar + self.config.dissimilar_weight * dissimilar,
            "similar": similar,
            "dissimilar": dissimilar,
        }

    def encoder(self) -> nn.Module:
        """Backbone and embedding layer; the runtime brings embeddings to length 1."""
        return nn.Sequential(OrderedDict(backbone=self.backbone.net, embedding=self.embedding))

    def pretext_metric(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Share of images, as they are, whose nearest other one in the batch is of their identity.

        Images that are alone with their identity are left out.
        """
        z, labels = self._embed(self.view(batch.images)), batch.labels
        nearest = torch.cdist(z, z).fill_diagonal_(torch.inf).argmin(1)
        paired = (labels[:, None] == labels).sum(1) > 1
        return {"nearest_is_same": accuracy(labels[nearest], torch.where(paired, labels, MISSING))}

    def _embed(self, x: Tensor) -> Tensor:
        z = self.embedding(self.backbone(x)).float()  # (N, D)
        return l2_normalize(z) if self.config.normalize else z
