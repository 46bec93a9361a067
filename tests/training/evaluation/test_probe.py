"""The linear probe: scikit-learn's solution, and a strength that is chosen on training images alone."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")

from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from embedkit.training.evaluation.probe import STRENGTHS, choose_probe, fit_probe, stratified_split


def classes(count, dim, k, *, spread=1.0, seed=0):
    """Overlapping Gaussian classes on axes of very different, correlated scales."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, k, count)
    means = np.random.default_rng(99).normal(size=(k, dim))
    features = means[labels] + spread * rng.normal(size=(count, dim))
    mix = np.random.default_rng(98).normal(size=(dim, dim)) * np.geomspace(1e-2, 1e2, dim)
    return torch.from_numpy(features @ mix + 5).float(), torch.from_numpy(labels)


def centered(weight, bias):
    """The bias is free, so that a constant may be added to it."""
    return weight - weight.mean(0), bias - bias.mean()


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-4])
def test_the_solution_is_scikit_learns(l2):
    features, labels = classes(400, 12, 4, spread=2.0)
    probe = next(fit_probe(features, labels, num_classes=4, strengths=(l2,)))
    scaled = StandardScaler().fit_transform(features.double().numpy())
    theirs = LogisticRegression(C=1 / (len(labels) * l2), tol=1e-9, max_iter=5000).fit(scaled, labels)
    for ours, expected in zip(
        centered(probe.weight.numpy(), probe.bias.numpy()),
        centered(theirs.coef_, theirs.intercept_),
        strict=True,
    ):
        np.testing.assert_allclose(ours, expected, atol=2e-3 * np.abs(theirs.coef_).max())
    assert (probe.predict(features).numpy() == theirs.predict(scaled)).mean() > 0.995


def test_the_start_does_not_matter():
    features, labels = classes(300, 8, 3, spread=2.0)
    path = list(fit_probe(features, labels, num_classes=3))
    assert [probe.l2 for probe in path] == list(STRENGTHS)
    for warm in path[1:5]:
        cold = next(fit_probe(features, labels, num_classes=3, strengths=(warm.l2,)))
        for one, two in zip(centered(warm.weight, warm.bias), centered(cold.weight, cold.bias), strict=True):
            torch.testing.assert_close(one, two, atol=1e-2 * float(cold.weight.abs().max()), rtol=0)


def test_columns_that_say_nothing():
    """Constant columns, copies of columns, and more columns than images."""
    features, labels = classes(60, 6, 3)
    more = torch.cat([features, torch.full((60, 50), 1e6), features, torch.zeros(60, 20)], dim=1)
    probe = next(fit_probe(more, labels, num_classes=3, strengths=(1e-2,)))
    # each of two copies takes half of the weight, at half of the penalty
    plain = next(fit_probe(features, labels, num_classes=3, strengths=(0.5e-2,)))
    expected = torch.zeros(3, 82)
    expected[:, :6] = expected[:, 56:62] = plain.weight / 2
    torch.testing.assert_close(probe.weight, expected, atol=2e-3 * float(plain.weight.abs().max()), rtol=0)
    assert (probe.std[6:56] == 1).all() and (probe.std[-20:] == 1).all()
    assert torch.equal(probe.predict(more), plain.predict(features))


def test_the_strength_is_the_best_on_the_held_out_part():
    # 250 columns of which 4 tell, and 300 images: without L2 it learns the noise
    features, labels = classes(300, 4, 3, spread=1.5)
    features = torch.cat(
        [features / features.std(0), torch.randn(300, 246, generator=torch.Generator().manual_seed(0))], dim=1
    )
    held_out = stratified_split(labels, 0.1, 5)
    right = [
        int((probe.predict(features[held_out]) == labels[held_out]).sum())
        for probe in fit_probe(features[~held_out], labels[~held_out], num_classes=3)
    ]
    best = STRENGTHS[right.index(max(right))]
    chosen = choose_probe(features, labels, num_classes=3, seed=5)
    assert chosen.l2 == best > STRENGTHS[-1]
    whole = next(fit_probe(features, labels, num_classes=3, strengths=(best,)))
    assert torch.equal(chosen.weight, whole.weight)
    torch.testing.assert_close(chosen.mean, features.mean(0))


def test_equally_good_strengths_give_the_strongest():
    labels = torch.arange(2).repeat(50)
    features = torch.where(labels == 0, -1.0, 1.0)[:, None] + 1e-3 * torch.linspace(0, 1, 100)[:, None]
    assert choose_probe(features, labels, num_classes=2).l2 == STRENGTHS[0]


def test_the_split_takes_a_share_of_each_class():
    labels = torch.tensor([0] * 50 + [1] * 20 + [2])
    chosen = stratified_split(labels, 0.1, 0)
    assert [int(chosen[labels == k].sum()) for k in range(3)] == [5, 2, 0]
    assert torch.equal(chosen, stratified_split(labels, 0.1, 0))
    assert not torch.equal(chosen, stratified_split(labels, 0.1, 1))
