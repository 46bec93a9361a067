"""Checks of an ONNX file before anything runs it: where its weights are, and which operators it uses.

`embedkit.model.onnx_proto` reads the file, so the runtime needs no onnx package, and no parser can see another graph
than the one that was checked. This module defines what a graph may contain.

It does not bound memory and time. A graph terminates, since control flow is refused, and a constant shape with more
than `MOST_ELEMENTS` elements is refused. But shapes may be computed, and broadcasting multiplies them: a small graph
can still request more memory than the machine has, even at load. To run untrusted entries, set a limit of the
operating system (`ulimit -v`, a container's memory limit).
"""

from __future__ import annotations

import json
import math
import operator
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from embedkit.errors import EntryError
from embedkit.model.layout import WEIGHTS
from embedkit.model.onnx_proto import Message, read_model

#: Domains that ONNX Runtime has built in; any other one needs a library of custom operators.
ALLOWED_DOMAINS = ("", "ai.onnx", "com.microsoft")

#: Built-in operators that run code from outside the graph: a compiled engine at a path, or code of the host process.
_REFUSED_OPERATORS = frozenset({"EPContext", "PythonOp", "PythonOpGrad", "ATen"})

#: Greatest number of elements of one constant shape: 256 MB of float32.
MOST_ELEMENTS = 1 << 26

#: Operator -> the inputs whose values determine the size of its output.
_SIZED_BY = {
    "CenterCropPad": (1,),
    "Col2Im": (0,),
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "MaxUnpool": (2,),
    "OneHot": (1,),
    "Pad": (1,),
    "Resize": (2, 3),
    "Tile": (1,),
    "Upsample": (1,),
}

_MAX_BYTES = 64 << 20
_EXTERNAL = 1  # TensorProto.DataLocation

#: ONNX TensorProto.DataType -> safetensors dtype and bytes per element.
_DTYPES = {1: ("F32", 4), 10: ("F16", 2), 16: ("BF16", 2), 7: ("I64", 8), 6: ("I32", 4), 11: ("F64", 8)}

#: TensorProto.DataType of shapes, scales and bounds -> `struct` code, and the field of unpacked values.
_CONSTANTS = {
    1: ("f", "float_data"),
    6: ("i", "int32_data"),
    7: ("q", "int64_data"),
    11: ("d", "double_data"),
}
_MOST_CONSTANT = 64  # values; no shape has more axes


@dataclass(frozen=True)
class ExternalTensor:
    """An initializer stored outside the graph: bytes `[offset, offset + length)` of `location`."""

    name: str
    location: str
    offset: int
    length: int
    dtype: int
    shape: tuple[int, ...]


def check_graph(graph: bytes, weights: bytes, where: str) -> list[ExternalTensor]:
    """Check that a graph takes its weights only from `model.safetensors`, and uses only plain operators.

    Args:
        graph: The bytes of `model.onnx`.
        weights: The bytes of `model.safetensors`.
        where: The entry, for messages.

    Returns:
        The external tensors, each of which is exactly one tensor of the weights file.

    Raises:
        EntryError: Not an ONNX file in canonical form, a foreign operator domain, control flow, functions, sparse
            tensors, a constant shape of more than `MOST_ELEMENTS`, or external data whose file, range, type or shape
            differs from the safetensors header.
    """
    if len(graph) > _MAX_BYTES:
        raise EntryError(
            f"{where}: expected a graph below {_MAX_BYTES >> 20} MB, found {len(graph) >> 20} MB"
        )
    try:
        if graph[4:8] == b"ORTM":  # ONNX Runtime's own format, which this module does not check
            raise ValueError("ORT format")
        model = read_model(graph)
        if "graph" not in model:
            raise ValueError("no graph")
    except ValueError as error:
        raise EntryError(f"{where} is not an ONNX file ({error}); pull the entry again") from None
    _check_model(model, where)
    tensors = []
    stored = set(tensor_table(weights, where).values())
    for proto in _tensors(model["graph"]):
        tensor = _external(proto, where)
        if tensor is not None:
            _check_range(tensor, stored, where)
            tensors.append(tensor)
    return tensors


def tensor_table(weights: bytes, where: str) -> Mapping[str, tuple[str, tuple[int, ...], int, int]]:
    """The header of a safetensors file: name -> dtype, shape, begin and end in bytes from the file's start.

    Raises:
        EntryError: The header is damaged, or the ranges do not tile the file exactly.
    """
    base = 8 + int.from_bytes(weights[:8], "little")
    if len(weights) < 8 or base > len(weights) or base > 100_000_008:
        raise EntryError(f"{where}: {WEIGHTS} is truncated or not a safetensors file; pull the entry again")
    try:
        header = json.loads(weights[8:base])
        table = {
            name: (
                str(item["dtype"]),
                tuple(map(operator.index, item["shape"])),
                base + operator.index(item["data_offsets"][0]),
                base + operator.index(item["data_offsets"][1]),
            )
            for name, item in header.items()
            if name != "__metadata__"
        }
        at = base
        for _, _, begin, end in sorted(table.values(), key=lambda row: (row[2], row[3])):
            if begin != at or end < begin:
                raise ValueError
            at = end
        if at != len(weights):
            raise ValueError
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        raise EntryError(f"{where}: the header of {WEIGHTS} is damaged; pull the entry again") from None
    return table


def _check_model(model: Message, where: str) -> None:
    """Refuse everything but built-in operators of ONNX Runtime that each run once."""
    graph: Message = model["graph"]
    for owner, key, what in (
        (model, "functions", "functions of its own"),
        (model, "training_info", "a graph for training"),
        (graph, "sparse_initializer", "sparse tensors"),
    ):
        if key in owner:
            raise EntryError(f"{where}: holds {what}, which no entry needs; export the encoder again")
    if any(pair.get("key") == "ort_config" for pair in model.get("metadata_props", ())):
        raise EntryError(f"{where}: holds options for ONNX Runtime; export the encoder again")
    nodes: list[Message] = graph.get("node", [])
    domains = {opset.get("domain", "") for opset in model.get("opset_import", ())}
    domains.update(node.get("domain", "") for node in nodes)
    domains.update(node.get("op_type", "") for node in nodes if node.get("op_type") in _REFUSED_OPERATORS)
    foreign = sorted(domains - set(ALLOWED_DOMAINS))
    if foreign:
        raise EntryError(f"{where}: uses operators of {foreign[0]!r}, which are not built into ONNX Runtime")
    for node in nodes:
        for attribute in node.get("attribute", ()):
            if "g" in attribute or "graphs" in attribute:
                raise EntryError(
                    f"{where}: the operator {node.get('op_type', '')!r} holds a graph, and control flow, which may "
                    "never end, is refused; export the encoder without it"
                )
            if "sparse_tensor" in attribute or "sparse_tensors" in attribute:
                raise EntryError(
                    f"{where}: holds sparse tensors, which no entry needs; export the encoder again"
                )
    _check_sizes(graph, where)


def _tensors(graph: Message) -> Iterator[Message]:
    """Every TensorProto of a graph without subgraphs."""
    for node in graph.get("node", ()):
        for attribute in node.get("attribute", ()):
            if "t" in attribute:
                yield attribute["t"]
            yield from attribute.get("tensors", ())
    yield from graph.get("initializer", ())


def _external(tensor: Message, where: str) -> ExternalTensor | None:
    """The location of a tensor's bytes outside the graph; None for a tensor that holds them itself.

    Raises:
        EntryError: It claims both, or states its location in a way that parsers may read differently.
    """
    pairs: list[Message] = tensor.get("external_data", [])
    name = tensor.get("name", "")
    if (tensor.get("data_location") == _EXTERNAL) != bool(pairs):
        raise EntryError(f"{where}: tensor {name!r} is ambiguous about whether its data are external")
    if not pairs:
        return None
    fields: dict[str, str] = {}
    for pair in pairs:
        key = pair.get("key", "")
        # ONNX Runtime supports further keys (prepacked weights), and parsers differ in which of two values they take.
        if key not in ("location", "offset", "length") or key in fields:
            raise EntryError(f"{where}: tensor {name!r} has external data with {key[:80]!r}")
        fields[key] = pair.get("value", "")
    # Only ASCII digits: int() also reads "+1", "1_0" and digits of other scripts, ONNX Runtime does not.
    offset, length = (
        int(text) if text.isascii() and text.isdigit() and len(text) < 20 else -1
        for text in (fields.get("offset", "0"), fields.get("length", ""))
    )
    shape = tuple(tensor.get("dims", ()))
    return ExternalTensor(name, fields.get("location", ""), offset, length, tensor.get("data_type", 0), shape)


def _check_range(
    tensor: ExternalTensor, stored: set[tuple[str, tuple[int, ...], int, int]], where: str
) -> None:
    if tensor.location != WEIGHTS:
        raise EntryError(
            f"{where}: tensor {tensor.name!r} points to {tensor.location[:80]!r}; only {WEIGHTS} is allowed"
        )
    dtype, width = _DTYPES.get(tensor.dtype, ("", 0))
    end = tensor.offset + tensor.length
    if (dtype, tensor.shape, tensor.offset, end) not in stored or (
        tensor.length != width * math.prod(tensor.shape)
    ):
        raise EntryError(
            f"{where}: tensor {tensor.name!r} points to bytes {tensor.offset}..{end} of {WEIGHTS}, where there "
            "is no tensor of its type and shape"
        )


# --- sizes ------------------------------------------------------------------------------------------------


def _check_sizes(graph: Message, where: str) -> None:
    """Refuse an operator whose output has more than `MOST_ELEMENTS`, as far as constants determine it."""
    constants = _constants(graph)
    for node in graph.get("node", ()):
        op = node.get("op_type", "")
        given = [constants.get(name) for name in node.get("input", ())]
        sizes = [
            math.prod(abs(value) or 1 for value in given[at] or ())
            for at in _SIZED_BY.get(op, ())
            if at < len(given)
        ]
        if op == "Range" and len(given) == 3 and all(given):
            (start, *_), (limit, *_), (step, *_) = given  # type: ignore[misc]
            sizes.append(abs(limit - start) / abs(step) if step else 0)
        for attribute in node.get("attribute", ()):
            if attribute.get("name") in (
                "shape",
                "output_shape",
            ):  # of random generators and of ConvTranspose
                sizes.append(math.prod(abs(side) or 1 for side in attribute.get("ints", ())))
        if any(not size <= MOST_ELEMENTS for size in sizes):
            raise EntryError(
                f"{where}: {op} requests more than {MOST_ELEMENTS} numbers at once, more than any entry needs"
            )


def _constants(graph: Message) -> dict[str, list[float]]:
    """Name -> the values of small constants: initializers and `Constant` nodes."""
    found = {tensor.get("name", ""): _values(tensor) for tensor in graph.get("initializer", ())}
    for node in graph.get("node", ()):
        if node.get("op_type") == "Constant" and node.get("output"):
            for attribute in node.get("attribute", ()):
                if "t" in attribute:
                    found[node["output"][0]] = _values(attribute["t"])
                elif "i" in attribute or "ints" in attribute:
                    found[node["output"][0]] = attribute.get("ints", [attribute.get("i", 0)])
    return found


def _values(tensor: Message) -> list[float]:
    code, field = _CONSTANTS.get(tensor.get("data_type", 0), ("", ""))
    raw: bytes = tensor.get("raw_data") or (tensor.get(field) if code in ("f", "d") else None) or b""
    values = tensor.get(field, []) if code in ("i", "q") else []
    width = struct.calcsize(f"<{code}") if code else 1
    if code and not len(raw) % width and len(raw) <= _MOST_CONSTANT * width:
        values = [*values, *struct.unpack(f"<{len(raw) // width}{code}", raw)]
    return [value if math.isfinite(value) else math.inf for value in values[:_MOST_CONSTANT]]
