"""Recipes of `autoencoder`."""

from __future__ import annotations

import dataclasses

from embedkit.training.config import RunConfig
from embedkit.training.data import DataConfig
from embedkit.training.methods import autoencoder
from embedkit.training.optim import Optimizer

__all__ = ["features", "recipe"]


def recipe() -> RunConfig:
    """r10 and a code of 32 on Fashion-MNIST: figure of the whole run not measured yet.

    Data: the four IDX files of Fashion-MNIST; no label is used. Time: 20 minutes on 2 cores.

        embedkit train autoencoder --data fashion-mnist/ --max-minutes 20
    """
    return RunConfig(
        recipe="autoencoder",
        method=autoencoder.Config(code_dim=32),
        backbone="r10",
        data=DataConfig(color="gray", image_size=28),
        optimizer=Optimizer(name="adamw", lr=2e-3, weight_decay=0.01, schedule="one_cycle", warmup_steps=500),
        batch_size=256,
        epochs=30,
    )


def features() -> RunConfig:
    """As `autoencoder`, but exported are the 256 features before the code: figure of the whole run not measured yet.

    After 200 steps, on 3,000 held-out training pictures: linear probe 0.83 against the code's 0.77, kNN 0.80 both.

        embedkit train autoencoder:features --data fashion-mnist/ --max-minutes 20
    """
    base = recipe()
    method = dataclasses.replace(base.method, embedding="features")
    return dataclasses.replace(base, recipe="autoencoder:features", method=method)
