"""What a zoo entry is: its files, its configuration, its preprocess contract and its manifest.

An entry is a folder of data. `config.json` is shaped for timm, with one key of ours (`embedkit`) that holds
everything the runtime needs; `manifest.json` names every other file by size and sha256. Nothing here opens
a model: this module parses, checks and names.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from reprlib import repr as _short
from typing import Any

from embedkit._io.json import JsonFormat, canonical_json
from embedkit.errors import EntryError

SCHEMA_VERSION = 1

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
GRAPH = "model.onnx"
GRAPH_INT8 = "model.int8.onnx"
CARD = "README.md"
GOLDEN = "golden.npz"
MANIFEST = "manifest.json"
MIXTURE = "mixture.safetensors"
INDEX = "index.json"

COLORS = ("rgb", "gray", "lab_l")
RESIZES = ("shortest", "longest", "squash")
INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
KINDS = ("encoder", "detector", "landmarks")

#: Folders are `<method>-<arch>.<data>`; a revision is at least 12 hex digits of the manifest's sha256.
ENTRY_NAME = re.compile(r"[a-z0-9][a-z0-9_]*-[a-z0-9_]+\.[a-z0-9_]+")
REVISION = re.compile(r"[0-9a-f]{12,64}")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,119}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_JSON = JsonFormat(error=EntryError, step="pull the entry again")


def sha256_hex(data: bytes | memoryview) -> str:
    """The sha256 of `data` as 64 lower-case hex digits."""
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """The contract from a decoded picture to the pixels that the graph takes.

    Attributes:
        color: `rgb` (3 channels), `gray` (1, ITU-R 601 luma) or `lab_l` (1, CIE L* of D65 scaled to 0..255).
        size: Height and width of the graph's input, in pixels.
        resize: `shortest` brings the shorter side to `resize_size`, `longest` the longer one, both keeping the
            aspect ratio; `squash` goes straight to `size`.
        resize_size: Pixels for `shortest` and `longest`; unused by `squash`.
        interpolation: The resampling filter, by its Pillow name, antialiased.
        crop: `center` takes the middle of what is larger than `size`; `none` means it already fits.
        pad: Fill value 0..255 for what is smaller than `size`, centred.
        mean: Per channel, in units of [0, 1], subtracted inside the graph.
        std: Per channel, in units of [0, 1], divided by inside the graph.
        reduced_decoding: Whether a JPEG may be decoded at 1/2, 1/4 or 1/8 when that leaves at least twice the
            pixels that are needed.
    """

    color: str = "rgb"
    size: tuple[int, int]
    resize: str = "shortest"
    resize_size: int = 0
    interpolation: str = "bicubic"
    crop: str = "center"
    pad: int = 0
    mean: tuple[float, ...]
    std: tuple[float, ...]
    reduced_decoding: bool = True

    @property
    def channels(self) -> int:
        """3 for `rgb`, else 1."""
        return 3 if self.color == "rgb" else 1

    def __post_init__(self) -> None:
        def need(ok: bool, key: str, expected: str, found: object) -> None:
            if not ok:
                raise EntryError(f"preprocess.{key}: expected {expected}, found {_short(found)}")

        need(self.color in COLORS, "color", f"one of {', '.join(COLORS)}", self.color)
        need(self.resize in RESIZES, "resize", f"one of {', '.join(RESIZES)}", self.resize)
        need(
            self.interpolation in INTERPOLATIONS,
            "interpolation",
            f"one of {', '.join(INTERPOLATIONS)}",
            self.interpolation,
        )
        need(self.crop in ("center", "none"), "crop", "'center' or 'none'", self.crop)
        need(
            len(self.size) == 2 and all(1 <= side <= 4096 for side in self.size),
            "size",
            "[height, width] of 1..4096 pixels",
            self.size,
        )
        need(
            self.resize == "squash" or 1 <= self.resize_size <= 4096,
            "resize_size",
            "1..4096 pixels",
            self.resize_size,
        )
        need(0 <= self.pad <= 255, "pad", "0..255", self.pad)
        for key, values in (("mean", self.mean), ("std", self.std)):
            need(len(values) == self.channels, key, f"{self.channels} numbers for {self.color}", values)
        need(all(value > 0 for value in self.std), "std", "numbers above 0", self.std)

    def to_json(self) -> dict[str, Any]:
        """The contract as it stands in `config.json`."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_json(cls, value: object, where: str = "preprocess") -> Preprocess:
        """Parse and check the contract; unknown keys are refused, since each one would change pixels."""
        data = _object(value, where)
        known = {f.name: f for f in dataclasses.fields(cls)}
        unknown = sorted(set(data) - set(known))
        if unknown:
            raise EntryError(
                f"{where}: unknown key {unknown[0]!r}; this embedkit knows {', '.join(sorted(known))}"
            )
        missing = sorted({"size", "mean", "std"} - set(data))
        if missing:
            raise EntryError(f"{where}: the key {missing[0]!r} is missing")
        for key in ("color", "resize", "interpolation", "crop"):
            if key in data and not isinstance(data[key], str):
                raise EntryError(f"{where}.{key}: expected text, found {_short(data[key])}")
        for key in ("resize_size", "pad"):
            if key in data and type(data[key]) is not int:
                raise EntryError(f"{where}.{key}: expected a whole number, found {_short(data[key])}")
        if type(data.get("reduced_decoding", True)) is not bool:
            raise EntryError(
                f"{where}.reduced_decoding: expected true or false, found {_short(data['reduced_decoding'])}"
            )
        numbers: dict[str, Any] = {}
        for key, kind in (("size", int), ("mean", float), ("std", float)):
            items = data[key]
            # JSON has room for infinity (1e999) and for whole numbers that no float holds.
            if not isinstance(items, list) or not all(
                type(item) in (int, kind) and abs(item) < 1e6 for item in items
            ):
                raise EntryError(f"{where}.{key}: expected a list of numbers, found {_short(items)}")
            numbers[key] = tuple(kind(item) for item in items)
        return cls(**{**data, **numbers})


@dataclass(frozen=True, kw_only=True)
class EntryConfig:
    """`config.json`: what timm reads at the top level, and what embedkit reads under its own key.

    Attributes:
        architecture: The timm name of the network.
        kind: `encoder`, `detector` or `landmarks`.
        outputs: Name -> shape without the batch axis; schema version 1 of an encoder has `embedding` (D,), of a
            detector `boxes` (A, 4) and `scores` (A,), of landmarks `points` (P, 2). Boxes are left, top, right and
            bottom, points x and y, all as shares of the input's width and height; scores are in [0, 1].
        method: The method that trained it, for example `simclr`.
        dim: Width D of the embedding; of another kind, how many numbers a picture gives.
        preprocess: The contract from a decoded picture to the graph's pixels.
        data: What it was trained on, in words.
        licence: SPDX identifier of the weights' licence.
        provenance: Where the weights come from: source, commit, run configuration.
        metrics: Figures of `embedkit evaluate`, bound to the weights' sha256.
        timm: The other top-level keys (`model_args`, `pretrained_cfg`, ...), as timm wants them.
    """

    architecture: str
    kind: str = "encoder"
    outputs: Mapping[str, tuple[int, ...]]
    method: str
    dim: int
    preprocess: Preprocess
    data: str
    licence: str
    provenance: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    timm: Mapping[str, Any] = field(default_factory=dict)

    @property
    def takes_aligned_faces(self) -> bool:
        """Whether of a whole photograph it says nothing: a face is to be found and aligned first."""
        return self.method == "face"

    def to_json(self) -> dict[str, Any]:
        """The whole of `config.json`."""
        return {
            "architecture": self.architecture,
            **self.timm,
            "embedkit": {
                "schema": SCHEMA_VERSION,
                "kind": self.kind,
                "outputs": {name: list(shape) for name, shape in self.outputs.items()},
                "method": self.method,
                "dim": self.dim,
                "preprocess": self.preprocess.to_json(),
                "data": self.data,
                "licence": self.licence,
                "provenance": dict(self.provenance),
                "metrics": dict(self.metrics),
            },
        }

    @classmethod
    def from_json(cls, text: bytes | str, where: str = CONFIG) -> EntryConfig:
        """Parse and check `config.json`.

        Raises:
            EntryError: Not JSON, another schema version, or a key that is missing or of the wrong type.
        """
        data = _object(parse_json(text, where), where)
        ours = _object(data.get("embedkit"), f"{where}: embedkit")
        _check_schema(ours, where)
        if _text(ours, "kind", where) not in KINDS:
            raise EntryError(
                f"{where}: embedkit.kind: expected one of {', '.join(KINDS)}, found {_short(ours['kind'])}"
            )
        outputs: dict[str, tuple[int, ...]] = {}
        for name, shape in _object(ours.get("outputs"), f"{where}: embedkit.outputs").items():
            if not isinstance(shape, list) or not all(type(n) is int and n > 0 for n in shape):
                raise EntryError(
                    f"{where}: embedkit.outputs.{name}: expected a shape such as [512], found {_short(shape)}"
                )
            outputs[name] = tuple(shape)
        dim = ours.get("dim")
        if type(dim) is not int or not 1 <= dim <= 1 << 20:
            raise EntryError(
                f"{where}: embedkit.dim: expected a whole number of 1..{1 << 20}, found {_short(dim)}"
            )
        if ours["kind"] == "encoder" and outputs.get("embedding") != (dim,):
            raise EntryError(
                f"{where}: embedkit.outputs.embedding: expected [{dim}] as embedkit.dim says, "
                f"found {list(outputs.get('embedding', ()))}"
            )
        numbers = sum(math.prod(shape) for shape in outputs.values())
        if ours["kind"] != "encoder" and dim != numbers:
            raise EntryError(
                f"{where}: embedkit.dim: expected {numbers} as embedkit.outputs says, found {dim}"
            )
        provenance = _object(ours.get("provenance", {}), f"{where}: embedkit.provenance")
        metrics = _object(ours.get("metrics", {}), f"{where}: embedkit.metrics")
        _check_figures(metrics, provenance, f"{where}: embedkit")
        return cls(
            architecture=_text(data, "architecture", where),
            kind=ours["kind"],
            outputs=outputs,
            method=_text(ours, "method", where),
            dim=dim,
            preprocess=Preprocess.from_json(ours.get("preprocess"), f"{where}: embedkit.preprocess"),
            data=_text(ours, "data", where),
            licence=_text(ours, "licence", where),
            provenance=provenance,
            metrics=metrics,
            timm={key: value for key, value in data.items() if key not in ("architecture", "embedkit")},
        )


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """Size in bytes and sha256 (64 hex digits) of one file of an entry."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """`manifest.json`: every other file of the entry by name, size and sha256.

    Attributes:
        files: File name -> record.
        sha256: Of the manifest's own bytes: the entry's identity, and what a revision is a prefix of.
    """

    files: Mapping[str, FileRecord]
    sha256: str

    @staticmethod
    def encode(files: Mapping[str, bytes]) -> bytes:
        """The bytes of a manifest over `files` (name -> content), the same for the same content."""
        records = {
            name: {"size": len(content), "sha256": sha256_hex(content)}
            for name, content in sorted(files.items())
        }
        return (json.dumps({"schema": SCHEMA_VERSION, "files": records}, indent=1) + "\n").encode()

    @classmethod
    def from_json(cls, text: bytes, where: str = MANIFEST) -> Manifest:
        """Parse and check a manifest.

        Raises:
            EntryError: Not JSON, another schema version, an unusable file name, size or digest.
        """
        if len(text) > 1_000_000:
            raise EntryError(f"{where}: expected less than 1 MB, found {len(text)} bytes")
        data = _object(parse_json(text, where), where)
        _check_schema(data, where)
        files: dict[str, FileRecord] = {}
        for name, record in _object(data.get("files"), f"{where}: files").items():
            check_file_name(name, where)
            if name == MANIFEST:
                raise EntryError(f"{where}: files: a manifest cannot list itself")
            fields = _object(record, f"{where}: {name}")
            size, digest = fields.get("size"), fields.get("sha256")
            if type(size) is not int or size < 0:
                raise EntryError(f"{where}: {name}.size: expected bytes, found {_short(size)}")
            if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
                raise EntryError(f"{where}: {name}.sha256: expected 64 hex digits, found {_short(digest)}")
            files[name] = FileRecord(size=size, sha256=digest)
        if len({name.casefold() for name in files}) != len(files):
            raise EntryError(f"{where}: two file names differ only in case; rename one of them")
        for name in (CONFIG, WEIGHTS, GRAPH):
            if name not in files:
                raise EntryError(f"{where}: an entry needs {name}, and the manifest does not list it")
        return cls(files=files, sha256=sha256_hex(text))


def space_fingerprint(
    manifest: Manifest, config: EntryConfig, *, normalized: bool, variant: str = "fp32"
) -> str:
    """The identity of an embedding space, 64 hex digits.

    Two files of embeddings may be compared exactly when their fingerprints are equal. Provider, fp16/TF32 and
    decode mode are left out on purpose: they change the last digits, not the space.

    Args:
        manifest: The entry's manifest.
        config: The entry's configuration.
        normalized: Whether rows are L2-normalised.
        variant: `fp32`, or `int8` for the quantised graph.
    """
    graph = GRAPH_INT8 if variant == "int8" else GRAPH
    identity = {
        "graph": manifest.files[graph].sha256,
        "weights": manifest.files[WEIGHTS].sha256,
        "preprocess": config.preprocess.to_json(),
        "dim": config.dim,
        "normalized": normalized,
        "variant": variant,
    }
    return sha256_hex(canonical_json(identity))


def check_file_name(name: str, where: str) -> None:
    """Refuse a file name that could leave the entry's folder, or that some file system cannot hold.

    Raises:
        EntryError: Separators, dot-dot, control characters, device names, anything but `[A-Za-z0-9._-]`.
    """
    stem = name.split(".", 1)[0].casefold()
    devices = {"con", "prn", "aux", "nul", *(f"{dev}{n}" for dev in ("com", "lpt") for n in range(10))}
    if not _FILE_NAME.fullmatch(name) or ".." in name or name.endswith(".") or stem in devices:
        raise EntryError(
            f"{where}: {name[:80]!r} is not a usable file name (letters, digits, '.', '_' and '-')"
        )


def parse_json(text: bytes | str, where: str) -> Any:
    """`text` as strict JSON; see `embedkit._io.json.JsonFormat`.

    Raises:
        EntryError: With the place and the parser's reason.
    """
    return _JSON.parse(text, where)


def _object(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise EntryError(f"{where}: expected an object, found {type(value).__name__}")
    return value


def _text(data: Mapping[str, Any], key: str, where: str) -> str:
    value = data.get(key)
    if not isinstance(value, str) or not value:
        raise EntryError(f"{where}: {key}: expected text, found {_short(value)}")
    return value


def _check_figures(metrics: Mapping[str, Any], provenance: Mapping[str, Any], where: str) -> None:
    """Refuse what no table or card could show: they are written from the figures of all entries of a zoo."""

    def check(value: object, at: str, keys: int) -> None:
        """Numbers below so many levels of keys."""
        if keys:
            for name, inner in _object(value, at).items():
                check(inner, f"{at}.{name}", keys - 1)
        # JSON has room for infinity (1e999) and for whole numbers that no float holds
        elif type(value) not in (int, float) or not abs(value) < 1e300:  # type: ignore[arg-type]
            raise EntryError(f"{at}: expected a number, found {_short(value)}")

    for part, keys in (("results", 2), ("baselines", 3), ("pictures", 2)):
        check(metrics.get(part, {}), f"{where}.metrics.{part}", keys)
    at = f"{where}.metrics.intervals"
    for data, figures in _object(metrics.get("intervals", {}), at).items():
        for name, bounds in _object(figures, f"{at}.{data}").items():
            if not isinstance(bounds, list) or len(bounds) != 2:
                raise EntryError(f"{at}.{data}.{name}: expected two bounds, found {_short(bounds)}")
            check(dict(enumerate(bounds)), f"{at}.{data}.{name}", 1)
    at = f"{where}.provenance.cost"
    cost = _object(provenance.get("cost", {}), at)
    check({key: cost[key] for key in ("images", "training_flops", "seconds") if key in cost}, at, 1)
    check(provenance.get("pretext", {}), f"{where}.provenance.pretext", 1)


def _check_schema(data: Mapping[str, Any], where: str) -> None:
    found = data.get("schema")
    if type(found) is not int or found != SCHEMA_VERSION:  # True == 1
        step = (
            "upgrade embedkit" if type(found) is int and found > SCHEMA_VERSION else "export the entry again"
        )
        raise EntryError(f"{where}: schema: expected {SCHEMA_VERSION}, found {_short(found)}; {step}")
