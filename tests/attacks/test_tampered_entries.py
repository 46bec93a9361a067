"""Entries that somebody changed: wrong hashes, missing files, and manifests that are true about hostile files."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

import embedkit
from embedkit.errors import EmbedkitError, EntryError, IntegrityError
from embedkit.hub.folder import FolderEntry
from embedkit.hub.resolve import find_entry
from embedkit.hub.verified import VerifiedEntry
from embedkit.model.layout import sha256_hex
from embedkit.model.manifest import Manifest
from embedkit.workflows.check_entry import verify_entry

FILES = ("README.md", "config.json", "golden.npz", "model.onnx", "model.safetensors")


def use_everything(folder: Path) -> None:
    """Read each file of an entry the way its users do."""
    encoder = embedkit.load_encoder(folder, device="cpu", threads=1)
    assert encoder.card
    result = verify_entry(folder, device="cpu")
    if not result.ok:
        raise IntegrityError(result.detail) if "sha256" in result.detail else EntryError(result.detail)


def replace(file: Path, content: bytes) -> None:
    """Put new content under the name; the old file may be a hard link to another entry's."""
    file.unlink()
    file.write_bytes(content)


def refused(folder: Path, kind: type[EmbedkitError] = EntryError) -> str:
    with pytest.raises(kind) as caught:
        use_everything(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_copy_is_good_before_it_is_changed(entry_copy):
    assert sorted(file.name for file in entry_copy.iterdir()) == sorted((*FILES, "manifest.json"))
    use_everything(entry_copy)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", ["a bit", "cut", "longer", "empty", "another entry's"])
def test_any_change_of_any_file_is_an_integrity_error_that_names_it(entry_copy, by_hand, name, change):
    file = entry_copy / name
    content = file.read_bytes()
    middle = len(content) // 2
    changed = {
        "a bit": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "cut": content[:-1],
        "longer": content + b"\0",
        "empty": b"",
        "another entry's": by_hand.TinyEntry().files()[name],
    }[change]
    replace(file, changed)
    message = refused(entry_copy, IntegrityError)
    assert (
        str(file) in message
        and f"found {len(changed)} bytes" in message
        and "pull the entry again" in message
    )


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(entry_copy, name):
    (entry_copy / name).unlink()
    message = refused(entry_copy)
    assert f"{entry_copy / name} cannot be read (No such file or directory)" in message


@pytest.mark.parametrize("name", FILES)
def test_a_folder_or_a_broken_link_in_place_of_a_file(entry_copy, name):
    file = entry_copy / name
    file.unlink()
    file.symlink_to(entry_copy / "nowhere")
    assert f"{file} cannot be read" in refused(entry_copy)
    file.unlink()
    file.mkdir()
    assert f"{file} cannot be read" in refused(entry_copy)


def test_a_missing_or_unreadable_manifest(entry_copy, tmp_path):
    replace(entry_copy / "manifest.json", b"{")
    assert "manifest.json is not JSON" in refused(entry_copy)
    (entry_copy / "manifest.json").unlink()
    assert refused(entry_copy) == f"{entry_copy} is not a zoo entry: it has no readable manifest.json"
    (tmp_path / "empty").mkdir()
    assert "is not a zoo entry" in refused(tmp_path / "empty")


def test_a_manifest_that_lists_more_than_is_there_hurts_only_verify(by_hand, tmp_path):
    """A load verifies the files that it reads; `zoo verify` checks all."""
    entry = by_hand.TinyEntry()
    folder = entry.write(tmp_path / "x", {**entry.files(), "extra.bin": b"abc"})
    (folder / "extra.bin").unlink()
    embedkit.load_encoder(folder)
    assert "extra.bin cannot be read" in verify_entry(folder).detail
    (folder / "unknown.txt").write_text("not in the manifest: ignored")
    (folder / "extra.bin").write_bytes(b"abc")
    assert verify_entry(folder).ok


def test_a_pin_refuses_a_manifest_that_is_true_about_other_files(by_hand, tmp_path):
    good = by_hand.TinyEntry().write(tmp_path / "good")
    evil = by_hand.TinyEntry(seed=1).write(tmp_path / "evil")
    pin = sha256_hex((good / "manifest.json").read_bytes())
    VerifiedEntry("x", FolderEntry(good), manifest_sha256=pin)
    with pytest.raises(IntegrityError, match=f"the index pins {pin[:12]}"):
        VerifiedEntry("x", FolderEntry(evil), manifest_sha256=pin)


def test_the_same_bytes_are_hashed_and_used(by_hand, tmp_path):
    """A file that changes between two readings must not matter: each is read once."""

    class Counting(FolderEntry):
        def __init__(self, path):
            super().__init__(path)
            self.reads: list[str] = []

        def read(self, name, limit):
            self.reads.append(name)
            return super().read(name, limit)

    from embedkit.encoder import Encoder
    from embedkit.model.providers import EngineOptions

    files = Counting(by_hand.TinyEntry().write(tmp_path / "x"))
    encoder = Encoder(VerifiedEntry("x", files), EngineOptions(device="cpu"))
    shutil.rmtree(tmp_path / "x")
    assert encoder.encode(np.zeros((8, 8, 3), np.uint8)).shape == (1, 4)
    assert sorted(files.reads) == ["config.json", "manifest.json", "model.onnx", "model.safetensors"]


# --- manifests that are true, of files that are not what an entry promises --------------------------------


def test_a_configuration_of_another_schema(entry_copy):
    config = json.loads((entry_copy / "config.json").read_bytes())
    config["embedkit"]["schema"] = 2
    replace(entry_copy / "config.json", json.dumps(config).encode())
    files = {name: (entry_copy / name).read_bytes() for name in FILES}
    replace(entry_copy / "manifest.json", Manifest.encode(files))
    assert "config.json: schema: expected 1, found 2; upgrade embedkit" in refused(entry_copy)


def test_a_graph_that_reads_outside_of_its_folder_runs_nothing(by_hand, tmp_path):
    entry = by_hand.TinyEntry()
    (tmp_path / "secret.bin").write_bytes(bytes(entry.weight.nbytes))
    for location in ("../secret.bin", str(tmp_path / "secret.bin"), "README.md"):
        external = entry.external(location=location, offset=0)
        entry.graph = entry.make_graph(weight=by_hand.tensor_proto("weight", (192, 4), 10, external=external))
        message = refused(entry.write(tmp_path / "entry"))
        assert f"points to {location[:80]!r}; only model.safetensors is allowed" in message


def test_graphs_that_onnx_runtime_refuses(by_hand, tmp_path):
    entry = by_hand.TinyEntry()
    good = entry.graph
    for graph in (
        entry.make_graph(nodes=by_hand.field(1, by_hand.node("NoSuchOperator", ["flat"], ["y"]))),
        entry.make_graph(nodes=by_hand.field(1, by_hand.node("Add", ["flat", "missing"], ["y"]))),
        entry.make_graph(opsets={"": 9999}),
        entry.make_graph(weight=by_hand.tensor_proto("weight", (7, 7), 1, raw=b"abc")),
        good.replace(b"embedding", b"embeddinG", 1),
        by_hand.model_proto(by_hand.field(2, "nothing in it")),
    ):
        entry.graph = graph
        assert str(tmp_path / "entry" / "model.onnx") in refused(entry.write(tmp_path / "entry"))


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("another width", "the graph gives (5,) and the configuration says (4,)"),
        ("another input size", "the graph takes (3, 8, 8) and the preprocess contract gives (3, 16, 16)"),
        ("another color", "the graph takes (3, 8, 8) and the preprocess contract gives (1, 8, 8)"),
        ("a float input", "expected the input `pixels` (uint8) and the output `embedding` (float)"),
        ("another input name", "expected the input `pixels` (uint8) and the output `embedding` (float)"),
        ("another output name", "expected the input `pixels` (uint8) and the output `embedding` (float)"),
        ("a double output", "expected the input `pixels` (uint8) and the output `embedding` (float)"),
        ("a detector", "is a detector, not an encoder"),
    ],
)
def test_graphs_that_do_not_do_what_the_configuration_says(by_hand, tmp_path, what, expected):
    entry = by_hand.TinyEntry()
    files = entry.files()
    f, node, info = by_hand.field, by_hand.node, by_hand.value_info

    def config(**changes) -> bytes:
        return json.dumps(dataclasses.replace(entry.config, **changes).to_json()).encode()

    to_double = node("Cast", ["sum"], ["embedding"], by_hand.attribute("to", 11, 2))
    swaps = {
        "a float input": [(info("pixels", 2, ["N", 3, 8, 8]), info("pixels", 1, ["N", 3, 8, 8]))],
        "another input name": [(b"pixels", b"images")],
        "another output name": [(b"embedding", b"embedded_")],
        "a double output": [
            (f(12, info("embedding", 1, ["N", 4])), f(12, info("embedding", 11, ["N", 4]))),
            (
                f(1, node("Add", ["product", "bias"], ["embedding"])),
                f(1, node("Add", ["product", "bias"], ["sum"])) + f(1, to_double),
            ),
        ],
    }
    if what in swaps:
        body = entry.graph_proto()
        for old, new in swaps[what]:
            assert old in body
            body = body.replace(old, new)
        files["model.onnx"] = by_hand.model_proto(body)
    elif what == "another width":
        wide = by_hand.TinyEntry(dim=5)
        files["model.onnx"], files["model.safetensors"] = wide.graph, wide.weights
    elif what == "another input size":
        files["config.json"] = config(preprocess=dataclasses.replace(entry.preprocess, size=(16, 16)))
    elif what == "another color":
        gray = dataclasses.replace(entry.preprocess, color="gray", mean=(0.0,), std=(1.0,))
        files["config.json"] = config(preprocess=gray)
    else:
        files["config.json"] = config(kind="detector", outputs={"boxes": (4,)})
    assert expected in refused(entry.write(tmp_path / "entry", files))


def test_weights_that_lie_about_themselves(by_hand, tmp_path):
    entry = by_hand.TinyEntry()
    good = entry.weights
    for weights in (good[:-4], good[:8], b"", (1 << 60).to_bytes(8, "little") + good[8:], good + good):
        entry.weights = weights
        assert "model.safetensors" in refused(entry.write(tmp_path / "entry"))


def npz(**arrays) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def hostile_golden() -> dict[str, bytes]:
    images = np.zeros((2, 8, 8, 3), np.uint8)
    rows, tolerance = np.zeros((2, 4), np.float32), np.float64(1e-4)
    bad_zip = bytearray(npz(images=images, embedding=rows, tolerance_fp32=tolerance))
    bad_zip[60:90] = b"\xff" * 30
    pickled = io.BytesIO()
    np.savez(pickled, images=np.array([{"a": 1}], object), embedding=rows, tolerance_fp32=tolerance)
    huge = io.BytesIO()
    with zipfile.ZipFile(huge, "w") as archive:
        head = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1099511627776, 1024, 1024, 3), }"
        head = b"\x93NUMPY\x01\0" + len(head).to_bytes(2, "little") + head
        for name in ("images", "embedding", "tolerance_fp32"):
            archive.writestr(f"{name}.npy", head)
    bomb = io.BytesIO()
    np.savez_compressed(
        bomb, images=np.zeros((1 << 27, 1), np.uint8), embedding=rows, tolerance_fp32=tolerance
    )
    return {
        "a bomb": bomb.getvalue(),
        "text": b"not an archive",
        "empty": b"",
        "a zip of nothing": b"PK\x05\x06" + bytes(18),
        "a damaged zip": bytes(bad_zip),
        "a pickle": pickled.getvalue(),
        "a header of exabytes": huge.getvalue(),
        "no tolerance": npz(images=images, embedding=rows),
        "tolerances": npz(images=images, embedding=rows, tolerance_fp32=np.ones(3)),
        "no images": npz(images=images[:0], embedding=rows[:0], tolerance_fp32=tolerance),
        "another width": npz(images=images, embedding=np.zeros((2, 5)), tolerance_fp32=tolerance),
        "more rows": npz(images=images, embedding=np.zeros((3, 4)), tolerance_fp32=tolerance),
        "float images": npz(images=images.astype(float), embedding=rows, tolerance_fp32=tolerance),
        "text rows": npz(images=images, embedding=np.full((2, 4), "x"), tolerance_fp32=tolerance),
        "other rows": npz(images=images, embedding=rows + 1, tolerance_fp32=tolerance),
        "not numbers": npz(images=images, embedding=rows * np.nan, tolerance_fp32=tolerance),
        "an endless tolerance": npz(images=images, embedding=rows, tolerance_fp32=np.float64(np.inf)),
        "no limit": npz(images=images, embedding=rows + 1, tolerance_fp32=np.float64(np.nan)),
    }


@pytest.mark.parametrize("what", sorted(hostile_golden()))
def test_golden_vectors_that_are_damaged_fail_without_a_traceback(by_hand, tmp_path, what):
    entry = by_hand.TinyEntry()
    folder = entry.write(tmp_path / "x", {**entry.files(), "golden.npz": hostile_golden()[what]})
    result = verify_entry(folder)
    assert not result.ok and result.files == 5 and "\n" not in result.detail
    embedkit.load_encoder(folder)  # it runs: only its test of itself is gone


BAD_FIGURES = {
    "text": {"metrics": {"results": {"d": {"auc": "good"}}}},
    "infinity": {"metrics": {"results": {"d": {"auc": float("inf")}}}},
    "too many digits": {"metrics": {"results": {"d": {"auc": 10**400}}}},
    "no data": {"metrics": {"results": None}},
    "one bound": {"metrics": {"intervals": {"d": {"auc": [0.5]}}}},
    "text for a bound": {"metrics": {"intervals": {"d": {"auc": [0.5, "x"]}}}},
    "a flat baseline": {"metrics": {"baselines": {"d": {"pixels": 0.5}}}},
    "no cost": {"provenance": {"cost": None}},
    "text for seconds": {"provenance": {"cost": {"seconds": "long"}}},
    "a list for the own task": {"provenance": {"pretext": [1]}},
    "one bound of the own task": {"provenance": {"pretext_intervals": {"accuracy": [0.5]}}},
    "text for a bound of the own task": {"provenance": {"pretext_intervals": {"accuracy": [0.5, "x"]}}},
}


@pytest.mark.parametrize("what", sorted(BAD_FIGURES))
def test_figures_that_no_table_can_show_stop_at_their_own_entry(by_hand, tmp_path, what):
    from embedkit.hub.publish.publish import publish

    entry = by_hand.TinyEntry()
    config = json.loads(entry.files()["config.json"])
    config["embedkit"] |= BAD_FIGURES[what]
    text = json.dumps(config).replace("Infinity", "1e999").encode()
    good = embedkit.hub.resolve.find_entry(entry.write(tmp_path / "zoo" / "linear-tiny.noise"))
    publish(good, str(tmp_path / "to"))
    bad = entry.write(tmp_path / "linear-bad.noise", {**entry.files(), "config.json": text})
    why = r"config\.json(: embedkit\.(metrics|provenance)| is not JSON \(1e999)"
    with pytest.raises(EntryError, match=why) as caught:
        publish(embedkit.hub.resolve.find_entry(bad), str(tmp_path / "to"))
    assert "\n" not in str(caught.value)
    publish(good, str(tmp_path / "to"))  # the zoo is as it was
    assert [path.name for path in (tmp_path / "to").iterdir() if path.is_dir()] == ["linear-tiny.noise"]


def test_a_damaged_mixture_fails(by_hand, tmp_path):
    entry = by_hand.TinyEntry()
    folder = entry.write(tmp_path / "x", {**entry.files(), "mixture.safetensors": b"cut"})
    result = verify_entry(folder)
    assert not result.ok and "mixture.safetensors is truncated" in result.detail


def test_an_entry_without_golden_vectors_or_card(by_hand, tmp_path):
    entry = by_hand.TinyEntry()
    files = {name: data for name, data in entry.files().items() if name not in ("golden.npz", "README.md")}
    folder = entry.write(tmp_path / "x", files)
    assert verify_entry(folder).detail == f"{folder}: the entry has no golden.npz"
    with pytest.raises(EntryError, match=r"the entry has no README.md"):
        _ = embedkit.load_encoder(folder).card


def test_a_card_of_any_bytes_can_be_read(by_hand, tmp_path):
    entry = by_hand.TinyEntry()
    folder = entry.write(tmp_path / "x", {**entry.files(), "README.md": b"# \xff\xfe caf\xc3\xa9"})
    assert find_entry(folder).card == "# \ufffd\ufffd café"


def test_reading_a_file_that_the_manifest_does_not_list(by_hand, tmp_path):
    folder = by_hand.TinyEntry().write(tmp_path / "x")
    (tmp_path / "secret").write_text("secret")
    entry = find_entry(folder)
    for name in ("../secret", "manifest.json", "model.int8.onnx", os.fspath(tmp_path / "secret"), ""):
        with pytest.raises(EntryError, match="the entry has no"):
            entry.read(name)
