"""The package's networks, rebuilt: equal to a forward pass in plain numpy that reads the same manifest.

On small synthetic manifests of the same layout always; on the real package where `EMBEDKIT_FACE_API` names it (the .tgz
that `npm pack @vladmandic/face-api@1.7.15` writes, or its folder).
"""

import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
pytest.importorskip("onnxruntime")

from numpy.lib.stride_tricks import sliding_window_view
from torch import nn

from embedkit.authoring.golden import synthetic_images
from embedkit.encoder import load_encoder
from embedkit.errors import ConfigError, EntryError, IntegrityError, SourceError
from embedkit.hub.resolve import find_entry
from embedkit.model.config import EntryConfig
from embedkit.model.preprocess import Preprocess
from embedkit.training.export.writer import write_entry
from embedkit.training.importers.face_api import IMPORTS, read_tensors
from embedkit.training.importers.face_networks import (
    BLOCKS,
    face_detector,
    face_landmarks,
    face_resnet,
)
from embedkit.workflows.check_entry import verify_entry

ZOO = Path(__file__).parents[3] / "zoo"
BUILD = {item.network: item.build for item in IMPORTS}
RECOGNITION, DETECTION, LANDMARKS = (item.network for item in IMPORTS)


# -- synthetic manifests -----------------------------------------------------------------------------------------


def recognition_layout(widths=(4, 6, 8, 10)) -> dict:
    shapes = {}

    def conv(name, kernel, inner, out):
        shapes[f"{name}/conv/filters"] = (kernel, kernel, inner, out)
        shapes[f"{name}/conv/bias"] = shapes[f"{name}/scale/weights"] = (out,)
        shapes[f"{name}/scale/biases"] = (out,)

    conv("conv32_down", 7, 3, widths[0])
    inner = widths[0]
    for name in BLOCKS:
        out = dict(zip((32, 64, 128, 256), widths, strict=True))[int(name[4:].partition("_")[0])]
        conv(f"{name}/conv1", 3, inner, out)
        conv(f"{name}/conv2", 3, out, out)
        inner = out
    return {**shapes, "fc": (inner, 5)}


def landmarks_layout(widths=(4, 5, 6, 7)) -> dict:
    shapes, inner = {}, 3
    for block, out in enumerate(widths):
        for index in range(4):
            name = f"dense{block}/conv{index}"
            if block or index:
                shapes[f"{name}/depthwise_filter"] = (3, 3, inner, 1)
                shapes[f"{name}/pointwise_filter"] = (1, 1, inner, out)
            else:
                shapes[f"{name}/filters"] = (3, 3, inner, out)
            shapes[f"{name}/bias"] = (out,)
            inner = out
    return {**shapes, "fc/weights": (inner, 136), "fc/bias": (136,)}


def detection_layout(width=4) -> dict:
    shapes = {"Preprocessor/mul/x": (), "Preprocessor/sub/y": (), "Postprocessor/Slice/begin": (3,)}

    def pointwise(name, kernel, inner):
        shapes[f"{name}/weights"] = (kernel, kernel, inner, width)
        shapes[f"{name}/convolution_bn_offset"] = (width,)

    pointwise("MobilenetV1/Conv2d_0_pointwise", 3, 3)
    for index in range(1, 14):
        name = f"MobilenetV1/Conv2d_{index}_depthwise"
        shapes[f"{name}/depthwise_weights"] = (3, 3, width, 1)
        for part in ("gamma", "beta", "moving_mean", "moving_variance"):
            shapes[f"{name}/BatchNorm/{part}"] = (width,)
        pointwise(f"MobilenetV1/Conv2d_{index}_pointwise", 1, width)
    for index in range(8):
        pointwise(f"Prediction/Conv2d_{index}_pointwise", 3 if index % 2 else 1, width)
    for index in range(6):
        priors = 6 if index else 3
        for head, each in (("BoxEncodingPredictor", 4), ("ClassPredictor", 3)):
            shapes[f"Prediction/BoxPredictor_{index}/{head}/weights"] = (1, 1, width, priors * each)
            shapes[f"Prediction/BoxPredictor_{index}/{head}/biases"] = (priors * each,)
    return {**shapes, "Output/extra_dim": (1, 5118, 4)}


def write_network(folder: Path, network: str, shapes: dict, seed: int = 0) -> dict:
    """A manifest and two shards, every third tensor in plain float32; returns what it must be read as."""
    rng = np.random.default_rng(seed)
    specs, data, expected = [], b"", {}
    for index, (name, shape) in enumerate(shapes.items()):
        fan = np.prod(shape[:-1]) if len(shape) > 1 else 1
        values = rng.normal(0, 1 / np.sqrt(max(fan, 1)), shape)
        if name.endswith(("gamma", "variance", "scale/weights")):
            values = np.abs(values) + 0.5
        constant = {"Preprocessor/mul/x": 2 / 255, "Preprocessor/sub/y": 1.0}.get(name)
        spec = {"name": name, "shape": list(shape), "dtype": "float32"}
        if name.startswith("Postprocessor"):
            spec["dtype"], values = "int32", np.arange(3)
            data += values.astype("<i4").tobytes()
        elif index % 3 == 0 or constant is not None:
            values = np.asarray(constant if constant is not None else values, "<f4")
            data += values.tobytes()
        else:
            low, scale = float(values.min()), float(np.ptp(values) or 1) / 255
            codes = np.round((values - low) / scale).astype(np.uint8)
            spec["quantization"] = {"dtype": "uint8", "scale": scale, "min": low, "original_dtype": "float32"}
            data += codes.tobytes()
            values = (codes.astype(np.float64) * scale + low).astype(np.float32)
        expected[name] = values
        specs.append(spec)
    cut = len(data) // 2
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{network}-1").write_bytes(data[:cut])
    (folder / f"{network}-2").write_bytes(data[cut:])
    manifest = [{"paths": [f"{network}-1", f"{network}-2"], "weights": specs}]
    (folder / f"{network}-weights_manifest.json").write_text(json.dumps(manifest))
    return expected


LAYOUTS = {
    RECOGNITION: recognition_layout,
    DETECTION: detection_layout,
    LANDMARKS: landmarks_layout,
}


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    folder = tmp_path_factory.mktemp("package") / "model"
    return folder, {name: write_network(folder, name, layout()) for name, layout in LAYOUTS.items()}


# -- the networks in numpy, on (H, W, C) and with the manifest's own names and layout -----------------------------


def conv(x, kernel, stride=1, pad=(0, 0)):
    x = np.pad(x, (pad, pad, (0, 0)))
    windows = sliding_window_view(x, kernel.shape[:2], axis=(0, 1))[::stride, ::stride]  # (H, W, C, kh, kw)
    return np.tensordot(windows, kernel, axes=([3, 4, 2], [0, 1, 2]))


def depthwise(x, kernel, stride):
    x = np.pad(x, (((0, 1), (0, 1), (0, 0)) if stride == 2 else ((1, 1), (1, 1), (0, 0))))
    windows = sliding_window_view(x, (3, 3), axis=(0, 1))[::stride, ::stride]
    return np.einsum("hwcij,ijc->hwc", windows, kernel[..., 0], optimize=True)


def relu(x):
    return np.maximum(x, 0)


def numpy_recognition(t, x):
    def layer(x, name, stride=1, pad=(0, 0)):
        y = conv(x, t[f"{name}/conv/filters"], stride, pad) + t[f"{name}/conv/bias"]
        return y * t[f"{name}/scale/weights"] + t[f"{name}/scale/biases"]

    x = relu(layer(x, "conv32_down", 2))
    x = sliding_window_view(x, (3, 3), axis=(0, 1))[::2, ::2].max(axis=(3, 4))
    for name in BLOCKS:
        down = "down" in name
        y = relu(layer(x, f"{name}/conv1", 2 if down else 1, (0, 0) if down else (1, 1)))
        y = layer(y, f"{name}/conv2", 1, (1, 1))
        if down:
            even = x[: x.shape[0] // 2 * 2, : x.shape[1] // 2 * 2]
            x = (even[::2, ::2] + even[1::2, ::2] + even[::2, 1::2] + even[1::2, 1::2]) / 4
        total = np.zeros((max(len(x), len(y)), max(x.shape[1], y.shape[1]), y.shape[2]))
        total[: len(x), : x.shape[1], : x.shape[2]] += x  # what one of them lacks counts as zero
        total[: len(y), : y.shape[1]] += y
        x = relu(total)
    return {"embedding": x.mean(axis=(0, 1)) @ t["fc"]}


def numpy_landmarks(t, x):
    for block in range(4):
        outputs = []
        for index in range(4):
            name = f"dense{block}/conv{index}"
            inner = relu(sum(outputs)) if outputs else x
            if block or index:
                y = depthwise(inner, t[f"{name}/depthwise_filter"], 1 if index else 2)
                y = conv(y, t[f"{name}/pointwise_filter"])
            else:
                y = conv(inner, t[f"{name}/filters"], 2, (0, 1))
            y = y + t[f"{name}/bias"]
            outputs.append(y if index else relu(y))
        x = relu(sum(outputs))
    return {"points": (x.mean(axis=(0, 1)) @ t["fc/weights"] + t["fc/bias"]).reshape(68, 2)}


def numpy_detection(t, x):
    def relu6(x):
        return np.clip(x, 0, 6)

    def pointwise(x, name, stride=1):
        kernel = t[f"{name}/weights"]
        pad = (0, 0) if len(kernel) == 1 else (0, 1)
        return relu6(conv(x, kernel, stride, pad) + t[f"{name}/convolution_bn_offset"])

    x, maps = pointwise(x, "MobilenetV1/Conv2d_0_pointwise", 2), []
    for index in range(1, 14):
        name = f"MobilenetV1/Conv2d_{index}_depthwise"
        x = depthwise(x, t[f"{name}/depthwise_weights"], 2 if index in (2, 4, 6, 12) else 1)
        gamma, beta, mean, variance = (
            t[f"{name}/BatchNorm/{part}"] for part in ("gamma", "beta", "moving_mean", "moving_variance")
        )
        x = relu6((x - mean) / np.sqrt(variance + 0.001) * gamma + beta)
        x = pointwise(x, f"MobilenetV1/Conv2d_{index}_pointwise")
        if index == 11:
            maps.append(x)
    maps.append(x)
    for index in range(8):
        x = pointwise(x, f"Prediction/Conv2d_{index}_pointwise", 2 if index % 2 else 1)
        if index % 2:
            maps.append(x)
    offsets, logits = [], []
    for index, x in enumerate(maps):
        head = f"Prediction/BoxPredictor_{index}"
        for rows, name, width in ((offsets, "BoxEncodingPredictor", 4), (logits, "ClassPredictor", 3)):
            y = conv(x, t[f"{head}/{name}/weights"]) + t[f"{head}/{name}/biases"]
            rows.append(y.reshape(-1, width))
    dy, dx, dh, dw = np.concatenate(offsets).T
    top, left, bottom, right = t["Output/extra_dim"][0].astype(np.float64).T
    height, width = bottom - top, right - left
    y, x = (top + bottom) / 2 + dy / 10 * height, (left + right) / 2 + dx / 10 * width
    h, w = np.exp(dh / 5) * height, np.exp(dw / 5) * width
    boxes = np.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], axis=1)
    return {"boxes": boxes, "scores": 1 / (1 + np.exp(-np.concatenate(logits)[:, 1]))}


NUMPY = {RECOGNITION: numpy_recognition, DETECTION: numpy_detection, LANDMARKS: numpy_landmarks}
SIDES = {RECOGNITION: 150, DETECTION: 512, LANDMARKS: 112}


def check_forward(network, tensors, image):
    """torch on (1, 3, S, S) against numpy in float64 on (S, S, 3)."""
    expected = NUMPY[network]({name: t.astype(np.float64) for name, t in tensors.items()}, image)
    built = BUILD[network]({name: torch.from_numpy(np.array(t)) for name, t in tensors.items()})
    with torch.inference_mode():
        found = built(torch.from_numpy(image.transpose(2, 0, 1)[None]).float())
    found = found if isinstance(found, dict) else {"embedding": found}
    assert sorted(found) == sorted(expected)
    for name, rows in expected.items():
        np.testing.assert_allclose(found[name][0].numpy(), rows, atol=1e-4, rtol=1e-4)
        assert np.ptp(rows) > 1e-3  # a comparison of zeros would say nothing


@pytest.mark.parametrize("network", LAYOUTS)
def test_the_network_equals_plain_numpy(package, network):
    side = SIDES[network]
    image = np.random.default_rng(1).normal(0, 0.5, (side, side, 3))
    check_forward(network, package[1][network], image)


@pytest.mark.parametrize("network", LAYOUTS)
def test_the_real_network_equals_plain_numpy(network):
    source = os.environ.get("EMBEDKIT_FACE_API")
    if not source:
        pytest.skip("set EMBEDKIT_FACE_API to what `npm pack @vladmandic/face-api@1.7.15` writes")
    item = next(item for item in IMPORTS if item.network == network)
    tensors = {name: t.numpy() for name, t in read_tensors(Path(source), network, sha256=item.sha256).items()}
    side = SIDES[network]
    image = synthetic_images(1, seed=3, height=side, width=side)[0].astype(np.float64) / 128 - 1
    check_forward(network, tensors, image)


# -- reading -----------------------------------------------------------------------------------------------------


def test_tensors_are_dequantized_and_shards_joined(package):
    folder, expected = package
    for source in (folder, folder.parent):
        for network, tensors in expected.items():
            found = read_tensors(source, network)
            assert list(found) == list(tensors)
            for name, tensor in tensors.items():
                np.testing.assert_array_equal(found[name].numpy(), tensor)


def test_values_by_hand(tmp_path):
    specs = [
        {
            "name": "q",
            "shape": [3],
            "dtype": "float32",
            "quantization": {"dtype": "uint8", "scale": 0.5, "min": -3.0},
        },
        {"name": "f", "shape": [], "dtype": "float32"},
        {
            "name": "w",
            "shape": [1],
            "dtype": "float32",
            "quantization": {"dtype": "uint16", "scale": 2.0, "min": 1.0},
        },
    ]
    (tmp_path / "x-weights_manifest.json").write_text(json.dumps([{"paths": ["x"], "weights": specs}]))
    (tmp_path / "x").write_bytes(bytes([0, 128, 255]) + np.float32(1.25).tobytes() + np.uint16(513).tobytes())
    found = read_tensors(tmp_path, "x")
    assert found["q"].tolist() == [-3.0, 61.0, 124.5]
    assert found["f"].item() == 1.25 and found["w"].tolist() == [1027.0]


def test_the_tgz_is_read_as_the_folder(package, tmp_path):
    folder, expected = package
    tgz = tmp_path / "package.tgz"
    with tarfile.open(tgz, "w:gz") as archive:
        archive.add(folder, "package/model")
    for name, tensor in read_tensors(tgz, LANDMARKS).items():
        np.testing.assert_array_equal(tensor.numpy(), expected[LANDMARKS][name])
    with pytest.raises(SourceError, match="npm pack"):
        read_tensors(tgz, "another_model")


def test_sources_that_are_none(package, tmp_path):
    with pytest.raises(SourceError, match="npm pack"):
        read_tensors(tmp_path / "nothing.tgz", RECOGNITION)
    with pytest.raises(SourceError, match="npm pack"):
        read_tensors(tmp_path, RECOGNITION)
    (tmp_path / "text.tgz").write_text("text")
    with pytest.raises(SourceError, match="npm pack"):
        read_tensors(tmp_path / "text.tgz", RECOGNITION)
    with pytest.raises(IntegrityError, match="not those of version"):
        read_tensors(package[0], RECOGNITION, sha256="0" * 64)


@pytest.mark.parametrize(
    ("manifest", "error", "message"),
    [
        ("not JSON", EntryError, "damaged"),
        ("{}", EntryError, "no tensor"),
        ('[{"paths": ["x"]}]', EntryError, "damaged"),
        ('[{"paths": ["../x"], "weights": []}]', EntryError, "not the name of a file"),
        ('[{"paths": ["x"], "weights": []}]', EntryError, "take 0 bytes of 4"),
        (
            '[{"paths": ["x"], "weights": [{"name": "a", "shape": [2], "dtype": "float32"}]}]',
            EntryError,
            "damaged",
        ),
        (
            '[{"paths": ["x"], "weights": [{"name": "a", "shape": [1], "dtype": "text"}]}]',
            EntryError,
            "damaged",
        ),
    ],
)
def test_manifests_that_do_not_fit(tmp_path, manifest, error, message):
    (tmp_path / "x-weights_manifest.json").write_text(manifest)
    (tmp_path / "x").write_bytes(bytes(4))
    with pytest.raises(error, match=message):
        face_resnet(read_tensors(tmp_path, "x"))


@pytest.mark.parametrize(
    ("network", "build", "name"),
    [
        (RECOGNITION, face_resnet, "conv64_2/conv1/scale/biases"),
        (DETECTION, face_detector, "Prediction/BoxPredictor_3/ClassPredictor/biases"),
        (LANDMARKS, face_landmarks, "dense2/conv0/pointwise_filter"),
    ],
)
def test_every_tensor_has_one_place(package, network, build, name):
    tensors = {key: torch.from_numpy(np.array(value)) for key, value in package[1][network].items()}
    build(tensors)
    with pytest.raises(EntryError, match=f"no tensor '{name}'"):
        build({key: value for key, value in tensors.items() if key != name})
    with pytest.raises(EntryError, match="1 tensors of the manifest have no place, such as 'extra'"):
        build({**tensors, "extra": torch.zeros(1)})
    with pytest.raises(EntryError, match="expected"):
        build({**tensors, name: torch.zeros(3)})


def test_a_detector_of_other_pixels_is_refused(package):
    tensors = {key: torch.from_numpy(np.array(value)) for key, value in package[1][DETECTION].items()}
    with pytest.raises(EntryError, match="-1..1"):
        face_detector({**tensors, "Preprocessor/mul/x": torch.tensor(1 / 255)})


# -- entries of other kinds --------------------------------------------------------------------------------------


class TinyDetector(nn.Module):
    """Two boxes and scores from the mean color; names stand in another order than the configuration's."""

    def __init__(self, weight: float = 1.0):
        super().__init__()
        self.fc = nn.Linear(3, 10)
        nn.init.constant_(self.fc.weight, weight)

    def forward(self, x):
        y = self.fc(x.mean(dim=(2, 3)))
        return {"scores": torch.sigmoid(y[:, 8:]), "boxes": y[:, :8].reshape(x.shape[0], 2, 4)}


def tiny_config(**changes) -> EntryConfig:
    facts = {
        "architecture": "tiny",
        "kind": "detector",
        "outputs": {"boxes": (2, 4), "scores": (2,)},
        "method": "detector",
        "dim": 10,
        "preprocess": Preprocess(size=(16, 16), resize="squash", mean=(0.5,) * 3, std=(0.5,) * 3),
        "data": "nothing",
        "license": "MIT",
    }
    return EntryConfig(**{**facts, **changes})


PIXELS = np.random.default_rng(0).integers(0, 256, (32, 3, 16, 16), dtype=np.uint8)


def test_a_detector_is_written_and_verified(tmp_path):
    torch.manual_seed(0)
    folder = tmp_path / "detector-tiny.nothing"
    network = TinyDetector().eval()
    write_entry(folder, network=network, config=tiny_config(), samples=PIXELS)
    result = verify_entry(folder)
    assert result.ok, result.detail
    with np.load(folder / "golden.npz") as golden:
        assert golden["boxes"].shape == (4, 2, 4) and golden["scores"].shape == (4, 2)
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: object-detection" in card and "`boxes` 2 x 4" in card
    assert "boxes by" in card and "cosine" not in card
    with pytest.raises(EntryError, match="is a detector, not an encoder"):
        load_encoder(folder)


def test_a_detector_whose_golden_vectors_differ_fails(tmp_path):
    folder = tmp_path / "detector-tiny.nothing"
    write_entry(folder, network=TinyDetector().eval(), config=tiny_config(), samples=PIXELS)
    with np.load(folder / "golden.npz") as golden:
        arrays = dict(golden)
    arrays["scores"] = arrays["scores"] + 0.01
    np.savez(folder / "golden.npz", **arrays)
    from embedkit.model.layout import MANIFEST
    from embedkit.model.manifest import Manifest

    names = [path.name for path in folder.iterdir() if path.name != MANIFEST]
    (folder / MANIFEST).write_bytes(Manifest.encode({name: (folder / name).read_bytes() for name in names}))
    result = verify_entry(folder)
    assert not result.ok and "1.0e-02" in result.detail


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"outputs": {"boxes": (2, 4)}, "dim": 8}, "expected of a detector the outputs boxes, scores"),
        ({"outputs": {"boxes": (3, 4), "scores": (2,)}, "dim": 14}, "boxes: .* says 3x4, .* gives 2x4"),
        ({"kind": "landmarks"}, "expected of a landmarks the outputs points"),
        ({"kind": "landmarks", "outputs": {"points": (5, 2)}}, "network gives boxes, scores"),
    ],
)
def test_outputs_that_do_not_fit_are_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        write_entry(
            tmp_path / "detector-tiny.nothing",
            network=TinyDetector().eval(),
            config=tiny_config(**changes),
            samples=PIXELS,
        )
    assert list(tmp_path.iterdir()) == []


def test_the_numbers_of_a_detector_are_counted(tmp_path):
    text = json.dumps(tiny_config(dim=11).to_json())
    with pytest.raises(EntryError, match="dim: expected 10"):
        EntryConfig.from_json(text)
    assert EntryConfig.from_json(json.dumps(tiny_config().to_json())).outputs["scores"] == (2,)


@pytest.mark.parametrize("item", IMPORTS, ids=[item.entry for item in IMPORTS])
def test_the_committed_entry_is_whole_and_gives_its_golden_vectors(item):
    folder = ZOO / item.entry
    result = verify_entry(folder, device="cpu")
    assert result.ok, result.detail
    entry = find_entry(folder)
    assert (entry.config.kind, entry.config.outputs) == (item.config.kind, item.config.outputs)
    assert entry.config.preprocess == item.config.preprocess
    assert "timm does not have this architecture" in entry.card
    assert entry.config.provenance["sha256"] == item.sha256
