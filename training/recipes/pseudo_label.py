"""Recipes of `pseudo_label`: the paper's form, the thresholded one, and the baseline that both are held against."""

from __future__ import annotations

import dataclasses

from embedkit.training.config import RunConfig
from embedkit.training.data import DataConfig, LabeledAndUnlabeled
from embedkit.training.methods import pseudo_label
from embedkit.training.optim import Optimizer

__all__ = ["baseline", "recipe", "thresholded"]

#: By function: what was measured; {} until it was.
RESULTS = {
    name: {"data": "fashion-mnist", "metrics": {}, "random": {}, "steps": 0, "minutes": 0.0, "cores": 2}
    for name in ("recipe", "thresholded", "baseline")
}


def recipe() -> RunConfig:
    """r10 on Fashion-MNIST with 40 labels a class, and the network's own guesses for all other images.

    Data: the four IDX files of Fashion-MNIST; 400 labels are drawn by the seed, the same as for `fixmatch`, the others
    are hidden.

        embedkit train pseudo_label --data fashion-mnist/
    """
    ratio = 3
    return RunConfig(
        recipe="pseudo_label",
        method=pseudo_label.Config(ratio=ratio),
        backbone="r10",
        data=DataConfig(
            color="gray", image_size=28, labels_per_class=40, sampler=LabeledAndUnlabeled(ratio=ratio)
        ),
        optimizer=Optimizer(name="adamw", lr=2e-3, weight_decay=0.05, schedule="one_cycle", warmup_steps=300),
        batch_size=64 * (1 + ratio),
        steps=8_000,
    )


def thresholded() -> RunConfig:
    """`pseudo_label` of guesses above 0.95 alone, at weight 1 after two fifths of the run.

    embedkit train pseudo_label:thresholded --data fashion-mnist/
    """
    return _variant("thresholded", threshold=0.95, unlabeled_weight=1.0, start=0.0, end=0.4)


def baseline() -> RunConfig:
    """Baseline of `pseudo_label`: its labels, views, steps and average without any unlabeled image.

    embedkit train pseudo_label:baseline --data fashion-mnist/
    """
    return _variant("baseline", supervised_only=True)


def tiny() -> RunConfig:
    """All fields have an effect: guesses of untrained weights pass this threshold, but not all of them."""
    return _variant("tiny", threshold=0.3)


def _variant(name: str, **fields: object) -> RunConfig:
    config = recipe()
    return dataclasses.replace(
        config, recipe=f"pseudo_label:{name}", method=dataclasses.replace(config.method, **fields)
    )
