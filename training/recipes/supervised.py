"""Recipes of `supervised`: r10, the encoders of 2012 to 2014, and the default encoder fine-tuned."""

from __future__ import annotations

import dataclasses
from typing import Any

from embedkit.training.augment import ColorJitter, Compose, RandomHorizontalFlip, RandomResizedCrop
from embedkit.training.config import Evaluation, RunConfig
from embedkit.training.data import DataConfig
from embedkit.training.methods import supervised
from embedkit.training.optim import Optimizer

__all__ = ["alexnet", "finetune", "gru", "recipe", "vgg11"]

#: What was measured, by function; see `recipes.summaries`.
RESULTS = {
    "recipe": {
        "data": "fashion-mnist",
        "metrics": {"probe_top1": 0.936, "knn_top1": 0.934, "validation_accuracy": 0.934},
        "random": {"probe_top1": 0.751, "knn_top1": 0.77},
    }
}


def recipe() -> RunConfig:
    """r10 on Fashion-MNIST.

    Data: the four IDX files of Fashion-MNIST. Time: 20 minutes on 2 cores.

        embedkit train supervised --data fashion-mnist/ --max-minutes 20
    """
    return RunConfig(
        recipe="supervised",
        method=supervised.Config(),
        backbone="r10",
        data=DataConfig(color="gray", image_size=28),
        optimizer=Optimizer(name="adamw", lr=4e-3, weight_decay=0.05, schedule="one_cycle", warmup_steps=500),
        batch_size=256,
        epochs=40,
    )


def finetune() -> RunConfig:
    """The default encoder, fine-tuned on color images with classes.

    The head learns at the full rate, each block below it at 0.9 of the one above, the stem at a sixth: what the encoder
    knows already of edges and textures changes least. Crops keep at least a quarter of the area, since the class must
    still be in the picture. kNN of the held-out images chooses the weights.

    Data: class folders, or a CSV or Parquet file with the column `label`.
    Time: made for 20 minutes of 2 cores on 6,000 images. Memory: 2.2 GB, and 0.3 GB for them, stored at 128 pixels.
    Smaller: `data.image_size=64`, `load_size=80`. Larger: 224 and 256, `batch_size=32`, `data.stream=true`, 2.8 GB.

        embedkit train supervised:finetune --data images/ --max-minutes 20
    """
    augment = Compose(
        steps=(
            RandomResizedCrop(scale=(0.25, 1.0)),
            RandomHorizontalFlip(),
            ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.8),
        )
    )
    return RunConfig(
        recipe="supervised:finetune",
        method=supervised.Config(label_smoothing=0.1, augment=augment),
        backbone="tf_efficientnet_lite0",
        init="supervised-efficientnet_lite0.in1k",
        data=DataConfig(color="rgb", image_size=96, load_size=128),
        optimizer=Optimizer(
            name="adamw",
            lr=1e-3,
            weight_decay=0.05,
            layer_decay=0.9,
            schedule="cosine",
            warmup_steps=100,
            clip_norm=1.0,
        ),
        batch_size=128,
        epochs=20,
        evaluation=Evaluation(every=100),
    )


def alexnet() -> RunConfig:
    """AlexNet with BatchNorm on Fashion-MNIST, in half its width, without its layers of 4096.

    Data: the four IDX files of Fashion-MNIST. Time: 1,680 steps, about 10 minutes on one core.

        embedkit train supervised:alexnet --data fashion-mnist/
    """
    return _older("alexnet", backbone="alexnet_bn", backbone_args={"width": 0.5}, epochs=8)


def vgg11() -> RunConfig:
    """VGG-11 with BatchNorm on Fashion-MNIST, in half its width, without its layers of 4096.

    Data: the four IDX files of Fashion-MNIST. Time: 1,260 steps, about 10 minutes on one core.

        embedkit train supervised:vgg11 --data fashion-mnist/
    """
    return _older("vgg11", backbone="vgg11", backbone_args={"width": 0.5}, epochs=6)


def gru() -> RunConfig:
    """A gated recurrent net (GRU) on the rows of Fashion-MNIST, one after another; exported is the mean of its states.

    Gradients are clipped, as is usual for recurrent nets.

    Data: the four IDX files of Fashion-MNIST. Time: 2,520 steps, about 10 minutes on one core.

        embedkit train supervised:gru --data fashion-mnist/
    """
    config = _older("gru", backbone="gru", epochs=12)
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, clip_norm=1.0))


def _older(name: str, **fields: Any) -> RunConfig:
    """The base with another network: fewer epochs, and the learning rate of a run that is as short."""
    base = recipe()
    optimizer = dataclasses.replace(base.optimizer, lr=2e-3, warmup_steps=200)
    return dataclasses.replace(base, recipe=f"supervised:{name}", optimizer=optimizer, **fields)
