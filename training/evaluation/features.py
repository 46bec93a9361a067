"""The model that is evaluated, an entry or a run, as a function from images to features.

The runtime computes an entry's features from its files, torch those of a run. Images go through the preprocess
contract either way, with JPEGs decoded at full scale.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from embedkit.encoder import Encoder, load_encoder, reason_of
from embedkit.errors import ConfigError, SourceError
from embedkit.hub.resolve import find_entry, is_path
from embedkit.model.layout import MANIFEST, MIXTURE, WEIGHTS
from embedkit.model.mixture import GaussianMixture
from embedkit.model.preprocess import Preprocess
from embedkit.training.build import build_method
from embedkit.training.config import Facts, RunConfig, from_json
from embedkit.training.data.source import Source
from embedkit.training.export.torch_to_onnx import PixelEncoder
from embedkit.training.method import Method
from embedkit.training.models.backbones import SHORT_NAMES, create_backbone
from embedkit.training.run_folder import CONFIG as RUN_CONFIG
from embedkit.training.run_folder import load_run

__all__ = [
    "SEED",
    "EvaluatedModel",
    "Features",
    "device",
    "open_model",
    "parts_of",
    "timm_network",
    "torch_features",
]

SEED = 0
#: Images that torch embeds at once.
BATCH = 256

#: A source and rows of it (N,) -> float32 (N, D), as the encoder gives them.
Features = Callable[[Source, np.ndarray], Tensor]


@dataclass(frozen=True)
class EvaluatedModel:
    """An encoder that is evaluated.

    Attributes:
        name: The entry's, or the run's folder.
        preprocess: Its contract.
        features: What it computes.
        dim: Columns of the features, D.
        architecture: The timm name of its network, or a short name of ours.
        model_args: With which timm builds the network; None where an entry's `config.json` does not say.
        create: Makes the exported encoder at random initialization, with the layers that the method put behind its
            backbone, or up to the stage that it exports.
        recreated: False where `create` makes only the network that the encoder was trained from.
        weights_sha256: Of an entry's weights; empty for a run.
        mixture: The fitted mixture of an entry that has one.
        trained: A run's configuration and method.
    """

    name: str
    preprocess: Preprocess
    features: Features
    dim: int
    architecture: str
    model_args: Mapping[str, Any] | None
    create: Callable[[], nn.Module]
    recreated: bool = True
    weights_sha256: str = ""
    mixture: GaussianMixture | None = None
    trained: tuple[RunConfig, Method] | None = None


def open_model(source: str | os.PathLike[str]) -> EvaluatedModel:
    """Open an entry, by name or folder as `load_encoder` takes it, or a run's folder.

    Raises:
        EntryNotFoundError: No such entry.
        OutputError: A run's folder without a checkpoint.
    """
    folder = Path(source)
    # A bare name is an entry's, even where the working directory has a folder of that name.
    if (
        is_path(os.fspath(source))
        and os.path.isfile(folder / RUN_CONFIG)
        and not os.path.isfile(folder / MANIFEST)
    ):
        config, method = load_run(folder)
        preprocess = config.data.preprocess(method.facts.mean, method.facts.std)
        network = method.encoder().eval()
        dim = _width(network, method.facts)
        return EvaluatedModel(
            name=folder.resolve().name,
            preprocess=preprocess,
            features=torch_features(network, preprocess),
            dim=dim,
            architecture=getattr(method.backbone, "architecture", config.backbone),
            model_args=getattr(method.backbone, "model_args", None),
            create=lambda: _initial_encoder(config, method.facts),
            trained=(config, method),
        )
    entry = find_entry(source)
    encoder = load_encoder(entry.location)
    create, recreated = _creator(encoder)
    return EvaluatedModel(
        name=entry.name,
        preprocess=encoder.preprocess,
        features=_runtime_features(encoder),
        dim=encoder.dim,
        architecture=encoder.config.architecture,
        model_args=encoder.config.timm.get("model_args"),
        create=create,
        recreated=recreated,
        weights_sha256=entry.manifest.files[WEIGHTS].sha256,
        mixture=GaussianMixture._of_entry(entry) if MIXTURE in entry.manifest.files else None,
    )


def _initial_encoder(config: RunConfig, facts: Facts) -> nn.Module:
    """The encoder of a method before its training, from torch's global generator."""
    return build_method(replace(config, seed=torch.initial_seed()), facts).encoder()


def _creator(encoder: Encoder) -> tuple[Callable[[], nn.Module], bool]:
    """How to create an entry's encoder: from the configuration of its run, else as the timm network that it names."""
    config, contract = encoder.config, encoder.preprocess
    stored = config.provenance.get("run")
    if stored and not config.timm:  # more than a timm network
        try:
            trained = from_json(stored)
            facts = Facts(
                image_shape=(contract.channels, *contract.size),
                mean=contract.mean,
                std=contract.std,
                num_classes=2,  # classifiers are not exported
                num_images=1,
                batch_size=2,
                steps_per_epoch=1,
                total_steps=1,
            )
            if _width(_initial_encoder(trained, facts), facts) == encoder.dim:
                return lambda: _initial_encoder(trained, facts), True
        except (ConfigError, AttributeError, TypeError):
            pass  # a run of an older or a newer version
    args = config.timm.get("model_args")
    return lambda: timm_network(config.architecture, args, contract), bool(config.timm)


def _width(network: nn.Module, facts: Facts) -> int:
    with torch.inference_mode():
        return network.eval()(torch.zeros(2, *facts.image_shape)).shape[1]


def device() -> torch.device:
    """Where torch computes features."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def timm_network(
    architecture: str, model_args: Mapping[str, Any] | None, preprocess: Preprocess
) -> nn.Module:
    """A network by its timm name, or a short name of ours, at random initialization.

    Args:
        architecture: The name.
        model_args: For `timm.create_model`; None for those that `create_backbone` chooses.
        preprocess: The contract, for its channels and size.

    Raises:
        ConfigError: timm has no such network.
    """
    if model_args is None:
        return create_backbone(architecture, in_chans=preprocess.channels, image_size=preprocess.size).net
    name = SHORT_NAMES.get(architecture, architecture)
    if not timm.is_model(name):
        raise ConfigError(f"backbone {architecture!r}: timm has no network of this name")
    return timm.create_model(name, num_classes=0, **model_args)


def _runtime_features(encoder: Encoder) -> Features:
    def features(source: Source, rows: np.ndarray) -> Tensor:
        size = encoder.default_batch_size
        parts = parts_of(rows, size)
        images = ([source.read(int(row)) for row in part] for part in parts)
        blocks: list[np.ndarray] = []
        # batches of one size, so that a row does not depend on which others are asked for
        with closing(encoder._flow(images, normalize=False, decode="exact", pad_to=size)) as flow:
            for part, (block, faults) in zip(parts, flow, strict=True):
                if faults:
                    index = min(faults)
                    where = source.where(int(part[index]))
                    raise SourceError(f"{where}: {reason_of(faults[index])}; fix or remove it")
                blocks.append(block)
        return torch.from_numpy(np.concatenate(blocks))

    return features


def torch_features(network: nn.Module, preprocess: Preprocess) -> Features:
    """What a network computes from normalized images, on the device of torch."""
    # (N, H, W, C) memory: several times faster for convolutions on a CPU
    encoder = PixelEncoder(network.eval(), preprocess).to(device(), memory_format=torch.channels_last)

    def features(source: Source, rows: np.ndarray) -> Tensor:
        blocks = []
        with torch.inference_mode():
            for part in parts_of(rows, BATCH):
                pixels = source.decode(part, preprocess).to(device(), memory_format=torch.channels_last)
                blocks.append(encoder(pixels).float().cpu())
        return torch.cat(blocks)

    return features


def parts_of(rows: np.ndarray, size: int) -> list[np.ndarray]:
    """`rows` in parts of up to `size`."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]
