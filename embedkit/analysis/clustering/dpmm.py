"""A Dirichlet process mixture of Gaussians, which infers the number of clusters, by a split and merge sampler.

Every cluster has two sub-clusters. Labels are drawn given all parameters at once, so an iteration is a few matrix
products. A cluster splits into its sub-clusters, or two clusters merge, by a Metropolis-Hastings ratio in which all
parameters are integrated out.

Source: Parallel Sampling of DP Mixture Models using Sub-Clusters Splits (Chang and Fisher, NIPS 2013), section 4.

Differences from the source:
- Sub-clusters start as the points nearer to one or the other of two random members, and are drawn again if they led to
  no split: random halves need many iterations to separate.
- The prior comes from the data, see `DPMMConfig`.
- The result is the most likely state that was visited, refined by hard EM, instead of the last one.
- `merge="joint"` accepts a merge by the ratio of the joint densities alone, as DeepDPM does (arXiv 2203.14309,
  section 4.3); `merge="source"` has the factor of the reverse move, a random split, which rejects nearly every
  merge of more than a few points. With `joint` the chain searches the mode and is not an exact sampler.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np

from embedkit.analysis.clustering.niw import NIW, Moments, log_gamma, moments, union
from embedkit.errors import ConfigError
from embedkit.model.mixture import GaussianMixture, Gaussians, blocks_of

__all__ = ["DPMMConfig", "DPMMFit", "fit", "log_joint", "log_merge", "log_split"]


@dataclass(frozen=True, kw_only=True)
class DPMMConfig:
    """The prior and the chain.

    The prior's mean is the data's; Sigma is expected to be `psi_scale` times the data's variances (on the
    diagonal), and with kappa = `psi_scale` the means are expected to spread as the data do.

    Attributes:
        init_k: Clusters at the start.
        alpha: Concentration of the Dirichlet process: how readily clusters split.
        psi_scale: A cluster's variance over the data's, above 0.
        extra_nu: The prior's degrees of freedom above D, above 1; more make `psi_scale` weigh more.
        iterations: Of the chain.
        burn_in: Iterations that sub-clusters have to settle before a split.
        recut: Iterations after which sub-clusters without a split are drawn again.
        neighbors: Number of nearest clusters with which a merge is tried.
        merge: `joint` or `source`, see the module.
        most_rows: Greatest number of rows of the chain, sampled by the seed; the other rows are assigned.
    """

    init_k: int = 1
    alpha: float = 10.0
    psi_scale: float = 0.05
    extra_nu: float = 2.0
    iterations: int = 100
    burn_in: int = 3
    recut: int = 8
    neighbors: int = 5
    merge: Literal["joint", "source"] = "joint"
    most_rows: int = 100_000

    def __post_init__(self) -> None:
        for name, least in (
            ("init_k", 1),
            ("iterations", 1),
            ("burn_in", 0),
            ("recut", 1),
            ("neighbors", 1),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"dpmm.{name}: expected at least {least}, found {getattr(self, name)}")
        for name, above in (("alpha", 0), ("psi_scale", 0), ("extra_nu", 1), ("most_rows", 1)):
            if not above < getattr(self, name) < math.inf:
                raise ConfigError(f"dpmm.{name}: expected above {above}, found {getattr(self, name)}")
        if self.merge not in ("joint", "source"):
            raise ConfigError(f"dpmm.merge: expected joint or source, found {self.merge!r}")

    def prior(self, whole: Moments) -> NIW:
        """The prior of clusters of data with these moments (of one cluster).

        Raises:
            ConfigError: All points are equal.
        """
        dim = whole.mean.shape[1]
        variance = np.diagonal(whole.scatter[0]) / whole.count[0]
        if not variance.max() > 0:
            raise ConfigError("dpmm: all rows are equal, so there is nothing to cluster")
        # a coordinate that never changes would make Psi singular
        variance = np.maximum(variance, 1e-6 * variance.mean())
        psi = np.diag(variance) * self.psi_scale * (self.extra_nu - 1)  # E Sigma = Psi / (nu - D - 1)
        return NIW(whole.mean[0].copy(), self.psi_scale, psi, dim + self.extra_nu)


@dataclass(frozen=True, eq=False)
class DPMMFit:
    """The result of `fit`.

    Attributes:
        mixture: The clusters, largest first; it takes the points in their given form.
        labels: int64 (N,), as `mixture.assign` gives them.
        probabilities: float64 (N,).
        k_counts: Number of clusters -> iterations with it in the chain's second half: how stable K is, not its
            posterior.
        log_joint: Of the most likely state that was visited, in nats.
    """

    mixture: GaussianMixture
    labels: np.ndarray
    probabilities: np.ndarray
    k_counts: dict[int, int]
    log_joint: float


def log_split(prior: NIW, left: Moments, right: Moments, alpha: float) -> np.ndarray:
    """The log Hastings ratio of splitting each cluster in its two halves, (K,), in nats.

        H = alpha Gamma(N_l) f(X_l) Gamma(N_r) f(X_r) / (Gamma(N) f(X))

    Args:
        prior: Of every cluster.
        left: One half of each cluster, none empty.
        right: The other half.
        alpha: Concentration of the Dirichlet process, above 0.
    """

    def worth(data: Moments) -> np.ndarray:
        result: np.ndarray = log_gamma(data.count) + prior.log_marginal(data)
        return result

    result: np.ndarray = math.log(alpha) + worth(left) + worth(right) - worth(union(left, right))
    return result


def log_merge(prior: NIW, a: Moments, b: Moments, alpha: float) -> np.ndarray:
    """The source's log Hastings ratio of merging pairs of clusters, whose reverse is a random split, (P,), in nats.

        H = Gamma(N) f(X) / (alpha Gamma(N_1) f(X_1) Gamma(N_2) f(X_2))
            Gamma(alpha) / Gamma(alpha + N) Gamma(alpha/2 + N_1) Gamma(alpha/2 + N_2) / Gamma(alpha/2)^2

    Args:
        prior: Of every cluster.
        a: One cluster of each pair, none empty.
        b: The other one.
        alpha: Concentration of the Dirichlet process, above 0.
    """
    random_split = (
        math.lgamma(alpha)
        - 2 * math.lgamma(alpha / 2)
        - log_gamma(alpha + a.count + b.count)
        + log_gamma(alpha / 2 + a.count)
        + log_gamma(alpha / 2 + b.count)
    )
    result: np.ndarray = random_split - log_split(prior, a, b, alpha)
    return result


def log_joint(prior: NIW, data: Moments, alpha: float) -> float:
    """The log of p(z, X) of a partition: the Chinese restaurant process times every cluster's marginal.

    Gamma(alpha) / Gamma(alpha + N) prod_k alpha Gamma(N_k) f(X_k)
    """
    clusters = math.log(alpha) + log_gamma(data.count) + prior.log_marginal(data)
    return math.lgamma(alpha) - math.lgamma(alpha + data.count.sum()) + float(clusters.sum())


def fit(points: np.ndarray, config: DPMMConfig | None = None, *, seed: int = 0) -> DPMMFit:
    """Cluster points by the Dirichlet process mixture.

    Args:
        points: float (N, D), N of 2 or more, finite; D of 64 or less in practice.
        config: The prior and the chain; the defaults when None.
        seed: Of every draw.

    Raises:
        ConfigError: More clusters to start from than points, or points that are all equal.
    """
    config = config or DPMMConfig()
    rng = np.random.default_rng(seed)
    few = points
    if len(points) > config.most_rows:
        few = points[np.sort(rng.choice(len(points), config.most_rows, replace=False))]
    if config.init_k > len(few):
        raise ConfigError(f"dpmm.init_k: expected 1 to {len(few)}, the rows; found {config.init_k}")
    chain = _Chain(few, config, rng)
    best, labels, found = -math.inf, chain.labels, chain.clusters()
    ks: list[int] = []
    for _ in range(config.iterations):
        chain.step()
        ks.append(len(chain))
        clusters = chain.clusters()
        value = log_joint(chain.prior, clusters, config.alpha)
        if value > best:
            best, labels, found = value, chain.labels.copy(), clusters
    mixture = _refined(few, labels, found, chain.prior)
    labels, probabilities = mixture.assign(points)
    sizes = np.bincount(labels, minlength=len(mixture))
    order = np.argsort(-sizes, kind="stable")
    order = order[sizes[order] > 0]
    if not np.array_equal(order, np.arange(len(mixture))):
        mixture = mixture.take(order)
        labels, probabilities = mixture.assign(points)
    counts = dict(sorted(Counter(ks[len(ks) // 2 :]).items()))
    return DPMMFit(mixture, labels, probabilities, counts, best)


def _refined(
    points: np.ndarray, labels: np.ndarray, found: Moments, prior: NIW, rounds: int = 20
) -> GaussianMixture:
    """Hard EM from a state until no label changes."""
    dim = points.shape[1]
    for last in range(rounds - 1, -1, -1):
        used = found.count > 0
        found, labels = found[used], (np.cumsum(used) - 1)[labels]
        gaussians = prior.mode(found)
        mixture = GaussianMixture(
            found.count / found.count.sum(), gaussians.means, gaussians.roots, np.zeros(dim), np.eye(dim)
        )
        again = mixture.assign(points)[0]
        if np.array_equal(again, labels) or not last:
            break
        labels = again
        found = _tally(points, labels, len(mixture))
    return mixture


class _Chain:
    """The state: labels, halves, and the moments of the halves, which determine everything else."""

    def __init__(self, points: np.ndarray, config: DPMMConfig, rng: np.random.Generator):
        self.points, self.config, self.rng = points, config, rng
        self.labels = np.zeros(len(points), np.int32)
        self.halves = np.zeros(len(points), np.int8)
        whole = _tally(points, self.labels, 1)
        self.prior = config.prior(whole)
        if config.init_k > 1:
            used, labels = np.unique(_seeded(points, config.init_k, rng), return_inverse=True)
            self.labels = labels.astype(np.int32)
            whole = _tally(points, self.labels, len(used))
        self.left, self.right = whole, Moments.zeros(len(whole), points.shape[1])
        self.age = np.zeros(len(whole), np.int64)
        self._cut(np.arange(len(whole)))

    def __len__(self) -> int:
        """K."""
        return len(self.age)

    def clusters(self) -> Moments:
        """Both halves together."""
        return union(self.left, self.right)

    def step(self) -> None:
        """One iteration."""
        self._gibbs()
        self._drop_empty()
        self.age += 1
        stale = (np.minimum(self.left.count, self.right.count) == 0) | (self.age > self.config.recut)
        self._cut(np.flatnonzero(stale))
        new = self._split()
        self._merge(new)

    def _gibbs(self) -> None:
        """Draw weights, Gaussians, labels and halves."""
        rng, alpha, k = self.rng, self.config.alpha, len(self)
        found = self.clusters()
        # a Dirichlet draw up to its scale, which does not affect labels; the share of new clusters is left out
        log_weights = np.log(np.maximum(rng.standard_gamma(found.count), 1e-300))
        sides = np.stack([self.left.count, self.right.count])
        log_sides = np.log(np.maximum(rng.standard_gamma(sides + alpha / 2), 1e-300))
        whole = self.prior.sample(found, rng)
        parts = [self.prior.sample(side, rng) for side in (self.left, self.right)]
        tally = Moments.zeros(2 * k, self.points.shape[1])
        for rows in blocks_of(len(self.points), max(k, 2) * self.points.shape[1]):
            block = self.points[rows].astype(np.float64)
            labels = _draw(log_weights + whole.log_densities(block), rng)
            halves = np.empty(len(block), np.int8)
            order = np.argsort(labels, kind="stable")
            ends = np.searchsorted(labels[order], np.arange(k + 1))
            for cluster in np.flatnonzero(np.diff(ends)):
                own = order[ends[cluster] : ends[cluster + 1]]
                one = slice(cluster, cluster + 1)
                joint = np.concatenate(
                    [
                        Gaussians(part.means[one], part.roots[one], part.log_dets[one]).log_densities(
                            block[own]
                        )
                        for part in parts
                    ],
                    axis=1,
                )
                halves[own] = _draw(log_sides[:, cluster] + joint, rng)
            self.labels[rows], self.halves[rows] = labels, halves
            tally = union(tally, moments(block, 2 * labels + halves, 2 * k))
        self.left, self.right = tally[0::2], tally[1::2]

    def _drop_empty(self) -> None:
        used = self.clusters().count > 0
        if not used.all():
            self.labels = (np.cumsum(used) - 1).astype(np.int32)[self.labels]
            self._keep(used)

    def _keep(self, used: np.ndarray) -> None:
        self.left, self.right, self.age = self.left[used], self.right[used], self.age[used]

    def _cut(self, chosen: np.ndarray) -> None:
        """Draw these clusters' halves again: the points nearer to one or the other of two random members."""
        if not len(chosen):
            return
        ends = [self._members()[chosen].astype(np.float64) for _ in range(2)]
        normal, middle = ends[1] - ends[0], (ends[1] + ends[0]) / 2
        position = np.full(len(self), -1)
        position[chosen] = np.arange(len(chosen))
        tally = Moments.zeros(2 * len(chosen), self.points.shape[1])
        for rows in blocks_of(len(self.points), 4 * self.points.shape[1]):
            own = position[self.labels[rows]]
            which = np.flatnonzero(own >= 0)
            own = own[which]
            block = self.points[rows][which].astype(np.float64)
            halves = np.einsum("nd,nd->n", block - middle[own], normal[own]) > 0
            self.halves[rows.start + which] = halves
            tally = union(tally, moments(block, 2 * own + halves, 2 * len(chosen)))
        for side, part in ((self.left, tally[0::2]), (self.right, tally[1::2])):
            side.count[chosen], side.mean[chosen], side.scatter[chosen] = part.count, part.mean, part.scatter
        self.age[chosen] = 0

    def _members(self) -> np.ndarray:
        """One point of every cluster, drawn at random: (K, D)."""
        order = self.rng.permutation(len(self.labels))
        _, first = np.unique(self.labels[order], return_index=True)
        return self.points[order[first]]

    def _split(self) -> np.ndarray:
        """Split clusters whose halves have settled; returns the numbers of the clusters after their split."""
        ready = (self.age >= self.config.burn_in) & (np.minimum(self.left.count, self.right.count) > 0)
        ready = np.flatnonzero(ready)
        ratio = log_split(self.prior, self.left[ready], self.right[ready], self.config.alpha)
        split = ready[np.log(self.rng.random(len(ready))) < ratio]
        if not len(split):
            return split
        k = len(self)
        number = np.full(k, -1, np.int32)
        number[split] = k + np.arange(len(split), dtype=np.int32)
        moved = (number[self.labels] >= 0) & (self.halves == 1)
        self.labels[moved] = number[self.labels[moved]]
        right = self.right[split]
        nothing = Moments.zeros(len(split), self.points.shape[1])
        self.right.count[split], self.right.mean[split], self.right.scatter[split] = 0, 0, 0
        self.left = Moments.concatenate(self.left, right)
        self.right = Moments.concatenate(self.right, nothing)
        self.age = np.concatenate([self.age, np.zeros(len(split), np.int64)])
        new = np.concatenate([split, k + np.arange(len(split))])
        self._cut(new)
        return new

    def _merge(self, new: np.ndarray) -> None:
        """Merge pairs of near clusters, each cluster at most once; clusters that have just split are excluded."""
        old = np.setdiff1d(np.arange(len(self)), new)
        if len(old) < 2:
            return
        found = self.clusters()
        pairs = old[_near_pairs(found.mean[old], self.config.neighbors)]
        a, b = found[pairs[:, 0]], found[pairs[:, 1]]
        if self.config.merge == "source":
            ratio = log_merge(self.prior, a, b, self.config.alpha)
        else:
            ratio = -log_split(self.prior, a, b, self.config.alpha)
        accepted = np.flatnonzero(np.log(self.rng.random(len(pairs))) < ratio)
        gone = np.zeros(len(self), bool)
        merged = np.zeros(len(self), bool)
        heir = np.arange(len(self), dtype=np.int32)
        for pair in self.rng.permutation(accepted):
            i, j = pairs[pair]
            if not (merged[i] or merged[j]):
                merged[i] = merged[j] = gone[j] = True
                heir[j] = i
                for side, part in ((self.left, found[i : i + 1]), (self.right, found[j : j + 1])):
                    side.count[i], side.mean[i], side.scatter[i] = (
                        part.count[0],
                        part.mean[0],
                        part.scatter[0],
                    )
                self.age[i] = 0
        if gone.any():
            both = merged[self.labels]
            self.halves[both] = gone[self.labels[both]]
            number = (np.cumsum(~gone) - 1).astype(np.int32)
            self.labels = number[heir[self.labels]]
            self._keep(~gone)


def _draw(log_weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One category of each row of unnormalized log weights (N, K), int64 (N,)."""
    weights = np.exp(log_weights - log_weights.max(1, keepdims=True))
    ends = np.cumsum(weights, axis=1)
    ticket = rng.random(len(ends)) * ends[:, -1]
    # rounding may put a ticket at the very end, which belongs to the last one
    result: np.ndarray = np.minimum((ends <= ticket[:, None]).sum(1), ends.shape[1] - 1)
    return result


def _near_pairs(means: np.ndarray, neighbors: int) -> np.ndarray:
    """Pairs (i, j), i < j, of which one is among the other's nearest means: int64 (P, 2)."""
    squares = (means * means).sum(1)
    distance = squares[:, None] + squares - 2 * means @ means.T
    np.fill_diagonal(distance, np.inf)
    near = np.argsort(distance, axis=1, kind="stable")[:, : min(neighbors, len(means) - 1)]
    first = np.repeat(np.arange(len(means)), near.shape[1])
    pairs = np.sort(np.stack([first, near.ravel()], 1), axis=1)
    return np.unique(pairs, axis=0)


def _seeded(points: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """The nearest of k centers that k-means++ draws: int64 (N,)."""
    from embedkit.analysis.clustering.kmeans import nearest, plus_plus

    return nearest(points, plus_plus(points, k, rng))[0]


def _tally(points: np.ndarray, labels: np.ndarray, clusters: int) -> Moments:
    """Moments of a partition, block by block."""
    total = Moments.zeros(clusters, points.shape[1])
    for rows in blocks_of(len(points), 4 * points.shape[1]):
        total = union(total, moments(points[rows].astype(np.float64), labels[rows], clusters))
    return total
