"""Lint: metrics of a set of embeddings that need no labels, each with a verdict in one sentence.

Sources: effective rank: RankMe (Garrido et al., ICML 2023, arXiv 2210.02885, equation 1). Uniformity:
Understanding Contrastive Representation Learning through Alignment and Uniformity on the Hypersphere (Wang and
Isola, ICML 2020, arXiv 2005.10242, section 4.1), t = 2. Hubness: Hubs in Space (Radovanovic, Nanopoulos and
Ivanovic, JMLR 11, 2010), skewness of the k-occurrences. Collapse of dimensions: Understanding Dimensional
Collapse in Contrastive Self-supervised Learning (Jing et al., ICLR 2022, arXiv 2110.09348).
The limits above or below which a metric is a warning are embedkit's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from embedkit.analysis.vectors import as_numbers, magnitudes
from embedkit.embeddings.formats import open_rows
from embedkit.embeddings.table import Embeddings
from embedkit.errors import ConfigError

__all__ = ["LintCheck", "LintReport", "lint"]

#: Rows whose effective rank is measured, as in the source.
RANK_ROWS = 25_600
#: Rows in the neighbor search, and rows whose nearest neighbor among all rows is searched.
NEIGHBOR_ROWS = 10_000
QUERIES = 2_000

#: A metric beyond its limit is a warning.
LEAST_RANK_SHARE = 0.05
MOST_MEAN_COSINE = 0.9
MOST_HUBNESS = 2.0
MOST_NEAR_DUPLICATES = 0.01
LEAST_STD = 1e-4

_BLOCK = 1 << 14
#: Similarities of one block: 32 MB of float32.
_CELLS = 1 << 23


@dataclass(frozen=True)
class LintCheck:
    """One metric and its verdict.

    Attributes:
        name: `bad_rows`, `effective_rank`, `collapse`, `uniformity`, `hubness`, `dead_dimensions` or
            `near_duplicates`.
        value: The metric; None if it cannot be computed.
        ok: False for a warning.
        words: What it means, in one sentence.
    """

    name: str
    value: float | None
    ok: bool
    words: str


@dataclass(frozen=True)
class LintReport:
    """The health of a set of embeddings.

    Attributes:
        rows: N.
        dim: D.
        sample: The rows that the metrics are computed on, in words.
        seed: The seed of the samples.
        checks: The metrics.
    """

    rows: int
    dim: int
    sample: str
    seed: int
    checks: tuple[LintCheck, ...]

    @property
    def warnings(self) -> tuple[LintCheck, ...]:
        """The checks that are not ok."""
        return tuple(check for check in self.checks if not check.ok)

    def to_json(self) -> dict[str, Any]:
        """The report as the command line prints it."""
        return {**asdict(self), "ok": not self.warnings}


def lint(
    source: Embeddings | np.ndarray | str | os.PathLike[str],
    *,
    neighbors: int = 10,
    threshold: float = 0.99,
    seed: int = 0,
) -> LintReport:
    """Check a set of embeddings.

    A file is streamed twice and never held, so the samples bound the memory, whatever the number of rows: the rank of
    at most `RANK_ROWS` rows, neighbors among `NEIGHBOR_ROWS`, and for `QUERIES` of them the nearest of all rows. With
    fewer rows, every metric is exact.

    Args:
        source: Embeddings, their file, or an array float (N, D), N of 2 or more.
        neighbors: Neighbors whose occurrences are counted.
        threshold: The least cosine of near-duplicates, in [-1, 1].
        seed: Of the samples.

    Raises:
        ConfigError: Fewer than 2 rows with a direction, or settings that cannot be used.
        OutputError: Not a file of embeddings.

    Examples:
        >>> report = embedkit.lint("samples.parquet")
        >>> [check.name for check in report.checks][:3]
        ['bad_rows', 'effective_rank', 'collapse']
        >>> "dead_dimensions" in [check.name for check in report.warnings]
        True
    """
    if neighbors < 1:
        raise ConfigError(f"neighbors: expected 1 or more, found {neighbors}")
    if not -1 <= threshold <= 1:
        raise ConfigError(f"threshold: expected a cosine in [-1, 1], found {threshold}")
    where, rows, dim, blocks, name = _open(source)
    if rows < 2:
        raise ConfigError(f"{where}: expected 2 rows or more, found {'one' if rows else 'none'}")
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.permutation(rows)[:RANK_ROWS]) if rows > RANK_ROWS else np.arange(rows)
    whole = _Whole(dim)
    parts, numbers = [], []
    for start, block in blocks():
        good = whole.add(block, start)
        inside = chosen[np.searchsorted(chosen, start) : np.searchsorted(chosen, start + len(block))]
        inside = inside[good[inside - start]]
        parts.append(block[inside - start])
        numbers.append(inside)
    if whole.count < 2:
        raise ConfigError(
            f"{where}: of {rows} rows all but {whole.count} hold NaN, infinity or zeros alone; embed the images again"
        )
    sample, sampled = np.concatenate(parts), np.concatenate(numbers)
    if len(sample) < 2:
        raise ConfigError(f"{where}: nearly all rows hold NaN, infinity or zeros; embed the images again")
    few = np.sort(rng.permutation(len(sample))[:NEIGHBOR_ROWS])
    near, near_rows = _unit(sample[few]), sampled[few]
    k = min(neighbors, len(near) - 1)
    cosine, uniformity, occurrences = _neighborhood(near, k)
    queries = np.sort(rng.permutation(len(near))[:QUERIES]) if rows > NEIGHBOR_ROWS else np.arange(len(near))
    nearest = _nearest(near[queries], near_rows[queries], blocks)
    checks = (
        _bad_rows(whole, rows, name),
        _rank(_rankme(sample), len(sample), dim),
        _collapse(cosine),
        _uniformity(uniformity, dim),
        _hubness(occurrences, k, near_rows, name),
        _dead(whole, dim),
        _duplicates(nearest, threshold),
    )
    words = "all rows"
    if rows > NEIGHBOR_ROWS:
        words = (
            f"samples of {rows} rows, drawn with seed {seed}: {len(sample)} for the rank, {len(near)} for "
            f"neighbors, {len(queries)} for near-duplicates; bad rows and dimensions are of all rows"
        )
    return LintReport(rows, dim, words, seed, checks)


class _Whole:
    """Statistics of all rows."""

    def __init__(self, dim: int):
        self.count = 0
        self.not_finite = self.zeros = 0
        self.first_bad = -1
        self._pivot: np.ndarray | None = None
        self._sums, self._squares = np.zeros(dim), np.zeros(dim)

    def add(self, block: np.ndarray, start: int) -> np.ndarray:
        """Add a block; returns which of its rows are usable, bool (B,)."""
        largest = magnitudes(block)
        finite = np.isfinite(largest)
        good: np.ndarray = finite & (largest > 0)
        self.not_finite += int((~finite).sum())
        self.zeros += int((finite & ~good).sum())
        if self.first_bad < 0 and not good.all():
            self.first_bad = start + int((~good).argmax())
        rows = block[good].astype(np.float64)
        if len(rows):
            if self._pivot is None:
                self._pivot = rows[0]
            rows -= self._pivot  # a constant dimension becomes exactly 0, however large it is
            self.count += len(rows)
            self._sums += rows.sum(0)
            self._squares += np.square(rows).sum(0)
        return good

    def std(self) -> np.ndarray:
        """Of every dimension, (D,)."""
        mean = self._sums / self.count
        return np.sqrt(np.maximum(self._squares / self.count - mean**2, 0))


def _rankme(sample: np.ndarray, epsilon: float = 1e-7) -> float:
    """Effective rank of rows as they are: exp of the entropy of the singular values, scaled to sum 1."""
    rows = sample.astype(np.float64)
    gram = rows.T @ rows if len(rows) >= rows.shape[1] else rows @ rows.T
    values = np.sqrt(np.maximum(np.linalg.eigvalsh(gram), 0))
    p = values / values.sum() + epsilon
    return float(np.exp(-(p * np.log(p)).sum()))


def _neighborhood(rows: np.ndarray, k: int) -> tuple[float, float, np.ndarray]:
    """Mean cosine and uniformity of all pairs, and how often each row is among the k nearest of another."""
    n = len(rows)
    # The cosines of all pairs sum to |sum of rows|^2 less those of each row with itself: exactly, and without a
    # product of all pairs.
    wide = rows.astype(np.float64)
    cosine = float(np.square(wide.sum(0)).sum() - np.square(wide).sum())
    potential = 0.0
    occurrences = np.zeros(n, np.int64)
    step = max(1, _CELLS // n)
    for start in range(0, n, step):
        block = rows[start : start + step] @ rows.T
        own = np.arange(len(block))
        block[own, start + own] = -np.inf  # a row is neither its own pair nor its own neighbor
        # |x - y|^2 = 2 - 2 cos, so that exp(-2 |x - y|^2) = exp(4 cos - 4)
        potential += float(np.exp(4 * block - 4).sum(dtype=np.float64))
        nearest = np.argpartition(-block, k - 1, axis=1)[:, :k]
        occurrences += np.bincount(nearest.ravel(), minlength=n)
    pairs = n * (n - 1)
    return cosine / pairs, float(np.log(potential / pairs)), occurrences


def _nearest(
    queries: np.ndarray, own: np.ndarray, blocks: Callable[[], Iterator[tuple[int, np.ndarray]]]
) -> np.ndarray:
    """The cosine of each query with the nearest other row of all, float32 (Q,)."""
    best = np.full(len(queries), -1, np.float32)
    step = max(1, _CELLS // len(queries))
    for start, block in blocks():
        for first in range(0, len(block), step):
            part = block[first : first + step]
            largest = magnitudes(part)
            good = np.isfinite(largest) & (largest > 0)
            cosines = queries @ _unit(np.where(good[:, None], part, 1)).T
            cosines[:, ~good] = -1
            at = own - start - first  # position of each query in this part
            inside = np.flatnonzero((at >= 0) & (at < len(part)))
            cosines[inside, at[inside]] = -1
            best = np.maximum(best, cosines.max(1))
    return best


def _unit(rows: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    return (rows / np.where(length > 0, length, 1)).astype(np.float32)


def _bad_rows(whole: _Whole, rows: int, name: Callable[[int], str]) -> LintCheck:
    bad = whole.not_finite + whole.zeros
    if not bad:
        return LintCheck("bad_rows", 0, True, "Every row is finite and has a direction.")
    words = (
        f"{whole.not_finite} of {rows} rows hold NaN or infinity and {whole.zeros} are all zeros (the first is "
        f"{name(whole.first_bad)}): embed those images again; all other metrics leave them out."
    )
    return LintCheck("bad_rows", bad, False, words)


def _rank(rank: float, rows: int, dim: int) -> LintCheck:
    most = min(rows, dim)
    share = rank / most
    words = f"The rows use about {rank:.1f} of {most} possible dimensions ({share:.0%})"
    if most > 1 and share < LEAST_RANK_SHARE:
        words += ": most of the width is unused; a reduction loses nothing, and better training may help."
        return LintCheck("effective_rank", rank, False, words)
    return LintCheck("effective_rank", rank, True, words + ".")


def _collapse(cosine: float) -> LintCheck:
    if cosine > MOST_MEAN_COSINE:
        words = (
            f"Two rows have a cosine of {cosine:.3f} on average: the embeddings have collapsed into one direction and "
            "separate images badly; check the training, or subtract the mean (pca) before comparing."
        )
        return LintCheck("collapse", cosine, False, words)
    return LintCheck(
        "collapse", cosine, True, f"Two rows have a cosine of {cosine:.3f} on average: no collapse."
    )


def _uniformity(value: float, dim: int) -> LintCheck:
    best = -4 + 8 / dim  # cosines of even directions have variance 1 / D
    words = (
        f"{value:.2f}, where rows spread evenly over the sphere would have about {best:.2f} and equal rows 0."
    )
    return LintCheck("uniformity", value, True, words)


def _hubness(occurrences: np.ndarray, k: int, rows: np.ndarray, name: Callable[[int], str]) -> LintCheck:
    spread = float(occurrences.std())
    skewness = float(((occurrences - occurrences.mean()) ** 3).mean() / spread**3) if spread > 0 else 0.0
    top = int(occurrences.argmax())
    never, most = (occurrences == 0).mean(), int(occurrences[top])
    words = (
        f"The skewness of how often a row is among the {k} nearest of others is {skewness:.2f}; "
        f"{never:.0%} of rows never are, and {name(int(rows[top]))} is {most} times"
    )
    if skewness > MOST_HUBNESS:
        return LintCheck("hubness", skewness, False, words + ": such hubs are found by every search.")
    return LintCheck("hubness", skewness, True, words + ".")


def _dead(whole: _Whole, dim: int) -> LintCheck:
    std = whole.std()
    dead = np.flatnonzero(std <= LEAST_STD * np.sqrt(np.square(std).mean()))
    if not len(dead):
        return LintCheck("dead_dimensions", 0, True, f"All {dim} dimensions vary.")
    some = ", ".join(map(str, dead[:5].tolist())) + (", ..." if len(dead) > 5 else "")
    words = f"{len(dead)} of {dim} dimensions are constant over all rows ({some})."
    return LintCheck("dead_dimensions", len(dead), False, words)


def _duplicates(nearest: np.ndarray, limit: float) -> LintCheck:
    # in float32 the cosine of equal rows may be a little below 1
    rate = float((nearest >= min(limit, 1 - 2e-6)).mean())
    words = f"{rate:.2%} of rows have another row at a cosine of {limit:g} or more"
    if rate > MOST_NEAR_DUPLICATES:
        words += ": inspect them with `embedkit duplicates` before you split, train or count."
        return LintCheck("near_duplicates", rate, False, words)
    return LintCheck("near_duplicates", rate, True, words + ".")


def _open(
    source: Embeddings | np.ndarray | str | os.PathLike[str],
) -> tuple[str, int, int, Callable[[], Iterator[tuple[int, np.ndarray]]], Callable[[int], str]]:
    """Open rows: their name in messages, N, D, a reader of all rows in blocks, and a function that names one row."""
    where = "the embeddings"
    if isinstance(source, (str, os.PathLike)):
        stored = open_rows(source)
        where, rows, dim = stored.where, len(stored), stored.metadata.dim

        def read(start: int, stop: int) -> np.ndarray:
            return stored.vectors(start, stop)

        def name(row: int) -> str:
            return str(stored.column("id", row, row + 1)[0])

    else:
        array = as_numbers(source.vectors if isinstance(source, Embeddings) else source, where)
        if not array.shape[1]:
            raise ConfigError(f"{where}: expected numbers (N, D), found no column")
        (rows, dim), ids = array.shape, source.ids if isinstance(source, Embeddings) else None

        def read(start: int, stop: int) -> np.ndarray:
            return array[start:stop]

        def name(row: int) -> str:
            return f"row {row}" if ids is None else ids[row]

    def blocks() -> Iterator[tuple[int, np.ndarray]]:
        for start in range(0, rows, _BLOCK):
            with np.errstate(
                over="ignore"
            ):  # what float32 cannot hold becomes infinity, which makes a bad row
                block = np.asarray(read(start, min(start + _BLOCK, rows)), np.float32)
            yield start, block

    return where, rows, dim, blocks, name
