"""Recipe of `damaged_jigsaw`."""

from __future__ import annotations

import dataclasses

from embedkit.training.augment import Compose, RandomHorizontalFlip, RandomResizedCrop
from embedkit.training.config import RunConfig
from embedkit.training.data import DataConfig
from embedkit.training.methods import damaged_jigsaw
from embedkit.training.models.tiles import TileGrid
from embedkit.training.optim import Optimizer

__all__ = ["recipe"]

#: By function: what was measured; {} until it was.
RESULTS = {"recipe": {"data": "photos", "metrics": {}, "random": {}, "steps": 0, "minutes": 0.0, "cores": 2}}


def recipe() -> RunConfig:
    """r10 on color images of 64 pixels: nine gray tiles, one missing, ordered, completed and colored.

    Data: a folder with Parquet files whose names begin with `train`, at any depth; no label is used.

        embedkit train damaged_jigsaw --data images/ --max-minutes 20
    """
    augment = Compose(steps=(RandomResizedCrop(scale=(0.5, 1.0)), RandomHorizontalFlip()))
    return RunConfig(
        recipe="damaged_jigsaw",
        method=damaged_jigsaw.Config(augment=augment),
        backbone="r10",
        data=DataConfig(color="rgb", image_size=64, validation=0.05),
        optimizer=Optimizer(name="adamw", lr=1e-3, weight_decay=0.05, schedule="one_cycle", warmup_steps=300),
        batch_size=128,
        epochs=40,
    )


def tiny() -> RunConfig:
    """Nine tiles of 8 pixels, a quarter of the run only shuffled."""
    base = recipe()
    return dataclasses.replace(
        base,
        method=dataclasses.replace(
            base.method,
            tiles=TileGrid(grid=3, cell=10, tile=8),
            shuffled=0.25,
            tile_dim=32,
            hidden_dim=64,
        ),
        backbone_args={"width": 0.25},
        data=DataConfig(color="rgb", image_size=32),
    )
