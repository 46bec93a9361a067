"""Export of an entry as one self-contained float32 ONNX file for other tools.

It requires the onnx package, not torch.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from embedkit._io.atomic import write_file
from embedkit.hub.resolve import find_entry
from embedkit.hub.verified import VerifiedEntry
from embedkit.model.layout import GRAPH, WEIGHTS
from embedkit.model.onnx_guard import check_graph
from embedkit.model.preprocess import Preprocess

__all__ = ["FLOAT_INPUT", "export_onnx", "recipe"]

#: The input of a graph that takes normalized pixels, by the name that Hugging Face's exports use for it.
FLOAT_INPUT = "pixel_values"

_CHANNELS = {"rgb": "RGB", "gray": "gray", "lab_l": "CIE L* scaled to 0..255"}


def export_onnx(
    entry: VerifiedEntry | str | os.PathLike[str], out: str | os.PathLike[str], *, float_input: bool = False
) -> Path:
    """Write an entry's encoder as one file: weights inside, in float32, and the preprocessing in its metadata.

    The output is `embedding`, float32 (N, D), not L2-normalized. The file's metadata (`metadata_props`) hold `entry`,
    `revision`, `license`, `input`, `output` (a sentence each), `recipe` (how an image becomes the input, in words) and
    `preprocess`, the contract as JSON.

    Args:
        entry: An entry, its folder, or its name as `load_encoder` takes it.
        out: The file to write; an existing one is replaced.
        float_input: Whether the input is `pixel_values`, float32 (N, C, H, W), as torchvision and timm give them:
            scaled to [0, 1], less the mean, divided by the standard deviation of each channel. By default it is
            `pixels`, uint8 (N, C, H, W), and the graph does that itself.

    Returns:
        `out`.

    Raises:
        EntryNotFoundError: No zoo has an entry of this name.
        EntryError: Not an entry, or (IntegrityError) its bytes are not those of its manifest.
        OutputError: `out` cannot be written.

    Examples:
        >>> from embedkit.authoring.onnx_export import export_onnx
        >>> export_onnx("supervised-efficientnet_lite0", "encoder.onnx", float_input=True)
        PosixPath('encoder.onnx')
    """
    if not isinstance(entry, VerifiedEntry):
        entry = find_entry(entry)
    graph, weights = entry.read(GRAPH), entry.read(WEIGHTS)
    external = {tensor.name: tensor for tensor in check_graph(graph, weights, f"{entry.location}/{GRAPH}")}
    model = onnx.load_from_string(graph)
    inlined = set()
    for tensor in model.graph.initializer:
        if tensor.name not in external:
            continue
        stored = external[tensor.name]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)  # float16 or float32
        values = np.frombuffer(weights, dtype, stored.length // dtype.itemsize, stored.offset)
        tensor.CopyFrom(numpy_helper.from_array(values.astype("<f4").reshape(stored.shape), tensor.name))
        inlined.add(tensor.name)
    # The weights are float32 now, so the Cast nodes between them and their consumers are removed.
    casts = {
        node.output[0]: node.input[0]
        for node in model.graph.node
        if node.op_type == "Cast" and node.input[0] in inlined
    }
    kept = [node for node in model.graph.node if node.output[0] not in casts]
    for node in kept:
        node.input[:] = [casts.get(name, name) for name in node.input]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    if float_input:
        _take_floats(model, entry.config.preprocess)
    _describe(model, entry, float_input=float_input)
    onnx.checker.check_model(model)
    path = Path(out)
    write_file(path, model.SerializeToString(deterministic=True))
    return path


def recipe(contract: Preprocess, *, float_input: bool = False) -> str:
    """How an image becomes the input of the file: up to five lines, which Pillow can follow.

    Examples:
        >>> from embedkit.authoring.onnx_export import recipe
        >>> print(recipe(embedkit.load_encoder().preprocess).splitlines()[1])
        2. resize the shorter side to 256 pixels (the other rounded down), bicubic, antialiased as in Pillow
    """
    height, width = contract.size
    if contract.resize == "squash":
        what = f"to {width}x{height} pixels (width x height)"
    else:
        side, other = ("shorter", "down") if contract.resize == "shortest" else ("longer", "to the nearest")
        what = f"the {side} side to {contract.resize_size} pixels (the other rounded {other})"
    cut = (
        f"take the central {width}x{height}, from round((side - kept) / 2) on"
        if contract.crop == "center"
        else f"center it in {width}x{height}"
    )
    kind, scaled = "uint8", "the graph normalizes"
    if float_input:
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (contract.mean, contract.std))
        kind, scaled = "float32", f"(value / 255 - mean) / std with mean ({mean}) and std ({std})"
    return "\n".join(
        [
            f"1. decode at full scale, turn upright by EXIF, to {_CHANNELS[contract.color]}",
            f"2. resize {what}, {contract.interpolation}, antialiased as in Pillow",
            f"3. {cut}; what is smaller is filled with {contract.pad}",
            f"4. {kind} (N, {contract.channels}, {height}, {width}); {scaled}",
            "5. `embedkit embed --decode exact` takes the same pixels; auto decodes large JPEGs at a reduced scale",
        ]
    )


def _take_floats(model: onnx.ModelProto, contract: Preprocess) -> None:
    """Let a graph of uint8 pixels take normalized ones, by undoing the normalization in front of it.

    The normalization inside is not cut out, since a graph may do it in any way. Undone and done again, it costs two
    operations on the pixels and less than 1e-6 of the embedding.
    """
    [pixels] = model.graph.input
    for name, values in (("scale", contract.std), ("shift", contract.mean)):
        array = 255 * np.array(values, np.float64).reshape(1, -1, 1, 1)
        tensor = numpy_helper.from_array(array.astype(np.float32), f"{FLOAT_INPUT}.{name}")
        model.graph.initializer.append(tensor)
    scaled = f"{FLOAT_INPUT}.scaled"
    front = [
        onnx.helper.make_node("Mul", [FLOAT_INPUT, f"{FLOAT_INPUT}.scale"], [scaled]),
        onnx.helper.make_node("Add", [scaled, f"{FLOAT_INPUT}.shift"], [pixels.name]),
    ]
    nodes = [*front, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    pixels.name = FLOAT_INPUT
    pixels.type.tensor_type.elem_type = onnx.TensorProto.FLOAT


def _describe(model: onnx.ModelProto, entry: VerifiedEntry, *, float_input: bool) -> None:
    """Say in the file what it takes and gives: nothing else goes with it."""
    config, contract = entry.config, entry.config.preprocess
    height, width = contract.size
    channels = _CHANNELS[contract.color]
    if float_input:
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (contract.mean, contract.std))
        taken = (
            f"float32 (N, {contract.channels}, {height}, {width}), {channels}, normalized: "
            f"(value / 255 - mean) / std, with mean ({mean}) and std ({std})"
        )
    else:
        taken = f"uint8 (N, {contract.channels}, {height}, {width}), {channels}; the graph normalizes"
    shapes = {name: ", ".join(map(str, ("N", *shape))) for name, shape in config.outputs.items()}
    given = "; ".join(f"{name}, float32 ({shape})" for name, shape in shapes.items())
    if config.kind == "encoder":
        given += ", not L2-normalized"
    facts = {
        "entry": entry.name,
        "revision": entry.revision,
        "license": config.license,
        "input": taken,
        "output": given,
        "recipe": recipe(contract, float_input=float_input),
        "preprocess": json.dumps(contract.to_json(), sort_keys=True),
    }
    onnx.helper.set_model_props(model, {**{p.key: p.value for p in model.metadata_props}, **facts})
    model.graph.input[0].doc_string = taken
    model.doc_string = f"{entry.name}, by embedkit. Input: {taken}. Output: {given}."
