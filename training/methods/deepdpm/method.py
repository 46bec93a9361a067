"""DeepDPM: clusters whose number is found, on the codes of an encoder or of an autoencoder that learns with them.

A clustering net and a Gaussian mixture teach each other, and clusters split and merge as a Dirichlet process
prior finds likely; then the autoencoder is drawn towards the clusters, and its new codes are clustered again.

Source: DeepDPM: Deep Clustering With an Unknown Number of Clusters (Ronen, Finder and Freifeld, CVPR 2022, arXiv
2203.14309), and the authors' code where the paper leaves something open.

Differences from the source:
- Splits and merges are decided by the exact marginal likelihood; the authors' code puts the mixture's current
  mean in the place of the points' own, which lowers it.
- A split leaves all other clusters' responsibilities as they are (its two logits add up to the old one), and of
  the possible merges the likeliest come first; clusters that no code belongs to are dropped before a move.
- The nets see standardized codes: the clustering net over all of them, a sub-clustering net over its cluster.
  Far from the origin a sub-clustering net at random gives a whole cluster to one half, and stays there.
- Mixing weights are smoothed by the Dirichlet's own pseudo-counts alpha / K, and not by 0.1.
- Larger steps and earlier moves, to fit minutes on a CPU; `ClustersConfig` has the fields to undo it.
- Later rounds start from the labels of the round before; theirs from its centers. A half that no code belongs to
  keeps its mean; theirs draws both halves again.
- The autoencoder is the backbone, a linear layer and BatchNorm (as in the authors' code, codes are standardized,
  so they cannot shrink towards their means; without its ReLU), and a convolutional decoder.

A run is made of rounds of three stages: batches train the autoencoder, batches are encoded, and then each step
is an epoch of the clusters over all codes, which takes about as long as a batch of images. With `weights` the
encoder is given and stays, and there is one round of the last two. One device: parameters change shape. The
clusters themselves are the module `clusters`, the space that they live in `reduction`.

Recipes, expected metrics, data, time and commands: `embedkit.training.recipes.deepdpm`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import save
from safetensors.torch import load_file
from torch import Tensor, nn

from embedkit.errors import ConfigError
from embedkit.model.layout import MIXTURE
from embedkit.model.preprocess import Preprocess
from embedkit.training.augment import Augmentation, Compose
from embedkit.training.config import Facts
from embedkit.training.data import Batch
from embedkit.training.init import contract_of, weights_in
from embedkit.training.method import Method, float32_loss
from embedkit.training.methods.deepdpm.clusters import Clusters, ClustersConfig
from embedkit.training.methods.deepdpm.niw import hard_moments, log_densities, precision_cholesky
from embedkit.training.methods.deepdpm.reduction import CodeReduction
from embedkit.training.models.backbones import Backbone
from embedkit.training.models.heads import ConvDecoder
from embedkit.training.stages import Plan, Stage

__all__ = ["FAMILY", "SUMMARY", "Config", "DeepDPM", "alternation_loss", "alternation_plan"]

#: The supervision that the method learns from.
FAMILY = "clusters"
#: The sentence that the card of an entry shows.
SUMMARY = (
    "DeepDPM: finds clusters and their number, on the codes of an encoder or of an autoencoder that "
    "is trained with them."
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Of `deepdpm`.

    Attributes:
        weights: A safetensors file with the weights of the backbone, or the folder of a run or an entry that holds
            one, whose features are clustered as they are; empty: an autoencoder is trained.
        code_dim: Width of the autoencoder's code.
        reduce: What is clustered: the codes (`none`), their principal components, or their UMAP embedding, as in
            the published figures; UMAP is no encoder, so its clusters are exported as Gaussians of the codes.
        transform: `normalize` brings what is clustered to length 1, as in the authors' code where the codes are
            given; never for points of a plane.
        reduce_dim: Width of what `pca` and `umap` give.
        rounds: Alternations of autoencoder and clusters; fewer where a round would be below 4 epochs, one where
            the encoder is given or codes are reduced.
        reconstruction_weight: Of the squared error, summed over pixels, from the second round on: the paper's
            lambda.
        cluster_weight: Of half the squared distance between a code and its nearest mean: beta.
        clusters: How clusters are learned.
        augment: What an image goes through before the autoencoder; the outcome is what is rebuilt.
    """

    weights: str = ""
    code_dim: int = 10
    reduce: Literal["none", "pca", "umap"] = "none"
    reduce_dim: int = 10
    transform: Literal["none", "normalize"] = "none"
    rounds: int = 3
    reconstruction_weight: float = 0.005
    cluster_weight: float = 1.0
    clusters: ClustersConfig = ClustersConfig(init_k=3)
    augment: Augmentation = Compose(steps=())


def alternation_plan(total: int | None, steps_per_epoch: int, *, rounds: int, trained: bool) -> Plan:
    """The stages of a run: of each round a quarter or more clusters; an epoch, at most another quarter, encodes.

    Args:
        total: Steps of the run; None while that is measured.
        steps_per_epoch: Batches of one pass over the data.
        rounds: At most; a round has 4 epochs or more, unless it is the only one.
        trained: Whether there is an autoencoder to train; without one, at most half encodes, and the rest clusters.
    """
    if total is None:
        return [("autoencoder" if trained else "encode", None)]
    rounds = max(1, min(rounds, total // (4 * steps_per_epoch)))
    plan: list[tuple[str, int | None]] = []
    for number in range(rounds):
        start = number * (total // rounds)
        length = (total if number == rounds - 1 else start + total // rounds) - start
        encode = min(steps_per_epoch, math.ceil(length / (4 if trained else 2)))
        train = length - encode - length // 4 if trained else 0
        # where the data begin again, so that every image is encoded once
        train = max((start + train) // steps_per_epoch * steps_per_epoch - start, 0) or train
        plan += [("autoencoder", train)] if train else []
        plan += [("encode", encode), ("cluster", length - train - encode)]
    return plan


@float32_loss
def alternation_loss(
    decoded: Tensor, x: Tensor, codes: Tensor, means: Tensor, weights: tuple[float, float]
) -> Tensor:
    """The sum lambda |x - x^|^2 + beta / 2 min_k |z - mu_k|^2, meaned over rows; no gradient reaches mu.

    Args:
        decoded: Images (N, C, H, W).
        x: What they should be.
        codes: z, (N, D).
        means: mu, (K, D).
        weights: lambda and beta.
    """
    rebuilt = (decoded - x).square().sum((1, 2, 3))
    nearest = (codes[:, None] - means.detach().to(codes)).square().sum(2).min(1).values
    return (weights[0] * rebuilt + weights[1] / 2 * nearest).mean()


class DeepDPM(Method):
    """Backbone, a linear code with BatchNorm and a decoder (unless the encoder is given), and the clusters.

    Attributes:
        codes: (N, D), of the images that were encoded last; `known` (N,) says which.
        labels: int64 (N,), the cluster of each image, -1 where there is none yet.
    """

    inert = ("reduce_dim", "rounds", "cluster_weight")

    codes: Tensor
    known: Tensor
    labels: Tensor

    def __init__(self, backbone: Backbone, config: Config, facts: Facts) -> None:
        super().__init__(backbone, config, facts)
        self.automatic_optimization = False
        self._entering = False
        channels, height, _ = facts.image_shape
        dim = backbone.dim if config.weights else config.code_dim
        self.reduction = CodeReduction(config.reduce, dim, config.reduce_dim, config.transform)
        if config.weights:
            backbone.requires_grad_(False)
        else:
            self.code = nn.Sequential(nn.Linear(backbone.dim, dim), nn.BatchNorm1d(dim, affine=False))
            self.decoder = ConvDecoder(dim, out_chans=channels, image_size=height, width=16)
        self.clusters = Clusters(self.reduction.width, config.clusters)
        images = facts.num_images
        self.register_buffer("codes", torch.zeros(images, dim))
        self.register_buffer("known", torch.zeros(images, dtype=torch.bool))
        self.register_buffer("labels", torch.full((images,), -1))

    @classmethod
    def contract(cls, config: Config) -> Preprocess | None:
        """That of the entry or the run whose encoder is given: color, resize rule, mean and std."""
        return contract_of(Path(config.weights)) if config.weights else None

    def plan(self) -> Plan:
        """`autoencoder`, `encode` and `cluster`, round by round."""
        rounds = self.config.rounds if self.config.reduce == "none" and not self.config.weights else 1
        return alternation_plan(
            self.total_steps, self.facts.steps_per_epoch, rounds=rounds, trained=not self.config.weights
        )

    def begin_stage(self, stage: Stage) -> None:
        """Say so to the step that follows."""
        self._entering = True

    def encoder(self) -> nn.Module:
        """The backbone as it was given, or the backbone and the layer to the code."""
        return self.backbone if self.config.weights else nn.Sequential(self.backbone, self.code)

    def configure_optimizers(self) -> Any:
        """The run's optimizer for the autoencoder, and the clusters' own, whose rates stay."""
        clusters = self.clusters.optimizer()
        for group in clusters.param_groups:
            group["own_lr"] = group["lr"]
        if self.config.weights:
            return clusters
        return [self.facts.optimizer.create(self.backbone, self.code, self.decoder), clusters]

    def on_fit_start(self) -> None:
        """Refuse several devices; take the encoder's weights.

        Raises:
            ConfigError: More than one device, or weights that are not the backbone's.
        """
        if self.trainer.world_size > 1:
            raise ConfigError(f"deepdpm: expected one device, found {self.trainer.world_size}; set devices=1")
        if self.config.weights and not self.batches_seen:
            try:
                self.backbone.net.load_state_dict(load_file(weights_in(Path(self.config.weights))))
            except (OSError, ValueError, RuntimeError, SafetensorError) as error:
                reason = str(error).splitlines()[0]
                raise ConfigError(
                    f"method.weights: {self.config.weights} does not fit the backbone ({reason}); name the folder of "
                    "a run or an entry with the same backbone and images"
                ) from error

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make room for what the checkpoint has, before weights and optimizers are loaded."""
        self.clusters.resize(len(checkpoint["state_dict"]["clusters.weights"]))
        self.reduction.resize(len(checkpoint["state_dict"]["reduction.embedded"]))

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """As all methods; the clusters have rates of their own."""
        super().on_train_batch_start(batch, batch_idx)
        for group in self.trainer.optimizers[-1].param_groups:
            group["lr"] = group["own_lr"]

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """A step of the autoencoder, the codes of a batch, or an epoch of the clusters."""
        stage = self.stage
        entering, self._entering = self._entering, False
        if stage.name == "autoencoder":
            self.log_dict(self._train_autoencoder(batch))
            return
        with torch.autocast(self.device.type, enabled=False):
            if entering and stage.name == "encode":
                self.known.zero_()
            if stage.name == "encode" or not self.known.any():
                self.codes[batch.indices] = self._embed(batch.images)
                self.known[batch.indices] = True
            if stage.name == "cluster":
                optimizer = self.trainer.optimizers[-1]
                if entering:
                    self._begin_clusters(optimizer)
                points = self.reduction.points(self.codes[self.known])
                moves = stage.left >= self.config.clusters.move_every
                logs = self.clusters.learn(points, optimizer, moves=moves)
                self.labels[self.known] = self.clusters.assign(points)
                self.log_dict({"loss": logs["cluster_loss"], **logs})

    def pretext_metric(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """On held-out images: nats by which the mixture is likelier than one Gaussian, and clusters in use."""
        if not self.known.any():
            return {}
        weights, means, covs = self._gaussians()
        # in float32, as the codes were that the mixture was fitted to
        with torch.autocast(self.device.type, enabled=False):
            space = self.reduction.space(self._embed(batch.images))
            everyone = self.reduction.space(self.codes[self.known])
        mixture = (weights.log() + log_densities(space, means, precision_cholesky(covs))).logsumexp(1)
        _, mean, cov = self._gaussians(torch.zeros(len(everyone), dtype=torch.long, device=self.device))
        one = log_densities(space, mean, precision_cholesky(cov))[:, 0]
        return {
            "gain_over_one_gaussian": (mixture - one).mean(),
            "clusters": torch.tensor(float(len(weights))),
        }

    def mixture(self) -> dict[str, np.ndarray]:
        """The mixture over the encoder's embeddings h, as float64 arrays that need no torch.

        With y = (h - center) @ components, of length 1 where the file's `transform` says so, P = precision_cholesky[k]:

            log N(y; mu_k, Sigma_k) = -|(y - means[k]) @ P|^2 / 2 + sum(log(diagonal(P))) - d / 2 log(2 pi)

        Returns:
            `weights` (K,), `means` (K, d), `precision_cholesky` (K, d, d), `center` (D,), `components` (D, d); no
            cluster is empty.
        """
        weights, means, covs = self._gaussians()
        center = self.reduction.center, self.reduction.components
        values = (weights, means, precision_cholesky(covs), *(value.double() for value in center))
        names = ("weights", "means", "precision_cholesky", "center", "components")
        return {name: value.cpu().numpy() for name, value in zip(names, values, strict=True)}

    def files(self) -> dict[str, bytes]:
        """`mixture.safetensors`: `mixture` with `transform` in its metadata; {} before there are clusters."""
        if not (self.labels >= 0).any():
            return {}
        # one key: several have no order
        return {MIXTURE: save(self.mixture(), {"transform": self.reduction.space_transform})}

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Of the autoencoder: reconstruction, and from the second round on the distance to the nearest cluster."""
        number = self.stage.round
        x = self.view(batch.images, self.config.augment, generator)
        codes = self.code(self.backbone(x))
        decoded = self.decoder(codes)
        # in the first round there are no clusters yet
        means = self.clusters.means if number else codes.detach()[:1]
        weights = (self.config.reconstruction_weight, self.config.cluster_weight if number else 0.0)
        loss = alternation_loss(decoded, x, self.reduction.space(codes.float()), means, weights)
        return {"loss": loss, "reconstruction": (decoded.detach().float() - x).square().mean()}

    def _train_autoencoder(self, batch: Batch) -> dict[str, Tensor]:
        outputs = self.loss(batch, self.generator())
        optimizer = self.optimizers()[0]  # type: ignore[index]
        optimizer.zero_grad()
        self.manual_backward(outputs["loss"])
        optimizer.step()
        return {name: value.detach() for name, value in outputs.items()}

    @torch.no_grad()
    def _embed(self, images: Tensor) -> Tensor:
        """The codes of images as they are, (N, D) float32, by the running statistics of BatchNorm."""
        encoder = self.encoder()
        training = self.training
        codes = encoder.eval()(self.view(images)).float()
        encoder.train(training)
        return codes

    def _begin_clusters(self, optimizer: torch.optim.Optimizer) -> None:
        codes = self.codes[self.known]
        self.reduction.fit(codes, self.facts.seed)
        self.labels[~self.known] = -1  # of an older round's clusters
        before, points = self.labels[self.known], self.reduction.points(codes)
        if (before >= 0).any():  # the clusters of the round before, on new codes
            self.clusters.start(points[before >= 0], optimizer, before[before >= 0])
        else:
            self.clusters.start(points, optimizer)

    @torch.no_grad()
    def _gaussians(self, labels: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Weights, means and covariances over `reduction.space`, of the clusters in use or of given labels."""
        if labels is None:
            used = self.labels[self.known].unique()
            if self.reduction.linear:
                weights = self.clusters.weights[used]
                return weights / weights.sum(), self.clusters.means[used], self.clusters.covs[used]
            labels = torch.searchsorted(used, self.labels[self.known])
        space = self.reduction.space(self.codes[self.known])
        found = hard_moments(space, labels, int(labels.max()) + 1)
        return found.count / len(space), *self.config.clusters.prior(space).mode(found)
