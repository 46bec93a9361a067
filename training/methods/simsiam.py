"""SimSiam: from one view of an image a predictor finds the projection of the other, which is held fixed.

There are no negatives and no second network: that the target takes no gradient, and that the predictor stands on
one side alone, keeps all projections from becoming one.

Source: Exploring Simple Siamese Representation Learning (Chen and He, CVPR 2021, arXiv 2011.10566), equations 1 to 4
and algorithm 1.

Differences from the source:
- Both views pass in one batch, so BatchNorm sees both at once; the authors' code passes one after the other.
- Linear layers before a BatchNorm have no bias. The authors' code has one before the last, frozen where BatchNorm
  takes it away.
- The projector's hidden layers are as wide as the backbone, as in the authors' code; the paper says 2,048, which is
  the width of its ResNet-50. Two layers, which is what we recall of its CIFAR experiments; its ImageNet's are three.
- BatchNorm's statistics are those of a device; theirs are synchronized (`RunConfig.sync_batch_norm` on GPU).
- SGD has Nesterov momentum, and vectors (biases, BatchNorm) take no weight decay, as everywhere in this package. The
  recipe's learning rate is 0.1 for every 256 of a batch (the paper's 0.05 for ImageNet and 0.03 for CIFAR), its network
  r10 (ResNet-50 and ResNet-18), its run 36 epochs (100 and 800).
- Views are SimCLR's for one channel of 28 pixels: no change of hue or saturation, no blur.

Recipe, expected metrics, data, time and command: `embedkit.training.recipes.simsiam`.
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
from embedkit.training.distributed import gather
from embedkit.training.method import Method, float32_loss
from embedkit.training.models.backbones import Backbone
from embedkit.training.models.heads import l2_normalize

__all__ = ["FAMILY", "SUMMARY", "Config", "SimSiam", "negative_cosine", "relative_std", "simsiam_loss"]

#: The supervision that the method learns from.
FAMILY = "views"
#: The sentence that the card of an entry shows.
SUMMARY = (
    "SimSiam: a predictor maps the projection of one view of an image to that of the other, which "
    "takes no gradient."
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Of `simsiam`.

    Attributes:
        projector_layers: Linear layers of the projector; all but the last are as wide as the backbone.
        projection_dim: d, the width of z and p.
        prediction_dim: Width of the predictor's hidden layer, a bottleneck.
        constant_predictor_lr: Whether the predictor keeps the peak learning rate while the rest follows the
            schedule: it must follow projections that change.
        augment: Drawn twice for every image. Weak ones make collapse likelier.
    """

    projector_layers: int = 2
    projection_dim: int = 2048
    prediction_dim: int = 512
    constant_predictor_lr: bool = True
    augment: Augmentation = TWO_VIEWS


@float32_loss
def negative_cosine(p: Tensor, z: Tensor) -> Tensor:
    """D(p, z) = -cos(p, z), meaned over rows, where z takes no gradient (equations 1 and 3).

    Args:
        p: Predictions (N, d), any length above 0.
        z: Projections (N, d), row by row of the same images.

    Returns:
        A scalar in [-1, 1].
    """
    return -(l2_normalize(p) * l2_normalize(z.detach())).sum(1).mean()


def simsiam_loss(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    """D(p1, stopgrad(z2)) / 2 + D(p2, stopgrad(z1)) / 2 (equation 4): a scalar in [-1, 1]."""
    return 0.5 * negative_cosine(p1, z2) + 0.5 * negative_cosine(p2, z1)


def relative_std(z: Tensor) -> Tensor:
    """The standard deviation of z / |z| over the batch, meaned over dimensions, in units of 1 / sqrt(d).

    The paper's sign of collapse (section 4.1): near 1 where directions spread evenly, 0 where all are one. Behind the
    projector's last BatchNorm, collapse onto a few directions leaves it near 1: the rank of embeddings shows that.

    Args:
        z: Projections (N, d), N above 1; with several ranks those of all of them count.

    Returns:
        A scalar in [0, 1], without gradient.
    """
    directions = l2_normalize(gather(z.detach()))  # (world * N, d)
    return directions.std(0, correction=0).mean() * z.shape[1] ** 0.5


class SimSiam(Method):
    """Backbone f, projector (z) and predictor h (p); the embedding is the backbone's."""

    stops_gradient = True

    def __init__(self, backbone: Backbone, config: Config, facts: Facts) -> None:
        super().__init__(backbone, config, facts)
        if min(config.projector_layers, config.projection_dim, config.prediction_dim) < 1:
            raise ConfigError(
                "simsiam: expected projector_layers, a projection_dim and a prediction_dim of 1 or more, found "
                f"{config.projector_layers}, {config.projection_dim} and {config.prediction_dim}"
            )
        dim, d, bottleneck = backbone.dim, config.projection_dim, config.prediction_dim
        hidden: list[nn.Module] = []
        for _ in range(config.projector_layers - 1):
            hidden += [nn.Linear(dim, dim, bias=False), nn.BatchNorm1d(dim), nn.ReLU()]
        self.projector = nn.Sequential(
            *hidden, nn.Linear(dim, d, bias=False), nn.BatchNorm1d(d, affine=False)
        )
        self.predictor = nn.Sequential(
            nn.Linear(d, bottleneck, bias=False),
            nn.BatchNorm1d(bottleneck),
            nn.ReLU(),
            nn.Linear(bottleneck, d),
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One optimizer, in which the predictor's parameters have groups of their own."""
        optimizer = self.facts.optimizer.create(self.backbone, self.projector)
        for group in self.facts.optimizer.create(self.predictor).param_groups:
            optimizer.add_param_group({**group, "constant_lr": self.config.constant_predictor_lr})
        return optimizer

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Set the learning rates."""
        super().on_train_batch_start(batch, batch_idx)
        for group in self.trainer.optimizers[0].param_groups:
            if group.get("constant_lr"):
                group["lr"] = self.facts.optimizer.lr

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """The symmetric loss of two views of each image, and the spread of projections, which falls in collapse."""
        p1, p2, z1, z2 = self._predict(batch.images, generator)
        return {"loss": simsiam_loss(p1, p2, z1, z2), "z_std": relative_std(torch.cat([z1, z2]))}

    def pretext_metric(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Share of predictions whose nearest projection of another view is their image's; 1 / N by chance."""
        p1, _, _, z2 = self._predict(batch.images, generator)
        nearest = (l2_normalize(p1) @ F.normalize(z2.float(), dim=1).T).argmax(1)
        return {
            "prediction_is_nearest": (nearest == torch.arange(len(p1), device=p1.device)).float().mean(),
            "z_std": relative_std(z2),
        }

    def _predict(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        x = self.view(torch.cat([images, images]), self.config.augment, generator)  # (2N, C, H, W)
        z = self.projector(self.backbone(x))
        return (*self.predictor(z).chunk(2), *z.chunk(2))
