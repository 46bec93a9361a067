"""The normal-inverse-Wishart prior of a Gaussian cluster, in float64 numpy: posterior, exact marginal, draws.

A cluster is represented by its moments (count, mean, scatter), so the union of two clusters is computed from their
moments without the points.

Source: Conjugate Bayesian analysis of the Gaussian distribution (Murphy, 2007, section 9). Draws: Bartlett's
decomposition of a Wishart matrix (On the theory of statistical regression, Proc. R. Soc. Edinburgh 53, 1933).
`embedkit.training.methods.deepdpm.niw` is the same prior in torch, for DeepDPM's training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from embedkit.errors import ConfigError
from embedkit.model.mixture import Gaussians

__all__ = ["NIW", "Moments", "log_gamma", "moments", "union"]

_TINY = np.finfo(np.float64).tiny
_lgamma = np.frompyfunc(math.lgamma, 1, 1)


def log_gamma(x: np.ndarray | float) -> np.ndarray:
    """The log of Gamma of every number, float64."""
    return np.asarray(_lgamma(x), np.float64)


@dataclass(frozen=True, eq=False)
class Moments:
    """Sufficient statistics of K clusters, float64.

    Attributes:
        count: (K,).
        mean: (K, D); zero where the count is zero.
        scatter: (K, D, D), the sum of (x - mean)(x - mean)^T.
    """

    count: np.ndarray
    mean: np.ndarray
    scatter: np.ndarray

    def __len__(self) -> int:
        """K."""
        return len(self.count)

    def __getitem__(self, index: np.ndarray | slice) -> Moments:
        """The clusters of some indices, a mask or a slice."""
        return Moments(self.count[index], self.mean[index], self.scatter[index])

    @classmethod
    def zeros(cls, clusters: int, dim: int) -> Moments:
        """The moments of K empty clusters."""
        return cls(np.zeros(clusters), np.zeros((clusters, dim)), np.zeros((clusters, dim, dim)))

    @classmethod
    def concatenate(cls, *parts: Moments) -> Moments:
        """The clusters of all parts, one after the other."""
        return cls(
            np.concatenate([part.count for part in parts]),
            np.concatenate([part.mean for part in parts]),
            np.concatenate([part.scatter for part in parts]),
        )


def moments(points: np.ndarray, labels: np.ndarray, clusters: int) -> Moments:
    """Moments of a partition of one block of points.

    Args:
        points: float64 (N, D).
        labels: int (N,), the cluster of each point, 0..K-1.
        clusters: K.
    """
    found = Moments.zeros(clusters, points.shape[1])
    order = np.argsort(labels, kind="stable")
    ends = np.searchsorted(labels[order], np.arange(clusters + 1))
    points = points[order]
    for k in np.flatnonzero(np.diff(ends)):
        own = points[ends[k] : ends[k + 1]]
        mean = own.mean(0)
        centered = own - mean
        found.count[k], found.mean[k], found.scatter[k] = len(own), mean, centered.T @ centered
    return found


def union(a: Moments, b: Moments) -> Moments:
    """The moments of each cluster of `a` together with the same-numbered cluster of `b`."""
    count = a.count + b.count
    total = np.maximum(count, _TINY)
    apart = b.mean - a.mean  # (K, D)
    mean = a.mean + (b.count / total)[:, None] * apart
    between = (a.count * b.count / total)[:, None, None] * (apart[:, :, None] * apart[:, None, :])
    return Moments(count, mean, a.scatter + b.scatter + between)


@dataclass(frozen=True, eq=False)
class NIW:
    """mu | Sigma ~ N(mean, Sigma / kappa), Sigma ~ IW(psi, nu).

    Attributes:
        mean: (D,), float64: m.
        kappa: Weight of the mean in points, above 0.
        psi: (D, D), float64, positive definite: the expected scatter of nu points.
        nu: Degrees of freedom, above D - 1.

    Raises:
        ConfigError: kappa or nu too small.
    """

    mean: np.ndarray
    kappa: float
    psi: np.ndarray
    nu: float

    def __post_init__(self) -> None:
        if not (self.kappa > 0 and self.nu > len(self.mean) - 1):
            raise ConfigError(
                f"NIW: expected kappa above 0 and nu above D - 1 = {len(self.mean) - 1}, "
                f"found {self.kappa} and {self.nu}"
            )

    def log_marginal(self, data: Moments) -> np.ndarray:
        """The points' density, log f(X), with mean and covariance integrated out, exactly.

            -ND/2 log pi + log Gamma_D(nu*/2) - log Gamma_D(nu/2) + nu/2 log|Psi| - nu*/2 log|Psi*|
            + D/2 log(kappa/kappa*)

        with nu* = nu + N, kappa* = kappa + N, and Psi* as in `scatter`.

        Returns:
            (K,), in nats; 0 for a cluster without points.
        """
        count, dim = data.count, len(self.mean)
        nu = self.nu + count
        steps = np.arange(dim) / 2
        # the constants of Gamma_D cancel
        gammas = log_gamma(nu[:, None] / 2 - steps).sum(1) - log_gamma(self.nu / 2 - steps).sum()
        result: np.ndarray = (
            -count * dim / 2 * math.log(math.pi)
            + gammas
            + self.nu / 2 * _logdet(self.psi)
            - nu / 2 * _logdet(self.scatter(data))
            - dim / 2 * np.log1p(count / self.kappa)
        )
        return result

    def scatter(self, data: Moments) -> np.ndarray:
        """Psi* = Psi + scatter + kappa N / (kappa + N) (mean - m)(mean - m)^T, (K, D, D)."""
        off = data.mean - self.mean  # (K, D)
        pull = self.kappa * data.count / (self.kappa + data.count)
        result: np.ndarray = (
            self.psi + data.scatter + pull[:, None, None] * (off[:, :, None] * off[:, None, :])
        )
        return result

    def means(self, data: Moments) -> np.ndarray:
        """(kappa m + N mean) / (kappa + N), (K, D): the posterior's m."""
        total = self.kappa + data.count
        result: np.ndarray = (self.kappa * self.mean + data.count[:, None] * data.mean) / total[:, None]
        return result

    def mode(self, data: Moments) -> Gaussians:
        """The most likely Gaussians given the points: covariances are Psi* / (nu + N + D + 2)."""
        degrees = self.nu + data.count + len(self.mean) + 2
        root = _inverse_transposed(np.linalg.cholesky(self.scatter(data) / degrees[:, None, None]))
        return Gaussians(self.means(data), root, _log_diagonal(root))

    def sample(self, data: Moments, rng: np.random.Generator) -> Gaussians:
        """One draw of each cluster's Gaussian from its posterior.

        With Psi* = C C^T and Bartlett's A, the precision is P P^T for P = C^-T A, so no covariance is inverted.
        """
        k, dim = data.mean.shape
        bartlett = np.tril(rng.standard_normal((k, dim, dim)), -1)
        degrees = (self.nu + data.count)[:, None] - np.arange(dim)
        bartlett[:, np.arange(dim), np.arange(dim)] = np.sqrt(rng.chisquare(degrees))
        root = _inverse_transposed(np.linalg.cholesky(self.scatter(data)))
        precision = root @ bartlett
        noise = rng.standard_normal((k, dim, 1))
        # Sigma / kappa* = P^-T P^-1 / kappa*
        step = np.linalg.solve(precision.transpose(0, 2, 1), noise)[:, :, 0]
        means = self.means(data) + step / np.sqrt(self.kappa + data.count)[:, None]
        return Gaussians(means, precision, _log_diagonal(root) + _log_diagonal(bartlett))


def _inverse_transposed(lower: np.ndarray) -> np.ndarray:
    """C^-T of lower triangular C, (K, D, D): upper triangular."""
    eye = np.broadcast_to(np.eye(lower.shape[-1]), lower.shape)
    return np.triu(np.linalg.solve(lower, eye).transpose(0, 2, 1))


def _log_diagonal(triangular: np.ndarray) -> np.ndarray:
    """The log of |T| of triangular matrices with a positive diagonal."""
    result: np.ndarray = np.log(np.diagonal(triangular, axis1=-2, axis2=-1)).sum(-1)
    return result


def _logdet(matrices: np.ndarray) -> np.ndarray:
    return 2 * _log_diagonal(np.linalg.cholesky(matrices))
