"""ONNX files of others: read whole, with their weights inside, and what they take."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import inliner

from embedkit._io.reading import read_regular
from embedkit._io.text import did_you_mean, one_line
from embedkit.authoring.onnx_rewrite import opset_of
from embedkit.errors import ConfigError, EntryError, SourceError

__all__ = ["KINDS", "MOST_BYTES", "Images", "add_output", "images_of", "parse_model", "read_file"]

#: Protobuf's own limit.
MOST_BYTES = (2 << 30) - 1
_MOST_EXTERNAL = 16 << 30
_LEAST_OPSET = 7
#: TensorProto type of an input of images -> numpy's.
KINDS: dict[int, type[np.generic]] = {
    onnx.TensorProto.UINT8: np.uint8,
    onnx.TensorProto.FLOAT: np.float32,
    onnx.TensorProto.FLOAT16: np.float16,
    onnx.TensorProto.DOUBLE: np.float64,
}


@dataclass(frozen=True, kw_only=True)
class Images:
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


def read_file(path: Path, limit: int) -> bytes:
    """All bytes of a file of at most `limit` bytes.

    Raises:
        SourceError: It cannot be read.
    """
    try:
        return read_regular(path, limit)
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({one_line(error)})") from None


def parse_model(content: bytes, path: Path) -> onnx.ModelProto:
    """The model with its weights inside and its functions inlined.

    Args:
        content: The file.
        path: Where it lies, for weights in other files.

    Raises:
        EntryError: It is no model, is too old, or its weights are not whole or in another folder.
    """
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
    if not name or Path(name).name != name or "\\" in name or ":" in name or os.path.islink(beside):
        raise EntryError(
            f"{path}: the weights {tensor.name[:80]!r} lie in {name[:80]!r}: expected a file of the same folder; save "
            "the model with its weights inside, or in one file beside it"
        )
    if name not in files:
        files[name] = read_file(beside, _MOST_EXTERNAL)
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


def images_of(model: onnx.ModelProto, where: str) -> Images:
    """The only input of a model.

    Raises:
        EntryError: It has several, or this one takes no images.
    """
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
    if kind not in KINDS or not (first or last or free):
        shape = "x".join(str(dim or "?") for dim in dims)
        raise EntryError(
            f"{where}: the input {one.name[:60]!r} is {onnx.TensorProto.DataType.Name(kind)} {shape}: expected images "
            "of 1 or 3 channels, uint8 or floats, NCHW or NHWC"
        )
    channels_last = None if free else not first
    size = (dims[1], dims[2]) if channels_last else (dims[2], dims[3])
    channels = dims[3] if channels_last else dims[1]
    return Images(
        name=one.name, kind=kind, batch=dims[0], channels_last=channels_last, size=size, channels=channels
    )


def add_output(model: onnx.ModelProto, output: str | None, where: str) -> str | None:
    """Make a value, or the first value of a node, an output of the graph, and give its name.

    Raises:
        ConfigError: There is none of this name.
    """
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
            f"{where}: --node {output[:80]!r} is neither a value nor a node of the graph; {near}"
        )
    graph.output.append(onnx.ValueInfoProto(name=found))
    return str(found)
