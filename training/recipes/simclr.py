"""Recipe of `simclr`."""

from __future__ import annotations

from embedkit.training.config import RunConfig
from embedkit.training.data import DataConfig
from embedkit.training.methods import simclr
from embedkit.training.optim import Optimizer

__all__ = ["recipe"]


def recipe() -> RunConfig:
    """r10 on Fashion-MNIST: linear probe 0.889 and kNN 0.855 on the test part after 52 epochs.

    Data: the four IDX files of Fashion-MNIST; no label is used. Time: 40 minutes on 2 cores (75 on one).

        embedkit train simclr --data fashion-mnist/
    """
    return RunConfig(
        recipe="simclr",
        method=simclr.Config(temperature=0.2),
        backbone="r10",
        data=DataConfig(color="gray", image_size=28),
        optimizer=Optimizer(
            name="adamw", lr=2e-3, weight_decay=0.05, schedule="one_cycle", warmup_steps=1000
        ),
        batch_size=512,
        epochs=52,
    )
