"""From a torch network to the graph of a zoo entry: pixels in, outputs by name, every weight outside.

The graph (ONNX, opset 20, IR version 10) holds no weights: each floating state-dict tensor is an external
initializer that points into `model.safetensors`, under its own name. Stored in float16 it passes one Cast,
which ONNX Runtime folds when it loads the graph, so that it then runs as fast as a plain float32 export.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping

import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnxscript import optimizer
from torch import Tensor, nn

import embedkit
from embedkit.errors import EntryError
from embedkit.model.layout import GRAPH, WEIGHTS
from embedkit.model.onnx_guard import check_graph, tensor_table
from embedkit.model.preprocess import Preprocess

OPSET = 20
IR_VERSION = 10
MAX_GRAPH_BYTES = 1_000_000

_PREFIX = "network."
_FLOATING = {"F16": ir.DataType.FLOAT16, "F32": ir.DataType.FLOAT}


class PixelEncoder(nn.Module):
    """A network behind the normalization of its preprocess contract: what the graph computes.

    Args:
        network: Takes normalized float32 (N, C, H, W), gives (N, D), or outputs (N, ...) by name.
        preprocess: The contract; its mean and std are folded into one scale and one shift,
            (x / 255 - mean) / std = x * scale + shift.
    """

    pixel_scale: Tensor
    pixel_shift: Tensor

    def __init__(self, network: nn.Module, preprocess: Preprocess):
        super().__init__()
        self.network = network
        mean = torch.tensor(preprocess.mean, dtype=torch.float64).reshape(1, -1, 1, 1)
        std = torch.tensor(preprocess.std, dtype=torch.float64).reshape(1, -1, 1, 1)
        self.register_buffer("pixel_scale", (1 / (255 * std)).float())
        self.register_buffer("pixel_shift", (-mean / std).float())
        self.eval()

    def forward(self, pixels: Tensor) -> Tensor | dict[str, Tensor]:
        """What the network gives for uint8 (N, C, H, W): float32 (N, D), not normalized, or outputs by name."""
        return self.network(pixels.float() * self.pixel_scale + self.pixel_shift)


def stored_state(network: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The network's state dict as it is stored: floating tensors in `dtype`, all others as they are."""
    return {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
        for name, tensor in network.state_dict().items()
    }


def holding(network: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A float32 copy of the network on the CPU, in eval mode, that holds the stored tensors."""
    twin = copy.deepcopy(network).to("cpu", torch.float32).to(memory_format=torch.contiguous_format)
    twin.load_state_dict(dict(state), strict=True)
    return twin.eval().requires_grad_(False)


def export_graph(
    network: nn.Module, preprocess: Preprocess, weights: bytes, metadata: Mapping[str, str]
) -> bytes:
    """Write the graph of an entry.

    Args:
        network: In eval mode, in float32, holding the stored weights (see `holding`).
        preprocess: The contract that the graph's input obeys.
        weights: The bytes of `model.safetensors`.
        metadata: Written into the model's `metadata_props`.

    Returns:
        The bytes of `model.onnx`: `pixels` uint8 (batch, C, H, W) in, `embedding` float32 (batch, D) out, or the
        outputs that the network names.

    Raises:
        EntryError: A floating tensor of the weights file is not an input of the graph, or the graph is not
            below 1 MB without its weights.
    """
    table = tensor_table(weights, GRAPH)
    stored = {
        name: (_FLOATING[dtype], shape, begin, end)
        for name, (dtype, shape, begin, end) in table.items()
        if dtype in _FLOATING
    }
    # Two images, since torch.export takes a batch of one for a constant.
    example = torch.zeros((2, preprocess.channels, *preprocess.size), dtype=torch.uint8)
    encoder = PixelEncoder(network, preprocess)
    with torch.inference_mode():
        given = encoder(example)
    with warnings.catch_warnings():
        # a recurrent layer holds its weights in a list beside its parameters, which are what is exported
        warnings.filterwarnings("ignore", r"The tensor attributes .*_flat_weights", UserWarning)
        # torch's own code for such a layer
        warnings.filterwarnings("ignore", "_check_is_size will be removed", FutureWarning)
        program = torch.onnx.export(
            encoder,
            (example,),
            dynamo=True,
            optimize=False,
            opset_version=OPSET,
            input_names=["pixels"],
            output_names=["embedding"] if isinstance(given, Tensor) else list(given),
            dynamic_shapes={"pixels": {0: torch.export.Dim("batch")}},
            verbose=False,
        )
    assert program is not None  # it is None only for dynamo=False
    model = program.model
    _fold(model, {_PREFIX + name for name in stored})
    _externalise(model.graph, stored)
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = "embedkit", embedkit.__version__
    model.graph.name = "embedkit"
    model.metadata_props.clear()
    model.metadata_props.update(sorted(metadata.items()))
    graph = ir.to_proto(model).SerializeToString(deterministic=True)
    if len(graph) >= MAX_GRAPH_BYTES:
        inside = {
            value.name: value.const_value.nbytes
            for value in model.graph.initializers.values()
            if value.const_value is not None and value.name not in stored
        }
        largest = max(inside, key=inside.__getitem__)
        raise EntryError(
            f"{GRAPH}: expected less than {MAX_GRAPH_BYTES} bytes without the weights, found {len(graph)}; "
            f"the largest tensor inside is {largest!r}: make it a persistent buffer"
        )
    check_graph(graph, weights, GRAPH)
    return graph


def _fold(model: ir.Model, weights: set[str]) -> None:
    """Fold shape arithmetic and the like, but nothing that would swallow a weight.

    Without folding, ONNX Runtime does not see that a Conv's bias is constant and leaves its
    BatchNormalization unfused (2.5 times slower). Folding all would put the transposed weight of every Linear
    into the graph.
    """

    def should_fold(node: ir.Node) -> bool | None:
        takes_weight = any(value is not None and value.name in weights for value in node.inputs)
        return False if takes_weight or node.op_type == "Transpose" else None

    # Sizes are in elements: a folded constant is a shape, an index or a bias of zeros, never a weight matrix.
    optimizer.fold_constants(model, input_size_limit=1024, output_size_limit=4096, should_fold=should_fold)
    passes.RemoveUnusedNodesPass()(model)
    # The exporter notes stack traces with this machine's paths on every node.
    passes.ClearMetadataAndDocStringPass()(model)


def _externalise(
    graph: ir.Graph, stored: Mapping[str, tuple[ir.DataType, tuple[int, ...], int, int]]
) -> None:
    """Make every stored tensor an external initializer under its state-dict name, cast to float32."""
    for node in graph:
        for output in node.outputs:
            if output.name in stored:
                output.name = f"{output.name}.value"  # the plain name belongs to the weight
    first = next(iter(graph))
    for name, (dtype, shape, begin, end) in stored.items():
        value = graph.initializers.pop(_PREFIX + name, None)
        if value is None:
            raise EntryError(
                f"{GRAPH}: the tensor {name!r} of {WEIGHTS} takes no part in the graph; delete the module "
                "that owns it from the encoder (heads stay in the training run)"
            )
        tensor = ir.ExternalTensor(WEIGHTS, begin, end - begin, dtype, shape=ir.Shape(shape), name=name)
        weight = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape), const_value=tensor)
        graph.register_initializer(weight)
        if dtype is ir.DataType.FLOAT:
            value.replace_all_uses_with(weight)
            continue
        cast = ir.node("Cast", [weight], {"to": ir.DataType.FLOAT}, name=f"{name}.cast")
        cast.outputs[0].name = f"{name}.float32"
        cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
        graph.insert_before(first, cast)
        value.replace_all_uses_with(cast.outputs[0])
    for value in list(graph.initializers.values()):
        value.name = str(value.name).removeprefix(_PREFIX)  # integer and non-persistent buffers stay inside
