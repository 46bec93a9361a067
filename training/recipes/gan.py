"""Recipes of `gan`: r10 as the discriminator, and DCGAN's own."""

from __future__ import annotations

import dataclasses
from typing import Any

from embedkit.training.config import RunConfig
from embedkit.training.data import DataConfig
from embedkit.training.methods import gan
from embedkit.training.optim import Optimizer

__all__ = ["dcgan", "recipe"]

#: By function: what was measured; empty until it was.
RESULTS: dict[str, dict[str, Any]] = {
    "recipe": {"data": "fashion-mnist", "metrics": {}, "random": {}, "steps": 0, "minutes": 0.0, "cores": 1},
    "dcgan": {"data": "fashion-mnist", "metrics": {}, "random": {}, "steps": 0, "minutes": 0.0, "cores": 1},
}


def recipe() -> RunConfig:
    """r10 on Fashion-MNIST as the discriminator; exported are its pooled features.

    Data: the four IDX files of Fashion-MNIST; no label is used.

        embedkit train gan --data fashion-mnist/ --max-minutes 20
    """
    return RunConfig(
        recipe="gan",
        method=gan.Config(),
        backbone="r10",
        data=DataConfig(color="gray", image_size=28),
        optimizer=Optimizer(
            name="adam", lr=2e-4, weight_decay=0.0, betas=(0.5, 0.999), schedule="constant", warmup_steps=0
        ),
        batch_size=128,
        epochs=10,
    )


def dcgan() -> RunConfig:
    """Three 5x5 convolutions of stride 2 with BatchNorm and LeakyReLU on Fashion-MNIST: DCGAN's, for 28 pixels.

    Data and time: as for `recipe`.

        embedkit train gan:dcgan --data fashion-mnist/ --max-minutes 20
    """
    plan = ((False, ((64, 5, 2),)), (False, ((128, 5, 2),)), (False, ((256, 5, 2),)))
    return dataclasses.replace(
        recipe(),
        recipe="gan:dcgan",
        backbone="alexnet_bn",
        backbone_args={"plan": plan, "activation_slope": 0.2},
    )
