"""Recipes of `mixup`: labels alone, the semi-supervised form, and the baseline that both are held against."""

from __future__ import annotations

import dataclasses

from embedkit.training.config import RunConfig
from embedkit.training.data import DataConfig, Labeled, LabeledAndUnlabeled
from embedkit.training.methods import mixup
from embedkit.training.optim import Optimizer

__all__ = ["baseline", "ict", "recipe"]

#: By function: what was measured; {} until it was.
RESULTS = {
    name: {"data": "fashion-mnist", "metrics": {}, "random": {}, "steps": 0, "minutes": 0.0, "cores": 2}
    for name in ("recipe", "ict", "baseline")
}

_LABELED = 64


def recipe() -> RunConfig:
    """r10 on mixtures of 400 labeled images of Fashion-MNIST, 40 a class.

    Data: the four IDX files of Fashion-MNIST; 400 labels are drawn by the seed, the same as for `fixmatch`; images
    without a label are not used.

        embedkit train mixup --data fashion-mnist/
    """
    return RunConfig(
        recipe="mixup",
        method=mixup.Config(),
        backbone="r10",
        data=DataConfig(color="gray", image_size=28, labels_per_class=40, sampler=Labeled()),
        optimizer=Optimizer(name="adamw", lr=2e-3, weight_decay=0.05, schedule="one_cycle", warmup_steps=300),
        batch_size=_LABELED,
        steps=10_000,
    )


def ict() -> RunConfig:
    """`mixup` of the same labeled images, and of all others with the answers of the average.

    embedkit train mixup:ict --data fashion-mnist/
    """
    config, ratio = recipe(), 1
    return dataclasses.replace(
        config,
        recipe="mixup:ict",
        method=dataclasses.replace(config.method, ratio=ratio),
        data=dataclasses.replace(config.data, sampler=LabeledAndUnlabeled(ratio=ratio)),
        batch_size=_LABELED * (1 + ratio),
    )


def baseline() -> RunConfig:
    """Baseline of `mixup`: its labels, views, steps and average with no image mixed, and none without a label.

    embedkit train mixup:baseline --data fashion-mnist/
    """
    config = recipe()
    return dataclasses.replace(
        config, recipe="mixup:baseline", method=dataclasses.replace(config.method, alpha=0.0)
    )


def tiny() -> RunConfig:
    """The form with both parts."""
    return ict()
