"""SimCLR: two views of an image are each other's positive, all other views in the batch are negatives.

The encoder learns what views share, and drops what they do not; the projector takes that loss upon itself, so
the features before it are exported.

Source: A Simple Framework for Contrastive Learning of Visual Representations (Chen, Kornblith, Norouzi and
Hinton, ICML 2020, arXiv 2002.05709), equation 1 and algorithm 1.

Differences from the source:
- The loss is the mean over the 2N anchors, as the paper writes it; the authors' code returns twice that.
- The projector ends in BatchNorm without shift, as in the authors' code and not in the paper.
- AdamW and one cycle instead of LARS and a cosine: batches here are 512 pairs and not 4096, the network is r10 or
  ResNet-50 with a stem for 64 pixels, and a run has tens of epochs, not 100 to 1,000.
- The temperature is 0.2 (0.1 for ImageNet and 0.5 for CIFAR there), the projector's hidden layer 512 wide and not as
  wide as the features of a ResNet-50 (2,048).
- BatchNorm's statistics are those of a device, theirs of all; `RunConfig.sync_batch_norm` makes them so on GPU.
- Views for one channel of 28 pixels: crops of at least a fifth of the area (the paper's 8 % would be 8x8
  pixels), no change of hue or saturation, no blur (the authors' advice for small images).

Recipe, expected metrics, data, time and command: `embedkit.training.recipes.simclr`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedkit.errors import ConfigError
from embedkit.training.augment import TWO_VIEWS, Augmentation
from embedkit.training.config import Facts
from embedkit.training.data import Batch
from embedkit.training.distributed import gather, rank
from embedkit.training.method import Method, float32_loss
from embedkit.training.models.backbones import Backbone

__all__ = ["FAMILY", "SUMMARY", "Config", "SimCLR", "nt_xent"]

#: The supervision that the method learns from.
FAMILY = "views"
#: The sentence that the card of an entry shows.
SUMMARY = (
    "SimCLR: two views of an image are each other's positive, all other views in the batch are negatives."
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Of `simclr`.

    Attributes:
        temperature: The paper's tau, above 0; it divides cosines.
        hidden_dim: Width of the projector's hidden layer.
        projection_dim: Width of z.
        augment: Drawn twice for every image.
    """

    temperature: float = 0.2
    hidden_dim: int = 512
    projection_dim: int = 128
    augment: Augmentation = TWO_VIEWS


@float32_loss
def nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """Normalized temperature-scaled cross-entropy (equation 1), meaned over all anchors.

        l(i, j) = -log( exp(s_ij / tau) / sum_{k != i} exp(s_ik / tau) ),   s = cosine, (i, j) a positive pair

    With several ranks the anchors are this rank's and the sum runs over the views of all ranks, with gradient;
    averaged over ranks that is the loss of the union batch.

    Args:
        z1: Projections of the first views (N, D), any length above 0.
        z2: Projections of the second views (N, D), row by row of the same images.
        temperature: tau, above 0.

    Returns:
        A scalar, in nats; log(2N - 1) when all projections are equal.
    """
    z = F.normalize(torch.cat([z1, z2]), dim=1)  # (2N, D)
    everyone = gather(z)  # (world * 2N, D)
    rows = torch.arange(len(z), device=z.device)
    first = rank() * len(z)
    logits = z @ everyone.T / temperature  # (2N, world * 2N)
    logits = logits.scatter(1, (first + rows)[:, None], -torch.inf)  # a view is not its own negative
    return F.cross_entropy(logits, first + rows.roll(len(z1)))


class SimCLR(Method):
    """Backbone f and projector g; the embedding is h = f(x)."""

    compares_images = True

    def __init__(self, backbone: Backbone, config: Config, facts: Facts) -> None:
        super().__init__(backbone, config, facts)
        if min(config.hidden_dim, config.projection_dim) < 1:
            raise ConfigError(
                "simclr: expected a hidden_dim and a projection_dim of 1 or more, found "
                f"{config.hidden_dim} and {config.projection_dim}"
            )
        self.projector = nn.Sequential(
            nn.Linear(backbone.dim, config.hidden_dim, bias=False),
            nn.BatchNorm1d(config.hidden_dim),
            nn.ReLU(),
            nn.Linear(config.hidden_dim, config.projection_dim, bias=False),
            nn.BatchNorm1d(config.projection_dim),
        )
        self.projector[-1].bias.requires_grad_(
            False
        )  # a scale and no shift: a shift would be shared by all z

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """NT-Xent of two views of each image."""
        z1, z2 = self._project(batch.images, generator)
        return {"loss": nt_xent(z1, z2, self.config.temperature)}

    def pretext_metric(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Share of views whose nearest other view is their positive; 1 / (2N - 1) by chance."""
        z = F.normalize(torch.cat(self._project(batch.images, generator)).float(), dim=1)
        nearest = (z @ z.T).fill_diagonal_(-torch.inf).argmax(1)
        positive = torch.arange(len(z), device=z.device).roll(len(batch.images))
        return {"positive_is_nearest": (nearest == positive).float().mean()}

    def _project(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        # Both views in one pass: one large batch is faster than two, and BatchNorm sees both distributions.
        x = self.view(torch.cat([images, images]), self.config.augment, generator)  # (2N, C, H, W)
        z1, z2 = self.projector(self.backbone(x)).chunk(2)
        return z1, z2
