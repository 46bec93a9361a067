"""Recipe of `bigan`."""

from __future__ import annotations

from embedkit.training.config import RunConfig
from embedkit.training.data import DataConfig
from embedkit.training.methods import bigan
from embedkit.training.optim import Optimizer

__all__ = ["recipe"]


def recipe() -> RunConfig:
    """r10 on Fashion-MNIST: figure of the whole run not measured yet.

    Data: the four IDX files of Fashion-MNIST; no label is used. Time: 20 minutes on 2 cores.

        embedkit train bigan --data fashion-mnist/ --max-minutes 20
    """
    return RunConfig(
        recipe="bigan",
        method=bigan.Config(),
        backbone="r10",
        data=DataConfig(color="gray", image_size=28),
        optimizer=Optimizer(
            name="adamw", lr=2e-4, weight_decay=0.0, betas=(0.5, 0.999), schedule="cosine", warmup_steps=0
        ),
        batch_size=128,
        epochs=30,
    )
