"""Recipes of `colorization`: one class a place, the paper's soft and weighted classes, and hypercolumns."""

from __future__ import annotations

import dataclasses

from embedkit.training.config import RunConfig
from embedkit.training.data import DataConfig
from embedkit.training.methods import colorization
from embedkit.training.methods.colorization import ABClasses, HueChroma
from embedkit.training.optim import Optimizer

__all__ = ["eccv16", "larsson", "recipe"]

#: By function: what was measured; {} until it was.
RESULTS = {
    name: {"data": "photos", "metrics": {}, "random": {}, "steps": 0, "minutes": 0.0, "cores": 2}
    for name in ("recipe", "eccv16", "larsson")
}


def recipe() -> RunConfig:
    """r10 on color images of 64 pixels: the bin of a and b at 16x16 places, from lightness.

    Data: a folder with Parquet files whose names begin with `train`, at any depth; no label is used.

        embedkit train colorization --data images/ --max-minutes 20
    """
    return RunConfig(
        recipe="colorization",
        method=colorization.Config(),
        backbone="r10",
        data=DataConfig(color="rgb", image_size=64, validation=0.05),
        optimizer=Optimizer(name="adamw", lr=2e-3, weight_decay=0.05, schedule="one_cycle", warmup_steps=300),
        batch_size=128,
        epochs=40,
    )


def eccv16() -> RunConfig:
    """With the soft targets and the rebalancing of rare colors of the paper, for colors that are less pale.

    Data and time: as for `recipe`.

        embedkit train colorization:eccv16 --data images/ --max-minutes 20
    """
    return _with(recipe(), "colorization:eccv16", ABClasses(neighbors=5, mix=0.5))


def larsson() -> RunConfig:
    """Histograms of hue and chroma from hypercolumns, so that all stages learn from colors directly.

    Data and time: as for `recipe`.

        embedkit train colorization:larsson --data images/ --max-minutes 20
    """
    return _with(recipe(), "colorization:larsson", HueChroma())


def tiny() -> RunConfig:
    """The soft, weighted form on images of 32 pixels."""
    base = _with(recipe(), "colorization", ABClasses(grid=25, neighbors=5, mix=0.5))
    return dataclasses.replace(
        base,
        method=dataclasses.replace(base.method, size=8, hidden_dim=32),
        backbone_args={"width": 0.25},
        data=DataConfig(color="rgb", image_size=32),
    )


def _with(base: RunConfig, name: str, target: ABClasses | HueChroma) -> RunConfig:
    return dataclasses.replace(base, recipe=name, method=dataclasses.replace(base.method, target=target))
