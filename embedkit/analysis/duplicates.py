"""Duplicates in a set of embeddings: an exact join in bounded memory.

Two rows are duplicates if their cosine reaches a threshold; groups are the connected components. There is no default
threshold: it depends on the encoder and on what counts as the same image. A target precision chooses it from labeled
pairs, by testing thresholds from the strictest one on until the exact lower bound of the precision falls below the
target (fixed sequence testing: Learn then Test, Angelopoulos et al., Annals of Applied Statistics 2025, arXiv
2110.01052), so the bound holds for the chosen threshold.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from embedkit._io.atomic import write_file
from embedkit.analysis.deletable import DeleteList, FileStates, deletable
from embedkit.analysis.matching.pairs import Pairs
from embedkit.analysis.matching.rates import clopper_pearson_lower
from embedkit.analysis.similarity import UnionFind, least_cosine, pair_similarity, pairs_above
from embedkit.analysis.vectors import Rows, Source
from embedkit.errors import ConfigError
from embedkit.images.ids import check_no_image

__all__ = [
    "DuplicateGroup",
    "Duplicates",
    "find_duplicates",
    "threshold_for_precision",
]

#: Confidence of the lower bound of a precision.
TAIL = 0.05
#: Numbers in memory at once while groups are reduced: 64 MB of float32.
TILE = 1 << 24
#: Size of the uniform sample of the pairs that were found.
SAMPLE = 1000


@dataclass(frozen=True)
class DuplicateGroup:
    """Rows that duplicates connect.

    Attributes:
        kept: The rows to keep: the best one, and each one that is not a duplicate of a better kept one. In a
            chain a-b-c the ends may differ more than the threshold allows; then both are kept. Existing files are
            better than links, and links than images whose files no longer exist; among files, `keep` decides.
        redundant: The other rows; each is a duplicate of a kept one.
        of: The first kept row that each redundant one is a duplicate of.
        cosines: float32, of each redundant row with that kept one.
    """

    kept: tuple[int, ...]
    redundant: tuple[int, ...]
    of: tuple[int, ...]
    cosines: np.ndarray

    def __len__(self) -> int:
        return len(self.kept) + len(self.redundant)

    def __repr__(self) -> str:
        return f"<DuplicateGroup: {len(self.kept)} kept, {len(self.redundant)} redundant>"


@dataclass(frozen=True)
class Duplicates:
    """The duplicates of a set.

    Attributes:
        names: One per row of the embeddings: its id, `id#part` for further parts.
        threshold: The least cosine of duplicates.
        pairs: Number of duplicate pairs.
        groups: The largest first.
        sample: Rows i, j and cosines of at most 1,000 of the pairs, uniformly drawn, for a person to label.
        has_parts: Whether some rows are parts of images, such as faces.
        root: The folder that ids are relative to; the working folder when None.
        recorded: int64 (N,), (N,), sizes in bytes and modification times in ns of the images at embedding;
            None if unknown.

    Examples:
        >>> found = embedkit.find_duplicates("samples.parquet", threshold=0.9)
        >>> found.pairs, [found.names[row] for row in found.redundant]
        (2, ['samples/cat-closer.jpg', 'samples/espresso.jpg'])
    """

    names: list[str]
    threshold: float
    pairs: int
    groups: list[DuplicateGroup]
    sample: tuple[np.ndarray, np.ndarray, np.ndarray]
    has_parts: bool = False
    root: str | None = None
    recorded: tuple[np.ndarray, np.ndarray] | None = None

    def __repr__(self) -> str:
        return (
            f"<Duplicates: {len(self.groups)} groups and {len(self.redundant)} redundant of {len(self.names)} rows, "
            f"{self.pairs} pairs at a cosine of {self.threshold:g} or more>"
        )

    @property
    def ids(self) -> list[list[str]]:
        """The names of each group, as `groups` has them: the kept ones first, then the redundant ones.

        Examples:
            >>> embedkit.find_duplicates("samples.parquet", threshold=0.9).ids[0]
            ['samples/cat-closer.jpg', 'samples/cat.jpg']
        """
        return [[self.names[row] for row in (*group.kept, *group.redundant)] for group in self.groups]

    @property
    def redundant(self) -> list[int]:
        """All rows that can be deleted, since each is a duplicate of a kept row; in ascending order."""
        return sorted(row for group in self.groups for row in group.redundant)

    def write_delete_list(self, path: str | os.PathLike[str], *, null: bool = False) -> DeleteList:
        """Write the paths of files that can be deleted without losing an image; nothing is deleted.

        The files are checked now. A file is listed only if it and its kept image are two regular files that exist and
        are unchanged; links, members of archives, and all uncertain cases are left out.

        Args:
            path: The list: absolute paths, one a line.
            null: Each path ends in a NUL byte instead, for `xargs -0`: only then can a name hold a line break.

        Returns:
            What is listed, and what is left out and why.

        Raises:
            ConfigError: A row is a part of an image.
            OutputError: The list cannot be written, or would overwrite one of the images.

        Examples:
            >>> found = embedkit.find_duplicates("samples.parquet", threshold=0.9)
            >>> done = found.write_delete_list("doubles.txt")
            >>> from pathlib import Path
            >>> [Path(line).name for line in Path("doubles.txt").read_text().splitlines()]
            ['cat-closer.jpg', 'espresso.jpg']
        """
        if self.has_parts:
            raise ConfigError(
                "some rows are parts of images, and a duplicate part is not an image to delete; "
                "use embeddings of whole images"
            )
        check_no_image({"the delete list": path}, self.names, self.root)
        found = deletable(
            FileStates(self.names, self.recorded, self.root),
            self.names,
            (row for group in self.groups for row in group.kept),
            sorted(pair for group in self.groups for pair in zip(group.redundant, group.of, strict=True)),
            line_breaks=null,
        )
        end = b"\0" if null else b"\n"
        write_file(Path(path), b"".join(os.fsencode(file) + end for file in found.files))
        return found


def find_duplicates(
    embeddings: Source,
    threshold: float | None = None,
    *,
    target_precision: float | None = None,
    labeled: Pairs | None = None,
    seed: int = 0,
    root: str | os.PathLike[str] | None = None,
    keep: str = "largest",
) -> Duplicates:
    """Find all groups of duplicates, exactly, in memory that grows with N alone.

    Args:
        embeddings: N rows, at least 2; a file larger than memory is read in blocks.
        threshold: Cosine in (-1, 1]; 1 finds equal rows.
        target_precision: Instead of a threshold, the share of true duplicates among the pairs that are found.
        labeled: With `target_precision`, pairs that a person has labeled; see `threshold_for_precision`.
        seed: Of the sample of pairs.
        root: The folder that ids are relative to; the working folder when None. Existing files are kept in
            preference to links, and links in preference to files that no longer exist.
        keep: Which of the existing files of a group is kept: `largest`, the one with the most pixels by the header of
            its file, then the one with the most bytes, then the oldest one; `oldest`, by its modification time; or
            `first`, by the order of rows, which also decides where all else is equal, and for arrays.

    Raises:
        ConfigError: One row, duplicate ids, neither or both of threshold and precision, another `keep`, or
            labeled pairs that cannot support the precision.

    Examples:
        >>> found = embedkit.find_duplicates("samples.parquet", threshold=0.9)
        >>> [[found.names[row] for row in (*group.kept, *group.redundant)] for group in found.groups]
        [['samples/cat.jpg', 'samples/cat-closer.jpg'], ['samples/coffee.jpg', 'samples/espresso.jpg']]
    """
    rows = Rows.of(embeddings)
    if len(rows) < 2:
        raise ConfigError(f"{rows.where}: expected at least 2 rows, found 1")
    names = rows.names()
    if (threshold is None) == (target_precision is None):
        raise ConfigError("find_duplicates: give a threshold, or a precision and labeled pairs")
    if target_precision is not None:
        if labeled is None:
            raise ConfigError(
                "a target precision needs labeled pairs; find some with a threshold, and label them"
            )
        threshold = threshold_for_precision(
            pair_similarity(rows, labeled.a, labeled.b), labeled.same, target_precision
        )
    assert threshold is not None
    if not -1 < threshold <= 1:
        raise ConfigError(f"threshold: expected a cosine in (-1, 1], found {threshold}")

    linked = UnionFind(len(rows))
    sample = _Sample(SAMPLE, np.random.default_rng(seed))
    for first, second, cosines in pairs_above(rows, threshold):
        linked.join(first, second)
        sample.add(first, second, cosines)
    roots = linked.find(np.arange(len(rows)))
    sizes = np.bincount(roots, minlength=len(rows))
    inside = np.flatnonzero(sizes[roots] > 1)
    inside = inside[np.argsort(roots[inside], kind="stable")]  # by group, in order within each
    edges = np.flatnonzero(np.diff(roots[inside])) + 1
    recorded = rows.recorded()
    if rows.metadata is not None:
        rank = FileStates(names, recorded, root).rank(inside.tolist(), keep)
        inside = inside[np.lexsort((inside, rank, roots[inside]))]  # by group, the best to keep first
    groups = []
    for members in _batches(np.split(inside, edges) if len(inside) else [], TILE // rows.dim):
        vectors = rows.take(np.concatenate(members))
        ends = np.cumsum([len(group) for group in members])
        for group, end in zip(members, ends.tolist(), strict=True):
            groups.append(_reduce(group, vectors[end - len(group) : end], least_cosine(threshold)))
    groups.sort(key=lambda found: (-len(found), min(found.kept)))
    return Duplicates(
        names,
        threshold,
        sample.seen,
        groups,
        sample.pairs(),
        rows.has_parts(),
        None if root is None else os.fspath(root),
        recorded,
    )


def _batches(groups: list[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    """Batches of groups of about `size` rows, so that rows of a file are not read group by group."""
    batch: list[np.ndarray] = []
    for group in groups:
        batch.append(group)
        if sum(map(len, batch)) >= size:
            yield batch
            batch = []
    if batch:
        yield batch


def _reduce(members: np.ndarray, vectors: np.ndarray, limit: np.float32) -> DuplicateGroup:
    """Go through a group in order, and keep each row that is not a duplicate of a kept one.

    Args:
        members: int64 (m,), rows, the best to keep first.
        vectors: float32 (m, D), of these rows.
        limit: The least cosine of duplicates.
    """
    kept: list[int] = []
    gone: list[tuple[int, int, float]] = []
    left = np.arange(len(members))
    while len(left):
        # Many heads at once: one matrix product instead of many products with a vector.
        heads = min(len(left), max(1, TILE // len(left)), 256)
        cosines = vectors[left[:heads]] @ vectors[left].T
        alive = np.ones(len(left), bool)
        for head in range(heads):
            if not alive[head]:
                continue
            kept.append(int(members[left[head]]))
            alive[head] = False
            close = np.flatnonzero(alive & (cosines[head] >= limit))
            alive[close] = False
            gone += zip(
                members[left[close]].tolist(),
                [kept[-1]] * len(close),
                cosines[head, close].tolist(),
                strict=True,
            )
        left = left[alive]
    gone.sort()
    return DuplicateGroup(
        tuple(kept),
        tuple(row for row, _, _ in gone),
        tuple(row for _, row, _ in gone),
        np.array([cosine for _, _, cosine in gone], np.float32),
    )


class _Sample:
    """A uniform sample of a stream of pairs: the pairs with the smallest random keys."""

    def __init__(self, size: int, rng: np.random.Generator):
        self.seen = 0
        self._size, self._rng = size, rng
        self._keys = np.empty(0)
        self._found: tuple[np.ndarray, ...] = (
            np.empty(0, np.int64),
            np.empty(0, np.int64),
            np.empty(0, np.float32),
        )

    def add(self, *pairs: np.ndarray) -> None:
        """Add pairs: rows i, rows j and cosines."""
        self.seen += len(pairs[0])
        keys = np.concatenate([self._keys, self._rng.random(len(pairs[0]))])
        merged = [np.concatenate(both) for both in zip(self._found, pairs, strict=True)]
        if len(keys) > self._size:
            keep = np.argpartition(keys, self._size)[: self._size]
            keys, merged = keys[keep], [part[keep] for part in merged]
        self._keys, self._found = keys, tuple(merged)

    def pairs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The sample, the highest cosine first."""
        first, second, cosines = self._found
        order = np.lexsort((second, first, -cosines))
        return first[order], second[order], cosines[order]


def threshold_for_precision(scores: np.ndarray, same: np.ndarray, precision: float) -> float:
    """The lowest threshold at which labeled pairs support a precision with 95 % confidence.

    Args:
        scores: float (P,), of pairs drawn uniformly from those that a low threshold finds.
        same: bool (P,), whether a person labeled them as the same image.
        precision: The target share of true duplicates, in (0, 1).

    Raises:
        ConfigError: Too few pairs for this precision, even if all of them were right, or too many wrong ones.

    Examples:
        >>> scores = np.linspace(0.8, 1, 201)
        >>> threshold = embedkit.analysis.threshold_for_precision(scores, same=scores > 0.9, precision=0.9)
        >>> round(threshold, 2)
        0.9
    """
    if not 0 < precision < 1:
        raise ConfigError(f"precision: expected a share in (0, 1), found {precision}")
    scores, same = np.asarray(scores, np.float64), np.asarray(same, bool)
    least = math.ceil(math.log(TAIL) / math.log(precision))
    if len(scores) < least:
        raise ConfigError(
            f"{len(scores)} labeled pairs cannot support a precision of {precision:g}: at least {least} are needed, "
            "all of them duplicates; label more, or lower the precision"
        )
    order = np.argsort(-scores, kind="stable")
    ranked, hits = scores[order], np.cumsum(same[order])
    chosen: float | None = None
    for last in np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True)):
        if last + 1 < least:
            continue
        if clopper_pearson_lower(int(hits[last]), int(last) + 1, TAIL) < precision:
            break
        chosen = float(ranked[last])
    if chosen is None:
        raise ConfigError(
            f"no threshold reaches a precision of {precision:g}: of the {least} most similar labeled pairs "
            f"{int(hits[least - 1])} are duplicates; lower the precision, or label more pairs"
        )
    return chosen
