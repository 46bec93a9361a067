"""Moments of batches that go by, against those of all vectors at once."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from embedkit.training.models.moments import Moments


def test_the_plane_of_the_largest_components():
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([3.0, 2.0, 1.0, 0.1, 0.05])
    x = torch.randn(60, 5, generator=generator) * scales + torch.arange(5.0)
    moments = Moments(5)
    for batch in x.split(20):
        moments.update(batch)
    torch.testing.assert_close(moments.mean, x.mean(0))
    centered = (x - x.mean(0)).double().numpy()
    axes = np.linalg.svd(centered, full_matrices=False)[2][:2]
    expected = centered @ axes.T @ axes + x.mean(0).double().numpy()
    np.testing.assert_allclose(moments.project(x, 2).numpy(), expected, atol=1e-4)
    torch.testing.assert_close(moments.project(x, 5), x, atol=1e-4, rtol=0)
    assert int(moments.count) == 3
