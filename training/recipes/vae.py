"""Recipes of `vae`."""

from __future__ import annotations

import dataclasses

from embedkit.training.config import RunConfig
from embedkit.training.data import DataConfig
from embedkit.training.methods import vae
from embedkit.training.optim import Optimizer

__all__ = ["mu", "recipe"]

#: What was measured, by function; see `recipes.summaries`.
RESULTS = {
    "recipe": {
        "data": "fashion-mnist",
        "metrics": {"probe_top1": 0.868, "knn_top1": 0.863, "elbo": -240},
        "random": {"probe_top1": 0.751, "knn_top1": 0.77},
    }
}


def recipe() -> RunConfig:
    """r10 and 32 latents on Fashion-MNIST.

    Data: the four IDX files of Fashion-MNIST; no label is used. Time: 2,100 steps, 11 minutes on one core.

        embedkit train vae --data fashion-mnist/
    """
    return RunConfig(
        recipe="vae",
        method=vae.Config(latent_dim=32),
        backbone="r10",
        data=DataConfig(color="gray", image_size=28),
        optimizer=Optimizer(name="adamw", lr=2e-3, weight_decay=0.01, schedule="one_cycle", warmup_steps=500),
        batch_size=256,
        epochs=10,
    )


def mu() -> RunConfig:
    """As `vae`, but exported is the mean of q(z|x).

    After 200 steps, on 3,000 held-out training images: linear probe 0.75 against the features' 0.81, kNN 0.76
    against 0.77.

        embedkit train vae:mu --data fashion-mnist/
    """
    base = recipe()
    return dataclasses.replace(base, recipe="vae:mu", method=dataclasses.replace(base.method, embedding="mu"))
