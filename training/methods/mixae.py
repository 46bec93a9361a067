"""MIXAE: K autoencoders share out the images among themselves, and an assignment network says whose each one is.

Each autoencoder learns the manifold of the images that it is given, the assignment network learns from all
codes which autoencoder reconstructs an image best; entropies keep assignments sharp and clusters in use.

Source: Deep Unsupervised Clustering Using Mixture of Autoencoders (Zhang, Sun, Eriksson and Balzano, 2017, arXiv
1712.07788), the objective of section 3.

Differences from the source:
- The K encoders share a trunk, the backbone, and differ in the linear layer to their codes: K networks would cost K
  times as much. The trunk is exported; with `embedding="codes"` all K codes, which the assignment network sees.
- The entropies' weights are ours, for want of a formula that we could check: `linear` begins with all clusters
  in use and ends with sharp assignments; `balanced` is after icannos/mixture-autoencoder, where alpha is K times less.
- The assignment network has one hidden layer with BatchNorm. Decoders have one hidden layer, fully connected, all K in
  one batched product. The squared error is meaned over
  pixels; with several ranks the mean assignment is that of the union batch.

Recipe, expected metrics, data, time and command: `embedkit.training.recipes.mixae`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedkit.errors import ConfigError
from embedkit.training.augment import Augmentation, Compose
from embedkit.training.config import Facts
from embedkit.training.data import Batch
from embedkit.training.distributed import gather
from embedkit.training.method import Method, float32_loss
from embedkit.training.models.backbones import Backbone

__all__ = ["FAMILY", "SUMMARY", "MIXAE", "Config", "entropy", "mixae_terms", "term_weights"]

#: The supervision that the method learns from.
FAMILY = "clusters"
#: The sentence that the card of an entry shows.
SUMMARY = (
    "MIXAE: K autoencoders divide the images among themselves, and an assignment network predicts "
    "the autoencoder of each."
)

#: Steps whose mean reconstruction error becomes the unit of both weights.
_CALIBRATION = 100


@dataclass(frozen=True, kw_only=True)
class Config:
    """Of `mixae`.

    Attributes:
        clusters: K, the number of autoencoders, 2 or more.
        code_dim: Width of each autoencoder's code z_k.
        assignment_dim: Width of the assignment network's hidden layer.
        decoder_dim: Width of each decoder's hidden layer.
        schedule: `linear`: alpha rises from 0 over the first half of the run while beta falls to `beta_end`;
            `constant`: both stay; `balanced`: every batch again, in units that make the entropy of a sample as
            large as the reconstruction error, and then the batch's entropy as large as both together.
        alpha: Weight of a sample's entropy; in units of reconstruction error / ln K, except for `balanced`.
        beta: Weight of the batch's entropy, likewise, at the start.
        beta_end: And from the middle of the run on.
        embedding: What is exported: the trunk's `features`, or all `codes` side by side (K * code_dim).
        augment: What an image goes through before it is encoded; it is reconstructed as it was.
    """

    clusters: int = 10
    code_dim: int = 10
    assignment_dim: int = 64
    decoder_dim: int = 256
    schedule: Literal["linear", "constant", "balanced"] = "linear"
    alpha: float = 0.1
    beta: float = 1.0
    beta_end: float = 0.1
    embedding: Literal["features", "codes"] = "features"
    augment: Augmentation = Compose(steps=())


def entropy(p: Tensor) -> Tensor:
    """-sum_k p_k ln p_k along the last axis, in nats; 0 ln 0 = 0."""
    smallest = torch.finfo(p.dtype).tiny  # at 0 the slope of p ln p is infinite
    return -(p * p.clamp(min=smallest).log()).sum(-1)


@float32_loss
def mixae_terms(errors: Tensor, p: Tensor) -> Tensor:
    """The three terms of the objective, rec + alpha * sample - beta * batch; gradient flows through p in each.

        rec    = 1/N sum_i sum_k p_ik e_ik
        sample = 1/N sum_i H(p_i)                low: every image has one autoencoder
        batch  = H(1/N sum_i p_i)                high: every autoencoder has as many images

    Args:
        errors: (N, K), e_ik = |x_i - x^_ik|^2 of image i by autoencoder k.
        p: (N, K), the assignment; rows sum to 1.

    Returns:
        (3,): rec, sample, batch; the entropies in nats, 0 to ln K. The mean of the last runs over all ranks.
    """
    return torch.stack([(p * errors).sum(1).mean(), entropy(p).mean(), entropy(gather(p).mean(0))])


def term_weights(config: Config, terms: Tensor, progress: float, unit: Tensor) -> tuple[Tensor, Tensor]:
    """Alpha and beta of a batch, without gradient.

    Args:
        config: Schedule and end points.
        terms: Of `mixae_terms`; used by `balanced` alone.
        progress: Share of the run that is done, in [0, 1].
        unit: A scalar, reconstruction error / ln K.
    """
    if config.schedule == "balanced":
        rec, sample, batch = terms.detach().clamp(min=1e-6)
        alpha = config.alpha * rec / sample
        return alpha, config.beta * (rec + alpha * sample) / batch
    if config.schedule == "constant":
        return config.alpha * unit, config.beta * unit
    if config.schedule != "linear":
        raise ConfigError(f"schedule: expected linear, constant or balanced, found {config.schedule!r}")
    done = min(1.0, 2 * progress)
    return config.alpha * done * unit, (config.beta + (config.beta_end - config.beta) * done) * unit


class Decoders(nn.Module):
    """K decoders side by side: code -> hidden -> pixels, ReLU between.

    Args:
        decoders: K.
        dims: Widths of code, hidden layer and image.
    """

    def __init__(self, decoders: int, dims: tuple[int, int, int]) -> None:
        super().__init__()
        layers = zip(dims[:-1], dims[1:], strict=True)
        uniform = [
            torch.empty(decoders, 1 + fan_in, out).uniform_(-1, 1) / fan_in**0.5 for fan_in, out in layers
        ]
        self.weights = nn.ParameterList(uniform)  # the first row of each is the bias

    def forward(self, codes: Tensor) -> Tensor:
        """Codes (N, K, d) -> images, flattened (N, K, P)."""
        x = codes.transpose(0, 1)  # (K, N, d)
        for index, weight in enumerate(self.weights):
            x = torch.baddbmm(weight[:, :1], F.relu(x) if index else x, weight[:, 1:])
        return x.transpose(0, 1)


class MIXAE(Method):
    """Trunk -> K codes z_k -> K decoders, and the assignment network on the K codes side by side."""

    stops_gradient = True  # the weights of the entropies follow the error, and take no gradient

    unit: Tensor

    def __init__(self, backbone: Backbone, config: Config, facts: Facts) -> None:
        super().__init__(backbone, config, facts)
        if config.clusters < 2:
            raise ConfigError(f"mixae: expected 2 or more clusters, found {config.clusters}")
        if min(config.code_dim, config.assignment_dim, config.decoder_dim) < 1:
            raise ConfigError(
                "mixae: expected a code_dim, an assignment_dim and a decoder_dim of 1 or more, found "
                f"{config.code_dim}, {config.assignment_dim} and {config.decoder_dim}"
            )
        k, width = config.clusters, config.clusters * config.code_dim  # (K, K * d)
        self.codes = nn.Linear(backbone.dim, width)
        self.decoders = Decoders(k, (config.code_dim, config.decoder_dim, math.prod(facts.image_shape)))
        self.assignment = nn.Sequential(
            nn.Linear(width, config.assignment_dim, bias=False),
            nn.BatchNorm1d(config.assignment_dim),
            nn.ReLU(),
            nn.Linear(config.assignment_dim, k),
        )
        self.register_buffer("unit", torch.zeros(()))

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Weighted reconstruction and both entropies of one view of each image."""
        errors, p = self._mixture(batch.images, self.config.augment, generator)
        terms = mixae_terms(errors, p)
        if self.batches_seen <= _CALIBRATION:
            rec = gather(terms[:1].detach()).mean() / math.log(self.config.clusters)
            self.unit += (rec - self.unit) / self.batches_seen
        alpha, beta = term_weights(self.config, terms, self.progress, self.unit)
        rec, sample, batch_entropy = terms
        return {
            "loss": rec + alpha * sample - beta * batch_entropy,
            "reconstruction": rec,
            "sample_entropy": sample,
            "batch_entropy": batch_entropy,
            "used_clusters": batch_entropy.exp(),
        }

    def assign(self, images: Tensor) -> Tensor:
        """The cluster of each image uint8 (N, C, H, W): int64 (N,), argmax_k p_k."""
        return self.assignment(self.codes(self.backbone(self.view(images)))).argmax(1)

    def encoder(self) -> nn.Module:
        """The trunk, or the trunk and the layer to all codes."""
        return nn.Sequential(self.backbone, self.codes) if self.config.embedding == "codes" else self.backbone

    def pretext_metric(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Variance that an image's own autoencoder explains (0 for the mean image), and clusters in use."""
        errors, p = self._mixture(batch.images, None, generator)
        own = errors.gather(1, p.argmax(1, keepdim=True)).mean()
        x = self.view(batch.images)
        variance = (x - x.mean(0)).square().mean()
        return {"explained_variance": 1 - own / variance, "used_clusters": entropy(p.mean(0)).exp()}

    def pretext_chance(self) -> dict[str, float]:
        """The mean image."""
        return {"explained_variance": 0.0}

    def solved(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Images, and what the autoencoder that each is assigned to makes of it."""
        z = self.codes(self.backbone(self.view(batch.images)))
        own = self._decoded(z)[torch.arange(len(z), device=z.device), self.assignment(z).argmax(1)]
        return {
            "true": self.pixels(batch.images),
            "reconstructed": self.denormalize(own.unflatten(1, self.facts.image_shape)),
        }

    def _decoded(self, z: Tensor) -> Tensor:
        """Codes (N, K * d) -> images of all K autoencoders, normalized and flattened (N, K, C * H * W)."""
        return self.decoders(z.unflatten(1, (self.config.clusters, -1))).float()

    def _mixture(
        self, images: Tensor, augment: Augmentation | None, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Errors (N, K) of every autoencoder and assignments p (N, K)."""
        z = self.codes(self.backbone(self.view(images, augment, generator)))  # (N, K * d)
        decoded = self._decoded(z)
        errors = (decoded - self.view(images).flatten(1)[:, None]).square().mean(2)
        return errors, self.assignment(z).float().softmax(1)
