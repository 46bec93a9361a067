"""Open-set identification (1:N) against a gallery, with the expected error (ISO/IEC 19795-1).

An identity of the gallery can be missed, and an unknown identity can be matched. Below the threshold the answer is no
match.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from embedkit.analysis.matching.calibration import Calibration, check_threshold
from embedkit.analysis.matching.pairs import identity_codes
from embedkit.analysis.similarity import top_k
from embedkit.analysis.vectors import Rows, Source
from embedkit.errors import ConfigError

__all__ = ["Identification", "identify"]


@dataclass(frozen=True)
class Identification:
    """The identity of an image among those of a gallery, or no match.

    Attributes:
        query: The image's id.
        identity: The identity of the nearest image; None (no match) if it scores below the threshold.
        nearest: The id of the nearest image of the gallery.
        score: Its cosine.
        threshold: The least score of a match.
        expected_fpir: False-positive identification rate: how often an identity outside the gallery is matched. At most
            the false-match rate times the number of gallery images (a union bound), and as uncertain as that rate, see
            `Calibration.fmr_interval` and `Calibration.predict`; None without a calibration.
    """

    query: str
    identity: Any
    nearest: str
    score: float
    threshold: float
    expected_fpir: float | None


def identify(
    queries: Source,
    gallery: Source,
    identities: Sequence[Hashable],
    *,
    calibration: Calibration | None = None,
    threshold: float | None = None,
) -> list[Identification]:
    """Match each query to the identities of a gallery, or report no match.

    A query gets the identity of its nearest image, if that reaches the threshold. A larger gallery gives an unknown
    identity more chances to reach it: see `Identification.expected_fpir`. With one identity in the gallery, this is a
    verification.

    Args:
        queries: Q rows.
        gallery: N labeled rows; an identity may have several.
        identities: (N,), the identities of the gallery's rows.
        calibration: Gives the threshold and the expected rate.
        threshold: Cosine; overrides the calibration's.

    Raises:
        ConfigError: A row without an identity, neither a calibration nor a threshold, or a threshold that is not a
        cosine.
        SpaceMismatchError: Queries, gallery and calibration of different spaces.

    Examples:
        >>> table = embedkit.Embeddings.load("things.parquet")
        >>> found = embedkit.identify("samples.parquet", table, table.label("thing"), threshold=0.5)
        >>> [(one.query, one.identity) for one in found][:2]
        [('samples/astronaut.jpg', 'astronaut'), ('samples/bricks.jpg', 'bricks')]
    """
    asked, labeled = Rows.of(queries, "the queries"), Rows.of(gallery, "the gallery")
    if len(identities) != len(labeled):
        raise ConfigError(f"{labeled.where}: expected {len(labeled)} identities, found {len(identities)}")
    codes = identity_codes(identities)
    if (codes < 0).any():
        raise ConfigError(
            f"{labeled.where}: {labeled.names()[int(np.argmin(codes))]} has no identity; give it one, or leave it out"
        )
    if calibration is not None:
        calibration._check_space(labeled.metadata, labeled.where)
    if threshold is None:
        if calibration is None:
            raise ConfigError("identify needs a calibration or a threshold")
        threshold = calibration.threshold
    else:
        check_threshold(threshold)
    scores, nearest = top_k(asked, labeled, 1)
    fpir = None if calibration is None else min(1.0, calibration.false_match_rate(threshold) * len(labeled))
    names, owners = asked.names(), labeled.names()
    return [
        Identification(
            query=names[index],
            identity=identities[row] if score >= threshold else None,
            nearest=owners[row],
            score=score,
            threshold=threshold,
            expected_fpir=fpir,
        )
        for index, (score, row) in enumerate(zip(scores[:, 0].tolist(), nearest[:, 0].tolist(), strict=True))
    ]
