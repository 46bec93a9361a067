"""Calibration from labeled pairs: the threshold for a false-match rate, and its uncertainty.

`embedkit.analysis.matching.rates` holds the statistics and their sources. A rate that the data cannot support is
refused. Rule of thirty: at least 30 false matches must be expected at the target (The NIST speaker recognition
evaluation, Doddington et al., Speech Communication 2000). Rule of three: the effective number of impostor pairs, which
is smaller than their number if pairs share identities, must be at least 3 / target, with which no false match at all
would still bound the rate at the target with 95 % confidence (If nothing goes wrong, is everything all right?, Hanley
and Lippman-Hand, JAMA 1983).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np

from embedkit.analysis.matching.calibration import EFFECTIVE, Calibration, GroupRates, Interval
from embedkit.analysis.matching.pairs import Pairs, check_both_kinds, identity_codes
from embedkit.analysis.matching.rates import SortedPairs, Spread, log_likelihood_ratios, resampled
from embedkit.analysis.similarity import pair_similarity
from embedkit.analysis.vectors import Rows, Source
from embedkit.embeddings.metadata import Metadata
from embedkit.errors import ConfigError

__all__ = ["calibrate", "calibrate_pairs", "check_support"]

#: Least expected number of false matches at the target (rule of thirty).
EXPECTED = 30
#: Bootstrap samples.
REPLICATES = 500
#: Points of the stored curve.
POINTS = 600
#: The largest score: the next number is still finite in float32.
MOST_SCORE = 1e30


def calibrate(
    scores: np.ndarray,
    labels: np.ndarray,
    target_fmr: float = 1e-3,
    *,
    identities: Sequence[Sequence[Hashable]] | np.ndarray | None = None,
    groups: Sequence[Hashable] | None = None,
    metadata: Metadata | None = None,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> Calibration:
    """Find the threshold for a false-match rate, with its uncertainty.

    Args:
        scores: float (P,), of pairs; higher means more similar.
        labels: bool (P,), whether a pair is of one identity.
        target_fmr: The target false-match rate, in (0, 1).
        identities: (P, 2), the identity of each side. Without them, pairs are resampled as if they were
            independent; intervals are then too narrow for dependent pairs.
        groups: (P,), a group for each pair; None or the empty text for pairs of no group, for example across groups.
        metadata: Of the embeddings that were compared; binds the calibration to their space.
        replicates: Bootstrap samples.
        seed: Of the bootstrap.

    Raises:
        ConfigError: Scores that are not finite, pairs of one kind only, or too few of them, or of too few
            identities, for this target.

    Examples:
        >>> scores = np.concatenate([np.linspace(0.4, 1, 200), np.linspace(-0.5, 0.6, 2000)])
        >>> same = np.repeat([True, False], [200, 2000])
        >>> calibration = embedkit.calibrate(scores, same, target_fmr=0.05, replicates=50)
        >>> round(calibration.threshold, 1), round(calibration.fnmr, 1)
        (0.5, 0.2)
    """
    try:
        scores, same = np.asarray(scores), np.asarray(labels).astype(bool)
    except ValueError:
        raise ConfigError("calibrate: expected scores and labels of one axis each") from None
    if scores.dtype.kind not in "fiu":
        raise ConfigError(f"calibrate: expected scores that are numbers, found {scores.dtype}")
    with np.errstate(over="ignore"):
        scores = scores.astype(np.float64)
    if scores.ndim != 1 or scores.shape != same.shape:
        raise ConfigError(
            f"calibrate: expected as many labels as scores, found {same.shape} and {scores.shape}"
        )
    if not (np.abs(scores) <= MOST_SCORE).all():
        raise ConfigError(f"calibrate: a score is NaN, infinite or above {MOST_SCORE:g}; leave that pair out")
    check_both_kinds(same, "calibrate")
    pairs = SortedPairs(scores, same)
    check_support(pairs.impostors, target_fmr)
    codes = _codes(identities, len(scores))
    curve = pairs.curve()
    assert curve is not None  # both kinds are present
    threshold = curve.threshold_at(target_fmr)
    matched = scores >= threshold
    fmr, fnmr = float(matched[~same].mean()), float((~matched[same]).mean())
    if identities is None:
        spread = Spread(rate=fmr, pair=fmr * (1 - fmr), block=0.0, identity=0.0, unevenness=0.0)
        variance = spread.pair / pairs.impostors
    else:
        spread, variance = Spread.of(matched[~same], codes[~same])
    effective = fmr * (1 - fmr) / variance if variance else float(pairs.impostors)
    if effective * target_fmr < EFFECTIVE:
        raise ConfigError(
            f"{pairs.impostors} impostor pairs of {len(np.unique(codes))} identities are worth "
            f"{effective:.0f} independent ones, too few for a false-match rate of {target_fmr:g}: "
            f"{math.ceil(EFFECTIVE / target_fmr)} are needed (the rule of three); add more identities"
        )

    rng = np.random.default_rng(seed)
    at = int(np.searchsorted(-curve.thresholds, -threshold, side="right")) - 1  # -1: nothing is accepted
    samples = [
        (
            found.threshold_at(target_fmr),
            found.fmr[at] if at >= 0 else 0.0,
            found.fnmr[at] if at >= 0 else 1.0,
            found.eer,
            found.auc,
        )
        for found in resampled(pairs, codes, replicates, rng)
    ]
    low, high = np.quantile(samples, (0.025, 0.975), axis=0) if samples else np.full((2, 5), np.nan)
    intervals = [(float(a), float(b)) for a, b in zip(low, high, strict=True)]
    return Calibration(
        threshold=threshold,
        target_fmr=target_fmr,
        fmr=fmr,
        fnmr=fnmr,
        eer=curve.eer,
        auc=curve.auc,
        threshold_interval=intervals[0],
        fmr_interval=_widened(intervals[1], fmr, codes[~same]),
        fnmr_interval=_widened(intervals[2], fnmr, codes[same]),
        eer_interval=intervals[3],
        auc_interval=intervals[4],
        genuine=pairs.genuine,
        impostors=pairs.impostors,
        effective_impostors=float(effective),
        identities=0 if identities is None else len(np.unique(codes)),
        spread=spread,
        curve=curve.thinned(POINTS),
        ratios=log_likelihood_ratios(scores, same),
        groups=_group_rates(matched, same, codes, groups, target_fmr, replicates, rng),
        entry=metadata.entry if metadata else "",
        fingerprint=metadata.fingerprint if metadata else "",
    )


def calibrate_pairs(
    embeddings: Source,
    pairs: Pairs,
    target_fmr: float = 1e-3,
    *,
    groups: Sequence[Hashable] | None = None,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> Calibration:
    """Calibrate the cosine of embeddings on pairs of their rows.

    Args:
        embeddings: N rows.
        pairs: See `read_pairs` and `sample_pairs`.
        target_fmr: The target false-match rate.
        groups: (N,), the group of each image; pairs across groups have no group.
        replicates: Bootstrap samples.
        seed: Of the bootstrap.

    Raises:
        ConfigError: As `calibrate` does.

    Examples:
        >>> table = embedkit.Embeddings.load("things.parquet")
        >>> pairs = embedkit.analysis.sample_pairs(table.label("thing"))
        >>> calibration = embedkit.analysis.calibrate_pairs(table, pairs, target_fmr=0.1, replicates=50)
        >>> calibration.identities, calibration.genuine, calibration.impostors
        (10, 60, 720)
    """
    rows = Rows.of(embeddings)
    of_pair = None
    if groups is not None:
        left, right = ([groups[row] for row in side.tolist()] for side in (pairs.a, pairs.b))
        of_pair = [a if a == b else None for a, b in zip(left, right, strict=True)]
    return calibrate(
        pair_similarity(rows, pairs.a, pairs.b),
        pairs.same,
        target_fmr,
        identities=pairs.identities,
        groups=of_pair,
        metadata=rows.metadata,
        replicates=replicates,
        seed=seed,
    )


def check_support(impostors: int, target_fmr: float) -> None:
    """Refuse a rate that this number of pairs cannot support, by the rule of thirty; the rule of three needs scores.

    Args:
        impostors: Pairs of two identities, 1 or more.
        target_fmr: The target false-match rate.

    Raises:
        ConfigError: Too few pairs, or a rate that is not in (0, 1).
    """
    if not 0 < target_fmr < 1:
        raise ConfigError(f"target_fmr: expected a rate in (0, 1), found {target_fmr}")
    needed = math.ceil(EXPECTED / target_fmr - 1e-9)
    if impostors < needed:
        higher = (
            f"choose {_two_digits_up(EXPECTED / impostors):.2g} or more, or " if impostors > EXPECTED else ""
        )
        raise ConfigError(
            f"{impostors} impostor pairs cannot support a false-match rate of {target_fmr:g}: at least "
            f"{needed} are needed to expect {EXPECTED} false matches "
            f"(the rule of thirty); {higher}add more pairs"
        )


def _two_digits_up(rate: float) -> float:
    """The least number of two digits that is not below `rate`: what is suggested must be accepted."""
    unit = 10.0 ** (math.floor(math.log10(rate)) - 1)
    return math.ceil(rate / unit - 1e-9) * unit


def _codes(identities: Sequence[Sequence[Hashable]] | np.ndarray | None, count: int) -> np.ndarray:
    """Identities as 0..n-1, int64 (P, 2); without them, each pair has two of its own."""
    if identities is None:
        return np.repeat(np.arange(count)[:, None], 2, 1)
    sides = np.asarray(identities)
    if sides.shape != (count, 2):
        raise ConfigError(f"identities: expected shape ({count}, 2), found {sides.shape}")
    codes = identity_codes(sides.reshape(-1))
    if (codes < 0).any():
        raise ConfigError(f"identities: pair {int(np.argmin(codes) // 2)} has a side without an identity")
    return codes.reshape(count, 2)


def _widened(interval: Interval, rate: float, identities: np.ndarray) -> Interval:
    """The interval. Without any error, its upper end is the rate that n identities without one cannot exclude."""
    if rate > 0:
        return interval
    return interval[0], min(1.0, -math.log(0.025) / len(np.unique(identities)))


def _group_rates(
    matched: np.ndarray,
    same: np.ndarray,
    codes: np.ndarray,
    groups: Sequence[Hashable] | None,
    target: float,
    replicates: int,
    rng: np.random.Generator,
) -> tuple[GroupRates, ...]:
    if groups is None:
        return ()
    if len(groups) != len(same):
        raise ConfigError(f"groups: expected one for each of the {len(same)} pairs, found {len(groups)}")
    of_pair = identity_codes(groups)
    names = {int(code): str(name) for code, name in zip(of_pair, groups, strict=True) if code >= 0}
    found = []
    for code, name in sorted(names.items(), key=lambda item: item[1]):
        here = of_pair == code
        fmr, fmr_interval = _rate(matched[here & ~same], codes[here & ~same], replicates, rng)
        fnmr, fnmr_interval = _rate(~matched[here & same], codes[here & same], replicates, rng)
        impostors = int((here & ~same).sum())
        found.append(
            GroupRates(
                name=name,
                genuine=int((here & same).sum()),
                impostors=impostors,
                fmr=fmr,
                fmr_interval=fmr_interval,
                fnmr=fnmr,
                fnmr_interval=fnmr_interval,
                supported=impostors * target >= EXPECTED,
            )
        )
    return tuple(found)


def _rate(
    hits: np.ndarray, identities: np.ndarray, replicates: int, rng: np.random.Generator
) -> tuple[float | None, Interval | None]:
    """The mean of `hits` and its interval by a bootstrap over identities."""
    if not len(hits):
        return None, None
    _, codes = np.unique(identities, return_inverse=True)
    a, b = codes.reshape(-1, 2).T
    count, within = int(max(a.max(), b.max())) + 1, a == b
    means = []
    for _ in range(replicates):
        weight = np.bincount(rng.integers(0, count, count), minlength=count).astype(np.float64)
        weights = np.where(within, weight[a], weight[a] * weight[b])
        if total := weights.sum():
            means.append(float((weights * hits).sum() / total))
    low, high = np.quantile(means, (0.025, 0.975)) if means else (0.0, 1.0)
    rate = float(hits.mean())
    return rate, _widened((float(low), float(high)), rate, identities)
