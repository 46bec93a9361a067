"""Whether an entry runs as fast as a plain float32 export of the same network.

The entry's graph takes float16 weights from outside and casts them; the plain one is what torch.onnx writes by
itself, with float32 weights inside. Both run through ONNX Runtime on one thread, in turns, in one process.

    python benchmarks/graph.py [r10 r50 lite0 vit_t4] [--runs 20] [--milliseconds 50]

Weights are random: speed does not depend on them.
"""

import argparse
import datetime
import platform
import statistics
import time

import numpy as np
import onnxruntime as ort
import timm
import torch
from safetensors.torch import save

from embedkit.model.engines.onnx import OnnxEngine
from embedkit.model.preprocess import Preprocess
from embedkit.model.providers import EngineOptions
from embedkit.training.export.torch_to_onnx import OPSET, PixelEncoder, export_graph, holding, stored_state
from embedkit.training.models.backbones import create_backbone

#: Name -> channels, side in pixels, batch size.
NETWORKS = {"r10": (1, 28, 64), "r50": (3, 224, 1), "lite0": (3, 224, 4), "vit_t4": (1, 28, 8)}


def build(name: str) -> torch.nn.Module:
    channels, side, _ = NETWORKS[name]
    torch.manual_seed(0)
    if name == "lite0":
        return timm.create_model("tf_efficientnet_lite0", num_classes=0).eval()
    return create_backbone(name, in_chans=channels, image_size=side).net.eval()


def plain_export(encoder: torch.nn.Module, example: torch.Tensor) -> bytes:
    program = torch.onnx.export(
        encoder,
        (example,),
        dynamo=True,
        opset_version=OPSET,
        input_names=["pixels"],
        output_names=["embedding"],
        dynamic_shapes={"pixels": {0: torch.export.Dim("batch")}},
        verbose=False,
    )
    return program.model_proto.SerializeToString()


def plain_session(model: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def seconds(run, times: int) -> float:
    begin = time.perf_counter()
    for _ in range(times):
        run()
    return time.perf_counter() - begin


def compare(name: str, runs: int, milliseconds: float) -> str:
    channels, side, batch = NETWORKS[name]
    preprocess = Preprocess(size=(side, side), resize="squash", color="rgb" if channels == 3 else "gray",
                            mean=(0.5,) * channels, std=(0.5,) * channels)  # fmt: skip
    state = stored_state(build(name), torch.float16)
    network = holding(build(name), state)
    weights = save(state, {"format": "pt"})
    graph = export_graph(network, preprocess, weights, {})
    pixels = np.random.default_rng(0).integers(0, 256, (batch, channels, side, side), np.uint8)
    plain_bytes = plain_export(PixelEncoder(network, preprocess), torch.from_numpy(pixels[:2]))

    begin = time.perf_counter()
    engine = OnnxEngine(graph, weights, EngineOptions(device="cpu"))
    load = time.perf_counter() - begin
    session = plain_session(plain_bytes)
    forms = {
        "entry": lambda: engine.run(pixels),
        "plain": lambda: session.run(["embedding"], {"pixels": pixels})[0],
    }
    apart = float(np.abs(forms["entry"]() - forms["plain"]()).max())
    once = min(seconds(run, 1) for run in forms.values() for _ in range(10))
    times = max(1, int(np.ceil(1.2 * milliseconds / 1000 / once)))
    taken: dict[str, list[float]] = {"entry": [], "plain": []}
    for turn in range(runs):
        for form in ("entry", "plain") if turn % 2 else ("plain", "entry"):
            taken[form].append(seconds(forms[form], times))
    entry, plain = (statistics.median(taken[form]) for form in ("entry", "plain"))
    rate = batch * times
    return (
        f"| {name} | {batch}x{channels}x{side}x{side} | {rate / entry:.0f} | {rate / plain:.0f} | "
        f"{entry / plain:.3f} | {min(taken['entry']) / min(taken['plain']):.3f} | {1e3 * min(taken['plain']):.0f} | "
        f"{len(graph) / 1e3:.0f} | {len(weights) / 1e6:.1f} | {len(plain_bytes) / 1e6:.1f} | {1e3 * load:.0f} | "
        f"{apart:.0e} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="The entry's graph against a plain float32 export.")
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), metavar="network")
    parser.add_argument("--runs", type=int, default=20, help="interleaved runs of each form")
    parser.add_argument("--milliseconds", type=float, default=50, help="shortest duration of one run")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.networks) - set(NETWORKS))
    if unknown:
        parser.error(f"{unknown[0]} is not one of {', '.join(NETWORKS)}")
    print(
        f"{datetime.date.today()}, {platform.machine()}, Python {platform.python_version()}, torch "
        f"{torch.__version__}, onnxruntime {ort.__version__}, one thread, {arguments.runs} interleaved runs\n"
    )
    print("| network | batch | entry, images/s | plain, images/s | ratio of medians | ratio of fastest |"
          " shortest run, ms | graph, kB | weights, MB | plain file, MB | load, ms | largest difference |")  # fmt: skip
    print("|" + "---|" * 12)
    for name in arguments.networks:
        print(compare(name, arguments.runs, arguments.milliseconds), flush=True)


if __name__ == "__main__":
    main()
