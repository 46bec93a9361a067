"""Calibration: the threshold and the rates by loops, variances and intervals by their definition and by trial."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from statistics import NormalDist

import numpy as np
import pytest

from embedkit.analysis.matching.calibrate import calibrate, calibrate_pairs, check_support
from embedkit.analysis.matching.calibration import Calibration, verify_vectors
from embedkit.analysis.matching.identification import identify
from embedkit.analysis.matching.pairs import sample_pairs
from embedkit.analysis.matching.rates import (
    Curve,
    SortedPairs,
    Spread,
    clopper_pearson_lower,
    log_likelihood_ratios,
    prediction_interval,
)
from embedkit.analysis.similarity import pair_similarity, similarity
from embedkit.embeddings.metadata import Metadata
from embedkit.embeddings.table import Embeddings
from embedkit.errors import ConfigError, MissingDependencyError, OutputError, SpaceMismatchError

METADATA = Metadata(
    entry="linear-tiny.noise", manifest_sha256="a" * 64, fingerprint="b" * 64, dim=16, normalized=True
)
OTHER = dataclasses.replace(METADATA, entry="other-tiny.noise", fingerprint="c" * 64)


def people(seed: int, count: int, images: int = 3, families: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Images of identities, some of which resemble each other: their pairs are far from independent."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(0, 1, (families, 16))[rng.integers(0, families, count)] + rng.normal(
        0, 1, (count, 16)
    )
    vectors = np.repeat(centres, images, 0) + rng.normal(0, 0.7, (count * images, 16))
    return vectors.astype(np.float32), np.repeat(np.arange(count), images)


@pytest.fixture(scope="module")
def scored():
    """Scores with ties, truth, and identities of 60 people's pairs."""
    vectors, identities = people(0, 60)
    pairs = sample_pairs(identities)
    return pair_similarity(vectors, pairs.a, pairs.b).round(3).astype(float), pairs


@pytest.fixture(scope="module")
def calibration(scored) -> Calibration:
    scores, pairs = scored
    return calibrate(scores, pairs.same, 0.01, identities=pairs.identities, metadata=METADATA, replicates=100)


# --- the curve --------------------------------------------------------------------------------------------


def rates_at(scores, same, threshold):
    matched = sum(1 for s, t in zip(scores, same, strict=True) if not t and s >= threshold)
    missed = sum(1 for s, t in zip(scores, same, strict=True) if t and s < threshold)
    return matched / sum(~same), missed / sum(same)


def test_curve_by_a_loop():
    rng = np.random.default_rng(0)
    same = rng.random(120) < 0.4
    scores = rng.normal(same * 1.0, 1).round(1)
    curve = SortedPairs(scores, same).curve()
    assert curve is not None and curve.thresholds.tolist() == sorted(set(scores.tolist()), reverse=True)
    for threshold, fmr, fnmr in zip(curve.thresholds, curve.fmr, curve.fnmr, strict=True):
        assert (fmr, fnmr) == pytest.approx(rates_at(scores, same, threshold))
    genuine, impostor = scores[same], scores[~same]
    wins = sum((g > i) + (g == i) / 2 for g in genuine for i in impostor)
    assert curve.auc == pytest.approx(wins / len(genuine) / len(impostor))


def test_weights_are_repetitions():
    rng = np.random.default_rng(1)
    scores, same, weight = rng.normal(0, 1, 50).round(1), rng.random(50) < 0.5, rng.integers(0, 4, 50)
    pairs = SortedPairs(scores, same)
    weighted = pairs.curve(weight[pairs.order].astype(float))
    repeated = SortedPairs(np.repeat(scores, weight), np.repeat(same, weight)).curve()
    assert weighted is not None and repeated is not None
    here = np.isin(weighted.thresholds, repeated.thresholds)
    assert weighted.fmr[here] == pytest.approx(repeated.fmr) and weighted.fnmr[here] == pytest.approx(
        repeated.fnmr
    )
    assert weighted.auc == pytest.approx(repeated.auc) and weighted.eer == pytest.approx(repeated.eer)


def test_eer_by_hand():
    # Genuine 4, 3, 1 and impostors 2, 0: FMR is 0, 0, 1/2, 1/2, 1 and FNMR 2/3, 1/3, 1/3, 0, 0 from 4 down.
    # Between the thresholds 3 and 2 FMR - FNMR goes from -1/3 to 1/6: after 2/3 of the way, FMR is 1/3.
    curve = SortedPairs(np.array([4.0, 3, 1, 2, 0]), np.array([True, True, True, False, False])).curve()
    assert curve is not None
    assert curve.fmr.tolist() == [0, 0, 0.5, 0.5, 1] and curve.fnmr == pytest.approx(
        [2 / 3, 1 / 3, 1 / 3, 0, 0]
    )
    assert curve.eer == pytest.approx(1 / 3)
    assert curve.auc == pytest.approx(5 / 6)


@pytest.mark.parametrize("target", [0.004, 0.01, 0.1, 0.5, 0.999])
def test_threshold_is_the_mildest_that_keeps_the_target(scored, target):
    scores, pairs = scored
    curve = SortedPairs(scores, pairs.same).curve()
    assert curve is not None
    threshold = curve.threshold_at(target)
    impostor = scores[~pairs.same]
    assert (impostor >= threshold).mean() <= target
    milder = impostor[impostor < threshold].max()
    assert (impostor >= milder).mean() > target
    assert 0 < threshold - milder < 2e-7  # just above: a score between two that were seen is accepted
    assert not np.float32(milder) >= threshold


def test_thinned_curve_keeps_points_of_the_curve(scored):
    scores, pairs = scored
    rng = np.random.default_rng(0)
    curve = SortedPairs(scores + rng.uniform(0, 1e-6, len(scores)), pairs.same).curve()
    assert curve is not None and len(curve.thresholds) > 10_000
    thin = curve.thinned(300)
    assert len(thin.thresholds) <= 303
    at = np.searchsorted(-curve.thresholds, -thin.thresholds)
    for side in ("thresholds", "fmr", "fnmr"):
        assert (getattr(curve, side)[at] == getattr(thin, side)).all()
    assert thin.fmr[-1] == 1 and abs(thin.auc - curve.auc) < 1e-3
    low = thin.fmr[thin.fmr > 0]
    assert (low[1:] / low[:-1]).max() < 2.01  # at low rates, too


# --- variance and prediction --------------------------------------------------------------------------------


def naive_variance(hits, identities):
    """Sum over all couples of pairs with an identity in common of the product of their residuals."""
    residual = hits - hits.mean()
    total = 0.0
    for i, a in enumerate(identities.tolist()):
        for j, b in enumerate(identities.tolist()):
            if set(a) & set(b):
                total += residual[i] * residual[j]
    return total / len(hits) ** 2


def test_variance_is_the_dyadic_one():
    rng = np.random.default_rng(2)
    wolf = rng.random(15) < 0.3
    identities = np.array([(i, j) for i in range(15) for j in range(i) for _ in range(rng.integers(1, 4))])
    hits = (wolf[identities].any(1) & (rng.random(len(identities)) < 0.7)).astype(float)
    spread, variance = Spread.of(hits, identities)
    assert min(spread.block, spread.identity) > 0, "nothing was cut off at 0"
    assert variance == pytest.approx(naive_variance(hits, identities))
    swapped = np.where(rng.random((len(hits), 1)) < 0.5, identities, identities[:, ::-1])
    assert Spread.of(hits, swapped)[1] == pytest.approx(variance)  # a pair has no order
    renamed = rng.permutation(40)[identities]
    assert Spread.of(hits, renamed)[1] == pytest.approx(variance)


def test_variance_for_the_same_design_is_the_same():
    """All pairs of 20 identities, two of each: `variance` for that size must give back what was measured."""
    rng = np.random.default_rng(3)
    identities = np.array([(i, j) for i in range(20) for j in range(i) for _ in range(2)])
    wolf = rng.random(20) < 0.3
    hits = wolf[identities].any(1) & (rng.random(len(identities)) < 0.7)
    spread, variance = Spread.of(hits, identities)
    assert spread.unevenness == 0
    assert spread.variance(20, len(hits)) == pytest.approx(variance)
    assert spread.variance(40, 4 * len(hits)) < variance  # more identities tell more,
    assert spread.variance(20, 100 * len(hits)) > variance / 2  # more pairs of the same ones hardly


def test_independent_pairs_have_the_binomial_variance():
    hits = np.arange(400) % 10 == 0
    spread, variance = Spread.of(hits, np.arange(800).reshape(400, 2))
    assert variance == pytest.approx(0.1 * 0.9 / 400)
    assert (spread.block, spread.identity) == (0, 0)


def test_prediction_interval_by_sums():
    """Of whole counts, the limits are where binomial tails by their sums pass 2.5 %."""
    pytest.importorskip("scipy", reason="pip install '.[analysis]'")

    def at_least(y, n, chance):
        return sum(math.comb(n, i) * chance**i * (1 - chance) ** (n - i) for i in range(y, n + 1))

    for seen, exposure, other in ((0, 100, 100), (3, 100, 250), (30, 1000, 1000), (200, 5000, 500)):
        low, high = prediction_interval(seen, exposure, other)
        chance = other / (exposure + other)
        top = math.floor(high * other + 1e-6)
        assert at_least(top, seen + top, chance) > 0.025 or top == 0
        assert at_least(top + 1, seen + top + 1, chance) <= 0.025 + 1e-9
        bottom = math.ceil(low * other - 1e-6)
        assert 1 - at_least(bottom + 1, seen + bottom, chance) >= 0.025 - 1e-9
        if bottom:
            assert 1 - at_least(bottom, seen + bottom - 1, chance) < 0.025


def test_prediction_covers_poisson_counts():
    pytest.importorskip("scipy", reason="pip install '.[analysis]'")
    rng = np.random.default_rng(4)
    for mean, factor in ((2.0, 1), (30.0, 1), (30.0, 4)):
        inside = 0
        interval = functools.cache(lambda seen, factor=factor: prediction_interval(seen, 1000, 1000 * factor))
        for seen, other in zip(rng.poisson(mean, 4000), rng.poisson(mean * factor, 4000), strict=True):
            low, high = interval(int(seen))
            inside += low - 1e-9 <= other / (1000 * factor) <= high + 1e-9
        assert 0.945 <= inside / 4000 < (0.99 if mean > 10 else 1)  # few counts make it conservative


def test_prediction_holds_where_pairs_share_identities():
    """What is promised: in 100 seeded splits of people, the other half's false-match rate is in the interval."""
    pytest.importorskip("scipy", reason="pip install '.[analysis]'")
    vectors, identities = people(5, 200)
    cosines = similarity(vectors)
    inside = as_if_independent = 0
    for seed in range(100):
        half = np.random.default_rng(seed).permutation(200) < 100
        samples = []
        for side in (half, ~half):
            pairs = sample_pairs([int(name) if side[name] else None for name in identities])
            samples.append((cosines[pairs.a, pairs.b], pairs.same, pairs.identities))
        (scores, same, names), (others, same_others, _) = samples
        found = calibrate(scores, same, 0.01, identities=names, replicates=0)
        rate = float((others[~same_others] >= found.threshold).mean())
        low, high = found.predict(identities=100, impostors=int((~same_others).sum()))
        inside += low <= rate <= high
        alone = 1.96 * (2 * found.fmr / found.impostors) ** 0.5
        as_if_independent += abs(rate - found.fmr) <= alone
    assert inside >= 90
    assert as_if_independent < 60, "these pairs would not tell a good interval from a bad one"


# --- calibrate --------------------------------------------------------------------------------------------


def test_rates_at_the_threshold(scored, calibration):
    scores, pairs = scored
    assert (calibration.fmr, calibration.fnmr) == pytest.approx(
        rates_at(scores.tolist(), pairs.same, calibration.threshold)
    )
    assert 0.009 < calibration.fmr <= 0.01
    assert calibration.genuine == pairs.same.sum() and calibration.impostors == (~pairs.same).sum()
    assert calibration.identities == 60 and calibration.effective_impostors < calibration.impostors / 3
    for name in ("threshold", "fmr", "fnmr", "eer", "auc"):
        low, high = getattr(calibration, f"{name}_interval")
        assert low < getattr(calibration, name) < high or name == "threshold"


def test_bootstrap_is_over_identities(scored):
    """Against a bootstrap that really draws people, and builds the pairs of those who were drawn."""
    scores, pairs = scored
    found = calibrate(scores, pairs.same, 0.01, identities=pairs.identities, replicates=400, seed=1)
    rng = np.random.default_rng(9)
    between: dict[tuple[int, int], list[int]] = {}
    for index, (i, j) in enumerate(pairs.identities.tolist()):
        between.setdefault((min(i, j), max(i, j)), []).append(index)
    matched = scores >= found.threshold
    rates = []
    for _ in range(300):
        drawn = rng.integers(0, 60, 60).tolist()
        genuine = [index for i in drawn for index in between.get((i, i), ())]
        rates.append(1 - matched[genuine].mean())
    low, high = np.quantile(rates, (0.025, 0.975))
    assert found.fnmr_interval == pytest.approx((low, high), abs=0.25 * (high - low))
    alone = calibrate(scores, pairs.same, 0.01, replicates=400, seed=1)  # pairs as if independent
    width = [interval[1] - interval[0] for interval in (found.fmr_interval, alone.fmr_interval)]
    assert width[0] > 2 * width[1]
    assert alone.identities == 0 and alone.effective_impostors == pytest.approx(alone.impostors, rel=1e-6)


def test_an_affine_score_gives_the_same_rates(scored, calibration):
    scores, pairs = scored
    other = calibrate(scores * 3 + 5, pairs.same, 0.01, identities=pairs.identities, replicates=10)
    assert other.fmr == calibration.fmr and other.fnmr == calibration.fnmr
    assert other.threshold == pytest.approx(calibration.threshold * 3 + 5)
    assert other.auc == pytest.approx(calibration.auc)


def test_no_error_seen_is_not_certainty():
    rng = np.random.default_rng(0)
    scores = np.concatenate([rng.uniform(2, 3, 40), rng.uniform(0, 1, 4000)])
    names = np.concatenate(
        [np.repeat(np.arange(40), 2), rng.integers(0, 20, 4000) * 2, rng.integers(0, 20, 4000)]
    )
    same = np.arange(4040) < 40
    identities = np.concatenate(
        [np.repeat(np.arange(40)[:, None], 2, 1), np.stack([names[80:4080] % 20, names[4080:] + 20], 1)]
    )
    found = calibrate(scores, same, 0.01, identities=identities, replicates=50)
    assert found.fnmr == 0 and found.fnmr_interval == (0, pytest.approx(-math.log(0.025) / 40))


def test_support_is_known_without_scores():
    check_support(3000, 0.01)
    with pytest.raises(ConfigError, match="2999 impostor pairs .* at least 3000 .* choose 0.011 or more"):
        check_support(2999, 0.01)
    with pytest.raises(ConfigError, match="target_fmr: expected a rate"):
        check_support(3000, 0.0)


def test_too_few_pairs_are_refused():
    rng = np.random.default_rng(0)
    scores, same = rng.normal(0, 1, 3100), np.arange(3100) < 100
    with pytest.raises(
        ConfigError, match="3000 impostor pairs cannot support .* 0.001: at least 30000 are needed"
    ):
        calibrate(scores, same, 1e-3)
    assert calibrate(scores, same, 0.01, replicates=0).impostors == 3000
    calibrate(scores[:3100], same, 30 / 3000, replicates=0)  # 30 exactly are enough


def test_many_pairs_of_few_identities_are_refused():
    """100,000 pairs, but whether one matches depends on one of 20 people alone."""
    rng = np.random.default_rng(0)
    identities = np.stack([rng.integers(0, 20, 100_000), 20 + rng.integers(0, 20, 100_000)], 1)
    scores = rng.normal(0, 1, 20)[identities[:, 0]] * 5 + rng.normal(0, 0.1, 100_000)
    genuine = np.repeat(np.arange(40)[:, None], 2, 1)
    scores, identities = np.append(scores, np.full(40, 9.0)), np.concatenate([identities, genuine])
    with pytest.raises(ConfigError, match="of 40 identities are worth .* add more identities"):
        calibrate(scores, np.arange(100_040) >= 100_000, 0.01, identities=identities)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": np.ones(3, bool)}, "found 3 of one and 0 of two"),
        ({"labels": np.zeros(3, bool)}, "found 0 of one and 3 of two"),
        ({"labels": np.ones(2, bool)}, "as many labels as scores"),
        ({"scores": np.array([0.1, np.nan, 0.2])}, "a score is NaN"),
        ({"target_fmr": 0.0}, r"target_fmr: expected a rate in \(0, 1\)"),
        ({"target_fmr": 1.5}, r"target_fmr: expected a rate in \(0, 1\)"),
    ],
)
def test_bad_arguments(changes, message):
    arguments = {
        "scores": np.array([0.1, 0.2, 0.3]),
        "labels": np.array([True, False, False]),
        "target_fmr": 0.5,
    }
    with pytest.raises(ConfigError, match=message):
        calibrate(**{**arguments, **changes})


def test_bad_identities_and_groups(scored):
    scores, pairs = scored
    with pytest.raises(ConfigError, match=r"identities: expected shape"):
        calibrate(scores, pairs.same, 0.01, identities=pairs.identities[:5])
    names = pairs.identities.astype(object)
    names[7, 1] = None
    with pytest.raises(ConfigError, match="pair 7 has a side without an identity"):
        calibrate(scores, pairs.same, 0.01, identities=names)
    with pytest.raises(ConfigError, match="groups: expected one for each"):
        calibrate(scores, pairs.same, 0.01, groups=["a"], replicates=0)


# --- groups -----------------------------------------------------------------------------------------------


def test_groups():
    vectors, identities = people(6, 60)
    group = np.where(identities < 20, "few", np.where(identities < 59, "many", "")).tolist()
    pairs = sample_pairs(identities)
    found = calibrate_pairs(vectors, pairs, 0.01, groups=group, replicates=50)
    assert [row.name for row in found.groups] == ["few", "many"]
    scores = pair_similarity(vectors, pairs.a, pairs.b)
    for row in found.groups:
        here = np.array([group[a] == group[b] == row.name for a, b in zip(pairs.a, pairs.b, strict=True)])
        fmr, fnmr = rates_at(scores[here], pairs.same[here], found.threshold)
        assert (row.fmr, row.fnmr) == pytest.approx((fmr, fnmr))
        assert row.impostors == (here & ~pairs.same).sum() and row.genuine == (here & pairs.same).sum()
        assert row.fmr_interval is not None and row.fmr_interval[0] <= fmr <= row.fmr_interval[1]
    assert [row.supported for row in found.groups] == [False, True]  # 1,710 and 6,669 impostor pairs


# --- evidence ---------------------------------------------------------------------------------------------


def test_log_likelihood_ratios_by_hand():
    # From the lowest score: impostor, genuine, impostor, genuine. The middle two violate the order and are
    # pooled at score 2.5, halves added: odds (1 + .5) / (1 + .5) = 1; the ends have .5 / 1.5 and 1.5 / .5. The
    # prior odds are 1.
    scores, same = np.array([1.0, 2, 3, 4]), np.array([False, True, False, True])
    at, ratios = log_likelihood_ratios(scores, same)
    assert at.tolist() == [1, 2.5, 4]
    assert ratios == pytest.approx([-math.log(3), 0, math.log(3)])


def test_probability_is_monotone_and_true():
    rng = np.random.default_rng(0)
    same = rng.random(40_000) < 0.2
    scores = rng.normal(same * 2.0, 1)  # the true log likelihood ratio is 2 s - 2
    found = calibrate(scores, same, 0.01, replicates=0)
    grid = np.linspace(-6, 8, 200)
    probability = found.probability(grid)
    assert (np.diff(probability) >= 0).all() and 0 < probability[0] and probability[-1] < 1
    middle = (grid > -1) & (grid < 3)
    assert np.abs(probability - 1 / (1 + np.exp(2 - 2 * grid)))[middle].max() < 0.08
    rare = found.probability(1.0, prior=0.01)
    assert rare == pytest.approx(0.01, abs=0.003)  # no evidence leaves the prior
    with pytest.raises(ConfigError, match="prior"):
        found.probability(0.0, prior=1.0)


def test_det_is_in_normal_deviates(calibration):
    x, y = calibration.det
    cdf = NormalDist().cdf
    points = set(
        zip(calibration.curve.fmr.round(9).tolist(), calibration.curve.fnmr.round(9).tolist(), strict=True)
    )
    assert len(x) > 50
    assert all((round(cdf(a), 9), round(cdf(b), 9)) in points for a, b in zip(x, y, strict=True))


# --- decisions --------------------------------------------------------------------------------------------


def test_false_match_rate_is_never_less_than_seen(scored, calibration):
    scores, pairs = scored
    impostor = scores[~pairs.same]
    assert calibration.false_match_rate(calibration.threshold) == calibration.fmr
    bound = 3 / calibration.effective_impostors
    for threshold in np.linspace(-1.1, 1.1, 60).tolist():
        stated = calibration.false_match_rate(threshold)
        seen = float((impostor >= threshold).mean())
        assert stated >= seen
        assert stated <= max(seen * 1.2 + 0.01, bound)
    assert calibration.false_match_rate(2.0) == bound and calibration.false_match_rate(-2.0) == 1.0


def test_verification(calibration):
    a = np.zeros(16)
    a[0] = 2.0
    b = np.zeros(16)
    b[:2] = [3.0, 4.0]  # cosine 0.6
    found = verify_vectors(a, b, calibration=calibration)
    assert found.score == pytest.approx(0.6) and found.threshold == calibration.threshold
    assert found.is_match == (0.6 >= calibration.threshold) and found.expected_fmr == calibration.fmr
    assert found.probability == pytest.approx(float(calibration.probability(0.6)))
    milder = verify_vectors(a, b, calibration=calibration, threshold=0.5)
    assert milder.is_match and milder.expected_fmr >= calibration.fmr
    bare = verify_vectors(a, b, threshold=0.7)
    assert not bare.is_match and bare.expected_fmr is None and bare.probability is None
    assert verify_vectors(a, a, threshold=0.99).is_match
    with pytest.raises(ConfigError, match="a calibration or a threshold"):
        verify_vectors(a, b)
    with pytest.raises(ConfigError, match="second vector: row 0 .* zeros"):
        verify_vectors(a, b * 0, threshold=0.5)
    with pytest.raises(ConfigError, match="16 numbers and the second 15"):
        verify_vectors(a, b[:15], threshold=0.5)


def embeddings(vectors, metadata=METADATA):
    ids = [f"{index}.jpg" for index in range(len(vectors))]
    return Embeddings(ids, np.zeros(len(vectors), np.int32), vectors, metadata)


def test_identify_knows_whom_it_does_not_know(calibration):
    gallery = np.eye(16, dtype=np.float32)[[0, 0, 1, 2]] + np.float32(0.01)
    queries = np.zeros((3, 16), np.float32)
    queries[0, [0, 5]] = [1, 0.2]
    queries[1, [1, 5]] = [1, 0.1]
    queries[2, 9] = 1
    found = identify(
        embeddings(queries), embeddings(gallery), ["ann", "ann", "bob", "cy"], calibration=calibration
    )
    assert [row.identity for row in found] == ["ann", "bob", None]
    assert [row.nearest for row in found[:2]] == ["0.jpg", "2.jpg"] and found[2].score < calibration.threshold
    assert found[0].expected_fpir == pytest.approx(4 * calibration.fmr)
    strict = identify(queries, gallery, ["ann", "ann", "bob", "cy"], threshold=0.9999)
    assert [row.identity for row in strict] == [None] * 3 and strict[0].expected_fpir is None


def test_a_gallery_of_one_identity_is_a_verification(calibration):
    vectors = np.eye(16, dtype=np.float32)
    found = identify(vectors[[1, 5]], embeddings(vectors[:3]), ["ann"] * 3, calibration=calibration)
    assert [row.identity for row in found] == ["ann", None]
    for row, query in zip(found, vectors[[1, 5]], strict=True):
        decided = [verify_vectors(query, one, calibration=calibration) for one in vectors[:3]]
        assert (row.identity is not None) == any(one.is_match for one in decided)
        assert row.score == max(one.score for one in decided)
    assert found[0].expected_fpir == pytest.approx(3 * calibration.fmr)


def test_identify_refuses(calibration):
    vectors = np.eye(16, dtype=np.float32)[:3]
    for identities, message in (
        (["ann", "bob"], "expected 3 identities, found 2"),
        (["ann", None, "bob"], "1.jpg has no identity"),
    ):
        with pytest.raises(ConfigError, match=message):
            identify(vectors, embeddings(vectors), identities, calibration=calibration)
    with pytest.raises(ConfigError, match="a calibration or a threshold"):
        identify(vectors, vectors, ["a", "b", "c"])
    with pytest.raises(SpaceMismatchError, match="linear-tiny.noise .*bbbb.* other-tiny.noise .*cccc"):
        identify(vectors, embeddings(vectors, OTHER), ["a", "b", "c"], calibration=calibration)


# --- files ------------------------------------------------------------------------------------------------


def test_saved_and_loaded_is_the_same(calibration, scored, tmp_path):
    scores, pairs = scored
    groups = np.where(pairs.a % 2, "odd", "even").tolist()
    found = calibrate(
        scores, pairs.same, 0.01, identities=pairs.identities, groups=groups, metadata=METADATA, replicates=20
    )
    found.save(tmp_path / "c.json")
    again = Calibration.load(tmp_path / "c.json")
    assert json.dumps(again.to_json(), sort_keys=True) == json.dumps(found.to_json(), sort_keys=True)
    assert (
        again.groups == found.groups and again.spread == found.spread and again.threshold == found.threshold
    )
    assert isinstance(again.curve, Curve) and again.fingerprint == METADATA.fingerprint
    again._check_space(METADATA, "x.parquet")
    with pytest.raises(SpaceMismatchError, match="linear-tiny.noise .* x.parquet .* other-tiny.noise"):
        again._check_space(OTHER, "x.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[: len(text) // 2],
        lambda text: b"{}",
        lambda text: b"[1]",
        lambda text: b"\xff\x00",
        lambda text: text.replace(b'"threshold"', b'"treshold"', 1),
        lambda text: text.replace(b'"fmr": [', b'"fmr": [0.5,', 1),
        lambda text: json.dumps({**json.loads(text), "threshold": "high"}).encode(),
        lambda text: json.dumps({**json.loads(text), "more": 1}).encode(),
        lambda text: b"[" * 100_000,
        *(
            lambda text, part=part: json.dumps({**json.loads(text), **part}).encode()
            for part in (
                {"threshold": 10**400},
                {"threshold": 1.5},
                {"threshold": math.nan},
                {"threshold": True},
                {"fmr": -0.1},
                {"fnmr": 1.1},
                {"eer": "0"},
                {"auc": math.inf},
                {"target_fmr": None},
                {"effective_impostors": 0},
                {"impostors": 0},
                {"identities": -1},
                {"identities": 2.5},
                {"fmr_interval": [0.1]},
                {"fmr_interval": []},
                {"auc_interval": [0.1, math.nan]},
                {"eer_interval": [0.1, 2]},
                {"threshold_interval": ["a", "b"]},
                {"threshold_interval": None},
                {"entry": 3},
                {"fingerprint": None},
                {"groups": [{}]},
                {"curve": {"thresholds": [], "fmr": [], "fnmr": []}},
                {"curve": {"thresholds": [[0.5]], "fmr": [[1]], "fnmr": [[0]]}},
                {"curve": {"thresholds": 0.5, "fmr": 1, "fnmr": 0}},
                {"curve": {"thresholds": [0.5], "fmr": [2], "fnmr": [0]}},
                {"curve": {"thresholds": [math.nan], "fmr": [1], "fnmr": [0]}},
                {"ratios": [[0.1, 0.2], [0.0, math.inf]]},
                {"ratios": [[], []]},
                {"spread": {"rate": 0, "pair": 0, "block": 0, "identity": 0, "unevenness": math.nan}},
            )
        ),
    ],
)
def test_damaged_files_are_one_sentence(calibration, tmp_path, change):
    path = tmp_path / "c.json"
    calibration.save(path)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(OutputError, match=r"c\.json(: | is not JSON \()[^\n]*; write the calibration again"):
        Calibration.load(path)


def test_plain_scores_may_have_thresholds_of_any_size(scored, tmp_path):
    scores, pairs = scored
    found = calibrate(100 * scores, pairs.same, 0.01, replicates=10)
    assert found.threshold > 1
    found.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json").threshold == found.threshold


def test_without_a_bootstrap_intervals_are_not_known(scored, tmp_path):
    scores, pairs = scored
    found = calibrate(scores, pairs.same, 0.01, identities=pairs.identities, replicates=0)
    found.save(tmp_path / "c.json")
    assert math.isnan(Calibration.load(tmp_path / "c.json").threshold_interval[0])


def test_cosines_that_rounding_took_beyond_one(tmp_path):
    """The mildest threshold above impostors of one score of 1 is a step more than 1."""
    same = np.arange(100) < 10
    found = calibrate(np.ones(100), same, 0.5, metadata=METADATA, replicates=10)
    assert found.threshold >= 1
    found.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json").threshold == found.threshold


@pytest.mark.parametrize("threshold", [math.nan, math.inf, -math.inf, 2, -2])
def test_a_threshold_is_a_cosine(threshold):
    vectors = np.eye(3, 16, dtype=np.float32)
    for act in (
        lambda: verify_vectors(vectors[0], vectors[1], threshold=threshold),
        lambda: identify(vectors, vectors, ["a", "b", "c"], threshold=threshold),
    ):
        with pytest.raises(ConfigError, match=r"^threshold: expected a cosine in \[-1, 1\], found"):
            act()
    assert verify_vectors(vectors[0], vectors[0], threshold=1).is_match


def test_other_files(calibration, tmp_path):
    with pytest.raises(OutputError, match="does not exist"):
        Calibration.load(tmp_path / "missing.json")
    path = tmp_path / "c.json"
    path.write_text(json.dumps({**calibration.to_json(), "embedkit_calibration": 9}))
    with pytest.raises(OutputError, match="expected version 1, found 9; upgrade"):
        Calibration.load(path)
    with pytest.raises(OutputError, match="cannot be written"):
        calibration.save(tmp_path / "missing" / "c.json")


def test_predict(calibration, monkeypatch):
    pytest.importorskip("scipy", reason="pip install '.[analysis]'")
    low, high = calibration.predict()
    assert low < calibration.fmr < high
    assert (
        high - low > calibration.fmr_interval[1] - calibration.fmr_interval[0]
    )  # two samples' chance, not one's
    wider, narrower = calibration.predict(identities=20, impostors=500), calibration.predict(identities=6000)
    assert wider[1] - wider[0] > high - low > narrower[1] - narrower[0]
    with pytest.raises(ConfigError, match="2 identities or more"):
        calibration.predict(identities=1)
    monkeypatch.setitem(__import__("sys").modules, "scipy", None)
    with pytest.raises(MissingDependencyError, match=r"pip install '\.\[analysis\]'"):
        calibration.predict()


def test_clopper_pearson():
    pytest.importorskip("scipy", reason="pip install '.[analysis]'")
    assert clopper_pearson_lower(299, 299, 0.05) == pytest.approx(0.05 ** (1 / 299))
    assert clopper_pearson_lower(0, 10, 0.05) == 0
    low = clopper_pearson_lower(8, 10, 0.05)
    assert sum(math.comb(10, i) * low**i * (1 - low) ** (10 - i) for i in (8, 9, 10)) == pytest.approx(0.05)
