"""What is judged: an entry or a run, and the baselines beside it. Each is a function from images to features.

An entry's features are what the runtime computes from its files; a run's, and the random network's, come from torch.
Images go through the preprocess contract either way, with JPEGs decoded at full scale.
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
from embedkit.training.config import Facts, RunConfig, from_json
from embedkit.training.data.datasets import Source
from embedkit.training.export.torch_to_onnx import PixelEncoder
from embedkit.training.method import Method
from embedkit.training.models.backbones import SHORT_NAMES, ChannelAffine, create_backbone

__all__ = [
    "Features",
    "Subject",
    "device",
    "open_subject",
    "pca_features",
    "pixel_features",
    "random_features",
    "random_network",
    "timm_network",
]

SEED = 0
#: Longest side of the pixel baseline.
PIXELS = 32
#: Images that torch embeds at once.
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
        create: Makes the encoder that is exported, at random initialization: with the layers that the method put behind
            its backbone, or up to the stage that it exports.
        recreated: Whether `create` makes that encoder, and not the network that it was trained from alone.
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
    create: Callable[[], nn.Module]
    recreated: bool = True
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
        dim = _width(network, method.facts)
        return Subject(
            name=place.resolve().name,
            preprocess=preprocess,
            features=_torch_features(network, preprocess),
            dim=dim,
            architecture=getattr(method.backbone, "architecture", config.backbone),
            model_args=getattr(method.backbone, "model_args", None),
            create=lambda: _anew(config, method.facts),
            trained=(config, method),
        )
    entry = find_entry(source)
    encoder = load_encoder(entry.location)
    create, recreated = _creator(encoder)
    return Subject(
        name=entry.name,
        preprocess=encoder.preprocess,
        features=_runtime_features(encoder),
        dim=encoder.dim,
        architecture=encoder.config.architecture,
        model_args=encoder.config.timm.get("model_args"),
        create=create,
        recreated=recreated,
        weights_sha256=entry.manifest.files[WEIGHTS].sha256,
        mixture=Mixture.of_entry(entry) if MIXTURE in entry.manifest.files else None,
    )


def _anew(config: RunConfig, facts: Facts) -> nn.Module:
    """The encoder of a method before its training, from torch's global generator."""
    return run.build_method(replace(config, seed=torch.initial_seed()), facts).encoder()


def _creator(encoder: Encoder) -> tuple[Callable[[], nn.Module], bool]:
    """What makes an entry's encoder again: the run that it was trained by, else the timm network that it names."""
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
            if _width(_anew(trained, facts), facts) == encoder.dim:
                return lambda: _anew(trained, facts), True
        except (ConfigError, AttributeError, TypeError):
            pass  # a run of an older or a newer embedkit
    args = config.timm.get("model_args")
    return lambda: timm_network(config.architecture, args, contract), bool(config.timm)


def _width(network: nn.Module, facts: Facts) -> int:
    with torch.inference_mode():
        return network.eval()(torch.zeros(2, *facts.image_shape)).shape[1]


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
        raise ConfigError(f"backbone {architecture!r}: timm knows no network of this name")
    return timm.create_model(name, num_classes=0, **model_args)


def random_network(
    create: Callable[[], nn.Module],
    pixels: Tensor,
    preprocess: Preprocess,
    *,
    open_branches: bool,
    seed: int = SEED,
) -> nn.Module:
    """A network at random initialization whose BatchNorm has the statistics of images.

    Args:
        create: Makes it, from torch's global generator.
        pixels: uint8 (N, C, H, W), training images.
        preprocess: The contract that they obey.
        open_branches: Switch on the residual branches that start switched off (a scale of zero behind them, as in
            timm's ResNets).
        seed: Of the weights.

    Returns:
        The network, in eval mode: normalized float32 (N, C, H, W) -> (N, D).
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = create()
    encoder = PixelEncoder(network, preprocess).to(device())
    if open_branches:
        for norm in _closed(network):
            nn.init.ones_(norm.weight)
    norms = [
        module
        for module in network.modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    ]
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
        pixels: uint8 (N, C, H, W), training images.

    Returns:
        Of the network with all residual branches on; and of the network as it is created, where that differs.
        Neither is always the harder to beat: kNN of r10 on Fashion-MNIST 0.770 and 0.572, MAP@R of ResNet-50 on crops
        of photographs 0.103 and 0.426.

    Raises:
        ConfigError: timm has no such network.
    """

    def features(open_branches: bool) -> tuple[nn.Module, Features]:
        network = random_network(subject.create, pixels, subject.preprocess, open_branches=open_branches)
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
    """The principal components of those pixels, fitted on training images: what a linear encoder can do.

    Args:
        preprocess: The contract.
        dim: Components, at most; fewer where there are fewer pixels or images.
        source: The training part.
        rows: Which images of it to fit on.
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


def _closed(network: nn.Module) -> list[Any]:
    """Norms, and scales in the place of norms, that switch a branch off."""
    return [
        module
        for module in network.modules()
        if isinstance(module, (_BatchNorm, nn.GroupNorm, ChannelAffine))
        and module.weight is not None
        and not module.weight.any()
    ]


def _runtime_features(encoder: Encoder) -> Features:
    def features(source: Source, rows: np.ndarray) -> Tensor:
        size = encoder.default_batch_size
        parts = _parts(rows, size)
        images = ([source.read(int(row)) for row in part] for part in parts)
        blocks: list[np.ndarray] = []
        # batches of one size, so that a row does not depend on which others are asked for
        with closing(encoder.flow(images, normalize=False, decode="exact", pad_to=size)) as flow:
            for part, (block, faults) in zip(parts, flow, strict=True):
                if faults:
                    index = min(faults)
                    where = source.where(int(part[index]))
                    raise SourceError(f"{where}: {reason_of(faults[index])}; fix or remove it")
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
