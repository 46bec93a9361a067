"""SphereFace: classification by angles alone, where an image must be m times closer to its identity than to others.

The margin leaves room between identities on the sphere, so that identities which were never seen are told apart by
their angles too.

Source: SphereFace: Deep Hypersphere Embedding for Face Recognition (Liu et al., CVPR 2017, arXiv 1704.08063),
equation 7, psi of section 3.2; annealing of the authors' code. The form `opensphere`: SphereFace Revived: Unifying
Hyperspherical Face Recognition (Liu et al., TPAMI 2022, arXiv 2109.05565), characteristic gradient detachment, in the
form of its authors' code (opensphere).

Differences from the source:
- Lengths of the identities' weights are divided out with gradient, and set back to 1 after every step; the authors'
  code does the second alone. The gradient along a weight is then 0 instead of being undone.
- cos(m theta) is a polynomial of cos theta, so no gradient is infinite at 0 and pi.
- The embedding is a linear layer on pooled features, not on the last map, and its width is that of r10: 256, not 512.
- `opensphere` is the default, with its margin of 1.7 rising from 1 over the first tenth of the run, which is ours:
  it needs no lambda and trains stably. `cvpr17` is the paper's m = 4, whose lambda counts steps as the authors' does.
- The recipe is ours: r10 on drawings of 32 pixels, AdamW and one-cycle; the paper's is a 20 to 64 layer network with
  PReLU and no BatchNorm, SGD in steps, on faces aligned to 112x96.
- For testing, features of an image and its mirror image are not put side by side.

Recipe, expected metrics, data, time and command: `embedkit.training.recipes.sphereface`.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedkit.errors import ConfigError
from embedkit.training.augment import Augmentation, ColorJitter, Compose, RandomAffine
from embedkit.training.config import Facts
from embedkit.training.data import Batch
from embedkit.training.data.targets import accuracy, cross_entropy
from embedkit.training.method import Method, float32_loss
from embedkit.training.models.backbones import Backbone

__all__ = ["FAMILY", "SUMMARY", "Config", "SphereFace", "a_softmax", "annealing", "detached_margin", "psi"]

#: The supervision that the method learns from.
FAMILY = "identities"
#: The sentence that the card of an entry shows.
SUMMARY = (
    "SphereFace: classification by angle alone, with a margin: an image must be m times closer to "
    "its identity than to others."
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Of `sphereface`.

    Attributes:
        form: `opensphere` normalizes features and gives psi no gradient of its own; `cvpr17` is the paper's.
        margin: m, 1 or more; a whole number for `cvpr17`.
        scale: s, the length that features are given; `opensphere` alone.
        margin_warmup: Share of the run over which m rises from 1; `opensphere` alone.
        lambda_base: lambda of the first step; `cvpr17` alone, as the next two.
        lambda_gamma: lambda = max(lambda_min, lambda_base / (1 + lambda_gamma * step)).
        lambda_min: Below this it does not fall, so the margin never acts in full.
        embed_dim: Width of the embedding.
        augment: What an image goes through.
    """

    form: Literal["opensphere", "cvpr17"] = "opensphere"
    margin: float = 1.7
    scale: float = 30.0
    margin_warmup: float = 0.1
    lambda_base: float = 1000.0
    lambda_gamma: float = 0.12
    lambda_min: float = 5.0
    embed_dim: int = 256
    augment: Augmentation = Compose(
        steps=(
            RandomAffine(degrees=15.0, translate=(0.1, 0.1), scale=(0.8, 1.2), fill=1.0),
            ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.05),
        )
    )


def psi(cosine: Tensor, margin: float) -> Tensor:
    """(-1)^k cos(m theta) - 2k for theta in [k pi / m, (k + 1) pi / m]: falls on where cos(m theta) would rise.

    Args:
        cosine: cos theta, any shape, in [-1, 1].
        margin: m, 1 or more. Gradient flows for a whole number alone.

    Returns:
        Of the same shape, 1 at 0; at pi 1 - 2m for a whole m.
    """
    with torch.no_grad():
        angle = margin * cosine.clamp(-1.0, 1.0).acos()
        k = (angle / math.pi).floor()
        sign = 1 - 2 * torch.remainder(k, 2)
    if margin != int(margin):
        return sign * angle.cos() - 2 * k
    before, multiple = torch.ones_like(cosine), cosine
    for _ in range(int(margin) - 1):  # Chebyshev's recurrence, for m = 4 up to 8 c^4 - 8 c^2 + 1
        before, multiple = multiple, 2 * cosine * multiple - before
    return sign * multiple - 2 * k


def annealing(step: int, base: float, gamma: float, minimum: float) -> float:
    """The lambda of a step, counted from 0: max(minimum, base / (1 + gamma * step))."""
    return max(minimum, base / (1 + gamma * step))


@float32_loss
def a_softmax(embeddings: Tensor, weights: Tensor, labels: Tensor, margin: int, lambda_: float) -> Tensor:
    """A-Softmax loss (equation 7) with an annealed target, meaned over rows: the form `cvpr17`.

        logit_j = |x| cos theta_j,   logit_y = |x| (lambda cos theta_y + psi(theta_y)) / (1 + lambda)

    Args:
        embeddings: x (N, D), of their own lengths.
        weights: (K, D), one row for each identity, of any length above 0; there is no bias.
        labels: int64 (N,), identities 0..K-1; rows of -1 are left out.
        margin: m, a whole number.
        lambda_: 0 or more; 0 is equation 7.

    Returns:
        A scalar, in nats.
    """
    cosine = F.normalize(embeddings, dim=1) @ F.normalize(weights, dim=1).T  # (N, K)
    own = cosine.gather(1, _columns(labels))
    target = (lambda_ * own + psi(own, margin)) / (1 + lambda_)
    logits = embeddings.norm(dim=1, keepdim=True) * cosine.scatter(1, _columns(labels), target)
    return cross_entropy(logits, labels)


@float32_loss
def detached_margin(
    embeddings: Tensor, weights: Tensor, labels: Tensor, margin: float, scale: float
) -> Tensor:
    """Features of length s, psi in the value and a cosine in the gradient: the form `opensphere`.

        logit_j = s cos theta_j,   logit_y = s (cos theta_y + stopgrad(psi(theta_y) - cos theta_y))

    Arguments are those of `a_softmax`; `margin` is any number from 1, `scale` is s, above 0.
    """
    cosine = F.normalize(embeddings, dim=1) @ F.normalize(weights, dim=1).T  # (N, K)
    own = cosine.gather(1, _columns(labels)).detach()
    delta = torch.zeros_like(cosine).scatter(1, _columns(labels), psi(own, margin) - own)
    return cross_entropy(scale * (cosine + delta), labels)


def _columns(labels: Tensor) -> Tensor:
    """The column of each row's identity (N, 1); any, for a row without one, which is left out of the mean."""
    return labels.clamp(min=0)[:, None]


class SphereFace(Method):
    """Backbone, the linear embedding layer, and a unit vector for each identity."""

    uses_labels = True
    stops_gradient = True
    inert = ("lambda_base", "lambda_gamma", "lambda_min")

    def __init__(self, backbone: Backbone, config: Config, facts: Facts) -> None:
        super().__init__(backbone, config, facts)
        if facts.num_classes < 2:
            raise ConfigError(
                f"sphereface: expected 2 or more identities, found {facts.num_classes}; "
                "name their column with --set data.label=COLUMN"
            )
        if config.form not in ("opensphere", "cvpr17"):
            raise ConfigError(f"form: expected opensphere or cvpr17, found {config.form!r}")
        if not 1 <= config.margin <= 16 or (config.form == "cvpr17" and config.margin != int(config.margin)):
            raise ConfigError(
                f"margin: expected 1 to 16, and a whole number for cvpr17; found {config.margin:g}"
            )
        self.embedding = nn.Linear(backbone.dim, config.embed_dim)
        self.identities = nn.Parameter(F.normalize(torch.randn(facts.num_classes, config.embed_dim), dim=1))

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """The margin's loss of one view of each image, and the share of views that are identified."""
        embeddings = self._embed(batch, self.config.augment, generator)
        c, step = self.config, max(0, self.batches_seen - 1)
        if c.form == "cvpr17":
            lambda_ = annealing(step, c.lambda_base, c.lambda_gamma, c.lambda_min)
            loss = a_softmax(embeddings, self.identities, batch.labels, int(c.margin), lambda_)
        else:
            loss = detached_margin(embeddings, self.identities, batch.labels, self.margin(), c.scale)
        return {"loss": loss, "accuracy": self._accuracy(embeddings, batch.labels)}

    def margin(self) -> float:
        """The m of this batch in `opensphere`: 1 while the run's length is not known, then it rises."""
        done = self.progress / self.config.margin_warmup if self.config.margin_warmup > 0 else 1.0
        return 1 + (self.config.margin - 1) * min(1.0, done)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Bring the identities' weights back to the sphere."""
        with torch.no_grad():
            self.identities.copy_(F.normalize(self.identities, dim=1))

    def encoder(self) -> nn.Module:
        """Backbone and embedding layer; the identities stay in the run."""
        return nn.Sequential(OrderedDict(backbone=self.backbone.net, embedding=self.embedding))

    def pretext_metric(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Share of images, as they are, whose nearest identity is their own; 1 / K by chance."""
        return {"identified": self._accuracy(self._embed(batch), batch.labels)}

    def _embed(
        self, batch: Batch, augment: Augmentation | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        return self.embedding(self.backbone(self.view(batch.images, augment, generator)))  # (N, D)

    def _accuracy(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return accuracy(embeddings.detach().float() @ self.identities.T, labels)
