"""k-means and spherical k-means by faiss, from k-means++ starts, with probabilities and a choice of K.

Training uses a sample if there are many rows; then every row is assigned, block by block.

Sources: k-means++: The Advantages of Careful Seeding (Arthur and Vassilvitskii, SODA 2007). Spherical k-means:
Concept Decompositions for Large Sparse Text Data (Dhillon and Modha, Machine Learning 42, 2001). Its
probabilities: Clustering on the Unit Hypersphere using von Mises-Fisher Distributions (Banerjee et al., JMLR 6,
2005), equation 4.4. The choice of K: Silhouettes (Rousseeuw, J. Comput. Appl. Math. 20, 1987).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from embedkit.analysis.similarity import faiss_module

__all__ = ["Centroids", "choose_k", "mean_silhouette", "nearest", "plus_plus", "train"]

#: Numbers of one block of distances: 32 MB of float32.
_BLOCK = 1 << 23
#: Training rows per centroid, and the bounds of their total number.
ROWS_PER_CENTROID = 256
FEWEST_ROWS = 50_000
MOST_ROWS = 500_000
#: Rows in the sample of k-means++.
SEED_ROWS = 20_000
#: Rows in the sample for the choice of K.
SILHOUETTE_ROWS = 3_000
ITERATIONS = 50


@dataclass(frozen=True, eq=False)
class Centroids:
    """A trained k-means.

    Attributes:
        centers: float32 (K, D), of length 1 where `spherical`.
        spherical: Whether similarity is the cosine.
        sharpness: What turns it into probabilities: 1 / (2 sigma^2) of equal spherical Gaussians, for squared
            distances, or kappa of equal von Mises-Fisher distributions, for cosines.
        rows: Number of training rows.
    """

    centers: np.ndarray
    spherical: bool
    sharpness: float
    rows: int

    def assign(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The nearest center of every point, and its probability under the mixture whose limit is k-means.

        Args:
            points: float32 (N, D).

        Returns:
            labels: int64 (N,).
            probabilities: float64 (N,).
        """
        labels = np.empty(len(points), np.int64)
        probabilities = np.empty(len(points))
        for rows, score in _scores(points, self.centers, spherical=self.spherical):
            labels[rows] = score.argmax(1)
            score -= score.max(1, keepdims=True)
            probabilities[rows] = 1 / np.exp(score * np.float32(self.sharpness)).sum(1, dtype=np.float64)
        return labels, probabilities


def unit(points: np.ndarray) -> np.ndarray:
    """Scale rows to length 1; a row of zeros is unchanged."""
    length = np.linalg.norm(points, axis=1, keepdims=True)
    return (points / np.where(length > 0, length, 1)).astype(np.float32, copy=False)


def nearest(points: np.ndarray, centers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest center of every point, int64 (N,), and the squared distance to it, float32 (N,)."""
    labels = np.empty(len(points), np.int64)
    distances = np.empty(len(points), np.float32)
    for rows, score in _scores(points, centers, spherical=False):
        labels[rows] = score.argmax(1)
        distances[rows] = -score.max(1)
    return labels, np.maximum(distances, 0)


def plus_plus(points: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """Draw k different rows to start from: float32 (k, D).

    Each is drawn in proportion to its squared distance from those before it; of a few such draws the one with
    the smallest remaining distances counts (the source's section 5).

    Args:
        points: float (N, D), N of k or more; a sample of `SEED_ROWS` (10 k, if that is more) is drawn from.
        k: Rows.
        rng: The random generator.
    """
    most = max(SEED_ROWS, 10 * k)
    if len(points) > most:
        points = points[np.sort(rng.choice(len(points), most, replace=False))]
    points = points.astype(np.float32, copy=False)
    draws = 2 + int(np.log(k))
    chosen = np.empty(k, np.int64)
    chosen[0] = rng.integers(len(points))
    middle = points.mean(0)
    centered = points - middle
    squares = np.square(centered).sum(1)
    distance = np.full(len(points), np.inf)
    for i in range(k):
        if i:
            ends = np.cumsum(distance)
            if ends[-1] > 0:
                tickets = rng.random(draws) * ends[-1]
                candidates = np.minimum(np.searchsorted(ends, tickets, side="right"), len(points) - 1)
            else:  # fewer distinct rows than centers
                candidates = rng.choice(np.setdiff1d(np.arange(len(points)), chosen[:i]), 1)
        else:
            candidates = chosen[:1]
        apart = squares[:, None] + squares[candidates] - 2 * centered @ centered[candidates].T
        left = np.minimum(distance[:, None], np.maximum(apart, 0))  # (N, draws)
        best = int(left.sum(0).argmin())
        chosen[i] = candidates[best]
        distance = left[:, best]
        distance[chosen[: i + 1]] = 0  # despite rounding, draw no row twice
    return points[chosen]


def train(
    points: np.ndarray, k: int, *, spherical: bool = False, starts: int = 10, seed: int = 0
) -> Centroids:
    """Train k centroids, the best of several starts.

    Args:
        points: float32 (N, D), N of k or more; of length 1 where `spherical`.
        k: Centroids.
        spherical: Whether similarity is the cosine.
        starts: Of k-means++.
        seed: Of the sample and the starts.

    Raises:
        MissingDependencyError: faiss is not installed.
    """
    faiss = faiss_module()
    rng = np.random.default_rng(seed)
    most = max(k, min(max(FEWEST_ROWS, ROWS_PER_CENTROID * k), MOST_ROWS))
    if len(points) > most:
        points = points[np.sort(rng.choice(len(points), most, replace=False))]
    points = np.ascontiguousarray(points, np.float32)
    found: list[tuple[float, np.ndarray]] = []
    for _ in range(starts):
        first = plus_plus(points, k, rng)
        # else faiss would sample the rows again, and warn if there are few
        kmeans = faiss.Kmeans(
            points.shape[1],
            k,
            niter=ITERATIONS,
            spherical=spherical,
            seed=int(rng.integers(1 << 31)),
            min_points_per_centroid=1,
            max_points_per_centroid=len(points),
        )
        kmeans.train(points, init_centroids=first)
        loss = float(nearest(points, kmeans.centroids)[1].sum(dtype=np.float64))
        found.append((loss, kmeans.centroids.copy()))
    least, best = min(found, key=lambda pair: pair[0])
    return Centroids(best, spherical, _sharpness(points, best, least, spherical=spherical), len(points))


def choose_k(
    points: np.ndarray, *, spherical: bool = False, seed: int = 0, most: int = 150
) -> tuple[int, dict[int, float]]:
    """The K of the largest mean silhouette, among 2 to 20 and then steps of a quarter up to `most`.

    The cost is bounded: k-means and silhouettes run on a sample of `SILHOUETTE_ROWS` rows. A silhouette is not defined
    for one cluster, so 1 is never chosen.

    Args:
        points: float32 (N, D), N of 3 or more; of length 1 where `spherical`.
        spherical: Whether similarity is the cosine.
        seed: Of the sample and of the starts.
        most: The largest K that is tried, but at most a third of the rows of the sample.

    Returns:
        K and the mean silhouette of every K that was tried, in [-1, 1].
    """
    rng = np.random.default_rng(seed)
    if len(points) > SILHOUETTE_ROWS:
        points = points[np.sort(rng.choice(len(points), SILHOUETTE_ROWS, replace=False))]
    most = max(2, min(most, len(points) // 3))
    candidates = list(range(2, min(20, most) + 1))
    while candidates[-1] * 5 // 4 <= most and most > 20:
        candidates.append(candidates[-1] * 5 // 4)
    squares = (points * points).sum(1)
    distance = np.maximum(squares[:, None] + squares - 2 * points @ points.T, 0)
    distance = distance / 2 if spherical else np.sqrt(distance)
    np.fill_diagonal(distance, 0)
    found = {}
    for k in candidates:
        labels, _ = train(points, k, spherical=spherical, starts=3, seed=seed).assign(points)
        found[k] = mean_silhouette(distance, labels)
    return max(found, key=lambda k: (found[k], -k)), found


def mean_silhouette(distance: np.ndarray, labels: np.ndarray) -> float:
    """The mean over rows of (b - a) / max(a, b), 0 for a row that is the only one of its cluster.

    a is a row's mean distance to the others of its cluster, b the least mean distance to another cluster.

    Args:
        distance: (N, N).
        labels: int (N,).

    Returns:
        In [-1, 1]; -1 if there is only one cluster.
    """
    used, labels = np.unique(labels, return_inverse=True)
    if len(used) < 2:
        return -1.0
    members = (labels[:, None] == np.arange(len(used))).astype(distance.dtype)  # (N, K)
    count = members.sum(0)
    sums = (distance @ members).astype(np.float64)
    rows = np.arange(len(labels))
    own = count[labels]
    a = sums[rows, labels] / np.maximum(own - 1, 1)
    means = sums / count
    means[rows, labels] = np.inf
    b = means.min(1)
    largest = np.maximum(a, b)
    values = np.where((own > 1) & (largest > 0), (b - a) / np.where(largest > 0, largest, 1), 0)
    return float(values.mean())


def _scores(
    points: np.ndarray, centers: np.ndarray, *, spherical: bool
) -> Iterator[tuple[slice, np.ndarray]]:
    """Cosines, or negative squared distances, of points and centers, block by block: float32 (B, K)."""
    centers = centers.astype(np.float32, copy=False)
    # far from the origin, squared distances would be small differences of large numbers
    middle = np.zeros(centers.shape[1], np.float32) if spherical else centers.mean(0)
    centers = centers - middle
    squares = (centers * centers).sum(1)
    step = max(1, _BLOCK // max(len(centers), centers.shape[1]))
    for start in range(0, len(points), step):
        rows = slice(start, min(start + step, len(points)))
        block = points[rows].astype(np.float32, copy=False) - middle
        score = block @ centers.T
        if not spherical:
            score *= 2
            score -= squares
            score -= (block * block).sum(1, keepdims=True)
        yield rows, score


def _sharpness(points: np.ndarray, centers: np.ndarray, loss: float, *, spherical: bool) -> float:
    """Maximum likelihood estimate of the concentration shared by all clusters; `loss`: sum of squared distances."""
    n, dim = points.shape
    if spherical:
        r = min(1 - loss / (2 * n), 1 - 1e-7)  # mean cosine
        return float((r * dim - r**3) / (1 - r * r))
    floor = 1e-12 * max(float(np.square(centers, dtype=np.float64).sum(1).mean()), 1e-30)
    return float(1 / (2 * max(loss / (n * dim), floor)))
