"""Every entry of this checkout's zoo: complete, unchanged, indexed, and giving its golden vectors anywhere.

Needs ONNX Runtime and no torch: this is what a client of the files alone can check.
"""

from pathlib import Path

import numpy as np
import pytest

from embedkit.hub.catalog import Index
from embedkit.hub.publish.index import build_index, index_bytes, pages
from embedkit.images.transform import read_pixels
from embedkit.model.config import EntryConfig
from embedkit.model.layout import (
    CARD,
    CONFIG,
    ENTRY_NAME,
    GOLDEN,
    GRAPH,
    INDEX,
    MANIFEST,
    WEIGHTS,
    sha256_hex,
)
from embedkit.model.manifest import Manifest
from embedkit.model.onnx_guard import check_graph

ZOO = Path(__file__).parents[2] / "zoo"
ENTRIES = sorted(path for path in ZOO.iterdir() if ENTRY_NAME.fullmatch(path.name))

each_entry = pytest.mark.parametrize("folder", ENTRIES, ids=[path.name for path in ENTRIES])


def test_the_default_entry_is_here():
    assert "supervised-efficientnet_lite0.in1k" in {path.name for path in ENTRIES}


@each_entry
def test_manifest_is_complete_and_right(folder):
    manifest = Manifest.from_json((folder / MANIFEST).read_bytes())
    assert {path.name for path in folder.iterdir()} == {*manifest.files, MANIFEST}
    assert {CONFIG, WEIGHTS, GRAPH, CARD, GOLDEN} <= set(manifest.files)
    for name, record in manifest.files.items():
        content = (folder / name).read_bytes()
        assert (name, len(content), sha256_hex(content)) == (name, record.size, record.sha256)


@each_entry
def test_configuration_and_graph_agree(folder):
    config = EntryConfig.from_json((folder / CONFIG).read_bytes())
    assert folder.name.startswith(f"{config.method}-")
    graph, weights = (folder / GRAPH).read_bytes(), (folder / WEIGHTS).read_bytes()
    assert len(graph) < 1_000_000 and check_graph(graph, weights, folder.name)
    bound_to = config.metrics.get("weights_sha256")
    assert bound_to in (None, sha256_hex(weights))


@each_entry
def test_card_names_the_entry_and_the_license(folder):
    config = EntryConfig.from_json((folder / CONFIG).read_bytes())
    text = (folder / CARD).read_text(encoding="utf-8")
    assert text.startswith("---\nlibrary_name: ")
    assert f"\nlicense: {config.license.lower()}\n" in text
    assert f"\n# {folder.name}\n" in text


@each_entry
def test_golden_vectors_are_reproduced_by_plain_onnxruntime(folder):
    ort = pytest.importorskip("onnxruntime")
    config = EntryConfig.from_json((folder / CONFIG).read_bytes())
    golden = np.load(folder / GOLDEN)
    session = ort.InferenceSession(str(folder / GRAPH), providers=["CPUExecutionProvider"])
    pixels = np.stack([read_pixels(p, config.preprocess, decode="exact") for p in golden["images"]])
    for size in (1, 2, 4):
        runs = [
            session.run(list(config.outputs), {"pixels": pixels[at : at + size]}) for at in range(0, 4, size)
        ]
        for (name, shape), blocks in zip(config.outputs.items(), zip(*runs, strict=True), strict=True):
            rows = np.concatenate(blocks)
            assert rows.shape == (4, *shape) and rows.dtype == np.float32
            if name == "embedding":
                rows /= np.linalg.norm(rows, axis=1, keepdims=True)
            assert np.abs(rows - golden[name]).max() <= golden["tolerance_fp32"]


def test_index_is_current():
    index = build_index(ZOO)
    assert (ZOO / INDEX).read_bytes() == index_bytes(index), "run embedkit publish --to zoo"
    for name, content in pages(index).items():
        assert (ZOO / name).read_bytes() == content, "run embedkit publish --to zoo"
    assert set(Index.from_json((ZOO / INDEX).read_bytes(), INDEX).rows) == {path.name for path in ENTRIES}
