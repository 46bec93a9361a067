"""Recipes of `cpc`: the second version's four directions, and the first version."""

from __future__ import annotations

import dataclasses

from embedkit.training.augment import Compose, RandomHorizontalFlip
from embedkit.training.config import RunConfig
from embedkit.training.data import DataConfig
from embedkit.training.methods import cpc
from embedkit.training.optim import Optimizer

__all__ = ["recipe", "v1"]

#: By function: what was measured; {} until it was.
RESULTS = {
    "recipe": {"data": "photos", "metrics": {}, "random": {}, "steps": 0, "minutes": 0.0, "cores": 1},
    "v1": {"data": "photos", "metrics": {}, "random": {}, "steps": 0, "minutes": 0.0, "cores": 1},
}


def recipe() -> RunConfig:
    """r10 on color images of 64 pixels, patches of 16 every 8: version 2, in four directions.

    Data: a folder with Parquet files whose names begin with `train`, at any depth; no label is used.

        embedkit train cpc --data images/ --max-minutes 30
    """
    return RunConfig(
        recipe="cpc",
        method=cpc.Config(),
        backbone="r10",
        data=DataConfig(color="rgb", image_size=64, validation=0.05),
        optimizer=Optimizer(
            name="adamw", lr=1e-3, weight_decay=0.01, schedule="cosine", warmup_steps=200, clip_norm=1.0
        ),
        batch_size=32,
        epochs=6,
    )


def v1() -> RunConfig:
    """Version 1: downwards alone, no norm, and no augmentation but flips of the image.

    embedkit train cpc:v1 --data images/ --max-minutes 30
    """
    config = recipe()
    method = cpc.Config(
        directions=1, norm="none", augment=RandomHorizontalFlip(), patch_augment=Compose(steps=())
    )
    return dataclasses.replace(config, recipe="cpc:v1", method=method)


def tiny() -> RunConfig:
    """The smallest run that has every part: a grid of 4x4 patches, of which one and two rows below are predicted."""
    config = recipe()
    return dataclasses.replace(
        config,
        method=dataclasses.replace(
            config.method, patch=8, stride=4, steps=1, hidden_dim=16, blocks=2, target_dim=16, scale=1.0
        ),
        backbone_args={"width": 0.5},
        data=dataclasses.replace(config.data, image_size=20),
        batch_size=16,
    )
