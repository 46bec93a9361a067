"""A look into an ONNX file before anything runs it: where its weights lie, and what operators it asks for.

Reads the protobuf wire format directly (ONNX `onnx.proto3`, IR version 10), so that the runtime needs no onnx
package and no byte of a graph reaches ONNX Runtime unchecked.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from embedkit.entry import WEIGHTS
from embedkit.errors import EntryError

#: What ONNX Runtime has built in; anything else would need a custom operator library.
ALLOWED_DOMAINS = ("", "ai.onnx", "com.microsoft")
_MAX_BYTES = 64 << 20
_MAX_DEPTH = 32

# Field numbers of onnx.proto3.
_MODEL_GRAPH, _MODEL_OPSETS, _MODEL_FUNCTIONS = 7, 8, 25
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_SPARSE = 1, 5, 15
_NODE_OPERATOR, _NODE_ATTRIBUTE, _NODE_DOMAIN = 4, 5, 7
_ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH, _ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS = 5, 6, 10, 11
_ATTRIBUTE_SPARSE, _ATTRIBUTE_SPARSES = 22, 23
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_EXTERNAL = 1, 2, 8, 13
_FUNCTION_NODE, _FUNCTION_ATTRIBUTE = 7, 11

#: ONNX TensorProto.DataType -> safetensors dtype and bytes per element.
_DTYPES = {1: ("F32", 4), 10: ("F16", 2), 16: ("BF16", 2), 7: ("I64", 8), 6: ("I32", 4), 11: ("F64", 8)}


@dataclass(frozen=True)
class ExternalTensor:
    """An initializer whose bytes lie outside the graph: `[offset, offset + length)` of `location`, in bytes."""

    name: str
    location: str
    offset: int
    length: int
    dtype: int
    shape: tuple[int, ...]


def check_graph(graph: bytes, weights: bytes, where: str) -> list[ExternalTensor]:
    """Check that a graph takes its weights from `model.safetensors` alone and asks for no custom operator.

    Args:
        graph: The bytes of `model.onnx`.
        weights: The bytes of `model.safetensors`.
        where: The entry, for messages.

    Returns:
        The external tensors, each of which is exactly one tensor of the weights file.

    Raises:
        EntryError: Not an ONNX file, a foreign operator domain, or external data at any other place, of any other
            range, type or shape than the safetensors header says.
    """
    if len(graph) > _MAX_BYTES:
        raise EntryError(
            f"{where}: expected a graph below {_MAX_BYTES >> 20} MB, found {len(graph) >> 20} MB"
        )
    try:
        if graph[4:8] == b"ORTM":  # ONNX Runtime would take it for its own format, whatever else it is
            raise ValueError("ORT format")
        tensors, domains = _walk(memoryview(graph))
    except (IndexError, UnicodeDecodeError, ValueError):
        raise EntryError(f"{where} is not an ONNX file; pull the entry again") from None
    foreign = sorted(domains - set(ALLOWED_DOMAINS))
    if foreign:
        raise EntryError(
            f"{where}: asks for operators of {foreign[0]!r}, which ONNX Runtime does not have built in"
        )
    stored = tensor_table(weights, where)
    ranges = set(stored.values())
    for tensor in tensors:
        if tensor.location != WEIGHTS:
            raise EntryError(
                f"{where}: tensor {tensor.name!r} points to {tensor.location[:80]!r}; only {WEIGHTS} is allowed"
            )
        dtype, width = _DTYPES.get(tensor.dtype, ("", 0))
        end = tensor.offset + tensor.length
        if (dtype, tensor.shape, tensor.offset, end) not in ranges or (
            tensor.length != width * math.prod(tensor.shape)
        ):
            raise EntryError(
                f"{where}: tensor {tensor.name!r} points to bytes {tensor.offset}..{end} of {WEIGHTS}, where no "
                "tensor of its type and shape lies"
            )
    return tensors


def tensor_table(weights: bytes, where: str) -> Mapping[str, tuple[str, tuple[int, ...], int, int]]:
    """The header of a safetensors file: name -> dtype, shape, begin and end in bytes from the file's start.

    Raises:
        EntryError: The header is damaged, or the ranges do not tile the file exactly.
    """
    base = 8 + int.from_bytes(weights[:8], "little")
    if len(weights) < 8 or base > len(weights) or base > 100_000_008:
        raise EntryError(f"{where}: {WEIGHTS} is cut or not a safetensors file; pull the entry again")
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


def _walk(model: memoryview) -> tuple[list[ExternalTensor], set[str]]:
    """All external tensors and operator domains of a model, in graphs, subgraphs, attributes and functions."""
    tensors: list[ExternalTensor] = []
    domains: set[str] = set()
    found_graph = False

    def graph(data: memoryview, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise ValueError("nested too deeply")
        for number, value in _fields(data):
            if number == _GRAPH_NODE:
                node(_message(value), depth)
            elif number == _GRAPH_INITIALIZER:
                tensor(_message(value))
            elif number == _GRAPH_SPARSE:
                sparse(_message(value))

    def node(data: memoryview, depth: int) -> None:
        for number, value in _fields(data):
            if number == _NODE_DOMAIN:
                domains.add(str(_message(value), "utf-8"))
            elif number == _NODE_OPERATOR and _message(value) == b"EPContext":
                domains.add("EPContext")  # it names a compiled engine by path, and an engine is a program
            elif number == _NODE_ATTRIBUTE:
                attribute(_message(value), depth)

    def attribute(data: memoryview, depth: int) -> None:
        for number, value in _fields(data):
            if number in (_ATTRIBUTE_TENSOR, _ATTRIBUTE_TENSORS):
                tensor(_message(value))
            elif number in (_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS):
                graph(_message(value), depth + 1)
            elif number in (_ATTRIBUTE_SPARSE, _ATTRIBUTE_SPARSES):
                sparse(_message(value))

    def sparse(data: memoryview) -> None:
        for number, value in _fields(data):
            if number in (1, 2):
                tensor(_message(value))

    def tensor(data: memoryview) -> None:
        name, kind = "", 0
        shape: list[int] = []
        external: dict[str, str] = {}
        for number, value in _fields(data):
            if number == _TENSOR_DIMS:
                shape += [value] if isinstance(value, int) else _varints(value)
            elif number == _TENSOR_TYPE and isinstance(value, int):
                kind = value
            elif number == _TENSOR_NAME:
                name = str(_message(value), "utf-8")
            elif number == _TENSOR_EXTERNAL:
                pair = {inner: str(_message(item), "utf-8") for inner, item in _fields(_message(value))}
                key = pair.get(1, "")
                # ONNX Runtime knows more keys (prepacked weights), and who says which of two values it takes?
                if key not in ("location", "offset", "length") or key in external:
                    raise ValueError(f"external data with {key!r}")
                external[key] = pair.get(2, "")
        if external:
            # Only plain digits: int() reads "+1", "1_0" and foreign digits, and ONNX Runtime does not.
            offset, length = (
                int(text) if text.isascii() and text.isdigit() else -1
                for text in (external.get("offset", "0"), external.get("length", ""))
            )
            tensors.append(
                ExternalTensor(name, external.get("location", ""), offset, length, kind, tuple(shape))
            )

    for number, value in _fields(model):
        if number == _MODEL_GRAPH:
            found_graph = True
            graph(_message(value), 0)
        elif number == _MODEL_FUNCTIONS:
            for inner, item in _fields(_message(value)):
                if inner == _FUNCTION_NODE:
                    node(_message(item), 0)
                elif inner == _FUNCTION_ATTRIBUTE:
                    attribute(_message(item), 0)
        elif number == _MODEL_OPSETS:
            domains.update(
                str(_message(item), "utf-8") for inner, item in _fields(_message(value)) if inner == 1
            )
    if not found_graph:
        raise ValueError("no graph")
    return tensors, domains


def _message(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number where a message was expected")
    return value


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of one protobuf message: number, and an int or the bytes of what is length-delimited."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if at + size > len(data):
            raise ValueError("cut")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a varint of more than ten bytes")


def _varints(data: memoryview) -> list[int]:
    values, at = [], 0
    while at < len(data):
        value, at = _varint(data, at)
        values.append(value)
    return values
