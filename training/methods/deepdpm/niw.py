"""The normal-inverse-Wishart prior of a Gaussian cluster: what a cluster is worth, and when to split or merge it.

A cluster is known by its moments (count, mean, scatter) alone, so the union of two clusters is worth what their
moments say, without another look at the data. Everything is float64: differences of marginal likelihoods of
thousands of points decide.

Sources: Conjugate Bayesian analysis of the Gaussian distribution (Murphy, 2007, section 9) for posterior and
marginal; Parallel Sampling of DP Mixture Models using Sub-Clusters Splits (Chang and Fisher, NIPS 2013,
equation 13 ff.) and DeepDPM (Ronen, Finder and Freifeld, CVPR 2022, arXiv 2203.14309, section 4.3) for the ratios.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from embedkit.errors import ConfigError

__all__ = [
    "TorchNIW",
    "TorchMoments",
    "hard_moments",
    "log_densities",
    "log_hastings_split",
    "merge_pairs",
    "moments",
    "precision_cholesky",
    "union",
    "worth_splitting",
]


@dataclass(frozen=True)
class TorchMoments:
    """Sufficient statistics of K clusters, float64.

    Attributes:
        count: (K,), the sum of the points' weights.
        mean: (K, D); zero where the count is zero.
        scatter: (K, D, D), the weighted sum of (x - mean)(x - mean)^T.
    """

    count: Tensor
    mean: Tensor
    scatter: Tensor

    def __getitem__(self, index: Tensor | slice) -> TorchMoments:
        """The clusters of some indices, a mask or a slice."""
        return TorchMoments(self.count[index], self.mean[index], self.scatter[index])


def moments(codes: Tensor, weights: Tensor) -> TorchMoments:
    """Weighted moments.

    Args:
        codes: (N, D).
        weights: (N, K), each point's share in each cluster, 0 or more.
    """
    codes = codes.double()
    return _stack([_moments(codes, column) for column in weights.double().T])


def hard_moments(codes: Tensor, labels: Tensor, clusters: int) -> TorchMoments:
    """Moments of a partition.

    Args:
        codes: (N, D).
        labels: int64 (N,), the cluster of each point, 0..clusters-1.
        clusters: K; clusters that no point is in have a count of 0.
    """
    codes = codes.double()
    parts = [codes[labels == k] for k in range(clusters)]
    return _stack([_moments(part, part.new_ones(len(part))) for part in parts])


def union(a: TorchMoments, b: TorchMoments) -> TorchMoments:
    """The moments of each cluster of `a` together with the same-numbered cluster of `b`."""
    count = a.count + b.count
    total = count.clamp(min=torch.finfo(count.dtype).tiny)
    apart = b.mean - a.mean  # (K, D)
    mean = a.mean + (b.count / total)[:, None] * apart
    between = (a.count * b.count / total)[:, None, None] * apart[:, :, None] * apart[:, None, :]
    return TorchMoments(count, mean, a.scatter + b.scatter + between)


@dataclass(frozen=True)
class TorchNIW:
    """mu | Sigma ~ N(mean, Sigma / kappa), Sigma ~ IW(psi, nu).

    Attributes:
        mean: (D,), float64: m.
        kappa: Points that the mean is worth, above 0.
        psi: (D, D), float64, positive definite: the scatter that one expects at nu points.
        nu: Degrees of freedom, above D - 1.

    Raises:
        ConfigError: kappa or nu too small.
    """

    mean: Tensor
    kappa: float
    psi: Tensor
    nu: float

    def __post_init__(self) -> None:
        if self.kappa <= 0 or self.nu <= len(self.mean) - 1:
            raise ConfigError(
                f"TorchNIW: expected kappa above 0 and nu above D - 1 = {len(self.mean) - 1}, "
                f"found {self.kappa} and {self.nu}"
            )

    def log_marginal(self, data: TorchMoments) -> Tensor:
        """The points' density, log f(X), with mean and covariance integrated out, exactly.

            -ND/2 log pi + log Gamma_D(nu*/2) - log Gamma_D(nu/2) + nu/2 log|Psi| - nu*/2 log|Psi*|
            + D/2 log(kappa/kappa*)

        with nu* = nu + N, kappa* = kappa + N, and Psi* as in `_scatter`.

        Returns:
            (K,), in nats; 0 for a cluster without points.
        """
        count, dim = data.count, len(self.mean)
        nu = self.nu + count
        before = torch.special.multigammaln(self.psi.new_tensor(self.nu / 2), dim)
        return (
            -count * dim / 2 * math.log(math.pi)
            + torch.special.multigammaln(nu / 2, dim)
            - before
            + self.nu / 2 * _logdet(self.psi)
            - nu / 2 * _logdet(self._scatter(data))
            - dim / 2 * torch.log1p(count / self.kappa)
        )

    def mode(self, data: TorchMoments) -> tuple[Tensor, Tensor]:
        """The most likely parameters after the points: the mode of the joint posterior.

        Returns:
            means: (K, D), (kappa m + N mean) / (kappa + N).
            covs: (K, D, D), Psi* / (nu + N + D + 2).
        """
        total = self.kappa + data.count
        means = (self.kappa * self.mean + data.count[:, None] * data.mean) / total[:, None]
        degrees = self.nu + data.count + len(self.mean) + 2
        return means, self._scatter(data) / degrees[:, None, None]

    def _scatter(self, data: TorchMoments) -> Tensor:
        """Psi* = Psi + scatter + kappa N / (kappa + N) (mean - m)(mean - m)^T, (K, D, D)."""
        off = data.mean - self.mean  # (K, D)
        pull = self.kappa * data.count / (self.kappa + data.count)
        return self.psi + data.scatter + pull[:, None, None] * off[:, :, None] * off[:, None, :]


def log_hastings_split(prior: TorchNIW, left: TorchMoments, right: TorchMoments, alpha: float) -> Tensor:
    """The log Hastings ratio of splitting each cluster in its two halves; of merging them, it is the negative.

        H = alpha Gamma(N_l) f(X_l) Gamma(N_r) f(X_r) / (Gamma(N) f(X))

    Args:
        prior: Of every cluster.
        left: Hard moments of one half of each cluster, none empty.
        right: Of the other half.
        alpha: Concentration of the Dirichlet process, above 0.

    Returns:
        (K,), in nats.
    """

    def worth(data: TorchMoments) -> Tensor:
        return torch.lgamma(data.count) + prior.log_marginal(data)

    return math.log(alpha) + worth(left) + worth(right) - worth(union(left, right))


def worth_splitting(
    prior: TorchNIW, left: TorchMoments, right: TorchMoments, alpha: float, chance: Tensor, fewest: int = 5
) -> Tensor:
    """Which clusters to split: with probability min(1, H).

    Args:
        prior: Of every cluster.
        left: Hard moments of one half of each cluster.
        right: Of the other half.
        alpha: Concentration of the Dirichlet process.
        chance: (K,), uniform in [0, 1).
        fewest: A half must have more points than this.

    Returns:
        bool (K,).
    """
    split = torch.minimum(left.count, right.count) > fewest
    rows = split.nonzero()[:, 0]
    log_h = log_hastings_split(prior, left[rows], right[rows], alpha)
    split[rows] = chance[rows].log() < log_h
    return split


def merge_pairs(
    prior: TorchNIW, data: TorchMoments, alpha: float, chance: Tensor, neighbors: int = 2
) -> list[tuple[int, int]]:
    """Which pairs of clusters to merge: among each cluster's nearest, the likeliest first, each cluster once.

    Args:
        prior: Of every cluster.
        data: Hard moments of all K clusters, none empty.
        alpha: Concentration of the Dirichlet process.
        chance: (K, K), uniform in [0, 1); (i, j) with i < j is used.
        neighbors: How many of a cluster's nearest means are candidates.

    Returns:
        Pairs (i, j), i < j.
    """
    near = torch.cdist(data.mean, data.mean).fill_diagonal_(torch.inf)
    near = near.argsort(1)[:, : min(neighbors, len(data.count) - 1)].tolist()
    pairs = sorted({(min(i, j), max(i, j)) for i, row in enumerate(near) for j in row})
    if not pairs:
        return []
    first, second = torch.tensor(pairs, device=data.mean.device).T
    log_h = -log_hastings_split(prior, data[first], data[second], alpha)
    accepted = chance[first, second].log() < log_h
    chosen: list[tuple[int, int]] = []
    for index in log_h.argsort(descending=True).tolist():
        if accepted[index] and not {*pairs[index]} & {k for pair in chosen for k in pair}:
            chosen.append(pairs[index])
    return chosen


def precision_cholesky(covs: Tensor) -> Tensor:
    """P (K, D, D) with P P^T = Sigma^-1 for covariances (K, D, D): (x - mu) P is standard normal."""
    eye = torch.eye(covs.shape[-1], dtype=covs.dtype, device=covs.device)
    lower = torch.linalg.cholesky(covs)
    return torch.linalg.solve_triangular(lower, eye.expand_as(covs), upper=False).mT


def log_densities(codes: Tensor, means: Tensor, precisions: Tensor) -> Tensor:
    """The log density of every point under every Gaussian, log N(x; mu, Sigma): (N, K), float64.

    Args:
        codes: (N, D).
        means: (K, D), float64.
        precisions: (K, D, D), of `precision_cholesky`.
    """
    codes = codes.double()
    # one Gaussian at a time: N * D numbers in memory and not K times as many
    columns = [
        -0.5 * ((codes - mean) @ root).square().sum(1) + root.diagonal().log().sum()
        for mean, root in zip(means, precisions, strict=True)
    ]
    return torch.stack(columns, 1) - codes.shape[1] / 2 * math.log(2 * math.pi)


def _moments(codes: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    count = weights.sum()
    mean = weights @ codes / count.clamp(min=torch.finfo(count.dtype).tiny)
    centerd = codes - mean
    return count, mean, (centerd * weights[:, None]).T @ centerd


def _stack(parts: list[tuple[Tensor, Tensor, Tensor]]) -> TorchMoments:
    count, mean, scatter = (torch.stack(values) for values in zip(*parts, strict=True))
    return TorchMoments(count, mean, scatter)


def _logdet(matrices: Tensor) -> Tensor:
    return 2 * torch.linalg.cholesky(matrices).diagonal(dim1=-2, dim2=-1).log().sum(-1)
