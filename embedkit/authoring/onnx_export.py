"""Export of an entry as one self-contained float32 ONNX file for other tools.

It requires the onnx package, not torch.
"""

from __future__ import annotations

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


def standalone(entry: VerifiedEntry | str | os.PathLike[str], out: Path) -> Path:
    """Write an entry's encoder as one file: weights inside, in float32; same input, output and names.

    Args:
        entry: An entry, its folder, or its name as `load_encoder` takes it.
        out: The file to write; an existing one is replaced.

    Returns:
        `out`.

    Raises:
        EntryNotFoundError: No zoo has an entry of this name.
        EntryError: Not an entry, or (IntegrityError) its bytes are not those of its manifest.
        OutputError: `out` cannot be written.
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
    onnx.checker.check_model(model)
    write_file(out, model.SerializeToString(deterministic=True))
    return out
