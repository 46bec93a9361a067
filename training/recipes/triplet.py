"""Recipes of `triplet`: semi-hard triplets, and the hardest of each anchor."""

from __future__ import annotations

import dataclasses
from typing import Any

from embedkit.training.config import RunConfig
from embedkit.training.data import DataConfig, IdentityBalanced
from embedkit.training.methods import triplet
from embedkit.training.optim import Optimizer
from embedkit.training.recipes import sphereface

__all__ = ["batch_hard", "finetune", "recipe"]

#: By function: what was measured; empty until it was.
RESULTS: dict[str, dict[str, Any]] = {
    "recipe": {
        "data": "emoji, new objects",
        "metrics": {"auc": 0.968, "map_at_r": 0.504},
        "random": {"auc": 0.737, "map_at_r": 0.104},
    },
    "batch_hard": {"data": "emoji", "metrics": {}, "random": {}, "steps": 0, "minutes": 0.0, "cores": 1},
}


def recipe() -> RunConfig:
    """r10 on emoji, one object drawn by up to five designers; judged on objects that were never seen.

    Batches are 64 objects in 4 drawings each. The drawing of each object that is set aside has no second one to be
    compared with; with `--set data.validation=0.4` there are two, and a metric while training.

    Data: a folder with `train.parquet`, of an image column and the column `identity`; for metrics also
    `test.parquet`, of other identities.

        embedkit train triplet --data emoji/ --max-minutes 20
    """
    return RunConfig(
        recipe="triplet",
        method=triplet.Config(),
        backbone="r10",
        data=DataConfig(
            label="identity",
            color="rgb",
            image_size=32,
            validation=0.2,
            sampler=IdentityBalanced(images_per_identity=4),
        ),
        optimizer=Optimizer(name="adamw", lr=1e-3, weight_decay=0.05, schedule="one_cycle", warmup_steps=300),
        batch_size=256,
        epochs=300,
    )


def batch_hard() -> RunConfig:
    """The hardest positive and negative of each anchor, plain distances and a soft margin (Hermans et al., 2017).

    Data and time: as for `recipe`.

        embedkit train triplet:batch_hard --data emoji/ --max-minutes 20
    """
    config = recipe()
    return dataclasses.replace(
        config,
        recipe="triplet:batch_hard",
        method=dataclasses.replace(config.method, mining="batch_hard", squared=False, soft_margin=True),
    )


def finetune() -> RunConfig:
    """The default encoder, fine-tuned to tell apart identities that it never saw.

    Data, views, time and memory: as for `sphereface:finetune`; batches are 32 identities of 4 images.

        embedkit train triplet:finetune --data identities/ --max-minutes 20
    """
    base = sphereface.finetune()
    return dataclasses.replace(
        base,
        recipe="triplet:finetune",
        method=triplet.Config(augment=base.method.augment),
        data=dataclasses.replace(base.data, sampler=IdentityBalanced(images_per_identity=4)),
    )
