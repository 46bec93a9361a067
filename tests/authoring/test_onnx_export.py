"""An entry as one ordinary ONNX file: what plain ONNX Runtime makes of it, and what the file says of itself."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from PIL import Image

from embedkit.authoring.onnx_export import export_onnx
from embedkit.encoder import load_encoder
from embedkit.errors import IntegrityError
from embedkit.model.layout import WEIGHTS

SAMPLES = Path(__file__).parents[2] / "samples"


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def plain_pixels(image: Image.Image, facts: dict[str, str]) -> np.ndarray:
    """Float pixels as a user of torchvision makes them, from what the file says; nothing of embedkit."""
    contract = json.loads(facts["preprocess"])
    (height, width), side = contract["size"], contract["resize_size"]
    image = image.convert("L" if contract["color"] == "gray" else "RGB")
    wide, high = (int(side * length / min(image.size)) for length in image.size)
    image = image.resize((wide, high), Image.Resampling[contract["interpolation"].upper()])
    left, top = round((wide - width) / 2), round((high - height) / 2)
    values = np.asarray(image.crop((left, top, left + width, top + height)), np.float32) / 255
    values = values.reshape(height, width, -1)
    normalized = (values - np.float32(contract["mean"])) / np.float32(contract["std"])
    return normalized.transpose(2, 0, 1)


@pytest.mark.parametrize(
    "name", ["supervised-efficientnet_lite0.in1k", "simclr-r50.photos", "simclr-r10.fmnist"]
)
def test_normalized_pixels_give_the_embeddings_of_encode(name, default_entry, photograph, tmp_path):
    folder = default_entry.parent / name
    if not (folder / "model.onnx").exists():
        pytest.skip("the wheel carries the default entry alone")
    encoder = load_encoder(folder, threads=1)
    out = export_onnx(folder, tmp_path / "encoder.onnx", float_input=True)
    session = ort.InferenceSession(out, providers=["CPUExecutionProvider"])
    [taken] = session.get_inputs()
    assert (taken.name, taken.type) == ("pixel_values", "tensor(float)")
    images = [photograph(seed, 320 + 40 * seed, 300) for seed in range(4)]
    facts = session.get_modelmeta().custom_metadata_map
    batch = np.stack([plain_pixels(image, facts) for image in images])
    [rows] = session.run(None, {"pixel_values": batch})
    cosines = (unit(rows) * encoder.encode(images)).sum(1)
    assert cosines.min() >= 0.99999, cosines
    # values of 0..1 without the normalization are another input, so the test above tells the two apart
    contract = json.loads(facts["preprocess"])
    shape = (1, -1, 1, 1)
    unscaled = batch * np.float32(contract["std"]).reshape(shape) + np.float32(contract["mean"]).reshape(
        shape
    )
    [others] = session.run(None, {"pixel_values": unscaled})
    assert (unit(others) * encoder.encode(images)).sum(1).min() < 0.9999


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="the samples of the checkout")
def test_the_recipe_by_pillow_alone(tmp_path):
    """Followed step by step it gives the encoder's own rows; a crop one pixel off gives 0.98, a plain resize 0.82."""
    encoder = load_encoder()
    path = export_onnx(encoder.name, tmp_path / "e.onnx")
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    facts = session.get_modelmeta().custom_metadata_map
    assert (
        "the shorter side to 256 pixels (the other rounded down), bicubic" in facts["recipe"]
        and "the central 224x224, from round((side - kept) / 2) on" in facts["recipe"]
    )
    image = Image.open(SAMPLES / "rocket.jpg").convert("RGB")
    scale = 256 / min(image.size)
    resized = image.resize([max(256, int(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
    left, top = (round((side - 224) / 2) for side in resized.size)
    pixels = np.asarray(resized.crop((left, top, left + 224, top + 224))).transpose(2, 0, 1)[None]
    [found] = session.run(None, {"pixels": np.ascontiguousarray(pixels)})
    assert (unit(found) * encoder.encode(SAMPLES / "rocket.jpg", decode="exact")).sum() > 0.99999


def test_by_hand(by_hand, tmp_path):
    """Of the linear entry: embedding = pixels @ weight + bias, with pixels = 255 * (x * std + mean)."""
    mean, std = (0.5, 0.25, 0.125), (0.25, 0.5, 1.0)
    entry = by_hand.TinyEntry(preprocess={"mean": mean, "std": std})
    folder = entry.write(tmp_path / entry.name)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 8, 8), dtype=np.uint8)
    expected = entry.embed(pixels, normalize=False)
    alone = ort.InferenceSession(
        export_onnx(folder, tmp_path / "u8.onnx"), providers=["CPUExecutionProvider"]
    )
    np.testing.assert_allclose(alone.run(None, {"pixels": pixels})[0], expected, rtol=1e-5, atol=1e-5)
    path = export_onnx(folder, tmp_path / "f32.onnx", float_input=True)
    channels = [(pixels[:, c] / np.float32(255) - mean[c]) / std[c] for c in range(3)]
    values = np.stack(channels, 1).astype(np.float32)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"pixel_values": values})[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("float_input", "taken"),
    [
        (
            True,
            "float32 (N, 3, 8, 8), RGB, normalized: (value / 255 - mean) / std, with mean (0.5, 0.25, 0.125) and "
            "std (0.25, 0.5, 1)",
        ),
        (False, "uint8 (N, 3, 8, 8), RGB; the graph normalizes"),
    ],
)
def test_the_file_says_what_it_takes(by_hand, tmp_path, float_input, taken):
    contract = {"mean": (0.5, 0.25, 0.125), "std": (0.25, 0.5, 1.0)}
    entry = by_hand.TinyEntry(preprocess=contract)
    folder = entry.write(tmp_path / entry.name)
    model = onnx.load(export_onnx(folder, tmp_path / "e.onnx", float_input=float_input))
    facts = {pair.key: pair.value for pair in model.metadata_props}
    assert facts["input"] == taken and taken in model.doc_string and model.graph.input[0].doc_string == taken
    assert facts["output"] == "embedding, float32 (N, 4), not L2-normalized"
    assert (facts["entry"], facts["license"]) == (entry.name, "CC0-1.0")
    assert facts["revision"] == load_encoder(folder).revision
    assert json.loads(facts["preprocess"])["std"] == [0.25, 0.5, 1.0]


def test_it_reads_what_the_manifest_names(tiny_entry, tmp_path):
    folder = Path(shutil.copytree(tiny_entry, tmp_path / tiny_entry.name))
    weights = bytearray((folder / WEIGHTS).read_bytes())
    weights[-1] ^= 1
    (folder / WEIGHTS).write_bytes(weights)
    with pytest.raises(IntegrityError):
        export_onnx(folder, tmp_path / "encoder.onnx")
    assert not (tmp_path / "encoder.onnx").exists()


def test_the_command_needs_no_torch(tiny_entry, tmp_path):
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'timm', 'lightning', 'embedkit.training')))\n"
        "from embedkit.cli import main; main()"
    )
    out = tmp_path / "x.onnx"
    words = [sys.executable, "-c", code, "export-onnx", tiny_entry, "-o", out, "--float-input"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{out}\n")
    facts = {pair.key: pair.value for pair in onnx.load(out).metadata_props}
    assert [line.removeprefix("embedkit: ") for line in done.stderr.splitlines()[1:]] == facts[
        "recipe"
    ].splitlines()
    onnx.checker.check_model(str(out), full_check=True)


def test_the_command_refuses_in_one_sentence(run, tiny_entry, tmp_path, monkeypatch):
    status, _, err = run("export-onnx", tiny_entry, "-o", tmp_path / "missing" / "x.onnx")
    assert status == 1 and "No such file or directory" in err and err.count("\n") == 1
    status, _, err = run("export-onnx", "linear-none.noise", "-o", tmp_path / "x.onnx")
    assert status == 1 and "there is no encoder 'linear-none.noise'" in err and err.count("\n") == 1
    status, _, err = run("export", tiny_entry, "--name", "supervised-tiny.b")
    assert status == 1 and "embedkit export-onnx" in err and err.count("\n") == 1
    monkeypatch.delitem(sys.modules, "embedkit.authoring.onnx_export")
    monkeypatch.setitem(sys.modules, "onnx", None)
    status, _, err = run("export-onnx", tiny_entry, "-o", tmp_path / "x.onnx")
    assert status == 1 and "pip install '.[onnx]'" in err and err.count("\n") == 1
