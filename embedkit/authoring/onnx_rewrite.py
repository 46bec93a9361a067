"""A foreign ONNX graph as the graph of an entry: uint8 pixels in, one vector an image out, the weights outside.

Nothing of the encoder's arithmetic is changed. In front of its input stand the normalization and, where the graph takes
channels last, a transpose; behind its output stands the pooling; what does not contribute to that output is removed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from safetensors.numpy import save

from embedkit.errors import EntryError
from embedkit.model.layout import WEIGHTS
from embedkit.model.onnx_guard import check_graph, tensor_table
from embedkit.model.preprocess import Preprocess

__all__ = ["free_batch", "keep_output", "normalize_input", "pool_output", "stored_outside"]

#: The names of an entry's input and output.
PIXELS, EMBEDDING = "pixels", "embedding"
#: Larger tensors of whole numbers, such as the indices of a relative position bias, are weights and not shapes.
_MOST_INSIDE = 1024
_FLOATING = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)
_WHOLE = (onnx.TensorProto.INT64, onnx.TensorProto.INT32)


def keep_output(graph: onnx.GraphProto, name: str) -> None:
    """Make one value the graph's only output, and remove what does not contribute to it.

    Args:
        graph: Changed in place.
        name: An output, or any other value that a node gives.
    """
    needed, kept = {name}, []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(filter(None, node.input))
    _replace(graph.node, reversed(kept))
    _replace(graph.initializer, (one for one in graph.initializer if one.name in needed))
    _replace(graph.output, (helper.make_empty_tensor_value_info(name),))
    # Shapes of values inside are hints, which another batch would make wrong.
    _replace(graph.value_info, ())


def free_batch(model: onnx.ModelProto, batch: int) -> None:
    """Let a graph that was traced with a fixed batch take any.

    The batch stands in the first axis of constant shapes of Reshape, alone or times the heads or windows, and in
    constants that are concatenated to images, such as a class token, which are repeated. Whether this was right is for
    the parity test.

    Args:
        model: Changed in place.
        batch: The fixed batch.
    """
    graph = model.graph
    constants = {one.name: one for one in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            constants.update((node.output[0], one.t) for one in node.attribute if one.name == "value")
    names = _names(graph)
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type == "Reshape" and node.input[1] in constants:
            shape = numpy_helper.to_array(constants[node.input[1]])
            if (free := _free_shape(shape.tolist(), batch)) and node.input[0] not in constants:
                name = _fresh(f"{node.output[0]}.shape", names)
                graph.initializer.append(numpy_helper.from_array(np.array(free, np.int64), name))
                node.input[1] = name
        if node.op_type == "Concat" and any(one.name == "axis" and one.i != 0 for one in node.attribute):
            given = [name for name in node.input if name not in constants]
            for index, name in enumerate(node.input):
                dims = list(constants[name].dims) if name in constants else []
                if given and len(dims) > 1 and dims[0] == batch:
                    nodes += _repeated(graph, node, index, dims[1:], given[0], names)
        nodes.append(node)
    _replace(graph.node, nodes)
    dimension = graph.input[0].type.tensor_type.shape.dim[0]
    dimension.Clear()
    dimension.dim_param = "batch"


def _free_shape(shape: list[int], batch: int) -> list[int]:
    """A constant shape of Reshape whose first axis follows from the batch; empty where it does not."""
    if not shape or shape[0] <= 0 or shape[0] % batch:
        return []
    if -1 not in shape:
        return [-1, *shape[1:]]
    return [0, *shape[1:]] if shape[0] == batch else []  # 0 copies the axis of the input


def _repeated(
    graph: onnx.GraphProto, node: onnx.NodeProto, index: int, sides: list[int], beside: str, names: set[str]
) -> Iterator[onnx.NodeProto]:
    """Nodes that repeat the first image of a constant, of these sides, for every image of the value `beside` it."""
    base = f"{node.output[0]}.{index}"
    parts = ("shape", "count", "rest", "sides", "first", "zero", "given")
    shape, count, rest, target, first, zero, given = (_fresh(f"{base}.{part}", names) for part in parts)
    graph.initializer.append(numpy_helper.from_array(np.array([0], np.int64), zero))
    graph.initializer.append(numpy_helper.from_array(np.array(sides, np.int64), rest))
    yield helper.make_node("Gather", [node.input[index], zero], [first], axis=0)
    yield helper.make_node("Shape", [beside], [shape])
    yield helper.make_node("Gather", [shape, zero], [count], axis=0)
    yield helper.make_node("Concat", [count, rest], [target], axis=0)
    yield helper.make_node("Expand", [first, target], [given])
    node.input[index] = given


def normalize_input(graph: onnx.GraphProto, contract: Preprocess, *, channels_last: bool) -> None:
    """Let a graph take an entry's pixels, by a normalization in front of an input of floats.

    Args:
        graph: Changed in place; it has one input.
        contract: Mean and std are folded into one scale and one shift, unless the graph takes uint8 itself.
        channels_last: Whether the graph takes (N, H, W, C).
    """
    [taken] = graph.input
    kind = taken.type.tensor_type.elem_type
    _rename(graph, PIXELS)
    _rename(graph, EMBEDDING)
    [taken] = graph.input
    names = _names(graph)
    nodes, last = [], PIXELS

    def add(operator: str, *more: str, **attributes: Any) -> None:
        nonlocal last
        out = _fresh(f"{PIXELS}.{operator.lower()}", names)
        nodes.append(helper.make_node(operator, [last, *more], [out], **attributes))
        last = out

    if kind != onnx.TensorProto.UINT8:
        add("Cast", to=onnx.TensorProto.FLOAT)
        mean, std = (
            np.array(values, np.float64).reshape(1, -1, 1, 1) for values in (contract.mean, contract.std)
        )
        for operator, values in (("Mul", 1 / (255 * std)), ("Add", -mean / std)):
            constant = _fresh(f"{PIXELS}.{'scale' if operator == 'Mul' else 'shift'}", names)
            graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), constant))
            add(operator, constant)
        if kind != onnx.TensorProto.FLOAT:
            add("Cast", to=kind)
    if channels_last:
        add("Transpose", perm=[0, 2, 3, 1])
    nodes.append(helper.make_node("Identity", [last], [taken.name]))
    _replace(graph.node, [*nodes, *graph.node])
    shape: list[str | int] = ["batch", contract.channels, *contract.size]
    _replace(graph.input, (helper.make_tensor_value_info(PIXELS, onnx.TensorProto.UINT8, shape),))


def pool_output(
    model: onnx.ModelProto, shape: Sequence[int], kind: int, *, pool: str, channels_last: bool
) -> int:
    """Make one float32 vector an image of the graph's only output.

    Args:
        model: Changed in place.
        shape: Of the output, without the batch: (D,), (L, D), (C, H, W), or (H, W, C).
        kind: Its TensorProto type.
        pool: `mean`, `cls` (the first of L), or `none` (the numbers one after the other).
        channels_last: Whether the last axis of three has the channels.

    Returns:
        D.
    """
    graph = model.graph
    names, nodes, last = _names(graph), [], graph.output[0].name

    def add(operator: str, *more: str, **attributes: Any) -> None:
        nonlocal last
        out = _fresh(f"{EMBEDDING}.{operator.lower()}", names)
        nodes.append(helper.make_node(operator, [last, *more], [out], **attributes))
        last = out

    def constant(values: object, name: str) -> str:
        free = _fresh(f"{EMBEDDING}.{name}", names)
        graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), free))
        return free

    if kind != onnx.TensorProto.FLOAT:
        add("Cast", to=onnx.TensorProto.FLOAT)
    dim = math.prod(shape)
    if pool == "cls":
        dim = shape[-1]
        add("Gather", constant(0, "first"), axis=1)
    elif pool == "mean":
        axes = [1] if len(shape) == 2 else [1, 2] if channels_last else [2, 3]
        dim = shape[0] if len(shape) == 3 and not channels_last else shape[-1]
        if opset_of(model) >= 18:
            add("ReduceMean", constant(axes, "axes"), keepdims=0)
        else:
            add("ReduceMean", axes=axes, keepdims=0)
    elif len(shape) > 1:
        add("Flatten", axis=1)
    nodes.append(helper.make_node("Identity", [last], [EMBEDDING]))
    graph.node.extend(nodes)
    _replace(
        graph.output, (helper.make_tensor_value_info(EMBEDDING, onnx.TensorProto.FLOAT, ["batch", dim]),)
    )
    return dim


def stored_outside(model: onnx.ModelProto, metadata: Mapping[str, str], where: str) -> tuple[bytes, bytes]:
    """The two files of an entry: the graph in canonical form, and its weights under their names.

    Args:
        model: The whole graph, with its weights inside; they are taken out of it.
        metadata: Written into the model's `metadata_props`.
        where: For messages.

    Returns:
        `model.onnx` and `model.safetensors`.

    Raises:
        EntryError: The graph has what no entry may have; see `check_graph`.
    """
    graph = model.graph
    _constants_to_initializers(graph)
    moved = [
        one
        for one in graph.initializer
        if (one.data_type in _FLOATING and len(one.dims))
        or (one.data_type in _WHOLE and math.prod(one.dims) > _MOST_INSIDE)
    ]
    arrays = {one.name: np.ascontiguousarray(numpy_helper.to_array(one)) for one in moved}
    if "__metadata__" in arrays:
        raise EntryError(f"{where}: a weight of the name '__metadata__' cannot be stored; rename it")
    # One metadata key: several would be written in an order that changes from run to run.
    weights = save(arrays, {"format": "np"})
    table = tensor_table(weights, where)
    for one in moved:
        _, _, begin, end = table[one.name]
        stored = onnx.TensorProto(name=one.name, data_type=one.data_type, dims=one.dims)
        stored.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", WEIGHTS), ("offset", begin), ("length", end - begin)):
            stored.external_data.add(key=key, value=str(value))
        one.CopyFrom(stored)
    _clean(model)
    helper.set_model_props(model, dict(sorted(metadata.items())))
    content = model.SerializeToString(deterministic=True)
    check_graph(content, weights, where)
    return content, weights


def opset_of(model: onnx.ModelProto) -> int:
    """The version of ONNX's own operators that a model uses; 0 where it names none."""
    return max((one.version for one in model.opset_import if one.domain in ("", "ai.onnx")), default=0)


def _clean(model: onnx.ModelProto) -> None:
    """Remove everything that is neither arithmetic nor a name: unknown fields, notes, hints, unused domains."""
    model.DiscardUnknownFields()
    graph = model.graph
    used = {node.domain for node in graph.node}
    _replace(
        model.opset_import,
        (one for one in model.opset_import if one.domain in ("", "ai.onnx") or one.domain in used),
    )
    for field in ("metadata_props", "configuration"):
        if field in model.DESCRIPTOR.fields_by_name:
            model.ClearField(field)
    for field in ("value_info", "quantization_annotation", "metadata_props"):
        graph.ClearField(field)
    model.doc_string = graph.doc_string = ""
    graph.name = "embedkit"
    for node in graph.node:
        node.ClearField("doc_string")
        for field in ("metadata_props", "device_configurations"):
            if field in node.DESCRIPTOR.fields_by_name:
                node.ClearField(field)
        for attribute in node.attribute:
            attribute.ClearField("doc_string")
    for tensor in graph.initializer:
        tensor.ClearField("doc_string")
        tensor.ClearField("metadata_props")
    # Initializers that are no inputs exist since IR version 4; older ones lack nothing else that is used.
    model.ir_version = max(model.ir_version, 8)


def _constants_to_initializers(graph: onnx.GraphProto) -> None:
    """Large constants of nodes, as some exporters write weights, become initializers."""
    kept = []
    for node in graph.node:
        value = next((one.t for one in node.attribute if one.name == "value" and one.HasField("t")), None)
        if node.op_type == "Constant" and value is not None and math.prod(value.dims) > _MOST_INSIDE:
            graph.initializer.append(value)
            graph.initializer[-1].name = node.output[0]
        else:
            kept.append(node)
    _replace(graph.node, kept)


def _names(graph: onnx.GraphProto) -> set[str]:
    """Every name of a value."""
    found = {one.name for part in (graph.input, graph.output, graph.initializer) for one in part}
    return found.union(*({*node.input, *node.output} for node in graph.node)) | {PIXELS, EMBEDDING}


def _fresh(name: str, names: set[str]) -> str:
    """A name that no value has yet, which is then taken."""
    free, number = name, 1
    while free in names:
        free, number = f"{name}.{number}", number + 1
    names.add(free)
    return free


def _rename(graph: onnx.GraphProto, name: str) -> None:
    """Give a value of the graph another name, so that an entry's input or output can have it."""
    free = _fresh(f"{name}.original", _names(graph))
    for part in (graph.input, graph.output, graph.initializer):
        for one in part:
            if one.name == name:
                one.name = free
    for node in graph.node:
        node.input[:] = [free if one == name else one for one in node.input]
        node.output[:] = [free if one == name else one for one in node.output]


def _replace(field: object, items: object) -> None:
    """Replace what a repeated field holds."""
    kept = list(items)  # type: ignore[call-overload]
    # Copies: what is deleted from the field may be among the items.
    kept = [type(one).FromString(one.SerializeToString()) for one in kept]
    del field[:]  # type: ignore[attr-defined]
    field.extend(kept)  # type: ignore[attr-defined]
