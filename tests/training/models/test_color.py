"""Lab against scikit-image, its bins, soft targets and weights against their definitions."""

import io

import numpy as np
import pytest

torch = pytest.importorskip("torch")
skimage_color = pytest.importorskip("skimage.color")

from embedkit.errors import ConfigError
from embedkit.training.models.color import (
    ABBins,
    LabInput,
    class_weights,
    is_gray,
    lab_to_rgb,
    rgb_to_lab,
)

RGB = torch.rand(4, 3, 9, 7, generator=torch.Generator().manual_seed(0))


def test_lab_is_scikit_images_and_goes_back():
    found = rgb_to_lab(RGB)
    expected = skimage_color.rgb2lab(RGB.permute(0, 2, 3, 1).numpy())
    np.testing.assert_allclose(found.permute(0, 2, 3, 1).numpy(), expected, atol=1e-3)
    torch.testing.assert_close(lab_to_rgb(found), RGB, atol=1e-5, rtol=0)
    dark = torch.tensor([0.0, 0.01, 0.03, 0.05, 1.0]).view(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert is_gray(rgb_to_lab(dark)).all() and not is_gray(found).any()


def test_a_gradient_through_lab_is_finite_at_black():
    rgb = torch.zeros(1, 3, 2, 2, requires_grad=True)
    rgb_to_lab(rgb).sum().backward()
    assert rgb.grad.isfinite().all()


def test_the_input_layer_undoes_the_contract_and_keeps_its_channels_apart():
    mean, std = (0.4, 0.5, 0.3), (0.2, 0.25, 0.3)
    x = (RGB - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    lab = LabInput(mean, std, "lab")(x)
    torch.testing.assert_close(lab[:, :1] * 50 + 50, rgb_to_lab(RGB)[:, :1], atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(lab[:, 1:] * 110, rgb_to_lab(RGB)[:, 1:], atol=1e-3, rtol=1e-4)
    assert torch.equal(LabInput(mean, std, "l")(x), lab[:, :1]) and torch.equal(
        LabInput(mean, std, "ab")(x), lab[:, 1:]
    )
    with pytest.raises(ConfigError, match="data.color=rgb"):
        LabInput((0.5,), (0.5,))


def test_the_input_layer_is_the_same_in_onnx():
    onnxruntime = pytest.importorskip("onnxruntime")
    layer, file = LabInput((0.4, 0.5, 0.3), (0.2, 0.25, 0.3), "lab").eval(), io.BytesIO()
    program = torch.onnx.export(layer, (RGB,), dynamo=True, opset_version=20, verbose=False)
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    x = RGB * 4 - 2
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    np.testing.assert_allclose(found, layer(x).numpy(), atol=2e-5)


def test_bins_lie_in_the_gamut_and_are_half_a_grid_away_at_most():
    bins, ab = ABBins(10), rgb_to_lab(RGB)[:, 1:]
    assert 250 < len(bins) < 320 and len(bins.centers.unique(dim=0)) == len(bins)
    off = (bins.centers[bins.nearest(ab)].movedim(-1, 1) - ab).abs()
    assert off.max() <= 5 + 1e-3
    assert len(ABBins(20)) < len(bins) / 3


def test_soft_targets_sum_to_one_and_decode_to_the_color():
    bins, ab = ABBins(10), rgb_to_lab(RGB)[:, 1:]
    soft = bins.soft(ab)
    torch.testing.assert_close(soft.sum(1), torch.ones(4, 9, 7))
    assert ((soft > 0).sum(1) == 5).all() and torch.equal(soft.argmax(1), bins.nearest(ab))
    distances = (bins.centers - ab[0, :, 2, 3]).square().sum(1)
    nearest = distances.topk(5, largest=False).indices
    weights = torch.exp(-distances[nearest] / 50)
    torch.testing.assert_close(soft[0, nearest, 2, 3], weights / weights.sum(), atol=1e-5, rtol=1e-4)
    assert (bins.decode(soft.clamp(min=1e-9).log(), temperature=1.0) - ab).abs().max() < 7
    one_hot = torch.nn.functional.one_hot(bins.nearest(ab), len(bins)).movedim(-1, 1).float()
    torch.testing.assert_close(bins.decode(100 * one_hot), bins.centers[bins.nearest(ab)].movedim(-1, 1))


def test_weights_have_mean_one_under_the_prior():
    prior = torch.tensor([0.7, 0.2, 0.1, 0.0])
    weights = class_weights(prior)
    assert float((prior * weights).sum()) == pytest.approx(1.0)
    expected = 1 / (0.5 * prior + 0.125)
    torch.testing.assert_close(weights, expected / (prior * expected).sum())
    torch.testing.assert_close(class_weights(torch.full((4,), 0.25)), torch.ones(4))
    torch.testing.assert_close(class_weights(prior, mix=1.0), torch.ones(4))
