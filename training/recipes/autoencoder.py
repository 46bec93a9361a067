"""Recipe of `autoencoder`."""

from __future__ import annotations

from embedkit.training.config import RunConfig
from embedkit.training.data import DataConfig
from embedkit.training.methods import autoencoder
from embedkit.training.optim import Optimizer

__all__ = ["recipe"]


def recipe() -> RunConfig:
    """r10 on Fashion-MNIST: figure of the whole run not measured yet.

    Data: the four IDX files of Fashion-MNIST; no label is used. Time: 20 minutes on 2 cores.

        embedkit train autoencoder --data fashion-mnist/ --max-minutes 20
    """
    return RunConfig(
        recipe="autoencoder",
        method=autoencoder.Config(),
        backbone="r10",
        data=DataConfig(color="gray", image_size=28),
        optimizer=Optimizer(name="adamw", lr=2e-3, weight_decay=0.01, schedule="one_cycle", warmup_steps=500),
        batch_size=256,
        epochs=40,
    )
