"""Recipes of `egomotion`: Agrawal's, and with Jayaraman's loss of equivariance."""

from __future__ import annotations

import dataclasses

from embedkit.training.config import RunConfig
from embedkit.training.data import DataConfig
from embedkit.training.methods import egomotion
from embedkit.training.optim import Optimizer

__all__ = ["equivariant", "recipe"]

#: By function: what was measured; {} until it was.
RESULTS = {
    "recipe": {"data": "fashion-mnist", "metrics": {}, "random": {}, "steps": 0, "minutes": 0.0, "cores": 1},
    "equivariant": {
        "data": "fashion-mnist",
        "metrics": {},
        "random": {},
        "steps": 0,
        "minutes": 0.0,
        "cores": 1,
    },
}


def recipe() -> RunConfig:
    """r10 on Fashion-MNIST: shifts of up to 3 pixels and turns of up to 30 degrees between two warped views.

    Data: the four IDX files of Fashion-MNIST; no label is used.

        embedkit train egomotion --data fashion-mnist/ --max-minutes 20
    """
    return RunConfig(
        recipe="egomotion",
        method=egomotion.Config(),
        backbone="r10",
        data=DataConfig(color="gray", image_size=28),
        optimizer=Optimizer(name="adamw", lr=2e-3, weight_decay=0.05, schedule="one_cycle", warmup_steps=300),
        batch_size=256,
        epochs=10,
    )


def equivariant() -> RunConfig:
    """The same, with maps that carry the features over the turn as a second loss.

    embedkit train egomotion:equivariant --data fashion-mnist/ --max-minutes 20
    """
    config = recipe()
    return dataclasses.replace(
        config,
        recipe="egomotion:equivariant",
        method=dataclasses.replace(config.method, equivariance=0.5),
    )


def tiny() -> RunConfig:
    """The smallest run that has every part."""
    config = equivariant()
    method = dataclasses.replace(config.method, crop=16, hidden_dim=64)
    return dataclasses.replace(config, method=method, batch_size=16)
