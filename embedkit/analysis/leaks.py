"""Leaks: the rows of a test set that a training set holds too, by an exact search in bounded memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from embedkit.analysis.similarity import least_cosine, top_k
from embedkit.analysis.vectors import Rows, Source
from embedkit.errors import ConfigError

__all__ = ["Leak", "Leaks", "find_leaks"]


@dataclass(frozen=True)
class Leak:
    """A row of the test set that the training set holds too.

    Attributes:
        test: Its id.
        train: The id of the nearest training row.
        cosine: Of both.
    """

    test: str
    train: str
    cosine: float


@dataclass(frozen=True)
class Leaks:
    """The rows of a test set that a training set holds too.

    Attributes:
        found: The most similar first.
        tested: Rows of the test set.
        threshold: The least cosine of a leak.
    """

    found: list[Leak]
    tested: int
    threshold: float

    @property
    def rate(self) -> float:
        """Share of the test rows that leak."""
        return len(self.found) / self.tested


def find_leaks(train: Source, test: Source, threshold: float) -> Leaks:
    """Find the test rows whose nearest training row reaches a threshold, exactly.

    Args:
        train: N rows; a file larger than memory is read in blocks.
        test: M rows.
        threshold: Cosine in (-1, 1]; 1 finds equal rows.

    Raises:
        ConfigError: Rows that cannot be compared, or duplicate ids.
        SpaceMismatchError: Embeddings of two spaces.

    Examples:
        >>> leaks = embedkit.find_leaks("things.parquet", "samples.parquet", threshold=0.8)
        >>> leaks.tested, 0 < leaks.rate <= 1
        (10, True)
    """
    base, asked = Rows.of(train, "the training set"), Rows.of(test, "the test set")
    if not -1 < threshold <= 1:
        raise ConfigError(f"threshold: expected a cosine in (-1, 1], found {threshold}")
    cosines, nearest = (found[:, 0] for found in top_k(asked, base, 1))
    names, owners = asked.names(), base.names()
    hits = np.flatnonzero(cosines >= least_cosine(threshold))
    hits = hits[np.argsort(-cosines[hits], kind="stable")]
    found = [Leak(names[row], owners[nearest[row]], float(cosines[row])) for row in hits.tolist()]
    return Leaks(found, len(asked), threshold)
