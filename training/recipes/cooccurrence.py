"""Recipe of `cooccurrence`."""

from __future__ import annotations

import dataclasses

from embedkit.training.config import RunConfig
from embedkit.training.data import DataConfig
from embedkit.training.methods import cooccurrence
from embedkit.training.optim import Optimizer

__all__ = ["recipe"]

#: By function: what was measured; {} until it was.
RESULTS = {"recipe": {"data": "photos", "metrics": {}, "random": {}, "steps": 0, "minutes": 0.0, "cores": 2}}


def recipe() -> RunConfig:
    """r10 on color images of 64 pixels: are two patches of 16, some pixels apart, from one image.

    Data: a folder with Parquet files whose names begin with `train`, at any depth; no label is used.

        embedkit train cooccurrence --data images/ --max-minutes 20
    """
    return RunConfig(
        recipe="cooccurrence",
        method=cooccurrence.Config(),
        backbone="r10",
        data=DataConfig(color="rgb", image_size=64, validation=0.05),
        optimizer=Optimizer(name="adamw", lr=1e-3, weight_decay=0.05, schedule="one_cycle", warmup_steps=300),
        batch_size=128,
        epochs=40,
    )


def tiny() -> RunConfig:
    """Patches of 8 of 32 pixels."""
    base = recipe()
    return dataclasses.replace(
        base,
        method=dataclasses.replace(
            base.method, patch=8, gap=2, reach=6, negatives=2, projection_dim=32, hidden_dim=64
        ),
        backbone_args={"width": 0.25},
        data=DataConfig(color="rgb", image_size=32),
    )
