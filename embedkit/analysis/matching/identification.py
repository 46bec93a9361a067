"""Who of a gallery an image shows, if anybody: decisions 1:N, with the error that is to be expected of them.

Somebody who is in the gallery can be missed, and somebody who is not can be taken for somebody who is (open-set
identification, ISO/IEC 19795-1): below the threshold the answer is nobody.
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
    """Who of a gallery an image shows, if anybody.

    Attributes:
        query: The image's id.
        identity: The nearest image's identity; None when it scores below the threshold: nobody of the gallery.
        nearest: The id of the nearest image of the gallery.
        score: Its cosine.
        threshold: The least score of a match.
        expected_fpir: How often somebody who is not in the gallery is to be taken for somebody who is: at most the
            false-match rate times the gallery's images (a union bound), and as unsure as that rate is, see
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
    """Find each query among the identities of a gallery, or say that it is none of them.

    A query has the identity of its nearest image, when that reaches the threshold. With a larger gallery
    somebody unknown has more chances to reach it: see `Identification.expected_fpir`. A gallery of one identity makes
    this a verification: the answer is that one, or nobody.

    Args:
        queries: Q rows.
        gallery: N rows of known identity, several to an identity if there are.
        identities: (N,), of the gallery's rows.
        calibration: Gives the threshold and the expected rate.
        threshold: Cosine; overrides the calibration's.

    Raises:
        ConfigError: A row without an identity, neither a calibration nor a threshold, or a threshold that is no cosine.
        SpaceMismatchError: Queries, gallery and calibration of different spaces.
    """
    asked, known = Rows.of(queries, "the queries"), Rows.of(gallery, "the gallery")
    if len(identities) != len(known):
        raise ConfigError(f"{known.where}: expected {len(known)} identities, found {len(identities)}")
    codes = identity_codes(identities)
    if (codes < 0).any():
        raise ConfigError(
            f"{known.where}: {known.names()[int(np.argmin(codes))]} has no identity; give it one, or leave it out"
        )
    if calibration is not None:
        calibration.check_space(known.metadata, known.where)
    if threshold is None:
        if calibration is None:
            raise ConfigError("identify needs a calibration or a threshold")
        threshold = calibration.threshold
    else:
        check_threshold(threshold)
    scores, nearest = top_k(asked, known, 1)
    fpir = None if calibration is None else min(1.0, calibration.false_match_rate(threshold) * len(known))
    names, owners = asked.names(), known.names()
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
