"""The space of clusters: principal components by numpy, lengths, and what UMAP is asked for."""

import sys
import types

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from embedkit.errors import ConfigError, MissingDependencyError
from embedkit.training.methods.deepdpm import reduction
from embedkit.training.methods.deepdpm.reduction import CodeReduction


def codes_of(count, dim):
    torch.manual_seed(0)
    return torch.randn(count, dim) * torch.arange(1.0, dim + 1) + 5


def test_codes_stay_as_they_are_and_pass_gradient():
    codes = codes_of(6, 3).requires_grad_()
    space = CodeReduction("none", 3, 99, "none")
    space.fit(codes, 0)
    assert space.width == 3 and torch.equal(space.space(codes), codes)
    space.space(codes).sum().backward()
    assert torch.equal(codes.grad, torch.ones(6, 3))
    unit = CodeReduction("none", 3, 99, "normalize")
    torch.testing.assert_close(unit.points(codes).norm(dim=1), torch.ones(6))


def test_principal_components_are_those_of_a_singular_value_decomposition():
    codes = codes_of(50, 4)
    space = CodeReduction("pca", 4, 2, "none")
    space.fit(codes, 0)
    centerd = codes.double().numpy() - codes.double().numpy().mean(0)
    left, values, _ = np.linalg.svd(centerd, full_matrices=False)
    expected = left[:, :2] * values[:2]
    found = space.points(codes).numpy()
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-4)
    assert space.linear and torch.equal(space.space(codes), space.points(codes))


def test_more_components_than_columns_are_refused():
    with pytest.raises(ConfigError, match="reduce_dim: 4 columns have 1 to 4 principal components, found 5"):
        CodeReduction("pca", 4, 5, "none")


def test_the_embedding_of_umap_is_clustered_and_its_codes_are_the_space(monkeypatch):
    monkeypatch.setattr(reduction, "_umap", lambda codes, dim, seed: codes[:, :dim] * (3 + seed))
    codes = codes_of(6, 4)
    space = CodeReduction("umap", 4, 2, "normalize")
    space.fit(codes, 1)
    torch.testing.assert_close(space.points(codes), codes[:, :2] / codes[:, :2].norm(dim=1, keepdim=True))
    assert not space.linear and space.space_transform == "none" and torch.equal(space.space(codes), codes)
    restored = CodeReduction("umap", 4, 2, "normalize")
    restored.resize(6)
    restored.load_state_dict(space.state_dict())
    assert torch.equal(restored.points(codes), space.points(codes))


def test_umap_is_asked_for_what_the_authors_used_and_missed_by_name(monkeypatch):
    asked = {}

    class UMAP:
        def __init__(self, **settings):
            asked.update(settings)

        def fit_transform(self, codes):
            torch.set_num_threads(
                threads + 1
            )  # as numba's threads do to OpenMP's, when they are first started
            return codes[:, :2] * 2

    threads = torch.get_num_threads()
    monkeypatch.setitem(sys.modules, "umap", types.SimpleNamespace(UMAP=UMAP))
    codes = torch.randn(6, 4)
    assert torch.equal(reduction._umap(codes, 2, 7), codes[:, :2] * 2)
    assert torch.get_num_threads() == threads
    # a seed alone makes UMAP repeat, on one thread
    assert asked == {"n_neighbors": 20, "min_dist": 0.0, "n_components": 2, "random_state": 7, "n_jobs": 1}
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(MissingDependencyError, match="pip install"):
        reduction._umap(codes, 2, 7)
