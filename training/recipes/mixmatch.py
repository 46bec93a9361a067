"""Recipes of `mixmatch`: the method, and the supervised baseline that it is held against."""

from __future__ import annotations

import dataclasses

from embedkit.training.config import RunConfig
from embedkit.training.data import DataConfig, LabeledAndUnlabeled
from embedkit.training.methods import mixmatch
from embedkit.training.optim import Optimizer

__all__ = ["baseline", "recipe"]

#: By function: what was measured; {} until it was.
RESULTS = {
    name: {"data": "fashion-mnist", "metrics": {}, "random": {}, "steps": 0, "minutes": 0.0, "cores": 2}
    for name in ("recipe", "baseline")
}


def recipe() -> RunConfig:
    """r10 on Fashion-MNIST with 40 labels a class, mixed with sharpened guesses for all other images.

    Data: the four IDX files of Fashion-MNIST; 400 labels are drawn by the seed, the same as for `fixmatch`, the others
    are hidden.

        embedkit train mixmatch --data fashion-mnist/
    """
    return RunConfig(
        recipe="mixmatch",
        method=mixmatch.Config(),
        backbone="r10",
        data=DataConfig(
            color="gray", image_size=28, labels_per_class=40, sampler=LabeledAndUnlabeled(ratio=1)
        ),
        optimizer=Optimizer(name="adamw", lr=2e-3, weight_decay=0.05, schedule="one_cycle", warmup_steps=300),
        batch_size=128,  # 64 labeled images and 64 others; two views of each of these are learned
        steps=8_000,
    )


def baseline() -> RunConfig:
    """Baseline of `mixmatch`: its labels, views, steps and average without any unlabeled image or mixture.

    embedkit train mixmatch:baseline --data fashion-mnist/
    """
    config = recipe()
    return dataclasses.replace(
        config,
        recipe="mixmatch:baseline",
        method=dataclasses.replace(config.method, supervised_only=True),
    )
