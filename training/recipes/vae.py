"""Recipes of `vae`."""

from __future__ import annotations

import dataclasses

from embedkit.training.config import RunConfig
from embedkit.training.data import DataConfig
from embedkit.training.methods import vae
from embedkit.training.optim import Optimizer

__all__ = ["mu", "recipe"]


def recipe() -> RunConfig:
    """r10 and 32 latent dimensions on Fashion-MNIST: figure of the whole run not measured yet.

    Data: the four IDX files of Fashion-MNIST; no label is used. Time: 20 minutes on 2 cores.

        embedkit train vae --data fashion-mnist/ --max-minutes 20
    """
    return RunConfig(
        recipe="vae",
        method=vae.Config(latent_dim=32),
        backbone="r10",
        data=DataConfig(color="gray", image_size=28),
        optimizer=Optimizer(name="adamw", lr=2e-3, weight_decay=0.01, schedule="one_cycle", warmup_steps=500),
        batch_size=256,
        epochs=30,
    )


def mu() -> RunConfig:
    """As `vae`, but exported is the mean of q(z|x): figure of the whole run not measured yet.

    After 200 steps, on 3,000 held-out training pictures: linear probe 0.75 against the features' 0.81, kNN 0.76
    against 0.77.

        embedkit train vae:mu --data fashion-mnist/ --max-minutes 20
    """
    base = recipe()
    return dataclasses.replace(base, recipe="vae:mu", method=dataclasses.replace(base.method, embedding="mu"))
