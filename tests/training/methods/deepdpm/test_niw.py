"""The prior of a Gaussian cluster: exact marginals, posterior modes, Hastings ratios and the decisions from them."""

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")
stats = pytest.importorskip("scipy.stats")

from embedkit.errors import ConfigError
from embedkit.training.methods.deepdpm.niw import (
    TorchMoments,
    TorchNIW,
    hard_moments,
    log_densities,
    log_hastings_split,
    merge_pairs,
    moments,
    precision_cholesky,
    union,
    worth_splitting,
)

FIVE = torch.tensor([(0.0, 0), (1, 0), (0, 2), (1, 3), (2, 1)], dtype=torch.float64)
UNIT = TorchNIW(torch.zeros(2).double(), 1.0, torch.eye(2).double(), 4.0)


def whole(points):
    return hard_moments(points, torch.zeros(len(points), dtype=torch.long), 1)


def random_points(n=60, dim=3, seed=0):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def broad(dim):
    return TorchNIW(torch.full((dim,), 0.3).double(), 0.7, torch.eye(dim).double() * 0.4 + 0.1, dim + 2.5)


def student_chain(prior, points):
    """log f as the product of each point's predictive density given those before it (multivariate Student t)."""
    m, kappa, psi, nu = prior.mean.numpy(), prior.kappa, prior.psi.numpy(), prior.nu
    total, dim = 0.0, len(m)
    for x in points.numpy():
        degrees = nu - dim + 1
        shape = psi * (kappa + 1) / (kappa * degrees)
        total += stats.multivariate_t(m, shape, df=degrees).logpdf(x)
        psi = psi + kappa / (kappa + 1) * np.outer(x - m, x - m)
        m, kappa, nu = (kappa * m + x) / (kappa + 1), kappa + 1, nu + 1
    return total


def test_golden_marginal():
    assert float(UNIT.log_marginal(whole(FIVE))) == pytest.approx(-19.518268339538, abs=1e-11)
    assert student_chain(UNIT, FIVE) == pytest.approx(-19.518268339538, abs=1e-9)


def test_the_mean_of_the_mixture_in_place_of_the_points_own_would_be_no_marginal():
    # what the authors' code computes when its mean is off by 0.3 in each coordinate, of the same five points
    found = whole(FIVE)
    off = torch.full((1, 2), 0.3).double()
    scatter = found.scatter + 5 * off[:, :, None] * off[:, None, :]
    shifted = UNIT.log_marginal(TorchMoments(found.count, found.mean + off, scatter))
    assert float(shifted) < -19.518268339538 - 0.5


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_marginal_is_the_chain_of_predictives_and_knows_no_order(dim):
    points = random_points(dim=dim) * 2 + 1
    prior = broad(dim)
    value = float(prior.log_marginal(whole(points)))
    assert value == pytest.approx(student_chain(prior, points), rel=1e-10)
    assert float(prior.log_marginal(whole(points.flip(0)))) == pytest.approx(value, rel=1e-12)
    assert (
        float(prior.log_marginal(hard_moments(points, torch.ones(60).long(), 2))[0]) == 0.0
    )  # an empty cluster


def test_moments_by_loop():
    points = random_points()
    weights = torch.rand(60, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = moments(points.float(), weights)  # float32 codes, float64 sums
    assert found.mean.dtype == torch.float64
    for k in range(4):
        count = sum(float(w) for w in weights[:, k])
        mean = sum(float(w) * x.float().double() for w, x in zip(weights[:, k], points, strict=True)) / count
        scatter = sum(
            float(w) * torch.outer(x.float().double() - mean, x.float().double() - mean)
            for w, x in zip(weights[:, k], points, strict=True)
        )
        assert float(found.count[k]) == pytest.approx(count)
        torch.testing.assert_close(found.mean[k], mean)
        torch.testing.assert_close(found.scatter[k], scatter)


def test_a_union_has_the_moments_of_all_points_together():
    points, labels = random_points(), torch.arange(60) % 3
    found = hard_moments(points, labels, 4)  # the last is empty
    both = union(found[torch.tensor([0, 2])], found[torch.tensor([1, 3])])
    together = hard_moments(points, torch.where(labels == 2, 1, 0), 2)
    for name in ("count", "mean", "scatter"):
        torch.testing.assert_close(getattr(both, name), getattr(together, name))
    assert not torch.isnan(found.mean).any() and float(found.count[3]) == 0


def test_the_mode_is_where_the_joint_posterior_is_highest():
    points, prior = random_points(dim=2), broad(2)
    mean, cov = (value[0].numpy() for value in prior.mode(whole(points)))

    def log_joint(mu, sigma):
        return (
            stats.multivariate_normal(mu, sigma).logpdf(points.numpy()).sum()
            + stats.multivariate_normal(prior.mean.numpy(), sigma / prior.kappa).logpdf(mu)
            + stats.invwishart(prior.nu, prior.psi.numpy()).logpdf(sigma)
        )

    best = log_joint(mean, cov)
    for direction in (np.array([1.0, 0]), np.array([0, 1.0]), np.array([1.0, -1])):
        for step in (-1e-2, 1e-2):
            assert log_joint(mean + step * direction, cov) < best
            assert log_joint(mean, cov + step * np.outer(direction, direction)) < best
    # far from any point it is the prior's own mode
    empty = TorchMoments(torch.zeros(1).double(), torch.zeros(1, 2).double(), torch.zeros(1, 2, 2).double())
    mean, cov = prior.mode(empty)
    torch.testing.assert_close(mean[0], prior.mean)
    torch.testing.assert_close(cov[0], prior.psi / (prior.nu + 4))


def test_split_by_its_formula_and_merge_as_its_negative():
    points, prior, alpha = random_points(), broad(3), 7.0
    labels = (torch.arange(60) % 5 == 0).long()
    found = hard_moments(points, labels, 2)
    split = float(log_hastings_split(prior, found[:1], found[1:], alpha))
    parts = [points[labels == 0], points[labels == 1], points]
    f = [student_chain(prior, part) for part in parts]
    gammas = [math.lgamma(len(part)) for part in parts]
    assert split == pytest.approx(math.log(alpha) + gammas[0] + f[0] + gammas[1] + f[1] - gammas[2] - f[2])
    merge = gammas[2] + f[2] - math.log(alpha) - gammas[0] - gammas[1] - f[0] - f[1]
    assert merge == pytest.approx(-split)
    # a merge is taken exactly when the chance is below its ratio
    for log_chance, pairs in ((merge - 1e-6, [(0, 1)]), (min(0.0, merge + 1e-6), [])):
        chance = torch.full((2, 2), math.exp(log_chance), dtype=torch.float64)
        assert merge_pairs(prior, found, alpha, chance) == (pairs if merge < 0 else [(0, 1)])


def test_known_ratios_of_two_gaussians_and_of_one_cut_in_two():
    # worked out in NumPy: unit Gaussians 6 apart, 100 points each; one Gaussian of 200, in sorted and random halves
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((100, 2)), rng.standard_normal((100, 2)) + [6, 0]

    def ratio(a, b):
        points = torch.from_numpy(np.concatenate([a, b]))
        prior = TorchNIW(points.mean(0), 1e-4, torch.eye(2).double() * 0.005, 4.0)
        return float(log_hastings_split(prior, whole(torch.from_numpy(a)), whole(torch.from_numpy(b)), 10.0))

    assert ratio(left, right) == pytest.approx(61.9, abs=0.05)
    one = rng.standard_normal((200, 2))
    ordered = one[one[:, 0].argsort()]
    assert ratio(ordered[:100], ordered[100:]) == pytest.approx(-67.8, abs=0.06)
    assert ratio(one[:100], one[100:]) < -150  # random halves cost more: neither is any narrower


def test_what_is_worth_splitting():
    generator = torch.Generator().manual_seed(0)
    apart = torch.randn(40, 2, generator=generator).double() + 20 * (torch.arange(40) % 2)[:, None]
    one = torch.randn(40, 2, generator=generator).double() + 100
    few = torch.randn(40, 2, generator=generator).double() - 100
    points = torch.cat([apart, one, few])
    halves = torch.cat([torch.arange(40) % 2, 2 + torch.arange(40) % 2, 4 + (torch.arange(40) < 5).long()])
    found = hard_moments(points, halves, 6)
    prior = TorchNIW(points.mean(0), 1e-4, torch.eye(2).double() * 0.005, 4.0)
    chance = torch.full((3,), 0.5)
    split = worth_splitting(prior, found[::2], found[1::2], 10.0, chance)
    assert split.tolist() == [True, False, False]
    # a ratio below 1 is a probability: with chance 0 even the bad split is taken, but never one of too few points
    split = worth_splitting(prior, found[::2], found[1::2], 10.0, torch.zeros(3))
    assert split.tolist() == [True, True, False]
    # an empty half is no split, and no NaN
    empty = hard_moments(one, torch.zeros(40).long(), 2)
    assert not worth_splitting(prior, empty[:1], empty[1:], 10.0, torch.zeros(1)).any()


def test_merges_are_between_neighbors_the_likeliest_first_and_each_cluster_once():
    # one Gaussian in four quarters along a line and another far off: the middle pair alone would leave two behind
    generator = torch.Generator().manual_seed(0)
    line = torch.randn(400, 2, generator=generator).double()
    points = torch.cat([line, line[:100] + 1000])
    labels = torch.cat([torch.arange(400) % 4, torch.full((100,), 4)])
    found = hard_moments(points, labels, 5)
    prior = TorchNIW(points.mean(0), 1e-4, torch.eye(2).double() * 0.005, 4.0)
    chance = torch.full((5, 5), 1 - 1e-9)
    pairs = merge_pairs(prior, found, 10.0, chance, neighbors=4)
    used = [k for pair in pairs for k in pair]
    assert len(pairs) == 2 and sorted(used) == [0, 1, 2, 3] and all(i < j for i, j in pairs)
    first, second = torch.triu_indices(4, 4, 1)
    ratios = -log_hastings_split(prior, found[first], found[second], 10.0)
    likeliest = int(ratios.argmax())
    assert pairs[0] == (int(first[likeliest]), int(second[likeliest]))
    # with one neighbor only nearest means are asked
    near = torch.cdist(found.mean, found.mean).fill_diagonal_(torch.inf).argmin(1)
    for i, j in merge_pairs(prior, found, 10.0, chance, neighbors=1):
        assert near[i] == j or near[j] == i
    assert merge_pairs(prior, found[:1], 10.0, torch.zeros(1, 1)) == []


def test_densities_are_scipys():
    points = random_points()
    means, spread = random_points(4, seed=1), random_points(12, seed=2).reshape(4, 3, 3)
    covs = spread @ spread.mT + 0.1 * torch.eye(3).double()
    roots = precision_cholesky(covs)
    torch.testing.assert_close(roots @ roots.mT, torch.linalg.inv(covs))
    found = log_densities(points.float(), means, roots)
    for k in range(4):
        expected = stats.multivariate_normal(means[k].numpy(), covs[k].numpy()).logpdf(points.float().numpy())
        np.testing.assert_allclose(found[:, k].numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize(("kappa", "nu"), [(0.0, 4.0), (1.0, 1.0)])
def test_a_prior_that_is_none_is_refused(kappa, nu):
    with pytest.raises(ConfigError, match="kappa above 0 and nu above D - 1 = 1"):
        TorchNIW(torch.zeros(2).double(), kappa, torch.eye(2).double(), nu)
