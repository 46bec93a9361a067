"""Recipes of `context_encoder`: random blocks by reconstruction alone, and the center with an adversary."""

from __future__ import annotations

import dataclasses
from typing import Any

from embedkit.training.config import RunConfig
from embedkit.training.data import DataConfig
from embedkit.training.methods import context_encoder
from embedkit.training.optim import Optimizer

__all__ = ["adversarial", "recipe"]

#: By function: what was measured; empty until it was.
RESULTS: dict[str, dict[str, Any]] = {
    "recipe": {"data": "photos", "metrics": {}, "random": {}, "steps": 0, "minutes": 0.0, "cores": 1},
    "adversarial": {"data": "photos", "metrics": {}, "random": {}, "steps": 0, "minutes": 0.0, "cores": 1},
}


def recipe() -> RunConfig:
    """r10 on color images of 64 pixels, a fifth or more of each hidden; exported are the pooled features.

    Data: a folder with Parquet files whose names begin with `train`, at any depth; no label is used.

        embedkit train context_encoder --data images/ --max-minutes 20
    """
    return RunConfig(
        recipe="context_encoder",
        method=context_encoder.Config(),
        backbone="r10",
        data=DataConfig(color="rgb", image_size=64, validation=0.05),
        optimizer=Optimizer(name="adamw", lr=2e-3, weight_decay=0.01, schedule="one_cycle", warmup_steps=300),
        batch_size=128,
        epochs=24,
    )


def adversarial() -> RunConfig:
    """The hole in the middle and the adversarial loss at 0.001: the paper's inpainting, whose features it did not take.

    As in the authors' code the discriminator's rate is a tenth of the painter's. Data and time: as for `recipe`.

        embedkit train context_encoder:adversarial --data images/ --max-minutes 20
    """
    config = recipe()
    adam = Optimizer(name="adam", weight_decay=0.0, betas=(0.5, 0.999), schedule="constant", warmup_steps=0)
    return dataclasses.replace(
        config,
        recipe="context_encoder:adversarial",
        method=dataclasses.replace(config.method, hole="center", adversarial_weight=0.001),
        optimizer=dataclasses.replace(adam, lr=2e-3),
        optimizers={"discriminator": dataclasses.replace(adam, lr=2e-4)},
        batch_size=64,
    )


def tiny() -> RunConfig:
    """Of 32 pixels, for tests."""
    config = recipe()
    return dataclasses.replace(
        config,
        method=dataclasses.replace(config.method, decoder_width=8),
        data=dataclasses.replace(config.data, image_size=32),
        backbone_args={"width": 0.5},
    )
