"""Recipes of `jigsaw`: nine tiles of color images, and four of Fashion-MNIST."""

from __future__ import annotations

import dataclasses

from embedkit.training.augment import Compose, RandomGrayscale, RandomHorizontalFlip, RandomResizedCrop
from embedkit.training.config import RunConfig
from embedkit.training.data import DataConfig
from embedkit.training.methods import jigsaw
from embedkit.training.models.permutations import PermutationSet
from embedkit.training.models.tiles import TileGrid
from embedkit.training.optim import Optimizer

__all__ = ["fmnist", "recipe"]

#: By function: what was measured; {} until it was.
RESULTS = {
    "recipe": {"data": "photos", "metrics": {}, "random": {}, "steps": 0, "minutes": 0.0, "cores": 2},
    "fmnist": {"data": "fashion-mnist", "metrics": {}, "random": {}, "steps": 0, "minutes": 0.0, "cores": 2},
}


def recipe() -> RunConfig:
    """r10 on color images of 64 pixels: nine tiles of 16 in one of 504 orders.

    Data: a folder with Parquet files whose names begin with `train`, at any depth; no label is used.

        embedkit train jigsaw --data images/ --max-minutes 20
    """
    augment = Compose(
        steps=(RandomResizedCrop(scale=(0.5, 1.0)), RandomHorizontalFlip(), RandomGrayscale(p=2 / 3))
    )
    return RunConfig(
        recipe="jigsaw",
        method=jigsaw.Config(augment=augment),
        backbone="r10",
        data=DataConfig(color="rgb", image_size=64, validation=0.05),
        optimizer=Optimizer(name="adamw", lr=1e-3, weight_decay=0.05, schedule="one_cycle", warmup_steps=300),
        batch_size=128,  # images, each of them in eight orders
        epochs=40,
    )


def fmnist() -> RunConfig:
    """r10 on Fashion-MNIST: four tiles of 12 in one of the 12 even orders.

    Black tiles look the same, so that some puzzles have no answer. Data: the four IDX files of Fashion-MNIST; no label
    is used.

        embedkit train jigsaw:fmnist --data fashion-mnist/ --max-minutes 20
    """
    return dataclasses.replace(
        recipe(),
        recipe="jigsaw:fmnist",
        method=jigsaw.Config(
            tiles=TileGrid(grid=2, cell=14, tile=12),
            permutations=PermutationSet(kind="even"),
            channel_shift=0,
            orders=4,
            augment=RandomHorizontalFlip(),
        ),
        data=DataConfig(color="gray", image_size=28),
        batch_size=256,
        epochs=10,
    )


def tiny() -> RunConfig:
    """Nine tiles of 8 pixels."""
    base = recipe()
    return dataclasses.replace(
        base,
        method=dataclasses.replace(
            base.method, tiles=TileGrid(grid=3, cell=10, tile=8), tile_dim=32, hidden_dim=64
        ),
        backbone_args={"width": 0.25},
        data=DataConfig(color="rgb", image_size=32),
    )
