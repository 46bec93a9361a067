"""What is judged: an entry or a run, and the baselines beside it. Each is a function from pictures to features.

An entry's features are what the runtime computes from its files; a run's, and the random network's, come from torch.
Pictures go through the preprocess contract either way, with JPEGs decoded at full scale.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from embedkit.encoder import Encoder, load_encoder, reason_of
from embedkit.errors import ConfigError, SourceError
from embedkit.hub.resolve import find_entry, is_path
from embedkit.model.layout import MANIFEST, MIXTURE, WEIGHTS
from embedkit.model.mixture import Mixture
from embedkit.model.preprocess import Preprocess
from embedkit.training import run
from embedkit.training.backbones import SHORT_NAMES, create_backbone
from embedkit.training.config import RunConfig
from embedkit.training.datasets import Source
from embedkit.training.graph import PixelEncoder
from embedkit.training.method import Method

__all__ = [
    "Features",
    "Subject",
    "device",
    "open_subject",
    "pca_features",
    "pixel_features",
    "random_features",
    "random_network",
]

SEED = 0
#: Longest side of the pixel baseline.
PIXELS = 32
#: Pictures that torch embeds at once.
BATCH = 256

#: A source and rows of it (N,) -> float32 (N, D), as the encoder gives them.
Features = Callable[[Source, np.ndarray], Tensor]


@dataclass(frozen=True)
class Subject:
    """An encoder that is judged.

    Attributes:
        name: The entry's, or the run's folder.
        preprocess: Its contract.
        features: What it computes.
        dim: Columns of the features, D.
        architecture: The timm name of its network, or a short name of ours.
        model_args: With which timm builds the network; None where an entry's `config.json` does not say.
        weights_sha256: Of an entry's weights; empty for a run.
        mixture: That an entry holds beside its encoder.
        trained: A run's configuration and method.
    """

    name: str
    preprocess: Preprocess
    features: Features
    dim: int
    architecture: str
    model_args: Mapping[str, Any] | None
    weights_sha256: str = ""
    mixture: Mixture | None = None
    trained: tuple[RunConfig, Method] | None = None


def open_subject(source: str | os.PathLike[str]) -> Subject:
    """Open an entry, by name or folder as `load_encoder` takes it, or a run's folder.

    Raises:
        EntryNotFoundError: No such entry.
        OutputError: A run's folder without a checkpoint.
    """
    place = Path(source)
    # A bare name is an entry's, whatever lies in the working directory.
    if is_path(os.fspath(source)) and (place / run.CONFIG).is_file() and not (place / MANIFEST).is_file():
        config, method = run.load_run(place)
        preprocess = config.data.preprocess(method.facts.mean, method.facts.std)
        network = method.encoder().eval()
        with torch.inference_mode():
            dim = network(torch.zeros(2, *method.facts.image_shape)).shape[1]
        return Subject(
            name=place.resolve().name,
            preprocess=preprocess,
            features=_torch_features(network, preprocess),
            dim=dim,
            architecture=method.backbone.architecture,
            model_args=method.backbone.model_args,
            trained=(config, method),
        )
    entry = find_entry(source)
    encoder = load_encoder(entry.location)
    return Subject(
        name=entry.name,
        preprocess=encoder.preprocess,
        features=_runtime_features(encoder),
        dim=encoder.dim,
        architecture=encoder.config.architecture,
        model_args=encoder.config.timm.get("model_args"),
        weights_sha256=entry.manifest.files[WEIGHTS].sha256,
        mixture=Mixture.of_entry(entry) if MIXTURE in entry.manifest.files else None,
    )


def random_network(
    architecture: str,
    model_args: Mapping[str, Any] | None,
    pixels: Tensor,
    preprocess: Preprocess,
    *,
    open_branches: bool,
    seed: int = SEED,
) -> nn.Module:
    """A network at random initialisation whose BatchNorm has the statistics of pictures.

    Args:
        architecture: A timm name, or a short name of ours.
        model_args: For `timm.create_model`; None for those that `create_backbone` chooses.
        pixels: uint8 (N, C, H, W), training pictures.
        preprocess: The contract that they obey.
        open_branches: Switch on the residual branches that start switched off (a BatchNorm scale of zero, as in
            timm's ResNets).
        seed: Of the weights.

    Returns:
        The network, in eval mode: normalised float32 (N, C, H, W) -> (N, D).

    Raises:
        ConfigError: timm has no such network.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if model_args is None:
            network = create_backbone(
                architecture, in_chans=preprocess.channels, image_size=preprocess.size
            ).net
        else:
            name = SHORT_NAMES.get(architecture, architecture)
            if not timm.is_model(name):
                raise ConfigError(f"backbone {architecture!r}: timm knows no network of this name")
            network = timm.create_model(name, num_classes=0, **model_args)
    encoder = PixelEncoder(network, preprocess).to(device())
    if open_branches:
        for norm in _closed(network):
            nn.init.ones_(norm.weight)
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
        norm.train()
    if norms:
        with torch.inference_mode():
            for part in pixels.split(BATCH):
                encoder(part.to(device()))
    return network.eval()


def random_features(subject: Subject, pixels: Tensor) -> tuple[Features, ...]:
    """The features of the subject's network before any training: what training adds is to be seen beside them.

    Args:
        subject: What the baseline stands beside.
        pixels: uint8 (N, C, H, W), training pictures.

    Returns:
        Of the network with all residual branches on; and of the network as it is created, where that differs.
        Neither is always the harder to beat: kNN of r10 on Fashion-MNIST 0.770 and 0.572, MAP@R of ResNet-50 on crops
        of photographs 0.103 and 0.426.

    Raises:
        ConfigError: timm has no such network.
    """

    def features(open_branches: bool) -> tuple[nn.Module, Features]:
        network = random_network(
            subject.architecture, subject.model_args, pixels, subject.preprocess, open_branches=open_branches
        )
        return network, _torch_features(network, subject.preprocess)

    created, plain = features(False)
    return (features(True)[1], plain) if _closed(created) else (plain,)


def pixel_features(preprocess: Preprocess) -> Features:
    """The pixels of the contract as a row in [0, 1]; where a side has more than 32, means over areas of them."""
    height, width = (
        max(1, round(side * min(1.0, PIXELS / max(preprocess.size)))) for side in preprocess.size
    )

    def features(source: Source, rows: np.ndarray) -> Tensor:
        parts = (source.decode(part, preprocess) for part in _parts(rows, BATCH))
        return torch.cat([F.adaptive_avg_pool2d(x.float() / 255, (height, width)).flatten(1) for x in parts])

    return features


def pca_features(preprocess: Preprocess, dim: int, source: Source, rows: np.ndarray) -> Features:
    """The principal components of those pixels, fitted on training pictures: what a linear encoder can do.

    Args:
        preprocess: The contract.
        dim: Components, at most; fewer where there are fewer pixels or pictures.
        source: The training part.
        rows: Which pictures of it to fit on.
    """
    pixels = pixel_features(preprocess)
    fitted = pixels(source, rows).double()
    center = fitted.mean(0)
    dim = min(dim, *fitted.shape)
    components = torch.linalg.eigh((fitted - center).T @ (fitted - center))[1].flip(1)[:, :dim]

    def features(source: Source, rows: np.ndarray) -> Tensor:
        return torch.cat(
            [((pixels(source, part).double() - center) @ components).float() for part in _parts(rows, 4096)]
        )

    return features


def device() -> torch.device:
    """Where torch computes features."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _closed(network: nn.Module) -> list[_BatchNorm]:
    """Norms that switch a branch off."""
    return [
        module
        for module in network.modules()
        if isinstance(module, _BatchNorm) and module.affine and not module.weight.any()
    ]


def _runtime_features(encoder: Encoder) -> Features:
    def features(source: Source, rows: np.ndarray) -> Tensor:
        size = encoder.default_batch_size
        parts = _parts(rows, size)
        pictures = ([source.read(int(row)) for row in part] for part in parts)
        blocks: list[np.ndarray] = []
        # batches of one size, so that a row does not depend on which others are asked for
        with closing(encoder.flow(pictures, normalize=False, decode="exact", pad_to=size)) as flow:
            for part, (block, faults) in zip(parts, flow, strict=True):
                if faults:
                    index = min(faults)
                    where = source.where(int(part[index]))
                    raise SourceError(f"{where}: {reason_of(faults[index])}; mend or remove it")
                blocks.append(block)
        return torch.from_numpy(np.concatenate(blocks))

    return features


def _torch_features(network: nn.Module, preprocess: Preprocess) -> Features:
    # (N, H, W, C) memory: several times faster for convolutions on a CPU
    encoder = PixelEncoder(network.eval(), preprocess).to(device(), memory_format=torch.channels_last)

    def features(source: Source, rows: np.ndarray) -> Tensor:
        blocks = []
        with torch.inference_mode():
            for part in _parts(rows, BATCH):
                pixels = source.decode(part, preprocess).to(device(), memory_format=torch.channels_last)
                blocks.append(encoder(pixels).float().cpu())
        return torch.cat(blocks)

    return features


def _parts(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]
