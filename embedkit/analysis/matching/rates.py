"""Error rates of verification: curves, variances, intervals, log likelihood ratios.

Pairs that share an identity are correlated: one face that resembles many makes many false matches. All variances here
therefore treat identities, not pairs, as the sample.

Sources.
Variance of a rate over pairs: Cluster-Robust Variance Estimation for Dyadic Data (Aronow, Samii and Assenova,
Political Analysis 2015, arXiv 1312.3398), here split into its three components, so that it can be computed for
another sample.
Bootstrap: Bootstrapping data arrays of arbitrary order (Owen and Eckles, Annals of Applied Statistics 2012, arXiv
1106.2125): a pair weighs as much as the product of its identities' weights; mildly conservative. For biometrics,
Error analysis of pattern recognition systems: the subsets bootstrap (Bolle, Ratha and Pankanti, Computer Vision
and Image Understanding 2004).
Prediction: the conditional interval for a Poisson count given another (Nelson, Applied Life Data Analysis, 1982;
reviewed in Improved closed-form prediction intervals for binomial and Poisson distributions, Krishnamoorthy and
Peng, Journal of Statistical Planning and Inference 2011), on effective counts (Confidence intervals for
proportions with small expected number of positive counts estimated from survey data, Korn and Graubard, Survey
Methodology 1998).
Log likelihood ratios: Application-independent evaluation of speaker detection (Brummer and du Preez, Computer
Speech and Language 2006).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from embedkit._io.optional import requires

#: Two-sided, for 95 %.
TAIL = 0.025


@dataclass(frozen=True)
class Curve:
    """Error rates at every distinct score as threshold, the strictest first.

    Attributes:
        thresholds: float64 (T,), descending; a pair is accepted when its score is at least the threshold.
        fmr: float64 (T,), false-match rate: share of impostor pairs that are accepted; rises to 1.
        fnmr: float64 (T,), false-non-match rate: share of genuine pairs that are not; falls to 0.
    """

    thresholds: np.ndarray
    fmr: np.ndarray
    fnmr: np.ndarray

    @property
    def auc(self) -> float:
        """Area under the ROC curve: how often a genuine pair scores above an impostor one, equal ones half."""
        x, y = np.insert(self.fmr, 0, 0), np.insert(1 - self.fnmr, 0, 0)
        return float(np.trapezoid(y, x))

    @property
    def eer(self) -> float:
        """Equal error rate: where FMR = FNMR, linear between two thresholds."""
        fmr = np.insert(self.fmr, 0, 0)
        gap = fmr - np.insert(self.fnmr, 0, 1)  # rises from -1 to 1
        after = int(np.argmax(gap >= 0))
        share = -gap[after - 1] / (gap[after] - gap[after - 1])
        return float(fmr[after - 1] + share * (fmr[after] - fmr[after - 1]))

    def threshold_at(self, target: float) -> float:
        """The lowest threshold with a false-match rate of at most `target`.

        It is one step of float32 above the first score that would exceed the target, so that it decides equally on
        scores in float32 and in float64.
        """
        over = int(np.searchsorted(self.fmr, target, side="right"))
        if over == len(self.fmr):
            return float(self.thresholds[-1])
        return float(np.nextafter(np.float32(self.thresholds[over]), np.float32(np.inf)))

    def thinned(self, most: int) -> Curve:
        """At most about `most` of the points: evenly by rank, and evenly by the logarithm of either rate."""
        if len(self.thresholds) <= most:
            return self
        points = [np.linspace(0, len(self.fmr) - 1, most // 3).round().astype(int), np.array([0])]
        for rate in (self.fmr, self.fnmr[::-1]):
            lowest = rate[rate > 0].min()
            index = np.searchsorted(rate, np.geomspace(lowest, 1, most // 3))
            points.append(index if rate is self.fmr else len(rate) - 1 - index)
        keep = np.unique(np.clip(np.concatenate(points), 0, len(self.fmr) - 1))
        return Curve(self.thresholds[keep], self.fmr[keep], self.fnmr[keep])


class SortedPairs:
    """Scored pairs in descending order, for curves under many weightings.

    Attributes:
        genuine: Pairs of one identity.
        impostors: Pairs of two.
    """

    def __init__(self, scores: np.ndarray, same: np.ndarray):
        """Sort pairs: scores float64 (P,), same bool (P,), both kinds present."""
        self.order = np.argsort(-scores, kind="stable")
        ranked = scores[self.order]
        self._same = same[self.order]
        self._last = np.flatnonzero(
            np.append(ranked[1:] != ranked[:-1], True)
        )  # of each group of equal scores
        self._values = ranked[self._last]
        self.genuine = int(same.sum())
        self.impostors = len(same) - self.genuine

    def curve(self, weights: np.ndarray | None = None) -> Curve | None:
        """The curve; with weights float64 (P,) by rank, None when they leave no pair of one kind."""
        if weights is None:
            weights = np.ones(len(self._same))
        accepted = np.cumsum(np.where(self._same, weights, 0))
        matched = np.cumsum(np.where(self._same, 0, weights))
        if not accepted[-1] or not matched[-1]:
            return None
        return Curve(self._values, matched[self._last] / matched[-1], 1 - accepted[self._last] / accepted[-1])


def resampled(
    pairs: SortedPairs, identities: np.ndarray, replicates: int, rng: np.random.Generator
) -> Iterator[Curve]:
    """Curves of bootstrap samples of identities.

    Args:
        pairs: The pairs.
        identities: int64 (P, 2), 0..n-1, in the pairs' original order.
        replicates: How many samples; one without a pair of some kind is left out.
        rng: The random generator.
    """
    a, b = identities[pairs.order].T
    count = int(identities.max()) + 1
    within = a == b
    for _ in range(replicates):
        weight = np.bincount(rng.integers(0, count, count), minlength=count).astype(np.float64)
        left = weight[a]
        found = pairs.curve(np.where(within, left, left * weight[b]))
        if found is not None:
            yield found


@dataclass(frozen=True)
class Spread:
    """The variance of a rate over pairs, in components that carry over to a sample of another size.

        Var = (pair * I + block * (B - I) + identity * (D - 2 B)) / I^2

    with I pairs, B = sum over pairs of identities of (number of their pairs)^2, and D = sum over identities of
    (number of their pairs)^2: D - 2 B counts the ordered couples of pairs with exactly one identity in common.

    Attributes:
        rate: The rate itself, p.
        pair: Variance of one pair, p (1 - p).
        block: Covariance of two pairs between the same two identities.
        identity: Covariance of two pairs with exactly one identity in common.
        unevenness: Variance over squared mean of the number of pairs of an identity.
    """

    rate: float
    pair: float
    block: float
    identity: float
    unevenness: float

    @classmethod
    def of(cls, hits: np.ndarray, identities: np.ndarray) -> tuple[Spread, float]:
        """Components of the mean of `hits`, bool (I,), over pairs of identities int64 (I, 2); and its variance.

        Negative covariances are set to 0: only an excess over the variance of independent pairs is estimated.
        """
        a, b = identities.T
        count, rate = int(identities.max()) + 1, float(hits.mean())
        _, block = np.unique(np.minimum(a, b) * count + np.maximum(a, b), return_inverse=True)
        sizes = np.bincount(block).astype(np.float64)
        degrees = np.bincount(a, minlength=count) + np.bincount(b, minlength=count).astype(np.float64)
        residual = hits - rate
        per_block = np.bincount(block, residual)
        per_identity = np.bincount(a, residual, count) + np.bincount(b, residual, count)
        pair = rate * (1 - rate)
        blocks, own = float((sizes**2).sum()), len(hits)
        one_shared = float((degrees**2).sum()) - 2 * blocks
        squares = float((per_block**2).sum())
        in_block = max(0.0, squares - pair * own) / (blocks - own) if blocks > own else 0.0
        shared = (
            max(0.0, float((per_identity**2).sum()) - 2 * squares) / one_shared if one_shared > 0 else 0.0
        )
        used = degrees[degrees > 0]
        spread = cls(rate, pair, in_block, shared, float(used.var() / used.mean() ** 2))
        return spread, (pair * own + in_block * (blocks - own) + shared * one_shared) / own**2

    def variance(self, identities: int, pairs: int) -> float:
        """Of the rate in another sample: `pairs` pairs, spread over `identities` as unevenly as here."""
        kinds = identities * (identities - 1) / 2
        blocks = max(pairs, pairs**2 / kinds)
        one_shared = max(0.0, (2 * pairs) ** 2 / identities * (1 + self.unevenness) - 2 * blocks)
        return (self.pair * pairs + self.block * (blocks - pairs) + self.identity * one_shared) / pairs**2


def prediction_interval(count: float, exposure: float, other: float) -> tuple[float, float]:
    """A 95 % interval for the rate of another Poisson sample.

    Given that both samples have n = x + y events, y is binomial with n trials and chance
    other / (exposure + other). The limits are the y beyond which observing both x and y has a probability of less
    than 2.5 % on either side.

    Args:
        count: Observed events, x; effective counts need not be whole numbers.
        exposure: Trials of these events.
        other: Trials of the other sample.

    Returns:
        Lowest and highest rate.
    """
    betainc = _special().betainc
    chance = other / (exposure + other)

    def solve(too_low: Callable[[float], bool]) -> float:
        low, high = 0.0, 1.0
        while too_low(high):
            high *= 2
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if too_low(middle) else (low, middle)
        return high

    # P(Y >= y) = I_chance(y, x + 1) and P(Y <= y) = 1 - I_chance(y + 1, x).
    highest = solve(lambda y: y <= 0 or betainc(y, count + 1, chance) > TAIL)
    lowest = 0.0
    if count > 0 and 1 - betainc(1, count, chance) < TAIL:
        lowest = solve(lambda y: 1 - betainc(y + 1, count, chance) < TAIL)
    return lowest / other, min(1.0, highest / other)


def clopper_pearson_lower(hits: int, trials: int, tail: float) -> float:
    """The exact lower bound of a binomial rate, at confidence 1 - tail."""
    return float(_special().betaincinv(hits, trials - hits + 1, tail)) if hits else 0.0


def log_likelihood_ratios(
    scores: np.ndarray, same: np.ndarray, most: int = 256
) -> tuple[np.ndarray, np.ndarray]:
    """Log P(score | one identity) / P(score | two), monotone in the score, by pooling adjacent violators.

    Half a pair of the other kind is added to each pool, so that no evidence is infinite.

    Args:
        scores: float64 (P,).
        same: bool (P,).
        most: Knots.

    Returns:
        Scores, rising, and the ratio at each, rising; linear in between and constant beyond. float64 (K,) each.
    """
    order = np.argsort(scores, kind="stable")
    values, start = np.unique(scores[order], return_index=True)
    hits = np.add.reduceat(same[order].astype(np.float64), start)
    sizes = np.diff(np.append(start, len(scores))).astype(np.float64)
    totals = np.add.reduceat(values * sizes, np.arange(len(values)))
    pools: list[list[float]] = []  # genuine pairs, all pairs, sum of their scores
    for genuine, size, total in zip(hits.tolist(), sizes.tolist(), totals.tolist(), strict=True):
        pools.append([genuine, size, total])
        while len(pools) > 1 and pools[-2][0] * pools[-1][1] >= pools[-1][0] * pools[-2][1]:
            last = pools.pop()
            pools[-1] = [x + y for x, y in zip(pools[-1], last, strict=True)]
    genuine_, size_, total_ = np.array(pools).T
    at = total_ / size_
    odds = np.log((genuine_ + 0.5) / (size_ - genuine_ + 0.5))
    prior = np.log((same.sum() + 0.5) / ((~same).sum() + 0.5))
    ratios = np.maximum.accumulate(odds - prior)  # the added halves may undo the order of small pools
    if len(at) > most:
        keep = np.unique(np.linspace(0, len(at) - 1, most).round().astype(int))
        at, ratios = at[keep], ratios[keep]
    return at, ratios


def _special() -> Any:
    with requires("an interval of a rate", "analysis", package="scipy"):
        from scipy import special
    return special
