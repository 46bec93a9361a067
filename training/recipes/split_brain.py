"""Recipe of `split_brain`."""

from __future__ import annotations

import dataclasses

from embedkit.training.config import RunConfig
from embedkit.training.data import DataConfig
from embedkit.training.methods import split_brain
from embedkit.training.optim import Optimizer

__all__ = ["recipe"]

#: By function: what was measured; {} until it was.
RESULTS = {"recipe": {"data": "photos", "metrics": {}, "random": {}, "steps": 0, "minutes": 0.0, "cores": 2}}


def recipe() -> RunConfig:
    """Two r10 of half the width on color images of 64 pixels: color from lightness, lightness from color.

    Data: a folder with Parquet files whose names begin with `train`, at any depth; no label is used.

        embedkit train split_brain --data images/ --max-minutes 20
    """
    return RunConfig(
        recipe="split_brain",
        method=split_brain.Config(),
        backbone="r10",
        data=DataConfig(color="rgb", image_size=64, validation=0.05),
        optimizer=Optimizer(name="adamw", lr=2e-3, weight_decay=0.05, schedule="one_cycle", warmup_steps=300),
        batch_size=128,
        epochs=40,
    )


def tiny() -> RunConfig:
    """On images of 32 pixels."""
    base = recipe()
    return dataclasses.replace(
        base,
        method=dataclasses.replace(base.method, grid=25, size=8, hidden_dim=32),
        backbone_args={"width": 0.25},
        data=DataConfig(color="rgb", image_size=32),
    )
