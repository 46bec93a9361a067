"""Baselines of an evaluation: the same network at random initialization, raw pixels, and their principal components."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from embedkit.model.preprocess import Preprocess
from embedkit.training.data.source import Source
from embedkit.training.evaluation.features import (
    BATCH,
    SEED,
    EvaluatedModel,
    Features,
    device,
    parts_of,
    torch_features,
)
from embedkit.training.export.torch_to_onnx import PixelEncoder
from embedkit.training.models.backbones import ChannelAffine

__all__ = ["pca_features", "pixel_features", "random_features", "random_network"]

#: Longest side of the pixel baseline.
PIXELS = 32


def random_network(
    create: Callable[[], nn.Module],
    pixels: Tensor,
    preprocess: Preprocess,
    *,
    open_branches: bool,
    seed: int = SEED,
) -> nn.Module:
    """A network at random initialization, with BatchNorm statistics of training images.

    Args:
        create: Makes it, from torch's global generator.
        pixels: uint8 (N, C, H, W), training images.
        preprocess: Their contract.
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


def random_features(model: EvaluatedModel, pixels: Tensor) -> tuple[Features, ...]:
    """The features of the model's network before any training, which show what training adds.

    Args:
        model: The evaluated one.
        pixels: uint8 (N, C, H, W), training images.

    Returns:
        Those of the network with all residual branches on; and those of the network as it is created, where they
        differ. Neither is always the harder to beat: kNN of r10 on Fashion-MNIST 0.770 and 0.572, MAP@R of
        ResNet-50 on crops of photographs 0.103 and 0.426.

    Raises:
        ConfigError: timm has no such network.
    """

    def features(open_branches: bool) -> tuple[nn.Module, Features]:
        network = random_network(model.create, pixels, model.preprocess, open_branches=open_branches)
        return network, torch_features(network, model.preprocess)

    created, plain = features(False)
    return (features(True)[1], plain) if _closed(created) else (plain,)


def pixel_features(preprocess: Preprocess) -> Features:
    """The pixels of the contract as a row in [0, 1], averaged over areas down to 32 a side where they are more."""
    height, width = (
        max(1, round(side * min(1.0, PIXELS / max(preprocess.size)))) for side in preprocess.size
    )

    def features(source: Source, rows: np.ndarray) -> Tensor:
        parts = (source.decode(part, preprocess) for part in parts_of(rows, BATCH))
        return torch.cat([F.adaptive_avg_pool2d(x.float() / 255, (height, width)).flatten(1) for x in parts])

    return features


def pca_features(preprocess: Preprocess, dim: int, source: Source, rows: np.ndarray) -> Features:
    """The principal components of those pixels, fitted on training images: the best linear encoder.

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
            [((pixels(source, part).double() - center) @ components).float() for part in parts_of(rows, 4096)]
        )

    return features


def _closed(network: nn.Module) -> list[Any]:
    """Norms, and scales used as norms, that switch a branch off."""
    return [
        module
        for module in network.modules()
        if isinstance(module, (_BatchNorm, nn.GroupNorm, ChannelAffine))
        and module.weight is not None
        and not module.weight.any()
    ]
