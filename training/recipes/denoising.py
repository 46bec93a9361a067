"""Recipes of `denoising`: a convolutional encoder, and the stacked perceptron of 2010."""

from __future__ import annotations

from typing import Any

from embedkit.training.config import RunConfig
from embedkit.training.data import DataConfig
from embedkit.training.methods import denoising
from embedkit.training.optim import Optimizer

__all__ = ["recipe", "stacked"]

#: By function: what was measured; empty until it was.
RESULTS: dict[str, dict[str, Any]] = {
    "recipe": {
        "data": "fashion-mnist",
        "metrics": {"probe_top1": 0.865, "knn_top1": 0.864},
        "random": {"probe_top1": 0.751, "knn_top1": 0.77},
    },
    "stacked": {"data": "fashion-mnist", "metrics": {}, "random": {}, "steps": 0, "minutes": 0.0, "cores": 1},
}


def recipe() -> RunConfig:
    """r10 on Fashion-MNIST, two of five pixels masked; exported are the pooled features.

    Data: the four IDX files of Fashion-MNIST; no label is used.

        embedkit train denoising --data fashion-mnist/
    """
    return RunConfig(
        recipe="denoising",
        method=denoising.Config(),
        backbone="r10",
        data=DataConfig(color="gray", image_size=28),
        optimizer=Optimizer(name="adamw", lr=2e-3, weight_decay=0.01, schedule="one_cycle", warmup_steps=300),
        batch_size=256,
        epochs=16,
    )


def stacked() -> RunConfig:
    """Three layers of 1,000 rectified units on Fashion-MNIST, one after another and then together.

    Each layer takes a fifth of the run. A quarter of the pixels, and of each layer's inputs, is masked.

    Data: the four IDX files of Fashion-MNIST; no label is used.

        embedkit train denoising:stacked --data fashion-mnist/
    """
    return RunConfig(
        recipe="denoising:stacked",
        method=denoising.Config(stacked=True, amount=0.25),
        backbone="mlp",
        backbone_args={"hidden": (1000, 1000, 1000), "norm": "none"},
        data=DataConfig(color="gray", image_size=28),
        optimizer=Optimizer(name="adamw", lr=1e-3, weight_decay=0.0, schedule="one_cycle", warmup_steps=100),
        batch_size=256,
        epochs=40,
    )
