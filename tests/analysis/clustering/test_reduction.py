"""Principal components and whitening: equal to the decomposition that they are, recorded, and refused in words."""

import json

import numpy as np
import pytest

from embedkit.analysis.clustering import reduction
from embedkit.analysis.clustering.reduction import fit_reduction, parse_reduction
from embedkit.errors import ConfigError


def rows(n=300, dim=6, seed=0):
    rng = np.random.default_rng(seed)
    return (
        rng.standard_normal((n, dim)) * 2.0 ** -np.arange(dim) @ rng.standard_normal((dim, dim)) + 5
    ).astype(np.float32)


def test_pca_is_the_singular_value_decomposition():
    points = rows()
    found = fit_reduction(points, "pca", 3)
    centered = points.astype(float) - points.astype(float).mean(0)
    _, values, axes = np.linalg.svd(centered, full_matrices=False)
    signs = np.sign((found.components * axes[:3].T).sum(0))
    np.testing.assert_allclose(found.components * signs, axes[:3].T, atol=1e-6)
    np.testing.assert_allclose(found.apply(points), centered @ axes[:3].T * signs, atol=1e-4)
    assert found.explained == pytest.approx((values[:3] ** 2).sum() / (values**2).sum())
    assert found.apply(points).dtype == np.float32
    # an axis could point either way: its largest entry decides
    largest = np.abs(found.components).argmax(0)
    assert (found.components[largest, np.arange(3)] > 0).all()


def test_all_components_keep_every_distance():
    points = rows()
    reduced = fit_reduction(points, "pca", 6).apply(points)
    for a, b in ((0, 1), (5, 200)):
        assert np.linalg.norm(reduced[a] - reduced[b]) == pytest.approx(
            np.linalg.norm(points[a] - points[b]), rel=1e-4
        )


def test_whitened_rows_have_unit_covariance():
    points = rows()
    reduced = fit_reduction(points, "whiten", 5).apply(points).astype(float)
    np.testing.assert_allclose(np.cov(reduced.T), np.eye(5), atol=1e-4)
    np.testing.assert_allclose(reduced.mean(0), 0, atol=1e-4)


def test_blocks_and_samples(monkeypatch):
    points = rows()
    whole = fit_reduction(points, "pca", 2)
    monkeypatch.setattr(reduction, "_BLOCK", 7)
    np.testing.assert_allclose(fit_reduction(points, "pca", 2).components, whole.components, atol=1e-9)
    np.testing.assert_allclose(whole.apply(points), fit_reduction(points, "pca", 2).apply(points), atol=1e-5)
    monkeypatch.setattr(reduction, "MOST_ROWS", 100)
    some = fit_reduction(points, "pca", 2, seed=3)
    assert some.rows == 100 and np.array_equal(
        some.components, fit_reduction(points, "pca", 2, seed=3).components
    )
    assert np.abs((some.components * whole.components).sum(0)).min() > 0.9


def test_what_is_recorded_is_json():
    found = fit_reduction(rows(), "whiten", 3, seed=4).to_json()
    assert json.loads(json.dumps(found)) == found
    assert {key: found[key] for key in ("method", "dim", "from_dim", "rows", "seed")} == {
        "method": "whiten",
        "dim": 3,
        "from_dim": 6,
        "rows": 300,
        "seed": 4,
    }


def test_names():
    assert parse_reduction("pca:32") == ("pca", 32)
    assert parse_reduction("whiten:1") == ("whiten", 1)
    for text in ("", "pca", "pca:", "pca:0", "pca:-1", "pca:x", "umap:2", "32"):
        with pytest.raises(ConfigError, match=r"expected pca:N or whiten:N, for example pca:32"):
            parse_reduction(text)


@pytest.mark.parametrize(
    ("points", "method", "dim", "message"),
    [
        (rows(), "pca", 7, "1 to 6 dimensions, for there are 300 rows of 6, found 7"),
        (rows(4), "pca", 4, "1 to 3 dimensions, for there are 4 rows of 6, found 4"),
        (rows(), "tsne", 2, "expected pca or whiten, found 'tsne'"),
        (np.ones((9, 3), np.float32), "pca", 2, "all rows are equal"),
        (rows()[:, [0, 1, 0, 1]], "whiten", 3, "along 2 dimensions only.*take whiten:2 or less"),
    ],
)
def test_what_cannot_be_reduced(points, method, dim, message):
    with pytest.raises(ConfigError, match=message):
        fit_reduction(points, method, dim)
