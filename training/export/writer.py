"""The writer of zoo entries, and its gates.

Nothing is written unless ONNX Runtime, loading the entry as the runtime does, and torch, both holding the
stored weights, agree to 1e-4 on L2-normalized rows (on boxes, scores and points as they are), rows do not
depend on their batch, and timm loads the folder strictly. The graph is built in `torch_to_onnx`, the card
in `card`; what a training run knows becomes a configuration in `from_run`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from safetensors.torch import save
from torch import nn

from embedkit._io.atomic import replacing_folder
from embedkit.authoring.card import render_card
from embedkit.authoring.golden import TOLERANCES, npz_bytes, synthetic_images
from embedkit.authoring.onnx_export import standalone
from embedkit.encoder import comparable
from embedkit.errors import ConfigError, ParityError
from embedkit.hub.folder import check_replaceable
from embedkit.hub.publish.index import update_index
from embedkit.images.transform import read_pixels
from embedkit.model.config import EntryConfig
from embedkit.model.engines.onnx import OnnxEngine
from embedkit.model.layout import (
    CARD,
    CONFIG,
    ENTRY_NAME,
    GOLDEN,
    GRAPH,
    MANIFEST,
    MIXTURE,
    SCHEMA_VERSION,
    WEIGHTS,
    sha256_hex,
)
from embedkit.model.manifest import Manifest
from embedkit.model.preprocess import Preprocess
from embedkit.model.providers import EngineOptions
from embedkit.training.export.torch_to_onnx import PixelEncoder, export_graph, holding, stored_state
from embedkit.training.methods import family_of

__all__ = ["standalone", "timm_config", "update_index", "write_entry"]

#: Below this cosine between an embedding of the float16 and of the original weights, float32 is stored.
FLOAT16_COSINE = 0.9999
#: The same for other outputs: above one of these absolute differences float32 is stored. Boxes and points are shares
#: of the input's side (a thousandth is half a pixel of 512), scores lie in [0, 1]; boxes count whose score reaches
#: `BOX_SCORE`, since nobody reads the others. A twentieth of a score and 2.5 pixels of 512 lose or find no face that
#: was not on the edge.
FLOAT16_DIFFERENCE = {"boxes": 5e-3, "scores": 0.05, "points": 1e-3}
BOX_SCORE = 0.1
#: ONNX Runtime against torch, largest absolute difference on L2-normalized rows.
PARITY_LIMIT = 1e-4
#: One image's row in batches of these sizes, largest absolute difference on L2-normalized rows.
BATCH_LIMIT, BATCH_SIZES = 1e-6, (1, 2, 7, 32)


def write_entry(
    folder: Path,
    *,
    network: nn.Module,
    config: EntryConfig,
    samples: np.ndarray,
    images: np.ndarray | None = None,
    extra: Mapping[str, bytes] | None = None,
) -> Manifest:
    """Write one entry of the zoo, whole or not at all; an entry of the same name is replaced, and nothing else is.

    Args:
        folder: `<zoo>/<method>-<arch>.<data>`.
        network: The encoder alone, in eval mode: normalized float32 (N, C, H, W) -> (N, D); of another kind,
            -> the configuration's outputs by name. Its state-dict names are the names in `model.safetensors`.
        config: What it is. `timm` (see `timm_config`) must build the same module, or be empty when timm
            cannot. `provenance` gains what the method learns from, what float16 rounding cost, the parity and the
            versions.
        samples: uint8 (S, C, H, W), S of 32 or more (64 by custom): pixels to measure and to compare on.
        images: uint8 (4, 48, 64, 3) for the golden vectors; synthetic ones by default.
        extra: Further files by name, such as a fitted mixture over the embeddings.

    Returns:
        The manifest as written.

    Raises:
        ConfigError: Name, network, samples and configuration do not fit together, or what lies in the place is not
            an entry alone.
        EntryError: The network cannot be stored this way: a tensor outside the graph, or a graph above 1 MB.
        ParityError: ONNX Runtime, torch and timm do not agree.
        OutputError: The folder cannot be written.
    """
    _check_request(folder, network, config, samples)
    check_replaceable(folder)
    preprocess = config.preprocess
    if images is None:
        images = synthetic_images(4)
    golden_pixels = np.stack([read_pixels(image, preprocess, decode="exact") for image in images])

    original = _outputs(holding(network, stored_state(network, torch.float32)), config, samples)
    stored = holding(network, stored_state(network, torch.float16))
    fits, cost = _rounding(_outputs(stored, config, samples), original)
    dtype = torch.float16 if fits else torch.float32
    state = stored_state(network, dtype)
    stored = holding(network, state)
    # One metadata key: several would be written in an order that changes from run to run.
    weights = save(state, {"format": "pt"})
    weights_sha256 = sha256_hex(weights)
    bound_to = config.metrics.get("weights_sha256", weights_sha256)
    if bound_to != weights_sha256:
        raise ConfigError(
            f"{folder.name}: the figures were measured on weights {str(bound_to)[:12]}..., and these are "
            f"{weights_sha256[:12]}...: evaluate this encoder, or leave the figures out"
        )
    versions = {"torch": torch.__version__, "onnx": onnx.__version__}
    about = {"schema": str(SCHEMA_VERSION), "method": config.method, "dim": str(config.dim), **versions}
    graph = export_graph(stored, preprocess, weights, {**about, "weights_sha256": weights_sha256})

    difference = _check_parity(folder.name, graph, weights, stored, config, samples, golden_pixels)
    family = family_of(config.method)
    config = dataclasses.replace(
        config,
        provenance={
            **({"family": family} if family else {}),
            **config.provenance,
            "stored": {
                "dtype": str(dtype).removeprefix("torch."),
                **cost,
                "images": len(samples),
            },
            "parity": {"max_difference": float(f"{difference:.1e}"), "limit": PARITY_LIMIT},
            "versions": versions,
        },
    )
    golden = {
        "images": images,
        **_outputs(stored, config, golden_pixels),
        **{key: np.array(value, np.float32) for key, value in TOLERANCES.items()},
    }
    files = {
        CONFIG: (json.dumps(config.to_json(), indent=1) + "\n").encode(),
        WEIGHTS: weights,
        GRAPH: graph,
        CARD: render_card(folder.name, config, mixture=MIXTURE in (extra or {})).encode(),
        GOLDEN: npz_bytes(golden),
        **(extra or {}),
    }
    manifest = Manifest.encode(files)
    with replacing_folder(folder) as partial:
        for name, content in files.items():
            (partial / name).write_bytes(content)
        if config.timm:
            _check_timm(folder.name, partial, stored, preprocess)
        (partial / MANIFEST).write_bytes(manifest)
    return Manifest.from_json(manifest)


def timm_config(
    network: nn.Module, preprocess: Preprocess, *, model_args: Mapping[str, Any], tag: str, license: str
) -> dict[str, Any]:
    """The top-level keys of `config.json` with which timm builds and feeds the network.

    Args:
        network: A timm network with `num_classes=0`.
        preprocess: The contract; `lab_l` has no timm counterpart and is described as `gray`.
        model_args: Whatever shapes the module, for `timm.create_model`; `global_pool` is added.
        tag: The data part of the entry's name.
        license: SPDX identifier.

    Returns:
        `num_classes`, `num_features`, `global_pool`, `model_args` and `pretrained_cfg`.
    """
    declared: Mapping[str, Any] = getattr(network, "pretrained_cfg", {})
    pool = getattr(network, "global_pool", "")
    pool = pool if isinstance(pool, str) else getattr(pool, "pool_type", "")
    # timm resizes the shorter side to size / crop_pct; its other two modes go straight to the size.
    shortest = preprocess.resize == "shortest"
    return {
        "num_classes": 0,
        "num_features": getattr(network, "num_features", 0),
        **({"global_pool": pool} if pool else {}),
        "model_args": {**({"global_pool": pool} if pool else {}), **model_args},
        "pretrained_cfg": {
            "tag": tag,
            "custom_load": False,
            "input_size": [preprocess.channels, *preprocess.size],
            "fixed_input_size": bool(declared.get("fixed_input_size", False)),
            "interpolation": preprocess.interpolation,
            "crop_pct": max(preprocess.size) / preprocess.resize_size if shortest else 1.0,
            "crop_mode": {"shortest": "center", "longest": "border", "squash": "squash"}[preprocess.resize],
            "mean": list(preprocess.mean),
            "std": list(preprocess.std),
            "num_classes": 0,
            "license": license.lower(),
        },
    }


def _check_request(folder: Path, network: nn.Module, config: EntryConfig, samples: np.ndarray) -> None:
    if not ENTRY_NAME.fullmatch(folder.name) or folder.name.partition("-")[0] != config.method:
        raise ConfigError(
            f"{folder.name!r}: expected the name {config.method}-<arch>.<data> in small letters"
        )
    if config.kind == "encoder" and config.outputs != {"embedding": (config.dim,)}:
        raise ConfigError(f"{folder.name}: expected an encoder with the one output embedding ({config.dim},)")
    wanted = {"detector": {"boxes", "scores"}, "landmarks": {"points"}}.get(config.kind, {"embedding"})
    if set(config.outputs) != wanted:
        raise ConfigError(
            f"{folder.name}: expected of a {config.kind} the outputs {', '.join(sorted(wanted))}"
        )
    EntryConfig.from_json(json.dumps(config.to_json()))  # what cannot be read back is not written
    training = [name or "the network" for name, module in network.named_modules() if module.training]
    if training:
        raise ConfigError(f"{folder.name}: {training[0]} is in train mode; call network.eval() first")
    expected = (config.preprocess.channels, *config.preprocess.size)
    if samples.dtype != np.uint8 or samples.shape[1:] != expected or len(samples) < max(BATCH_SIZES):
        raise ConfigError(
            f"{folder.name}: samples: expected uint8 (N, {', '.join(map(str, expected))}) with N of "
            f"{max(BATCH_SIZES)} or more, found {samples.dtype} {samples.shape}"
        )


def _outputs(network: nn.Module, config: EntryConfig, pixels: np.ndarray) -> dict[str, np.ndarray]:
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
        with np.errstate(
            invalid="ignore"
        ):  # weights beyond float16 give infinite rows, which no gate lets through
            outputs[name] = comparable(name, rows)
    return outputs


def _rounding(
    found: Mapping[str, np.ndarray], original: Mapping[str, np.ndarray]
) -> tuple[bool, dict[str, Any]]:
    """Whether float16 weights do, and what they cost: cosines of an embedding, differences of other outputs."""
    # Written so that a NaN (a weight beyond float16's 65504) also means float32.
    if "embedding" in original:
        cosines = np.einsum("nd,nd->n", found["embedding"], original["embedding"], dtype=np.float64)
        return bool(cosines.min() >= FLOAT16_COSINE), {
            "min_cosine": _rounded(cosines.min()),
            "mean_cosine": _rounded(cosines.mean()),
            "threshold": FLOAT16_COSINE,
        }
    limits = {name: FLOAT16_DIFFERENCE[name] for name in original}
    moved = {name: np.abs(found[name] - rows) for name, rows in original.items()}
    if "boxes" in moved:
        moved["boxes"] = moved["boxes"][original["scores"] >= BOX_SCORE]
    most = {name: float(rows.max()) if rows.size else 0.0 for name, rows in moved.items()}
    return all(most[name] <= limit for name, limit in limits.items()), {
        "max_difference": {name: _rounded(np.float64(value)) for name, value in most.items()},
        "threshold": limits,
    }


def _check_parity(
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
                _difference(run(pixels, max(BATCH_SIZES)), _outputs(network, config, pixels))
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


def _check_timm(name: str, folder: Path, network: nn.Module, preprocess: Preprocess) -> None:
    """Load the folder with timm, strictly, and hold the result against the network.

    Raises:
        ParityError: timm refuses, or builds another function.
    """
    import timm

    try:
        loaded = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise ParityError(
            f"{name}: timm does not load what config.json and {WEIGHTS} say ({str(error)[:300]}); fix "
            "config.timm, or leave it empty; nothing was written"
        ) from error
    pixels = torch.zeros((2, preprocess.channels, *preprocess.size))
    pixels += torch.linspace(-2, 2, preprocess.size[1])
    with torch.inference_mode():
        found, expected = loaded(pixels), network(pixels)
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-4, atol=1e-5):
        raise ParityError(
            f"{name}: timm loads another function than the one exported: give in config.timm's model_args "
            "whatever shapes the module; nothing was written"
        )


def _rounded(cosine: np.floating) -> float | None:
    """Seven decimals; None (JSON's null) where rounding overflowed."""
    return round(float(cosine), 7) if np.isfinite(cosine) else None
