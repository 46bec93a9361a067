"""Recipe of `ubernet`."""

from __future__ import annotations

import dataclasses

from embedkit.training.config import RunConfig
from embedkit.training.data import DataConfig
from embedkit.training.methods import ubernet
from embedkit.training.optim import Optimizer

__all__ = ["recipe"]

#: By function: what was measured; {} until it was.
RESULTS = {
    "recipe": {
        "data": "photos and emoji",
        "metrics": {},
        "random": {},
        "steps": 0,
        "minutes": 0.0,
        "cores": 1,
    }
}


def recipe() -> RunConfig:
    """r10 on color images of 64 pixels: edges, color, a reconstruction, turns, the photograph, group and identity.

    Data: a folder with Parquet files whose names begin with `train` and which have the columns `photo`, `group` and
    `identity`; a value that is missing (null) is a label that is missing.

        embedkit train ubernet --data images/ --max-minutes 20
    """
    return RunConfig(
        recipe="ubernet",
        method=ubernet.Config(
            tasks=("edges", "color", "reconstruction", "rotation", "label", "group", "identity")
        ),
        backbone="r10",
        data=DataConfig(
            label="photo", targets=("group", "identity"), color="rgb", image_size=64, validation=0.05
        ),
        optimizer=Optimizer(name="adamw", lr=1e-3, weight_decay=0.05, schedule="cosine", warmup_steps=200),
        batch_size=64,
        epochs=12,
    )


def tiny() -> RunConfig:
    """The smallest run that has a task of each kind; heads move on every third batch, the trunk on every second."""
    config = recipe()
    method = ubernet.Config(hidden_dim=16, head_batch=48, trunk_batch=32)
    return dataclasses.replace(
        config,
        method=method,
        backbone_args={"width": 0.5},
        data=DataConfig(color="rgb", image_size=28),
        batch_size=16,
    )
