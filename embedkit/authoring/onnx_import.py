"""Any ONNX encoder of images as an entry of a zoo, without torch.

The weights move into `model.safetensors` under their names, in the precision that they have; the graph is written again
in canonical form, and has to pass the same guard as any other. The entry then gives what the file gives: both run in
ONNX Runtime on the same images, before anything is written.

    embedkit import encoder.onnx --name own-r50.products --license Apache-2.0
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import inliner

from embedkit._io.atomic import replacing_folder
from embedkit._io.reading import read_regular
from embedkit._io.text import did_you_mean, one_line
from embedkit.authoring.card import render_card
from embedkit.authoring.contract import PROCESSOR, Contract, from_processor
from embedkit.authoring.golden import TOLERANCES, npz_bytes, sample_pixels, synthetic_images
from embedkit.authoring.import_request import Imported, License, Request, decide_license
from embedkit.authoring.onnx_rewrite import (
    free_batch,
    keep_output,
    normalize_input,
    opset_of,
    pool_output,
    stored_outside,
)
from embedkit.encoder import comparable
from embedkit.errors import ConfigError, EntryError, ParityError, SourceError
from embedkit.hub.folder import check_replaceable
from embedkit.hub.publish.index import update_index
from embedkit.images.transform import read_pixels
from embedkit.model.card import Card
from embedkit.model.config import EntryConfig
from embedkit.model.engines.onnx import OnnxEngine, open_session
from embedkit.model.layout import CARD, CONFIG, GOLDEN, GRAPH, MANIFEST, WEIGHTS, sha256_hex
from embedkit.model.manifest import Manifest
from embedkit.model.preprocess import Preprocess
from embedkit.model.providers import CPU, EngineOptions, available_cpus

__all__ = ["PARITY_LIMIT", "POOLS", "import_onnx", "is_onnx"]

POOLS = ("mean", "cls", "none")
#: The entry against the file, largest absolute difference on L2-normalized rows, and the least cosine.
PARITY_LIMIT, LEAST_COSINE = 1e-4, 0.99999
#: Batches in which the entry is compared: a row must not depend on its batch.
_BATCHES = (1, 2, 7, 32)
#: Protobuf's own limit.
_MOST_BYTES = (2 << 30) - 1
_MOST_EXTERNAL = 16 << 30
_LEAST_OPSET = 7
_KINDS = {
    onnx.TensorProto.UINT8: np.uint8,
    onnx.TensorProto.FLOAT: np.float32,
    onnx.TensorProto.FLOAT16: np.float16,
    onnx.TensorProto.DOUBLE: np.float64,
}
_TYPES = {"tensor(float)": 1, "tensor(float16)": 10, "tensor(double)": 11}


@dataclass(frozen=True, kw_only=True)
class _Input:
    """The images that a file takes.

    Attributes:
        name: Of the input.
        kind: TensorProto type.
        batch: The fixed batch, 0 for any.
        channels_last: (N, H, W, C); None where no shape tells.
        size: Height and width in pixels, 0 where they are free.
        channels: 1 or 3, 0 where no shape tells.
    """

    name: str
    kind: int
    batch: int
    channels_last: bool | None
    size: tuple[int, int]
    channels: int


def is_onnx(path: str | os.PathLike[str]) -> bool:
    """Whether a file is an ONNX model: by its suffix, or by how protobuf begins such a model."""
    if os.fspath(path).lower().endswith(".onnx"):
        return True
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError:
        return False
    # The field `ir_version`, a small number, comes first; the header of a safetensors file begins with a brace.
    return len(start) == 9 and start[0] == 8 and 1 <= start[1] <= 32 and start[8:9] != b"{"


def import_onnx(
    path: str | os.PathLike[str],
    request: Request,
    *,
    architecture: str | None = None,
    output: str | None = None,
) -> Imported:
    """Write the encoder of an ONNX file as an entry of the zoo.

    The file takes images as uint8 or floats, channels first or last, in a fixed or a free batch. What a
    `preprocessor_config.json` beside it states is read; `request.contract` replaces parts of it.

    Args:
        path: The file. Its weights may lie in other files of the same folder.
        request: The entry that is wanted; its license must be given.
        architecture: The network's name for the card; the middle of the entry's name when None.
        output: The output that is the embedding, or any other value of the graph, or a node; the only one that gives
            a vector an image when None.

    Returns:
        The entry.

    Raises:
        SourceError: The file cannot be read.
        ConfigError: No license, image size or normalization is known, or the output cannot be chosen.
        EntryError: Not an ONNX file, or a graph that no entry may have: foreign operators, control flow, weights in
            other folders.
        ParityError: The entry does not give what the file gives; nothing is written.
        OutputError: The zoo cannot be written.

    Examples:
        >>> from pathlib import Path
        >>> from embedkit.authoring.import_request import Request
        >>> from embedkit.authoring.onnx_export import export_onnx
        >>> from embedkit.authoring.onnx_import import import_onnx
        >>> file = export_onnx("simclr-r10", "encoder.onnx", float_input=True)
        >>> request = Request(name="own-r10.fmnist", zoo=Path("own"), license="Apache-2.0")
        >>> import_onnx(file, request).folder
        PosixPath('own/own-r10.fmnist')
    """
    path = Path(path)
    license = decide_license(request, None, stated=False, where=str(path))
    check_replaceable(request.zoo / request.name)
    content = _read(path, _MOST_BYTES)
    model = _parse(content, path)
    taken = _input_of(model, str(path))
    contract, stated_by = _contract(model, path, request.contract, taken)
    added = _add_output(model, output, str(path))
    graph, weights = stored_outside(_copy(model), {}, str(path))
    original = _Original(graph, weights, taken, contract, str(path))
    samples = sample_pixels(contract, request.samples)
    chosen, shape, kind = original.choose(added, samples[:2])
    pool = _pool(request.pool, shape, chosen, str(path))

    keep_output(model.graph, chosen)
    channels_last = bool(original.channels_last)
    if taken.batch:
        free_batch(model, taken.batch)
    normalize_input(model.graph, contract, channels_last=channels_last)
    dim = pool_output(model, shape, kind, pool=pool, channels_last=channels_last)
    about = {"method": request.method, "dim": str(dim), "onnx": onnx.__version__}
    graph, weights = stored_outside(model, about, str(path))

    images = synthetic_images(4)
    golden_pixels = np.stack([read_pixels(image, contract, decode="exact") for image in images])
    expected = [original.rows(pixels, chosen, pool) for pixels in (samples, golden_pixels)]
    difference = _check_parity(graph, weights, (samples, golden_pixels), expected, taken.batch, str(path))
    config = EntryConfig(
        architecture=architecture or request.name.partition("-")[2].partition(".")[0],
        outputs={"embedding": (dim,)},
        method=request.method,
        dim=dim,
        preprocess=contract,
        data=request.data or request.tag,
        license=license.name,
        provenance={
            **({"source": request.origin} if request.origin else {}),
            "file": path.name,
            "sha256": sha256_hex(content),
            "producer": f"{model.producer_name} {model.producer_version}".strip() or "not stated",
            "opset": opset_of(model),
            "output": chosen,
            "pool": pool,
            "preprocess_by": stated_by,
            "license_by": license.stated_by,
            "importer": "embedkit.authoring.onnx_import",
            "compared_on": "synthetic images" if request.samples is None else "images",
            "parity": {"max_difference": float(f"{difference:.1e}"), "limit": PARITY_LIMIT},
            "versions": {"onnx": onnx.__version__},
        },
        card=Card(summary=f"The encoder of the ONNX file {path.name}, with its weights as they are."),
    )
    golden = {
        "images": images,
        "embedding": comparable("embedding", expected[1]),
        **{key: np.array(value, np.float32) for key, value in TOLERANCES.items()},
    }
    _write(request, config, {WEIGHTS: weights, GRAPH: graph, GOLDEN: npz_bytes(golden)})
    return _told(request, config, license, chosen, shape, pool, stated_by)


# --- what the file is -------------------------------------------------------------------------------------


def _read(path: Path, limit: int) -> bytes:
    try:
        return read_regular(path, limit)
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({one_line(error)})") from None


def _parse(content: bytes, path: Path) -> onnx.ModelProto:
    """The model with its weights inside and its functions inlined."""
    try:
        model = onnx.load_model_from_string(content)
        if not model.graph.node:
            raise ValueError("it holds no operators")
        model.DiscardUnknownFields()
        if model.functions:
            model = inliner.inline_local_functions(model)
    except Exception as error:  # protobuf's own, and those of the inliner
        raise EntryError(f"{path} is not an ONNX model that can be read ({one_line(error)})") from None
    if opset_of(model) < _LEAST_OPSET:
        raise EntryError(
            f"{path}: uses version {opset_of(model)} of ONNX's operators; export it with {_LEAST_OPSET} or later"
        )
    graph = model.graph
    weights = {one.name for one in graph.initializer}
    # Before IR version 4 each weight was an input as well.
    inputs = [one for one in graph.input if one.name not in weights]
    del graph.input[:]
    graph.input.extend(inputs)
    tensors = [
        *graph.initializer,
        *(one.t for node in graph.node for one in node.attribute if one.HasField("t")),
    ]
    files: dict[str, bytes] = {}
    for tensor in tensors:
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            _load_external(tensor, path, files)
    return model


def _load_external(tensor: onnx.TensorProto, path: Path, files: dict[str, bytes]) -> None:
    """Put the bytes of a tensor, which lie in another file of the folder, into it."""
    pairs = {pair.key: pair.value for pair in tensor.external_data}
    name = pairs.get("location", "")
    beside = path.parent / name
    if not name or Path(name).name != name or "\\" in name or ":" in name or beside.is_symlink():
        raise EntryError(
            f"{path}: the weights {tensor.name[:80]!r} lie in {name[:80]!r}: expected a file of the same folder; save "
            "the model with its weights inside, or in one file beside it"
        )
    if name not in files:
        files[name] = _read(beside, _MOST_EXTERNAL)
    try:
        start = int(pairs.get("offset", "0"))
        length = int(pairs["length"]) if "length" in pairs else len(files[name]) - start
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        whole = start >= 0 and length == math.prod(tensor.dims) * dtype.itemsize
        if not whole or start + length > len(files[name]):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise EntryError(
            f"{path}: the weights {tensor.name[:80]!r} are not whole in {name}; copy both files again"
        ) from None
    tensor.raw_data = files[name][start : start + length]
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")


def _input_of(model: onnx.ModelProto, where: str) -> _Input:
    inputs = model.graph.input
    if len(inputs) != 1:
        listed = ", ".join(repr(one.name[:60]) for one in inputs) or "none"
        raise EntryError(
            f"{where}: expected one input, the images, found {listed}; export the image encoder alone"
        )
    [one] = inputs
    kind = one.type.tensor_type.elem_type
    dims = [dim.dim_value for dim in one.type.tensor_type.shape.dim]
    first, last = (dims[1] in (1, 3), dims[3] in (1, 3)) if len(dims) == 4 else (False, False)
    free = len(dims) == 4 and dims[1] == dims[3] == 0
    if kind not in _KINDS or not (first or last or free):
        shape = "x".join(str(dim or "?") for dim in dims)
        raise EntryError(
            f"{where}: the input {one.name[:60]!r} is {onnx.TensorProto.DataType.Name(kind)} {shape}: expected images "
            "of 1 or 3 channels, uint8 or floats, NCHW or NHWC"
        )
    channels_last = None if free else not first
    size = (dims[1], dims[2]) if channels_last else (dims[2], dims[3])
    channels = dims[3] if channels_last else dims[1]
    return _Input(
        name=one.name, kind=kind, batch=dims[0], channels_last=channels_last, size=size, channels=channels
    )


def _contract(model: onnx.ModelProto, path: Path, given: Contract, taken: _Input) -> tuple[Preprocess, str]:
    """The preprocessing, and who states it."""
    ours = next((one.value for one in model.metadata_props if one.key == "preprocess"), None)
    beside = path.parent / PROCESSOR
    color = given.color or ("gray" if taken.channels == 1 else "rgb")
    size = taken.size if all(taken.size) else (given.image_size or 0,) * 2
    if ours is not None:
        base, by = (
            Preprocess.from_json(_facts(ours, str(path)), f"{path}: preprocess"),
            "the file, as embedkit wrote it",
        )
    elif beside.is_file():
        base, by = from_processor(_read(beside, 1 << 20), str(beside)), f"{PROCESSOR} beside the file"
    else:
        if not all(size):
            raise ConfigError(
                f"{path} takes images of any size: give --image-size, or put a {PROCESSOR} beside it"
            )
        channels = 3 if color == "rgb" else 1
        plain = taken.kind == onnx.TensorProto.UINT8
        if not plain and (given.mean is None or given.std is None):
            raise ConfigError(
                f"{path} takes floats, and how pixels become them is not known: give --mean and --std in units of "
                f"[0, 1] (0 and 1 for values of 0..1, 0 and 0.00392157 for 0..255), or put a {PROCESSOR} beside it"
            )
        base = Preprocess(
            color=color, size=size, resize_size=min(size), mean=(0.0,) * channels, std=(1.0,) * channels
        )
        by = "the person who imported it"
    if given:
        base, by = given.applied(base), "the person who imported it"
    if taken.kind == onnx.TensorProto.UINT8 and (given.mean or given.std):
        raise ConfigError(f"{path} takes uint8 and normalizes itself: leave --mean and --std out")
    if all(taken.size) and taken.size != base.size:
        fixed, wanted = ("x".join(map(str, sides)) for sides in (taken.size, base.size))
        raise ConfigError(
            f"{path} takes images of {fixed} pixels, and not of {wanted}: leave --image-size out"
        )
    if taken.channels not in (0, base.channels):
        raise ConfigError(
            f"{path} takes {taken.channels} channels, and {base.color} has {base.channels}: give --color"
        )
    return base, by


def _facts(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise EntryError(f"{where}: the preprocessing in its metadata is not JSON") from None


# --- what the file gives ----------------------------------------------------------------------------------


class _Original:
    """The file itself in ONNX Runtime: what it gives for an entry's pixels."""

    def __init__(self, graph: bytes, weights: bytes, taken: _Input, contract: Preprocess, where: str):
        self._taken, self._contract, self._where = taken, contract, where
        self.channels_last = taken.channels_last
        try:
            self._session = open_session(graph, weights, [(CPU, {})], available_cpus())
        except Exception as error:  # ONNX Runtime's errors have no common base class
            raise EntryError(f"{where}: ONNX Runtime refuses the graph ({_reason(error)})") from None

    def choose(self, wanted: str | None, pixels: np.ndarray) -> tuple[str, tuple[int, ...], int]:
        """The output that is the embedding: its name, its shape without the batch, and its TensorProto type."""
        types = {one.name: one.type for one in self._session.get_outputs()}
        names = [wanted] if wanted is not None else list(types)
        if self.channels_last is None:
            self.channels_last = False
            try:
                self._run(pixels[:1], names)
            except EntryError:
                self.channels_last = True
        shapes = {name: rows.shape[1:] for name, rows in zip(names, self._run(pixels, names), strict=True)}
        listed = ", ".join(f"{name} {_sides(shape)}" for name, shape in shapes.items())
        if wanted is None and len(shapes) > 1:
            vectors = [name for name, shape in shapes.items() if len(shape) == 1]
            if len(vectors) != 1:
                raise ConfigError(f"{self._where}: give --output, one of {listed} (each for one image)")
            names = vectors
        [name] = names
        if types[name] not in _TYPES or not 1 <= len(shapes[name]) <= 3:
            raise EntryError(
                f"{self._where}: the output {listed} is {types[name]}: expected floats of 1 to 3 axes an image"
            )
        return name, shapes[name], _TYPES[types[name]]

    def rows(self, pixels: np.ndarray, name: str, pool: str) -> np.ndarray:
        """Float32 (N, D) for uint8 (N, C, H, W), pooled."""
        [values] = self._run(pixels, [name])
        values = values.astype(np.float32)
        if pool == "cls":
            return values[:, 0]
        if pool == "mean" and values.ndim == 4:
            return values.mean((1, 2) if self.channels_last else (2, 3))
        return values.mean(1) if pool == "mean" else values.reshape(len(values), -1)

    def _run(self, pixels: np.ndarray, names: list[str]) -> list[np.ndarray]:
        images = pixels
        kind = _KINDS[self._taken.kind]
        if kind is not np.uint8:
            mean, std = (
                np.array(values, np.float32).reshape(1, -1, 1, 1)
                for values in (self._contract.mean, self._contract.std)
            )
            images = ((pixels.astype(np.float32) / 255 - mean) / std).astype(kind)
        if self.channels_last:
            images = images.transpose(0, 2, 3, 1)
        size = self._taken.batch or 16
        parts: list[list[np.ndarray]] = []
        for start in range(0, len(images), size):
            part = images[start : start + size]
            missing = self._taken.batch - len(part)
            if missing > 0:
                part = np.concatenate([part, np.repeat(part[-1:], missing, 0)])
            try:
                given = self._session.run(names, {self._taken.name: np.ascontiguousarray(part)})
            except Exception as error:  # as above
                sides = _sides(part.shape[1:])
                raise EntryError(
                    f"{self._where} does not take images of {sides} ({_reason(error)})"
                ) from None
            if any(rows.ndim < 2 or len(rows) != len(part) for rows in given):
                raise EntryError(f"{self._where}: an output has no axis for the images of a batch")
            parts.append([rows[: len(images) - start] for rows in given])
        return [np.concatenate(rows) for rows in zip(*parts, strict=True)]


def _add_output(model: onnx.ModelProto, output: str | None, where: str) -> str | None:
    """Make a value or a node's first one an output of the graph, and give the value's name."""
    if output is None:
        return None
    graph = model.graph
    outputs = [one.name for one in graph.output]
    if output in outputs:
        return output
    values = {name: name for node in graph.node for name in node.output if name}
    found = {**{node.name: node.output[0] for node in graph.node if node.name}, **values}.get(output)
    if found is None:
        near = did_you_mean(output, [*outputs, *values], most=3) or f"its outputs are {', '.join(outputs)}"
        raise ConfigError(
            f"{where}: --output {output[:80]!r} is neither a value nor a node of the graph; {near}"
        )
    graph.output.append(onnx.ValueInfoProto(name=found))
    return found


def _pool(wanted: str | None, shape: tuple[int, ...], name: str, where: str) -> str:
    """How an output becomes one vector an image."""
    if wanted not in (None, *POOLS):
        raise ConfigError(f"--pool {wanted!r}: expected one of {', '.join(POOLS)}")
    if len(shape) == 1 or (len(shape) == 3 and shape.count(1) >= 2 and wanted is None):
        if wanted in ("mean", "cls"):
            raise ConfigError(f"{where}: the output {name} is one vector an image: leave --pool {wanted} out")
        return "none"
    if wanted is None:
        parts = "mean or cls (the first)" if len(shape) == 2 else "mean"
        raise ConfigError(
            f"{where}: the output {name} has {_sides(shape)} numbers an image: give --pool {parts}, or another --output"
        )
    if wanted == "cls" and len(shape) != 2:
        raise ConfigError(
            f"{where}: the output {name}, {_sides(shape)}, has no class token: give --pool mean"
        )
    return wanted


# --- the entry --------------------------------------------------------------------------------------------


def _check_parity(
    graph: bytes,
    weights: bytes,
    pixels: tuple[np.ndarray, ...],
    expected: list[np.ndarray],
    batch: int,
    where: str,
) -> float:
    """The largest difference between the entry, in several batches, and the file."""
    engine = OnnxEngine(graph, weights, EngineOptions(device="cpu"), where=where)
    rows = comparable("embedding", np.concatenate(expected))
    every = np.concatenate(pixels)
    difference = 0.0
    for size in _BATCHES:
        some = every if size == max(_BATCHES) else every[: 2 * size]
        parts = [engine.run(some[start : start + size]) for start in range(0, len(some), size)]
        if any(len(part) != min(size, len(some) - at * size) for at, part in enumerate(parts)):
            raise ParityError(f"{where}: the graph does not give one row an image; nothing was written")
        found = comparable("embedding", np.concatenate(parts))
        difference = float(np.max([difference, np.abs(found - rows[: len(found)]).max()]))
        cosine = np.einsum("nd,nd->n", found, rows[: len(found)], dtype=np.float64).min()
        if not (difference <= PARITY_LIMIT and cosine >= LEAST_COSINE):  # also a NaN
            reason = (
                f"it was traced with a batch of {batch}: export it with a free one"
                if batch and size > 1
                else ("a row depends on its batch, or is not finite")
            )
            raise ParityError(
                f"{where}: in batches of {size} the entry differs from the file by {difference:.1e} on L2-normalized "
                f"rows, and {PARITY_LIMIT:.0e} is allowed ({reason}); nothing was written"
            )
    return difference


def _write(request: Request, config: EntryConfig, files: Mapping[str, bytes]) -> None:
    files = {
        CONFIG: (json.dumps(config.to_json(), indent=1) + "\n").encode(),
        **files,
        CARD: render_card(request.name, config).encode(),
    }
    with replacing_folder(request.zoo / request.name) as partial:
        for name, content in {**files, MANIFEST: Manifest.encode(files)}.items():
            (partial / name).write_bytes(content)
    update_index(request.zoo)


def _told(
    request: Request,
    config: EntryConfig,
    license: License,
    chosen: str,
    shape: tuple[int, ...],
    pool: str,
    stated_by: str,
) -> Imported:
    size, channels = config.preprocess.size, config.preprocess.channels
    how = "" if pool == "none" else f", {'the mean' if pool == 'mean' else 'the first'} of {_sides(shape)}"
    notes = [f"images of {channels}x{size[0]}x{size[1]}, preprocessing by {stated_by}"]
    if pool == "mean" and len(shape) == 2:
        notes.append(
            "the mean is over all tokens, a class token and registers among them if the output has any"
        )
    return Imported(
        folder=request.zoo / request.name,
        architecture=config.architecture,
        license=license.name,
        recognized=f"an ONNX file, output {chosen}{how}",
        notes=tuple(notes),
    )


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def _sides(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
