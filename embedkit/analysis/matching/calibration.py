"""A calibration: its threshold and error rates, its file, and decisions about two vectors.

A calibration holds the threshold for a false-match rate, the error rates at that threshold, 95 % intervals from a
bootstrap over identities, and an interval for the rate in another sample. It is bound to the space in which it was
measured. `embedkit.analysis.matching.calibrate` makes it; `embedkit.analysis.matching.identification` decides against a
gallery.
"""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, TypeAlias

import numpy as np

from embedkit._io.atomic import write_file
from embedkit._io.json import Fields, JsonFormat, indented_json
from embedkit.analysis.matching.rates import Curve, Spread, prediction_interval
from embedkit.analysis.vectors import Rows, as_numbers
from embedkit.embeddings.metadata import Metadata
from embedkit.errors import ConfigError, OutputError, SpaceMismatchError

__all__ = [
    "Calibration",
    "GroupRates",
    "Verification",
    "check_threshold",
    "verify_vectors",
]

VERSION = 1
#: Least product of effective impostor pairs and a supported rate (rule of three; see `matching.calibrate`).
EFFECTIVE = 3
#: Rounding error by which a sum of float64 rates may exceed 1.
_ROUNDING = 1e-9
#: The largest cosine: 1, the rounding of float32, and one step.
_MOST_COSINE = 1 + 1e-5

Interval: TypeAlias = tuple[float, float]


@dataclass(frozen=True)
class Verification:
    """Whether two images show one identity.

    Attributes:
        score: Their cosine.
        threshold: The least score of a match.
        is_match: Whether the score reaches the threshold.
        expected_fmr: Expected share of pairs of two identities that reach this threshold; None without a calibration.
        probability: Of one identity, if half of all pairs are; None without a calibration.
    """

    score: float
    threshold: float
    is_match: bool
    expected_fmr: float | None
    probability: float | None


@dataclass(frozen=True)
class GroupRates:
    """Error rates of one group's pairs at the common threshold; None if there is no such pair.

    Attributes:
        name: The group.
        genuine: Pairs of one identity.
        impostors: Pairs of two.
        fmr: False-match rate.
        fmr_interval: 95 %, bootstrap over identities.
        fnmr: False-non-match rate.
        fnmr_interval: 95 %, bootstrap over identities.
        supported: Whether the group alone has enough impostor pairs for the target by the rule of thirty.
    """

    name: str
    genuine: int
    impostors: int
    fmr: float | None
    fmr_interval: Interval | None
    fnmr: float | None
    fnmr_interval: Interval | None
    supported: bool


@dataclass(frozen=True)
class Calibration:
    """A threshold and its error rates, with 95 % intervals.

    Attributes:
        threshold: The lowest one whose false-match rate is at most the target.
        target_fmr: The target false-match rate.
        fmr: False-match rate at the threshold, in these pairs.
        fnmr: False-non-match rate at the threshold.
        eer: Equal error rate.
        auc: Area under the ROC curve.
        threshold_interval: Of the threshold for the target.
        fmr_interval: Of the false-match rate at this threshold. For the rate in another sample see
            `predict`, whose interval is wider.
        fnmr_interval: Of the false-non-match rate at this threshold.
        eer_interval: Of the equal error rate.
        auc_interval: Of the area.
        genuine: Pairs of one identity.
        impostors: Pairs of two.
        effective_impostors: Number of independent pairs with the same information about the false-match rate.
        identities: Number of identities; 0 if unknown, and pairs were resampled instead.
        spread: Components of the variance of the false-match rate.
        curve: Thresholds, false-match and false-non-match rates; ROC is 1 - FNMR over FMR.
        ratios: Scores, and the log likelihood ratio at each.
        groups: Error rates of each group.
        entry: The encoder's name, empty for plain scores.
        fingerprint: The space's identity, 64 hex digits, empty for plain scores.

    Examples:
        >>> calibration = embedkit.Calibration.load("calibration.json")
        >>> calibration.target_fmr, calibration.fmr <= calibration.target_fmr
        (0.1, True)
        >>> low, high = calibration.threshold_interval
        >>> low <= calibration.threshold <= high
        True
    """

    threshold: float
    target_fmr: float
    fmr: float
    fnmr: float
    eer: float
    auc: float
    threshold_interval: Interval
    fmr_interval: Interval
    fnmr_interval: Interval
    eer_interval: Interval
    auc_interval: Interval
    genuine: int
    impostors: int
    effective_impostors: float
    identities: int
    spread: Spread
    curve: Curve
    ratios: tuple[np.ndarray, np.ndarray]
    groups: tuple[GroupRates, ...] = ()
    entry: str = ""
    fingerprint: str = ""

    @property
    def det(self) -> tuple[np.ndarray, np.ndarray]:
        """The DET curve: FMR and FNMR as normal deviates, where both are above 0 and below 1."""
        deviate = NormalDist().inv_cdf
        inside = (self.curve.fmr > 0) & (self.curve.fmr < 1) & (self.curve.fnmr > 0) & (self.curve.fnmr < 1)
        x, y = (
            np.array([deviate(rate) for rate in side[inside]]) for side in (self.curve.fmr, self.curve.fnmr)
        )
        return x, y

    def predict(self, *, identities: int | None = None, impostors: int | None = None) -> Interval:
        """A 95 % prediction interval for the false-match rate at this threshold in another sample.

        It covers the sampling error of both samples.

        Args:
            identities: Identities of the other sample; as many as here when None.
            impostors: Its impostor pairs, spread over the identities as here; as many as here when None.

        Raises:
            ConfigError: A sample without a pair.
            MissingDependencyError: scipy is not installed.

        Examples:
            >>> calibration = embedkit.Calibration.load("calibration.json")
            >>> low, high = calibration.predict(identities=500)
            >>> 0 <= low < calibration.fmr < high < 1
            True
        """
        others = self.impostors if impostors is None else impostors
        people = self.identities if identities is None else identities
        if others < 1 or (self.identities and people < 2):
            raise ConfigError(
                f"predict: expected a sample of 2 identities or more, found {people} in {others} pairs"
            )
        if not self.fmr:
            return prediction_interval(0, self.impostors, others)
        if self.identities:
            exposure = self.fmr / self.spread.variance(people, others)
        else:
            exposure = float(others)
        return prediction_interval(self.fmr * self.effective_impostors, self.effective_impostors, exposure)

    def false_match_rate(self, threshold: float) -> float:
        """Expected false-match rate at `threshold`, at least the bound of the rule of three for these pairs.

        Examples:
            >>> calibration = embedkit.Calibration.load("calibration.json")
            >>> calibration.false_match_rate(0.9) < calibration.false_match_rate(0.3)
            True
        """
        if threshold == self.threshold:
            return self.fmr
        index = int(np.searchsorted(-self.curve.thresholds, -threshold))  # the first one that accepts as much
        seen = float(self.curve.fmr[index]) if index < len(self.curve.fmr) else 1.0
        return min(1.0, max(seen, EFFECTIVE / self.effective_impostors))

    def probability(self, score: np.ndarray | float, *, prior: float = 0.5) -> np.ndarray:
        """Probability that a pair with this score is of one identity; increases with the score.

        Args:
            score: Cosines, of any shape.
            prior: Share of such pairs among all pairs that are verified, in (0, 1).

        Returns:
            float64, of the scores' shape.

        Examples:
            >>> calibration = embedkit.Calibration.load("calibration.json")
            >>> unlikely, likely = calibration.probability(np.array([0.1, 0.9]))
            >>> bool(unlikely < 0.5 < likely)
            True
        """
        if not 0 < prior < 1:
            raise ConfigError(f"prior: expected a share in (0, 1), found {prior}")
        odds = np.interp(score, *self.ratios) + math.log(prior / (1 - prior))
        result: np.ndarray = 1 / (1 + np.exp(-odds))
        return result

    def _check_space(self, metadata: Metadata | None, where: str) -> None:
        """Refuse embeddings of another space than the one that was calibrated.

        Raises:
            SpaceMismatchError: The spaces differ; the message names both.
        """
        if metadata is not None and self.fingerprint and metadata.fingerprint != self.fingerprint:
            raise SpaceMismatchError(
                f"the calibration is of {self.entry} (space {self.fingerprint[:12]}) and {where} holds embeddings "
                f"of {metadata.entry} (space {metadata.fingerprint[:12]}); name the calibrated encoder with --encoder, "
                "or calibrate the other space"
            )

    def to_json(self) -> dict[str, Any]:
        """The calibration as plain values; without a bootstrap sample, intervals are None.

        Examples:
            >>> embedkit.Calibration.load("calibration.json").to_json()["target_fmr"]
            0.1
        """
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        data |= {key: None for key in _INTERVALS if math.isnan(data[key][0])}
        data["spread"] = dataclasses.asdict(self.spread)
        data["groups"] = [dataclasses.asdict(group) for group in self.groups]
        data["curve"] = {key: value.tolist() for key, value in vars(self.curve).items()}
        data["ratios"] = [side.tolist() for side in self.ratios]
        return {_VERSION_KEY: VERSION, **data}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file, in one step.

        Raises:
            OutputError: The file cannot be written.

        Examples:
            >>> embedkit.Calibration.load("calibration.json").save("copy.json")
        """
        write_file(Path(path), indented_json(self.to_json()))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read what `save` wrote.

        Raises:
            OutputError: Not such a file, a damaged one, or one of another version.

        Examples:
            >>> embedkit.Calibration.load("calibration.json").entry
            'supervised-efficientnet_lite0.in1k'
        """
        return _parsed(_FILE.read(path))


_VERSION_KEY = "embedkit_calibration"
_INTERVALS = ("threshold_interval", "fmr_interval", "fnmr_interval", "eer_interval", "auc_interval")
_FILE = JsonFormat(
    error=OutputError, step="write the calibration again with `embedkit calibrate`", limit=64 << 20
)


def _parsed(data: Fields) -> Calibration:
    """Parse a calibration, with the type and range of every field checked."""
    data.version(_VERSION_KEY, VERSION)
    data.only(_VERSION_KEY, *(field.name for field in dataclasses.fields(Calibration)))
    fingerprint = data.text("fingerprint", empty=True)
    # Plain scores have no space and any range; those of embeddings are cosines.
    most = _MOST_COSINE if fingerprint else math.inf
    has_intervals = any(key in data for key in _INTERVALS)  # there are none without a bootstrap sample

    def interval(key: str) -> Interval:
        return _share_interval(data, key) if has_intervals else (math.nan, math.nan)

    spread = data.fields("spread")
    spread.only(*(field.name for field in dataclasses.fields(Spread)))
    effective = data.number("effective_impostors", 0)
    if not effective:
        data.fail("effective_impostors", "a number above 0")
    return Calibration(
        threshold=data.number("threshold", -most, most),
        target_fmr=_share(data, "target_fmr"),
        fmr=_share(data, "fmr"),
        fnmr=_share(data, "fnmr"),
        eer=_share(data, "eer"),
        auc=_share(data, "auc"),
        threshold_interval=_interval(data, "threshold_interval") if has_intervals else (math.nan, math.nan),
        fmr_interval=interval("fmr_interval"),
        fnmr_interval=interval("fnmr_interval"),
        eer_interval=interval("eer_interval"),
        auc_interval=interval("auc_interval"),
        genuine=data.whole("genuine", 1),
        impostors=data.whole("impostors", 1),
        effective_impostors=effective,
        identities=data.whole("identities"),
        spread=Spread(**{field.name: spread.number(field.name, 0) for field in dataclasses.fields(Spread)}),
        curve=_curve(data.fields("curve")),
        ratios=_ratios(data),
        groups=tuple(_group(group) for group in data.each("groups")),
        entry=data.text("entry", empty=True),
        fingerprint=fingerprint,
    )


def _share(data: Fields, key: str) -> float:
    return data.number(key, -_ROUNDING, 1 + _ROUNDING)


def _interval(data: Fields, key: str, low: float = -math.inf, high: float = math.inf) -> Interval:
    first, last = data.numbers(key, low, high, length=2)
    return first, last


def _share_interval(data: Fields, key: str) -> Interval:
    return _interval(data, key, -_ROUNDING, 1 + _ROUNDING)


def _curve(data: Fields) -> Curve:
    data.only("thresholds", "fmr", "fnmr")
    thresholds = np.array(data.numbers("thresholds"), np.float64)
    if not len(thresholds) or (np.diff(thresholds) > 0).any():
        data.fail("thresholds", "descending numbers, one or more")
    rates = (data.numbers(key, -_ROUNDING, 1 + _ROUNDING, length=len(thresholds)) for key in ("fmr", "fnmr"))
    return Curve(thresholds, *(np.array(side, np.float64) for side in rates))


def _ratios(data: Fields) -> tuple[np.ndarray, np.ndarray]:
    scores, ratios = (np.array(side, np.float64) for side in data.rows("ratios", count=2))
    if not len(scores) or len(scores) != len(ratios) or (np.diff(scores) < 0).any():
        data.fail("ratios", "ascending scores and as many ratios, one or more")
    return scores, ratios


def _group(data: Fields) -> GroupRates:
    data.only(*(field.name for field in dataclasses.fields(GroupRates)))
    return GroupRates(
        name=data.text("name", empty=True),
        genuine=data.whole("genuine"),
        impostors=data.whole("impostors"),
        fmr=data.optional("fmr", lambda key: _share(data, key)),
        fmr_interval=data.optional("fmr_interval", lambda key: _share_interval(data, key)),
        fnmr=data.optional("fnmr", lambda key: _share(data, key)),
        fnmr_interval=data.optional("fnmr_interval", lambda key: _share_interval(data, key)),
        supported=data.flag("supported"),
    )


def check_threshold(threshold: float) -> None:
    """Refuse a threshold that is not a cosine.

    Raises:
        ConfigError: It is not finite, or outside [-1, 1].
    """
    if not -1 <= threshold <= 1:  # nor NaN
        raise ConfigError(f"threshold: expected a cosine in [-1, 1], found {threshold}")


def verify_vectors(
    a: np.ndarray, b: np.ndarray, *, calibration: Calibration | None = None, threshold: float | None = None
) -> Verification:
    """Decide whether two embeddings are of one identity.

    Args:
        a: float (D,).
        b: float (D,), of the same space.
        calibration: Gives the threshold, the expected false-match rate and the probability.
        threshold: Cosine; overrides the calibration's threshold.

    Raises:
        ConfigError: Neither a calibration nor a threshold, a threshold that is not a cosine, a vector with NaN or of
            zeros, or two widths.

    Examples:
        >>> table = embedkit.Embeddings.load("samples.parquet")
        >>> cat, closer = (table.vectors[table.ids.index(f"samples/{name}.jpg")] for name in ("cat", "cat-closer"))
        >>> embedkit.analysis.verify_vectors(cat, closer, threshold=0.8).is_match
        True
    """
    if threshold is None:
        if calibration is None:
            raise ConfigError(
                "a decision needs a calibration or a threshold; make a calibration with `embedkit calibrate`"
            )
        threshold = calibration.threshold
    else:
        check_threshold(threshold)
    left, right = (
        Rows.of(as_numbers([vector], where), where)
        for vector, where in ((a, "the first vector"), (b, "the second vector"))
    )
    if left.dim != right.dim:
        raise ConfigError(
            f"the first vector has {left.dim} numbers and the second {right.dim}: not one space"
        )
    score = float(left.unit(0, 1)[0] @ right.unit(0, 1)[0])
    return Verification(
        score=score,
        threshold=threshold,
        is_match=score >= threshold,
        expected_fmr=None if calibration is None else calibration.false_match_rate(threshold),
        probability=None if calibration is None else float(calibration.probability(score)),
    )
