"""Recipes of `mean_teacher`: the method, and the supervised baseline that it is held against."""

from __future__ import annotations

import dataclasses

from embedkit.training.config import RunConfig
from embedkit.training.data import DataConfig, LabeledAndUnlabeled
from embedkit.training.methods import mean_teacher
from embedkit.training.optim import Optimizer

__all__ = ["baseline", "recipe"]

#: By function: what was measured; {} until it was.
RESULTS = {
    name: {"data": "fashion-mnist", "metrics": {}, "random": {}, "steps": 0, "minutes": 0.0, "cores": 2}
    for name in ("recipe", "baseline")
}


def recipe() -> RunConfig:
    """r10 on Fashion-MNIST with 40 labels a class, and a teacher's word for all other images.

    Data: the four IDX files of Fashion-MNIST; 400 labels are drawn by the seed, the same as for `fixmatch`, the others
    are hidden.

        embedkit train mean_teacher --data fashion-mnist/
    """
    ratio = 3
    return RunConfig(
        recipe="mean_teacher",
        method=mean_teacher.Config(ratio=ratio),
        backbone="r10",
        data=DataConfig(
            color="gray", image_size=28, labels_per_class=40, sampler=LabeledAndUnlabeled(ratio=ratio)
        ),
        optimizer=Optimizer(name="adamw", lr=2e-3, weight_decay=0.05, schedule="one_cycle", warmup_steps=300),
        batch_size=32 * (1 + ratio),
        steps=10_000,
    )


def baseline() -> RunConfig:
    """Baseline of `mean_teacher`: its labels, views, steps and average without any unlabeled image.

    embedkit train mean_teacher:baseline --data fashion-mnist/
    """
    config = recipe()
    return dataclasses.replace(
        config,
        recipe="mean_teacher:baseline",
        method=dataclasses.replace(config.method, supervised_only=True),
    )
