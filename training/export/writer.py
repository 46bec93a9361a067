"""From a torch network and a configuration to the files of a zoo entry.

An entry is written only if it passes the checks of `parity`. The graph is built in `torch_to_onnx`, the card in
`embedkit.authoring.card`; `from_run` makes the configuration of a training run.
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
from embedkit.errors import ConfigError
from embedkit.hub.folder import check_replaceable
from embedkit.hub.publish.index import update_index
from embedkit.images.transform import read_pixels
from embedkit.model.config import EntryConfig
from embedkit.model.layout import (
    CARD,
    CONFIG,
    ENTRY_NAME,
    GOLDEN,
    GRAPH,
    MANIFEST,
    SCHEMA_VERSION,
    WEIGHTS,
    sha256_hex,
)
from embedkit.model.manifest import Manifest
from embedkit.model.preprocess import Preprocess
from embedkit.training.export.parity import (
    BATCH_SIZES,
    PARITY_LIMIT,
    check_parity,
    check_timm,
    rounding_cost,
    torch_outputs,
)
from embedkit.training.export.torch_to_onnx import export_graph, holding, stored_state
from embedkit.training.methods import family_of

__all__ = ["timm_config", "update_index", "write_entry"]


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
            cannot. `provenance` gains the method's supervision, the cost of float16 rounding, the parity and the
            versions.
        samples: uint8 (S, C, H, W), S of 32 or more (64 by custom): pixels to measure and to compare on.
        images: uint8 (4, 48, 64, 3) for the golden vectors; synthetic ones by default.
        extra: Further files by name, such as a fitted mixture over the embeddings or an image for the card.

    Returns:
        The manifest as written.

    Raises:
        ConfigError: Name, network, samples and configuration do not fit together, or what lies at `folder` is
            not an entry alone.
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

    original = torch_outputs(holding(network, stored_state(network, torch.float32)), config, samples)
    stored = holding(network, stored_state(network, torch.float16))
    fits, cost = rounding_cost(torch_outputs(stored, config, samples), original)
    dtype = torch.float16 if fits else torch.float32
    state = stored_state(network, dtype)
    stored = holding(network, state)
    # One metadata key: several would be written in an order that changes from run to run.
    weights = save(state, {"format": "pt"})
    weights_sha256 = sha256_hex(weights)
    bound_to = config.metrics.get("weights_sha256", weights_sha256)
    if bound_to != weights_sha256:
        raise ConfigError(
            f"{folder.name}: the metrics were measured on weights {str(bound_to)[:12]}..., and these are "
            f"{weights_sha256[:12]}...: evaluate this encoder, or leave the metrics out"
        )
    versions = {"torch": torch.__version__, "onnx": onnx.__version__}
    about = {"schema": str(SCHEMA_VERSION), "method": config.method, "dim": str(config.dim), **versions}
    graph = export_graph(stored, preprocess, weights, {**about, "weights_sha256": weights_sha256})

    difference = check_parity(folder.name, graph, weights, stored, config, samples, golden_pixels)
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
        **torch_outputs(stored, config, golden_pixels),
        **{key: np.array(value, np.float32) for key, value in TOLERANCES.items()},
    }
    files = {
        CONFIG: (json.dumps(config.to_json(), indent=1) + "\n").encode(),
        WEIGHTS: weights,
        GRAPH: graph,
        CARD: render_card(folder.name, config, extra or {}).encode(),
        GOLDEN: npz_bytes(golden),
        **(extra or {}),
    }
    manifest = Manifest.encode(files)
    with replacing_folder(folder) as partial:
        for name, content in files.items():
            (partial / name).write_bytes(content)
        if config.timm:
            check_timm(folder.name, partial, stored, preprocess)
        (partial / MANIFEST).write_bytes(manifest)
    return Manifest.from_json(manifest)


def timm_config(
    network: nn.Module,
    preprocess: Preprocess,
    *,
    model_args: Mapping[str, Any],
    tag: str,
    license: str,
    head: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The top-level keys of `config.json` with which timm builds and feeds the network.

    Args:
        network: A timm network, with `num_classes=0` unless `head` is given.
        preprocess: The contract; `lab_l` has no timm counterpart and is described as `gray`.
        model_args: Whatever shapes the module, for `timm.create_model`; `global_pool` is added.
        tag: The data part of the entry's name.
        license: SPDX identifier.
        head: `num_classes`, and the name of the `classifier`, of a network with one.

    Returns:
        `num_classes`, `num_features`, `global_pool`, `model_args` and `pretrained_cfg`.
    """
    declared: Mapping[str, Any] = getattr(network, "pretrained_cfg", {})
    pool = getattr(network, "global_pool", "")
    pool = pool if isinstance(pool, str) else getattr(pool, "pool_type", "")
    # timm resizes the shorter side to size / crop_pct; its other two modes go straight to the size.
    shortest = preprocess.resize == "shortest"
    head = head or {"num_classes": 0}
    return {
        "num_classes": head["num_classes"],
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
            **head,
            "license": license.lower(),
        },
    }


def _check_request(folder: Path, network: nn.Module, config: EntryConfig, samples: np.ndarray) -> None:
    if not ENTRY_NAME.fullmatch(folder.name) or folder.name.partition("-")[0] != config.method:
        raise ConfigError(
            f"{folder.name!r}: expected the name {config.method}-<arch>.<data> in small letters"
        )
    logits = {"logits": (len(config.classes),)} if config.classes else {}
    if config.kind == "encoder" and config.outputs != {"embedding": (config.dim,), **logits}:
        given = (
            f"the outputs embedding and logits {logits['logits']}" if logits else "the one output embedding"
        )
        raise ConfigError(f"{folder.name}: expected an encoder with {given}, D = {config.dim}")
    wanted = {"detector": {"boxes", "scores"}, "landmarks": {"points"}}.get(
        config.kind, {"embedding", *logits}
    )
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
