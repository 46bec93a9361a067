"""Clustering scores against labels: ACC, NMI and ARI.

Source: accuracy: Unsupervised Deep Embedding for Clustering Analysis (Xie, Girshick and Farhadi, ICML 2016, arXiv
1511.06335, equation 10).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from embedkit._io.optional import requires
from embedkit.analysis.matching.pairs import identity_codes
from embedkit.errors import ConfigError

__all__ = ["ClusteringScores", "clustering_scores"]

#: Cells of the largest table of clusters and classes.
_MOST_CELLS = 1 << 25


@dataclass(frozen=True)
class ClusteringScores:
    """Scores of clusters against classes.

    Attributes:
        acc: Share of rows whose cluster is matched to their class, by the best one-to-one matching. Rows of further
            clusters, and noise, count as errors.
        nmi: Mutual information over the arithmetic mean of both entropies, in [0, 1]; noise is one more cluster.
        ari: Adjusted Rand index: 1 for equal partitions, 0 on average for random ones; noise as above.
        rows: Number of labeled rows.
        classes: Number of classes.
    """

    acc: float
    nmi: float
    ari: float
    rows: int
    classes: int


def clustering_scores(clusters: np.ndarray, labels: Sequence[Hashable] | np.ndarray) -> ClusteringScores:
    """Compare a partition with classes; see `ClusteringScores`.

    Args:
        clusters: int (N,), -1 for noise.
        labels: One per row; rows with None, NaN or the empty text are left out.

    Raises:
        ConfigError: Of another length, no label at all, or too many different labels.
        MissingDependencyError: scipy is not installed.

    Examples:
        >>> scores = embedkit.analysis.clustering_scores(np.array([0, 0, 1, 1]), ["cat", "cat", "dog", "cat"])
        >>> scores.acc, scores.classes
        (0.75, 2)
    """
    with requires("a clustering score", "analysis"):
        from scipy.optimize import linear_sum_assignment
    if len(labels) != len(clusters):
        raise ConfigError(f"labels: expected one for each of {len(clusters)} rows, found {len(labels)}")
    classes = identity_codes(labels)
    labeled = classes >= 0
    n = int(labeled.sum())
    if not n:
        raise ConfigError("labels: all are empty; name another column")
    count = int(classes.max()) + 1
    used, rows = np.unique(clusters[labeled], return_inverse=True)
    if len(used) * count > _MOST_CELLS:
        raise ConfigError(
            f"labels: {count} different ones among {n} rows are names rather than classes; name another column"
        )
    shape = (len(used), count)
    table = np.bincount(rows * shape[1] + classes[labeled], minlength=shape[0] * shape[1]).reshape(shape)
    table = table.astype(np.float64)
    real = table[used >= 0]  # noise is not matched to a class
    matched = real[linear_sum_assignment(real, maximize=True)].sum()
    a, b = table.sum(1), table.sum(0)
    cells, expected = table[table > 0], np.outer(a, b)[table > 0]
    mutual = (cells / n * np.log(cells * n / expected)).sum()
    entropy = sum(-(side / n * np.log(side / n)).sum() for side in (a, b)) / 2

    def pairs(counts: np.ndarray) -> float:
        return float((counts * (counts - 1) / 2).sum())

    together, chance = pairs(table), pairs(a) * pairs(b) / max(1.0, n * (n - 1) / 2)
    most = (pairs(a) + pairs(b)) / 2
    return ClusteringScores(
        acc=float(matched / n),
        nmi=float(mutual / entropy) if entropy > 0 else 1.0,  # both are one single cluster
        ari=float((together - chance) / (most - chance)) if most != chance else 1.0,
        rows=n,
        classes=count,
    )
