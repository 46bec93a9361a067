"""What all tests share: the default entry, an encoder over it, images, and entries small enough to write by hand."""

from __future__ import annotations

import importlib.resources
import io
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

from embedkit import cli as commands

# The same examples on every run, and no limit of time for one of them on a busy machine.
settings.register_profile("embedkit", derandomize=True, deadline=None)
settings.load_profile("embedkit")

# Test modules import ONNX Runtime themselves, before embedkit can turn its telemetry off.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

DEFAULT_ENTRY = "supervised-efficientnet_lite0.in1k"

#: Below `tests/`, what `pytest -m fast` leaves out: three seconds and more a module, or everything that needs torch.
SLOW = frozenset(
    """
    test_examples.py test_install_hints.py test_wheel.py
    training zoo test_logging.py authoring/test_onnx_export.py authoring/test_onnx_import.py cli/test_progress.py
    _io/test_json.py _io/test_columns.py analysis/clustering/test_dpmm.py
    analysis/matching/test_calibration.py analysis/test_hostile_files.py analysis/test_vectors.py
    attacks cli/test_cli.py cli/test_completion.py cli/test_help.py cli/test_outputs.py embeddings/test_formats.py
    hub/publish hub/test_bulk.py hub/test_zoos.py images/test_memory.py model/test_onnx_guard.py
    pipeline/test_job.py pipeline/test_kills.py pipeline/test_outputs.py storage/test_answer.py
    workflows/faces workflows/test_adopt.py workflows/test_kills.py workflows/visual/test_atlas.py
    """.split()
)


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        path = item.path.relative_to(here)
        if SLOW.isdisjoint({path.as_posix(), *(parent.as_posix() for parent in path.parents)}):
            item.add_marker(pytest.mark.fast)


@pytest.fixture(scope="session", autouse=True)
def _a_machine_of_its_own(tmp_path_factory) -> Iterator[None]:
    """No zoo, configuration or cache of whoever runs the tests."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("EMBEDKIT_ZOO", raising=False)
        patch.setenv("EMBEDKIT_CACHE", str(home / "cache"))
        patch.setenv("XDG_CONFIG_HOME", str(home / "config"))
        yield


@pytest.fixture(scope="session")
def default_entry() -> Path:
    """The folder of the entry that the wheel carries."""
    return Path(str(importlib.resources.files("embedkit.zoo"))) / DEFAULT_ENTRY


@pytest.fixture
def entry_copy(default_entry, tmp_path) -> Path:
    """A copy of the default entry whose files may be replaced, but not written in place: they are hard links."""
    folder = tmp_path / "copy" / DEFAULT_ENTRY
    folder.mkdir(parents=True)
    for file in default_entry.iterdir():
        try:
            os.link(file, folder / file.name)
        except OSError:  # another file system
            shutil.copyfile(file, folder / file.name)
    return folder


@pytest.fixture(scope="session")
def encoder():
    """The default encoder on two threads, loaded once."""
    from embedkit import load_encoder

    return load_encoder(device="cpu", threads=2)


# --- images ---------------------------------------------------------------------------------------------


def draw_photograph(seed: int, width: int = 500, height: int = 375) -> Image.Image:
    """An RGB image with the statistics of a photograph: smooth structure at several scales, and noise."""
    rng = np.random.default_rng(seed)
    field = np.zeros((height, width, 3), np.float32)
    for cells, weight in ((2, 90.0), (5, 50.0), (17, 30.0), (61, 15.0)):
        coarse = rng.normal(0, weight, (cells, max(2, cells * width // height), 3)).astype(np.float32)
        bands = [
            Image.fromarray(coarse[:, :, band]).resize((width, height), Image.Resampling.BICUBIC)
            for band in range(3)
        ]
        field += np.stack([np.asarray(band) for band in bands], axis=2)
    field += rng.normal(0, 4, (height, width, 1))
    return Image.fromarray(np.clip(field + 128, 0, 255).astype(np.uint8))


@pytest.fixture(scope="session")
def photograph() -> Callable[..., Image.Image]:
    """`photograph(seed, width=500, height=375)` -> an RGB image."""
    return draw_photograph


@pytest.fixture(scope="session")
def jpeg_maker() -> Callable[..., bytes]:
    """`jpeg_maker(seed, width=500, height=375, **save_options)` -> the bytes of a JPEG."""

    def make(seed: int, width: int = 500, height: int = 375, **save_options) -> bytes:
        file = io.BytesIO()
        draw_photograph(seed, width, height).save(file, "JPEG", **{"quality": 90, **save_options})
        return file.getvalue()

    return make


# --- entries by hand --------------------------------------------------------------------------------------
# A writer of the protobuf wire format with the field numbers of onnx.proto3: the runtime's tests need no onnx
# package, and can write what that package would refuse to.


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1  # a negative int64 takes ten bytes
    text = bytearray()
    while value > 0x7F:
        text.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*text, value])


def field(number: int, value: int | str | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def tensor_proto(
    name: str,
    shape: Sequence[int],
    dtype: int,
    *,
    raw: bytes | None = None,
    external: Mapping[str, object] | None = None,
) -> bytes:
    """A TensorProto; `external` are the key-value pairs that say where its bytes lie."""
    data = b"".join(field(1, side) for side in shape) + field(2, dtype) + field(8, name)
    if raw is not None:
        data += field(9, raw)
    for key, value in (external or {}).items():
        data += field(13, field(1, key) + field(2, str(value)))
    return data + (field(14, 1) if external else b"")


def attribute(name: str, value: int | bytes, kind: int) -> bytes:
    """An AttributeProto of kind 2 (int), 4 (tensor) or 5 (graph)."""
    return field(1, name) + field({2: 3, 4: 5, 5: 6}[kind], value) + field(20, kind)


def node(
    op: str, inputs: Sequence[str], outputs: Sequence[str], *attributes: bytes, domain: str = ""
) -> bytes:
    """A NodeProto."""
    parts = [field(1, name) for name in inputs] + [field(2, name) for name in outputs] + [field(4, op)]
    return b"".join([*parts, *(field(5, a) for a in attributes), field(7, domain) if domain else b""])


def value_info(name: str, dtype: int, shape: Sequence[int | str]) -> bytes:
    dims = b"".join(field(1, field(1 if isinstance(side, int) else 2, side)) for side in shape)
    return field(1, name) + field(2, field(1, field(1, dtype) + field(2, dims)))


def model_proto(graph: bytes, *, opsets: Mapping[str, int] | None = None) -> bytes:
    versions = opsets or {"": 20}
    sets = b"".join(field(8, (field(1, d) if d else b"") + field(2, v)) for d, v in versions.items())
    return field(1, 10) + field(7, graph) + sets


def safetensors_bytes(tensors: Mapping[str, np.ndarray]) -> bytes:
    """A safetensors file, written here on its own: header length, JSON header, the arrays one after another."""
    header: dict[str, object] = {}
    at = 0
    for name, array in tensors.items():
        dtype = {"float16": "F16", "float32": "F32"}[array.dtype.name]
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
    return raw_safetensors(header, b"".join(array.tobytes() for array in tensors.values()))


def raw_safetensors(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


class TinyEntry:
    """A zoo entry of one matrix: embedding = pixels @ weight + bias, over 8 x 8 pixels.

    Every part may be replaced before `write`, which then makes a manifest that is true for what is there.
    """

    name = "linear-tiny.noise"

    def __init__(self, *, color: str = "rgb", dim: int = 4, seed: int = 0, preprocess: Mapping | None = None):
        from embedkit.model.config import EntryConfig
        from embedkit.model.preprocess import Preprocess

        channels = 3 if color == "rgb" else 1
        contract = {"size": (8, 8), "resize_size": 8, "mean": (0.0,) * channels, "std": (1.0,) * channels}
        self.preprocess = Preprocess(color=color, **{**contract, **(preprocess or {})})
        self.inputs = channels * self.preprocess.size[0] * self.preprocess.size[1]
        rng = np.random.default_rng(seed)
        self.weight = (rng.normal(0, 1, (self.inputs, dim)) / 255).astype(np.float16)
        self.bias = rng.normal(0, 0.1, dim).astype(np.float32)
        self.config = EntryConfig(
            architecture="linear",
            outputs={"embedding": (dim,)},
            method="linear",
            dim=dim,
            preprocess=self.preprocess,
            data="noise",
            license="CC0-1.0",
            timm={"num_classes": 0},
        )
        self.weights = safetensors_bytes({"weight": self.weight, "bias": self.bias})
        self.start = len(self.weights) - self.weight.nbytes - self.bias.nbytes
        self.graph = self.make_graph()

    def external(self, **changes: object) -> dict[str, object]:
        """Where `weight` lies; keyword arguments replace or add pairs."""
        place = {"location": "model.safetensors", "offset": self.start, "length": self.weight.nbytes}
        return {**place, **changes}

    def make_graph(
        self,
        *,
        weight: bytes | None = None,
        nodes: bytes = b"",
        initializers: bytes = b"",
        opsets: Mapping[str, int] | None = None,
        outputs: Sequence[int | str] | None = None,
        rest: bytes = b"",
    ) -> bytes:
        """The graph; the arguments replace the weight's TensorProto, or add encoded fields to the GraphProto."""
        body = self.graph_proto(weight=weight, nodes=nodes, initializers=initializers, outputs=outputs) + rest
        return model_proto(body, opsets=opsets)

    def graph_proto(
        self,
        *,
        weight: bytes | None = None,
        nodes: bytes = b"",
        initializers: bytes = b"",
        outputs: Sequence[int | str] | None = None,
    ) -> bytes:
        """The GraphProto of `make_graph`."""
        channels, (height, width) = self.preprocess.channels, self.preprocess.size
        dim = self.bias.size
        at = self.start + self.weight.nbytes
        bias = {"location": "model.safetensors", "offset": at, "length": self.bias.nbytes}
        if weight is None:
            weight = tensor_proto("weight", self.weight.shape, 10, external=self.external())
        graph = [
            field(1, node("Cast", ["pixels"], ["float"], attribute("to", 1, 2))),
            field(1, node("Cast", ["weight"], ["wide"], attribute("to", 1, 2))),
            field(1, node("Flatten", ["float"], ["flat"], attribute("axis", 1, 2))),
            field(1, node("MatMul", ["flat", "wide"], ["product"])),
            field(1, node("Add", ["product", "bias"], ["embedding"])),
            nodes,
            field(2, "tiny"),
            field(5, weight),
            field(5, tensor_proto("bias", self.bias.shape, 1, external=bias)),
            initializers,
            field(11, value_info("pixels", 2, ["N", channels, height, width])),
            field(12, value_info("embedding", 1, outputs or ["N", dim])),
        ]
        return b"".join(graph)

    def embed(self, pixels: np.ndarray, *, normalize: bool = True) -> np.ndarray:
        """What the entry computes, in numpy: uint8 (N, C, H, W) -> float32 (N, D)."""
        rows = pixels.reshape(len(pixels), -1).astype(np.float64) @ self.weight.astype(np.float64) + self.bias
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True) if normalize else rows).astype(np.float32)

    def files(self) -> dict[str, bytes]:
        """File name -> content, without the manifest."""
        from embedkit.images.transform import read_pixels

        images = np.random.default_rng(9).integers(0, 256, (4, 12, 10, 3), dtype=np.uint8)
        pixels = np.stack([read_pixels(image, self.preprocess) for image in images])
        golden = io.BytesIO()
        np.savez(
            golden,
            images=images,
            embedding=self.embed(pixels),
            tolerance_fp32=np.float64(1e-4),
            tolerance_fp16=np.float64(0.015),
        )
        return {
            "config.json": json.dumps(self.config.to_json(), indent=1).encode(),
            "model.onnx": self.graph,
            "model.safetensors": self.weights,
            "README.md": b"---\nlicense: cc0-1.0\n---\n# A tiny entry\n",
            "golden.npz": golden.getvalue(),
        }

    def write(self, folder: Path, files: Mapping[str, bytes] | None = None) -> Path:
        """Write the entry into `folder`, with a manifest that is true."""
        from embedkit.model.manifest import Manifest

        files = self.files() if files is None else files
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        (folder / "manifest.json").write_bytes(Manifest.encode(files))
        return folder


def write_index(zoo: Path, aliases: Mapping[str, str] | None = None, **changes: object) -> Path:
    """An `index.json` over the entries of a zoo folder; `changes` replace facts of every row."""
    entries = {}
    for manifest in sorted(zoo.glob("*/manifest.json")):
        from embedkit.model.config import EntryConfig
        from embedkit.model.layout import sha256_hex

        config = EntryConfig.from_json((manifest.parent / "config.json").read_bytes())
        entries[manifest.parent.name] = {
            "manifest_sha256": sha256_hex(manifest.read_bytes()),
            "method": config.method,
            "architecture": config.architecture,
            "data": config.data,
            "dim": config.dim,
            "license": config.license,
            "bytes": sum(os.path.getsize(file) for file in manifest.parent.iterdir()),
            **changes,
        }
    if aliases is None:
        aliases = {name.partition(".")[0]: name for name in entries}
    (zoo / "index.json").write_text(json.dumps({"schema": 1, "entries": entries, "aliases": dict(aliases)}))
    return zoo


@pytest.fixture(scope="session")
def by_hand() -> SimpleNamespace:
    """The writers above: `by_hand.TinyEntry`, `by_hand.field`, `by_hand.safetensors_bytes`, ..."""
    return SimpleNamespace(
        TinyEntry=TinyEntry,
        attribute=attribute,
        field=field,
        model_proto=model_proto,
        node=node,
        raw_safetensors=raw_safetensors,
        safetensors_bytes=safetensors_bytes,
        tensor_proto=tensor_proto,
        value_info=value_info,
        varint=varint,
        write_index=write_index,
    )


@pytest.fixture(scope="session")
def tiny_entry(tmp_path_factory) -> Path:
    """A written `TinyEntry`: loads in milliseconds; do not change it."""
    return TinyEntry().write(tmp_path_factory.mktemp("zoo") / TinyEntry.name)


@pytest.fixture(scope="session")
def tiny(tiny_entry):
    """An encoder over `tiny_entry` on two threads."""
    from embedkit import load_encoder

    return load_encoder(tiny_entry, threads=2)


@pytest.fixture
def run(monkeypatch, capsys):
    """`run(*words)` -> (exit status, stdout, stderr)."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["embedkit", *map(str, words)])
        try:
            commands.main()
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return status, out, err

    return run
