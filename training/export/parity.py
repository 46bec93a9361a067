"""The checks that an entry passes before it is written: rounding, ONNX Runtime against torch, and timm.

ONNX Runtime, loading the entry as the runtime does, and torch, both holding the stored weights, agree to 1e-4 on
L2-normalized rows (on boxes, scores and points as they are); a row does not depend on its batch; timm loads the folder
strictly and gives the same features.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from embedkit._io.text import one_line
from embedkit.encoder import comparable
from embedkit.errors import ConfigError, ParityError
from embedkit.model.config import EntryConfig
from embedkit.model.engines.onnx import OnnxEngine
from embedkit.model.layout import WEIGHTS
from embedkit.model.preprocess import Preprocess
from embedkit.model.providers import EngineOptions
from embedkit.training.export.torch_to_onnx import PixelEncoder

__all__ = ["BATCH_SIZES", "PARITY_LIMIT", "check_parity", "check_timm", "rounding_cost", "torch_outputs"]

#: Below this cosine between an embedding of the float16 and of the original weights, float32 is stored.
FLOAT16_COSINE = 0.9999
#: The same for other outputs: above one of these absolute differences float32 is stored. Boxes and points are shares
#: of the input's side (a thousandth is half a pixel of 512), scores lie in [0, 1]; only boxes whose score
#: reaches `BOX_SCORE` are compared. A twentieth of a score and 2.5 pixels of 512 change no detection that was not
#: at the threshold. Of logits the probabilities are compared.
FLOAT16_DIFFERENCE = {"boxes": 5e-3, "scores": 0.05, "points": 1e-3, "logits": 0.01}
BOX_SCORE = 0.1
#: ONNX Runtime against torch, largest absolute difference on L2-normalized rows.
PARITY_LIMIT = 1e-4
#: One image's row in batches of these sizes, largest absolute difference on L2-normalized rows.
BATCH_LIMIT, BATCH_SIZES = 1e-6, (1, 2, 7, 32)


def torch_outputs(network: nn.Module, config: EntryConfig, pixels: np.ndarray) -> dict[str, np.ndarray]:
    """By torch, each output for uint8 (N, C, H, W): float32 (N, ...), the embedding L2-normalized."""
    encoder = PixelEncoder(network, config.preprocess)
    blocks: list[dict[str, torch.Tensor]] = []
    with torch.inference_mode():
        # In parts: activations of 64 large images would not fit everywhere.
        for part in torch.from_numpy(pixels).split(16):
            given = encoder(part)
            blocks.append(given if isinstance(given, dict) else {"embedding": given})
    if sorted(blocks[0]) != sorted(config.outputs):
        raise ConfigError(
            f"outputs: the configuration says {', '.join(sorted(config.outputs))}, and the network gives "
            f"{', '.join(sorted(blocks[0]))}"
        )
    outputs: dict[str, np.ndarray] = {}
    for name, shape in config.outputs.items():
        rows = torch.cat([block[name] for block in blocks]).numpy()
        if rows.shape[1:] != shape:
            said, found = ("x".join(map(str, each)) for each in (shape, rows.shape[1:]))
            raise ConfigError(
                f"outputs.{name}: the configuration says {said}, and the network gives {found} an image"
            )
        # Weights beyond float16 give infinite rows, which no check accepts.
        with np.errstate(invalid="ignore"):
            outputs[name] = comparable(name, rows)
    return outputs


def rounding_cost(
    found: Mapping[str, np.ndarray], original: Mapping[str, np.ndarray]
) -> tuple[bool, dict[str, Any]]:
    """Whether float16 weights are accurate enough, and their cost: cosines of an embedding, else differences."""
    # Written so that a NaN (a weight beyond float16's 65504) also means float32.
    if "embedding" in original:
        cosines = np.einsum("nd,nd->n", found["embedding"], original["embedding"], dtype=np.float64)
        moved = np.abs(found["logits"] - original["logits"]).max() if "logits" in original else np.float64(0)
        return bool(cosines.min() >= FLOAT16_COSINE and moved <= FLOAT16_DIFFERENCE["logits"]), {
            "min_cosine": _rounded(cosines.min()),
            "mean_cosine": _rounded(cosines.mean()),
            "threshold": FLOAT16_COSINE,
            **({"probability_difference": _rounded(moved)} if "logits" in original else {}),
        }
    limits = {name: FLOAT16_DIFFERENCE[name] for name in original}
    differences = {name: np.abs(found[name] - rows) for name, rows in original.items()}
    if "boxes" in differences:
        differences["boxes"] = differences["boxes"][original["scores"] >= BOX_SCORE]
    most = {name: float(rows.max()) if rows.size else 0.0 for name, rows in differences.items()}
    return all(most[name] <= limit for name, limit in limits.items()), {
        "max_difference": {name: _rounded(np.float64(value)) for name, value in most.items()},
        "threshold": limits,
    }


def check_parity(
    name: str,
    graph: bytes,
    weights: bytes,
    network: nn.Module,
    config: EntryConfig,
    samples: np.ndarray,
    golden_pixels: np.ndarray,
) -> float:
    """The largest difference between ONNX Runtime and torch on the samples and the golden images.

    Raises:
        ParityError: Above the limit, not finite, or dependent on the batch.
    """
    engine = OnnxEngine(
        graph, weights, EngineOptions(device="cpu"), where=name, outputs=tuple(config.outputs)
    )

    def run(pixels: np.ndarray, size: int) -> dict[str, np.ndarray]:
        parts = [engine.run_all(pixels[start : start + size]) for start in range(0, len(pixels), size)]
        return {
            output: comparable(output, np.concatenate([part[output] for part in parts]))
            for output in config.outputs
        }

    # Not max(), which passes over a NaN.
    difference = float(
        np.max(
            [
                _difference(run(pixels, max(BATCH_SIZES)), torch_outputs(network, config, pixels))
                for pixels in (samples, golden_pixels)
            ]
        )
    )
    if not difference <= PARITY_LIMIT:
        raise ParityError(
            f"{name}: ONNX Runtime and torch differ by {difference:.1e} on L2-normalized rows or other outputs, and "
            f"{PARITY_LIMIT:.0e} is allowed: look for an operator that differs in ONNX; nothing was written"
        )
    some = samples[: max(BATCH_SIZES)]
    rows = [run(some, size) for size in BATCH_SIZES]
    spread = float(np.max([_difference(other, rows[-1]) for other in rows]))
    if not spread <= BATCH_LIMIT:
        raise ParityError(
            f"{name}: a row changes by {spread:.1e} with the size of its batch, and {BATCH_LIMIT:.0e} is "
            "allowed: look for an operator over the batch axis; nothing was written"
        )
    return difference


def _difference(left: Mapping[str, np.ndarray], right: Mapping[str, np.ndarray]) -> float:
    """Largest absolute difference over the outputs; NaN where either holds one."""
    return float(np.max([np.abs(left[name] - right[name]).max() for name in right]))


def check_timm(name: str, folder: Path, network: nn.Module, preprocess: Preprocess) -> None:
    """Load the folder with timm, strictly, and compare the result with the network.

    Raises:
        ParityError: timm refuses, or builds another function.
    """
    import timm

    try:
        loaded = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
        whole = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise ParityError(
            f"{name}: timm does not load what config.json and {WEIGHTS} say ({one_line(error, 300)}); fix "
            "config.timm, or leave it empty; nothing was written"
        ) from error
    pixels = torch.zeros((2, preprocess.channels, *preprocess.size))
    pixels += torch.linspace(-2, 2, preprocess.size[1])
    with torch.inference_mode():
        outputs = network(pixels)
        if isinstance(outputs, dict):
            pairs = [(loaded(pixels), outputs["embedding"]), (whole(pixels), outputs["logits"])]
        else:
            pairs = [(loaded(pixels), outputs)]
    if any(
        found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
        for found, expected in pairs
    ):
        raise ParityError(
            f"{name}: timm loads another function than the one exported: give in config.timm's model_args "
            "whatever shapes the module; nothing was written"
        )


def _rounded(cosine: np.floating) -> float | None:
    """Seven decimals; None (JSON's null) where rounding overflowed."""
    return round(float(cosine), 7) if np.isfinite(cosine) else None
