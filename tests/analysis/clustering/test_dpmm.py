"""The mixture that finds K: exact formulas, the likeliest of all partitions, 15 Gaussians from every start."""

import dataclasses
import itertools
import json
import math
import subprocess
import sys

import numpy as np
import pytest

stats = pytest.importorskip("scipy.stats")

from safetensors.numpy import save

from embedkit.analysis.clustering.dpmm import DPMMConfig, fit, log_joint, log_merge, log_split
from embedkit.analysis.clustering.niw import NIW, Moments, moments, union
from embedkit.errors import ConfigError, EntryError, SpaceMismatchError
from embedkit.model import mixture as mixture_
from embedkit.model.mixture import GaussianMixture

FIVE = np.array([(0.0, 0), (1, 0), (0, 2), (1, 3), (2, 1)])
UNIT = NIW(np.zeros(2), 1.0, np.eye(2), 4.0)


def whole(points):
    return moments(points, np.zeros(len(points), int), 1)


def broad(dim):
    return NIW(np.full(dim, 0.3), 0.7, np.eye(dim) * 0.4 + 0.1, dim + 2.5)


def student_chain(prior, points):
    """log f as the product of each point's predictive density given those before it (multivariate Student t)."""
    m, kappa, psi, nu = prior.mean, prior.kappa, prior.psi, prior.nu
    total, dim = 0.0, len(m)
    for x in points:
        degrees = nu - dim + 1
        shape = psi * (kappa + 1) / (kappa * degrees)
        total += stats.multivariate_t(m, shape, df=degrees).logpdf(x)
        psi = psi + kappa / (kappa + 1) * np.outer(x - m, x - m)
        m, kappa, nu = (kappa * m + x) / (kappa + 1), kappa + 1, nu + 1
    return total


def fifteen_gaussians(seed, n=10_000):
    """DeepDPM's set: means {-5, 0, 5} x {-5, -3, 0, 3, 5}, covariances A A^T, A = I / 2 + U(-0.3, 0.2)."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % 15)
    means = np.array([(x, y) for x in (-5, 0, 5) for y in (-5, -3, 0, 3, 5)], float)
    roots = 0.5 * np.eye(2) + rng.uniform(-0.3, 0.2, (15, 2, 2))
    noise = np.einsum("nij,nj->ni", roots[labels], rng.standard_normal((n, 2)))
    return (means[labels] + noise).astype(np.float32), labels


def mutual_information(a, b):
    """Normalized by the mean of both entropies."""
    _, a = np.unique(a, return_inverse=True)
    _, b = np.unique(b, return_inverse=True)
    joint = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(joint, (a, b), 1 / len(a))
    p, q = joint.sum(1), joint.sum(0)
    cells = joint > 0
    shared = (joint[cells] * np.log(joint[cells] / np.outer(p, q)[cells])).sum()
    return 2 * shared / -((p * np.log(p)).sum() + (q * np.log(q)).sum())


def partitions(n):
    """All partitions of n points, as labels in order of first appearance."""
    found = [[0]]
    for _ in range(n - 1):
        found = [[*labels, new] for labels in found for new in range(max(labels) + 2)]
    return np.array(found)


# ---- the prior -------------------------------------------------------------------------------------------


def test_golden_marginal():
    assert UNIT.log_marginal(whole(FIVE))[0] == pytest.approx(-19.518268339538, abs=1e-11)
    assert student_chain(UNIT, FIVE) == pytest.approx(-19.518268339538, abs=1e-9)


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_marginal_is_the_chain_of_predictives_and_an_empty_cluster_is_worth_nothing(dim):
    points = np.random.default_rng(dim).standard_normal((60, dim)) * 2 + 1
    value = broad(dim).log_marginal(moments(points, np.ones(60, int), 2))
    assert value[1] == pytest.approx(student_chain(broad(dim), points), rel=1e-10)
    assert value[0] == 0.0


def test_moments_and_union_by_loop():
    rng = np.random.default_rng(0)
    points, labels = rng.standard_normal((60, 3)), rng.integers(0, 3, 60)
    found = moments(points, labels, 4)
    assert found.count[3] == 0 and not np.isnan(found.mean).any()
    for k in range(3):
        own = points[labels == k]
        mean = sum(own) / len(own)
        np.testing.assert_allclose(found.mean[k], mean)
        np.testing.assert_allclose(found.scatter[k], sum(np.outer(x - mean, x - mean) for x in own))
    both = union(found[np.array([0, 2])], found[np.array([1, 3])])
    together = moments(points, np.where(labels == 2, 1, 0), 2)
    for name in ("count", "mean", "scatter"):
        np.testing.assert_allclose(getattr(both, name), getattr(together, name))


def test_draws_have_the_posteriors_moments_and_densities_are_scipys():
    prior, one = broad(2), whole(FIVE)
    many = Moments(*(np.repeat(getattr(one, name), 40_000, axis=0) for name in ("count", "mean", "scatter")))
    drawn = prior.sample(many, np.random.default_rng(0))
    scatter, nu, kappa = prior.scatter(one)[0], prior.nu + 5, prior.kappa + 5
    precision = drawn.roots @ drawn.roots.transpose(0, 2, 1)
    np.testing.assert_allclose(precision.mean(0), nu * np.linalg.inv(scatter), rtol=0.02, atol=0.02)
    np.testing.assert_allclose(drawn.means.mean(0), prior.means(one)[0], atol=0.01)
    # E Sigma / kappa* = Psi* / (nu* - D - 1) / kappa* is the spread of the means
    np.testing.assert_allclose(np.cov(drawn.means.T), scatter / (nu - 3) / kappa, rtol=0.06, atol=0.01)
    np.testing.assert_allclose(drawn.log_dets, np.linalg.slogdet(drawn.roots)[1])
    for gaussians in (drawn, prior.mode(many)):
        density = gaussians.log_densities(FIVE)
        for k in (0, 1, 39_999):
            cov = np.linalg.inv(gaussians.roots[k] @ gaussians.roots[k].T)
            expected = stats.multivariate_normal(gaussians.means[k], cov).logpdf(FIVE)
            np.testing.assert_allclose(density[:, k], expected, rtol=1e-8)


def test_the_mode_is_where_the_joint_posterior_is_highest():
    prior = broad(2)
    found = prior.mode(whole(FIVE))
    mean, cov = found.means[0], np.linalg.inv(found.roots[0] @ found.roots[0].T)
    np.testing.assert_array_equal(found.roots[0], np.triu(found.roots[0]))

    def posterior(mu, sigma):
        return (
            stats.multivariate_normal(mu, sigma).logpdf(FIVE).sum()
            + stats.multivariate_normal(prior.mean, sigma / prior.kappa).logpdf(mu)
            + stats.invwishart(prior.nu, prior.psi).logpdf(sigma)
        )

    best = posterior(mean, cov)
    for direction in (np.array([1.0, 0]), np.array([0, 1.0]), np.array([1.0, -1])):
        for step in (-1e-2, 1e-2):
            assert posterior(mean + step * direction, cov) < best
            assert posterior(mean, cov + step * np.outer(direction, direction)) < best


@pytest.mark.parametrize(("kappa", "nu"), [(0.0, 4.0), (1.0, 1.0), (float("nan"), 4.0)])
def test_a_prior_that_is_none_is_refused(kappa, nu):
    with pytest.raises(ConfigError, match="kappa above 0 and nu above D - 1 = 1"):
        NIW(np.zeros(2), kappa, np.eye(2), nu)


# ---- ratios ----------------------------------------------------------------------------------------------


def test_split_and_merge_by_their_formulas():
    points, prior, alpha = np.random.default_rng(0).standard_normal((60, 3)), broad(3), 7.0
    side = np.arange(60) % 5 == 0
    a, b = whole(points[~side]), whole(points[side])
    f = [student_chain(prior, part) for part in (points[~side], points[side], points)]
    gammas = [math.lgamma(n) for n in (48, 12, 60)]
    split = math.log(alpha) + gammas[0] + f[0] + gammas[1] + f[1] - gammas[2] - f[2]
    assert log_split(prior, a, b, alpha)[0] == pytest.approx(split)
    # the reverse of the source's merge: 60 points, one after the other, draw their sides from a Polya urn
    urn, counts = 0.0, [alpha / 2, alpha / 2]
    for right in side:
        urn += math.log(counts[int(right)] / sum(counts))
        counts[int(right)] += 1
    assert log_merge(prior, a, b, alpha)[0] == pytest.approx(urn - split)


def test_known_ratios_of_two_gaussians_and_of_one_cut_in_two():
    # unit Gaussians 6 apart, 100 points each; one Gaussian of 200, in sorted and in random halves
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((100, 2)), rng.standard_normal((100, 2)) + [6, 0]

    def ratio(a, b):
        prior = NIW(np.concatenate([a, b]).mean(0), 1e-4, np.eye(2) * 0.005, 4.0)
        return log_split(prior, whole(a), whole(b), 10.0)[0]

    assert ratio(left, right) == pytest.approx(61.9, abs=0.05)
    one = rng.standard_normal((200, 2))
    ordered = one[one[:, 0].argsort()]
    assert ratio(ordered[:100], ordered[100:]) == pytest.approx(-67.8, abs=0.06)
    assert ratio(one[:100], one[100:]) < -150


def test_log_joint_is_a_chinese_restaurant_times_marginals():
    points, prior, alpha = np.random.default_rng(1).standard_normal((6, 1)), broad(1), 2.5
    seated = 0.0
    for labels in partitions(6):
        restaurant, counts = 0.0, []
        for i, k in enumerate(labels):
            if k == len(counts):
                restaurant += math.log(alpha / (i + alpha))
                counts.append(1)
            else:
                restaurant += math.log(counts[k] / (i + alpha))
                counts[k] += 1
        seated += math.exp(restaurant)
        f = sum(student_chain(prior, points[labels == k]) for k in range(len(counts)))
        value = log_joint(prior, moments(points, labels, len(counts)), alpha)
        assert value == pytest.approx(restaurant + f)
    assert seated == pytest.approx(1)


# ---- the chain -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merge", ["joint", "source"])
def test_the_likeliest_of_all_partitions_is_found(merge):
    points = np.array([[-4.1], [-4.0], [-3.8], [0.0], [0.3], [3.9], [4.0]])
    config = DPMMConfig(alpha=1.0, merge=merge)
    prior = config.prior(whole(points))
    values = {
        tuple(labels): log_joint(prior, moments(points, labels, labels.max() + 1), 1.0)
        for labels in partitions(7)
    }
    best = max(values, key=values.__getitem__)
    assert len(set(best)) > 1
    for seed, init_k in itertools.product(range(2), (1, 3, 7)):
        found = fit(points, dataclasses.replace(config, init_k=init_k), seed=seed)
        assert found.log_joint == pytest.approx(values[best])


def test_as_likely_as_a_naive_collapsed_gibbs_sampler():
    rng = np.random.default_rng(3)
    points = np.concatenate([rng.standard_normal((12, 2)) * s + m for m, s in ((0, 1), (5, 0.5), (-5, 0.3))])
    config = DPMMConfig(alpha=1.0)
    prior, n = config.prior(whole(points)), len(points)
    assert np.array_equal(prior.mean, points.mean(0))
    labels, best = np.zeros(n, int), -math.inf
    for _ in range(15):  # Neal (2000), algorithm 3: one point at a time, all parameters integrated out
        for i in range(n):
            rest = np.delete(np.arange(n), i)
            used = np.unique(labels[rest])
            without = [prior.log_marginal(whole(points[rest][labels[rest] == k]))[0] for k in used]
            joined = [
                prior.log_marginal(
                    whole(np.concatenate([points[rest][labels[rest] == k], points[i : i + 1]]))
                )[0]
                for k in used
            ]
            weights = [
                math.log((labels[rest] == k).sum()) + new - old
                for k, new, old in zip(used, joined, without, strict=True)
            ]
            weights.append(math.log(config.alpha) + prior.log_marginal(whole(points[i : i + 1]))[0])
            p = np.exp(np.array(weights) - max(weights))
            labels[i] = [*used, labels.max() + 1][rng.choice(len(p), p=p / p.sum())]
        _, labels = np.unique(labels, return_inverse=True)
        best = max(best, log_joint(prior, moments(points, labels, labels.max() + 1), config.alpha))
    for seed in range(3):
        assert fit(points, config, seed=seed).log_joint > best - 0.5


@pytest.mark.parametrize("init_k", [1, 5, 15, 30])
def test_fifteen_gaussians_from_every_start(init_k):
    points, labels = fifteen_gaussians(seed=0)
    found = fit(points, DPMMConfig(init_k=init_k), seed=0)
    assert 14 <= len(found.mixture) <= 16
    assert mutual_information(labels, found.labels) > 0.93
    again, probabilities = found.mixture.assign(points)
    assert np.array_equal(again, found.labels) and np.array_equal(probabilities, found.probabilities)
    sizes = np.bincount(found.labels)
    assert (np.diff(sizes) <= 0).all() and sizes.min() > 0
    assert sum(found.k_counts.values()) == 50 and max(found.k_counts, key=found.k_counts.get) in (14, 15, 16)


def test_scale_and_place_do_not_matter_and_the_seed_repeats():
    points, labels = fifteen_gaussians(seed=1, n=3000)
    found = fit(points * 1e-3 + 50, seed=0)
    assert mutual_information(labels, found.labels) > 0.93
    again = fit(points * 1e-3 + 50, seed=0)
    assert np.array_equal(found.labels, again.labels) and found.log_joint == again.log_joint


def test_of_many_rows_some_are_fitted_and_all_assigned():
    points, labels = fifteen_gaussians(seed=2)
    found = fit(points, DPMMConfig(most_rows=3000), seed=0)
    assert len(found.labels) == 10_000
    assert mutual_information(labels, found.labels) > 0.93


def test_blocks_change_nothing(monkeypatch):
    points, _ = fifteen_gaussians(seed=0, n=400)
    whole_ = fit(points, DPMMConfig(iterations=1), seed=0).mixture
    monkeypatch.setattr(mixture_, "_BLOCK", 64)
    labels, probabilities = whole_.assign(points)
    monkeypatch.undo()
    assert np.array_equal(labels, whole_.assign(points)[0])
    np.testing.assert_allclose(probabilities, whole_.assign(points)[1])
    monkeypatch.setattr(mixture_, "_BLOCK", 2048)
    assert mutual_information(fifteen_gaussians(seed=0, n=400)[1], fit(points, seed=0).labels) > 0.8


def test_one_gaussian_stays_one_and_few_or_odd_points_are_no_error():
    rng = np.random.default_rng(0)
    assert len(fit(rng.standard_normal((500, 3)), seed=0).mixture) == 1
    assert len(fit(rng.standard_normal((2, 3)), seed=0).labels) == 2
    # equal points twice over, and a dimension that never changes
    points = np.repeat(rng.standard_normal((6, 3)), 20, axis=0)
    points[:, 1] = 7
    found = fit(points, seed=0)
    assert np.isfinite(found.probabilities).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 0.0}, "alpha: expected above 0"),
        ({"psi_scale": float("nan")}, "psi_scale: expected above 0"),
        ({"init_k": 0}, "init_k: expected at least 1"),
        ({"merge": "all"}, "joint or source"),
    ],
)
def test_settings_that_cannot_be_used(changes, message):
    with pytest.raises(ConfigError, match=message):
        DPMMConfig(**changes)


def test_more_clusters_than_rows_and_equal_rows():
    with pytest.raises(ConfigError, match="1 to 5, the rows; found 9"):
        fit(np.random.default_rng(0).standard_normal((5, 2)), DPMMConfig(init_k=9))
    with pytest.raises(ConfigError, match="all rows are equal"):
        fit(np.ones((5, 2)))


# ---- fitted mixtures -------------------------------------------------------------------------------------


def arrays(seed=0, k=3, d=2, width=4):
    rng = np.random.default_rng(seed)
    spread = rng.standard_normal((k, d, d))
    covs = spread @ spread.transpose(0, 2, 1) + 0.2 * np.eye(d)
    roots = np.linalg.inv(np.linalg.cholesky(covs)).transpose(0, 2, 1)  # P P^T = Sigma^-1
    return {
        "weights": np.array([0.5, 0.3, 0.2]),
        "means": rng.standard_normal((k, d)),
        "precision_cholesky": np.ascontiguousarray(roots),
        "center": rng.standard_normal(width),
        "components": rng.standard_normal((width, d)),
    }


@pytest.mark.parametrize("transform", ["none", "normalize"])
def test_a_mixture_file_assigns_as_its_formula_says(tmp_path, transform):
    parts = arrays()
    (tmp_path / "m.safetensors").write_bytes(save(parts, {"transform": transform}))
    mixture = GaussianMixture.load(tmp_path / "m.safetensors")
    h = np.random.default_rng(1).standard_normal((50, 4)).astype(np.float32)
    labels, probabilities = mixture.assign(h)
    for x, label, probability in zip(h, labels, probabilities, strict=True):
        y = (x.astype(float) - parts["center"]) @ parts["components"]
        if transform == "normalize":
            y /= np.linalg.norm(y)
        p = np.array(
            [
                w * stats.multivariate_normal(m, np.linalg.inv(r @ r.T)).pdf(y)
                for w, m, r in zip(parts["weights"], parts["means"], parts["precision_cholesky"], strict=True)
            ]
        )
        assert label == p.argmax()
        assert probability == pytest.approx(p.max() / p.sum(), rel=1e-9)
    same = GaussianMixture.load((tmp_path / "m.safetensors").read_bytes())
    assert np.array_equal(same.assign(h)[0], labels)
    assert labels.dtype == np.int64 and labels.shape == probabilities.shape == (50,)


def test_saved_and_loaded_with_its_space(tmp_path):
    found = fit(fifteen_gaussians(0, 500)[0], DPMMConfig(iterations=20)).mixture
    found = dataclasses.replace(found, spaces=("a" * 64,))
    found.save(tmp_path / "m.safetensors")
    loaded = GaussianMixture.load(tmp_path / "m.safetensors")
    for name in ("weights", "means", "precision_cholesky", "center", "components"):
        assert np.array_equal(getattr(found, name), getattr(loaded, name))
    loaded._check(2, "a" * 64)
    loaded._check(2, None)
    with pytest.raises(
        SpaceMismatchError, match=r"belongs to space aaaaaaaaaaaa and x\.parquet to bbbbbbbbbbbb"
    ):
        loaded._check(2, "b" * 64, "x.parquet")
    with pytest.raises(SpaceMismatchError, match="takes embeddings of 2 columns and the embeddings have 3"):
        loaded._check(3, "a" * 64)


def damaged(**changes):
    return save({**arrays(), **changes}, {"transform": "none"})


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a mixture",
        save(arrays(), {"transform": "none"})[:-8],
        save({"weights": np.ones(1)}),
        save(arrays(), {"transform": "umap"}),
        damaged(means=np.zeros((2, 2))),
        damaged(components=np.zeros((3, 2))),
        damaged(weights=np.array([0.5, 0.5, 0.5])),
        damaged(weights=np.array([1.5, -0.25, -0.25])),
        damaged(means=np.full((3, 2), np.nan)),
        damaged(precision_cholesky=np.zeros((3, 2, 2))),
        damaged(center=np.zeros((4, 1))),
    ],
)
def test_what_is_no_mixture_is_refused_in_one_sentence(content):
    with pytest.raises(EntryError, match=r"mixture\.safetensors.*; pull the entry again, or fit") as error:
        GaussianMixture.load(content)
    assert "\n" not in str(error.value)


def test_a_missing_file_and_rows_that_are_none(tmp_path):
    with pytest.raises(EntryError, match=r"gone\.safetensors cannot be read \(No such file"):
        GaussianMixture.load(tmp_path / "gone.safetensors")
    mixture = GaussianMixture.load(save(arrays(), {"transform": "none"}))
    with pytest.raises(SpaceMismatchError, match="4 columns and the embeddings have 5"):
        mixture.assign(np.zeros((3, 5)))
    with pytest.raises(ConfigError, match=r"found float64 of shape \(4,\)"):
        mixture.assign(np.zeros(4))
    with pytest.raises(ConfigError, match="NaN"):
        mixture.assign(np.full((3, 4), np.nan))
    assert len(mixture.assign(np.zeros((0, 4)))[0]) == 0


def test_a_mixture_needs_numpy_and_safetensors_alone():
    code = """
import sys, json
for name in ("scipy", "sklearn", "faiss", "torch"):
    sys.modules[name] = None
from embedkit.model.mixture import GaussianMixture
import numpy as np
from safetensors.numpy import save
one = {"weights": np.ones(1), "means": np.zeros((1, 2)), "precision_cholesky": np.eye(2)[None],
       "center": np.zeros(2), "components": np.eye(2)}
print(json.dumps(GaussianMixture.load(save(one)).assign(np.zeros((1, 2)))[1].tolist()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [1.0]


def test_a_training_run_writes_what_is_read_here():
    torch = pytest.importorskip("torch")
    from embedkit.training.methods.deepdpm.niw import log_densities, precision_cholesky

    parts = arrays()
    covs = np.linalg.inv(parts["precision_cholesky"] @ parts["precision_cholesky"].transpose(0, 2, 1))
    parts["precision_cholesky"] = np.ascontiguousarray(precision_cholesky(torch.from_numpy(covs)).numpy())
    mixture = GaussianMixture.load(save(parts, {"transform": "none"}))
    h = np.random.default_rng(1).standard_normal((50, 4))
    y = torch.from_numpy((h - parts["center"]) @ parts["components"])
    joint = torch.from_numpy(parts["weights"]).log() + log_densities(
        y, torch.from_numpy(parts["means"]), torch.from_numpy(parts["precision_cholesky"])
    )
    labels, probabilities = mixture.assign(h)
    assert np.array_equal(labels, joint.argmax(1).numpy())
    np.testing.assert_allclose(probabilities, joint.softmax(1).max(1).values.numpy(), rtol=1e-9)
