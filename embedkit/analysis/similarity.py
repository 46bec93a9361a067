"""Cosine similarity: of two sets, of pairs, and the exact joins that search, duplicates and leaks share.

Comparisons of all rows with all others run in blocks, so memory grows with N and not with its square. Rows that do not
fit into memory are read from their file again for every block.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import numpy as np

from embedkit._io.optional import requires
from embedkit.analysis.vectors import BLOCK, ROUNDING, Rows, Source, as_count, check_comparable
from embedkit.errors import ConfigError

__all__ = ["UnionFind", "pair_similarity", "pairs_above", "similarity", "top_k"]

#: Rows and columns of one tile of similarities: 2 MB of float32, which stay in the CPU's cache during the scan.
TILE = (256, 2048)
#: Up to this many similarities numpy finds the largest; above, faiss is faster.
SMALL = 1 << 22
#: Numbers of the largest matrix of similarities that is returned: 4 GB.
LARGEST = 1 << 30


def faiss_module() -> ModuleType:
    """Import faiss, at first use.

    Raises:
        MissingDependencyError: It is not installed; the message holds the pip line.
    """
    with requires("a comparison of this many rows", "analysis"):
        import faiss
    return faiss


def similarity(a: Source, b: Source | None = None) -> np.ndarray:
    """The cosine of every row of `a` with every row of `b`.

    Args:
        a: Embeddings, their file, or an array (N, D).
        b: The same, M rows; `a` itself when None.

    Returns:
        float32 (N, M), cosines in [-1, 1] up to rounding.

    Raises:
        ConfigError: Rows that cannot be compared, or a matrix above 4 GB.
        SpaceMismatchError: Embeddings of two spaces.

    Examples:
        >>> cosines = embedkit.similarity("samples.parquet")
        >>> cosines.shape, bool(np.allclose(np.diag(cosines), 1, atol=1e-5))
        ((10, 10), True)
    """
    left = Rows.of(a, "the first embeddings")
    right = left if b is None else Rows.of(b, "the second embeddings")
    check_comparable(left, right)
    if len(left) * len(right) > LARGEST:
        raise ConfigError(
            f"{len(left)} x {len(right)} similarities would take {len(left) * len(right) * 4 / 1e9:.0f} GB; "
            "use top_k for the nearest of each row, or find_duplicates"
        )
    result = np.empty((len(left), len(right)), np.float32)
    for row, rows in left.chunks():
        for column, columns in right.chunks():
            result[row : row + len(rows), column : column + len(columns)] = rows @ columns.T
    return result


def pair_similarity(embeddings: Source, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The cosines of pairs of rows.

    Args:
        embeddings: N rows.
        a: int64 (P,), the first row of each pair.
        b: int64 (P,), the second one.

    Returns:
        float32 (P,).

    Raises:
        ConfigError: Rows that do not exist, or rows that cannot be compared.

    Examples:
        >>> embedkit.analysis.pair_similarity(np.eye(3), np.array([0, 0]), np.array([0, 1]))
        array([1., 0.], dtype=float32)
    """
    rows = Rows.of(embeddings)
    a, b = np.asarray(a, np.int64), np.asarray(b, np.int64)
    if len(a) != len(b) or (
        len(a) and not (0 <= min(a.min(), b.min()) and max(a.max(), b.max()) < len(rows))
    ):
        raise ConfigError(
            f"pairs: expected two lists of one length, of rows 0 to {len(rows) - 1} of {rows.where}"
        )
    cosines = np.empty(len(a), np.float32)
    for at in range(0, len(a), BLOCK):
        pair = slice(at, at + BLOCK)
        cosines[pair] = np.einsum("nd,nd->n", rows.take(a[pair]), rows.take(b[pair]))
    return cosines


def top_k(
    queries: Source, base: Source | None, k: int, *, exclude_self: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The k most similar rows of `base` for every query, exactly.

    Args:
        queries: Q rows.
        base: N rows, which may be a file larger than memory; `queries` themselves when None.
        k: Neighbors, at most N (N - 1 with `exclude_self`).
        exclude_self: Row i of `base` is no neighbor of query i.

    Returns:
        Cosines float32 (Q, k), descending, and rows of `base` int64 (Q, k).

    Raises:
        ConfigError: k larger than there are rows, or rows that cannot be compared.
        SpaceMismatchError: Embeddings of two spaces.
        MissingDependencyError: faiss is not installed, and the search is too large for numpy.

    Examples:
        >>> cosines, rows = embedkit.analysis.top_k("samples.parquet", None, 1, exclude_self=True)
        >>> ids = embedkit.Embeddings.load("samples.parquet").ids
        >>> ids[rows[ids.index("samples/cat.jpg"), 0]]
        'samples/cat-closer.jpg'
    """
    left = Rows.of(queries, "the queries")
    right = left if base is None else Rows.of(base)
    check_comparable(left, right)
    k, most = as_count(k, "k"), len(right) - exclude_self
    if not 1 <= k <= most:
        raise ConfigError(
            f"k: expected 1 to {most}, for {right.where} has {len(right)} row{'s' * (len(right) > 1)}, found {k}"
        )
    depth = k + exclude_self
    cosines = np.empty((len(left), k), np.float32)
    rows = np.empty((len(left), k), np.int64)
    for query, block in left.chunks():
        best = np.empty((len(block), 0), np.float32), np.empty((len(block), 0), np.int64)
        for start, part in right.chunks():
            near, index = _nearest(block, part, min(depth, len(part)))
            merged = np.concatenate([best[0], near], 1), np.concatenate([best[1], index + start], 1)
            best = _largest(*merged, min(depth, merged[0].shape[1]))
        if exclude_self:
            best = without_own(*best, np.arange(query, query + len(block)))
        cosines[query : query + len(block)], rows[query : query + len(block)] = best
    return cosines, rows


def _nearest(queries: np.ndarray, base: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Top k of all rows in memory: by numpy if they are few, else by faiss."""
    if len(queries) * len(base) <= SMALL:
        cosines = queries @ base.T
        rows = np.broadcast_to(np.arange(len(base)), cosines.shape)
        return _largest(cosines, rows, k)
    faiss = faiss_module()
    found = [
        faiss.knn(queries[at : at + BLOCK], base, k, metric=faiss.METRIC_INNER_PRODUCT)
        for at in range(0, len(queries), BLOCK)
    ]
    return _largest(
        np.concatenate([pair[0] for pair in found]), np.concatenate([pair[1] for pair in found]), k
    )


def _largest(cosines: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k largest of each row, descending; ties in the order of rows."""
    if k < cosines.shape[1]:
        order = np.argpartition(-cosines, k - 1, axis=1)[:, :k]
        cosines, rows = np.take_along_axis(cosines, order, 1), np.take_along_axis(rows, order, 1)
    order = np.lexsort((rows, -cosines), axis=1)
    return np.take_along_axis(cosines, order, 1), np.take_along_axis(rows, order, 1)


def without_own(cosines: np.ndarray, rows: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Drop one column: each query's own row, or the last one if equal rows displaced it.

    Args:
        cosines: float32 (Q, k).
        rows: int64 (Q, k).
        own: int64 (Q,).
    """
    drop = rows == own[:, None]
    drop[~drop.any(1), -1] = True
    shape = (len(rows), rows.shape[1] - 1)
    return cosines[~drop].reshape(shape), rows[~drop].reshape(shape)


def least_cosine(threshold: float) -> np.float32:
    """The float32 limit for cosines: a threshold of 1 must find equal rows despite rounding."""
    return np.float32(min(threshold, 1 - 2 * ROUNDING))


def pairs_above(
    embeddings: Source, threshold: float, *, tile: tuple[int, int] = TILE
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Every pair of rows whose cosine is at least `threshold`, exactly, tile by tile.

    Only tiles on and above the diagonal are computed, so each pair is computed once. A tile without a pair yields
    nothing; memory holds one tile and its pairs.

    Args:
        embeddings: N rows, which may be a file larger than memory.
        threshold: Cosine; 1 finds equal rows despite rounding.
        tile: Rows and columns of one tile.

    Yields:
        Rows i int64 (n,), rows j int64 (n,) with i < j, and their cosines float32 (n,).
    """
    rows = Rows.of(embeddings)
    limit = least_cosine(threshold)
    height, width = tile
    buffer = np.empty(height * width, np.float32)
    hits = np.empty(height * width, bool)
    for top, held in rows.chunks(share=2):
        for left, other in rows.chunks(top):
            for i in range(0, len(held), height):
                block = held[i : i + height]
                # Left of the diagonal are the same pairs, mirrored.
                for j in range(i if left == top else 0, len(other), width):
                    columns = other[j : j + width]
                    size = len(block) * len(columns)
                    cosines = buffer[:size].reshape(len(block), len(columns))
                    np.matmul(block, columns.T, out=cosines)
                    above = np.greater_equal(buffer[:size], limit, out=hits[:size])
                    found = np.flatnonzero(above)
                    if not len(found):
                        continue
                    first, second = np.divmod(found, len(columns))
                    first += top + i
                    second += left + j
                    once = first < second
                    if once.any():
                        yield first[once], second[once], buffer[:size][found[once]]


class UnionFind:
    """Connected components of rows, built pair by pair in memory of one number per row."""

    def __init__(self, count: int):
        """Start with every row as a group of its own."""
        self._parent = np.arange(count)

    def find(self, rows: np.ndarray) -> np.ndarray:
        """The smallest row of each row's group, int64 (n,)."""
        roots: np.ndarray = self._parent[rows]
        while True:
            above = self._parent[roots]
            if np.array_equal(above, roots):
                break
            roots = above
        self._parent[rows] = roots
        return roots

    def join(self, a: np.ndarray, b: np.ndarray) -> None:
        """Join the groups of each pair, int64 (n,) each."""
        while len(a):
            a, b = self.find(a), self.find(b)
            apart = a != b
            a, b = a[apart], b[apart]
            # A root is attached to the smallest root that it meets; the next round handles the others.
            np.minimum.at(self._parent, np.maximum(a, b), np.minimum(a, b))
