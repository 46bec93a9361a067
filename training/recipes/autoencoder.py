"""Recipes of `autoencoder`."""

from __future__ import annotations

import dataclasses

from embedkit.training.config import RunConfig
from embedkit.training.data import DataConfig
from embedkit.training.methods import autoencoder
from embedkit.training.optim import Optimizer

__all__ = ["features", "hinton2006", "recipe"]

#: What was measured, by function; see `recipes.summaries`.
RESULTS = {
    "features": {
        "data": "fashion-mnist",
        "metrics": {"probe_top1": 0.871, "knn_top1": 0.875},
        "random": {"probe_top1": 0.751, "knn_top1": 0.77},
    }
}


def recipe() -> RunConfig:
    """r10 on Fashion-MNIST, exported is the code of 32: the same run as `autoencoder:features`.

    Data: the four IDX files of Fashion-MNIST; no label is used. Time: 1,680 steps, 8 minutes on one core.

        embedkit train autoencoder --data fashion-mnist/
    """
    return RunConfig(
        recipe="autoencoder",
        method=autoencoder.Config(code_dim=32),
        backbone="r10",
        data=DataConfig(color="gray", image_size=28),
        optimizer=Optimizer(name="adamw", lr=2e-3, weight_decay=0.01, schedule="one_cycle", warmup_steps=500),
        batch_size=256,
        epochs=8,
    )


def features() -> RunConfig:
    """r10 on Fashion-MNIST, exported are the features before the code.

    The better part: after 200 steps, on 3,000 held-out training images, the features' linear probe was at 0.83 and
    the code's at 0.77.

        embedkit train autoencoder:features --data fashion-mnist/
    """
    base = recipe()
    method = dataclasses.replace(base.method, embedding="features")
    return dataclasses.replace(base, recipe="autoencoder:features", method=method)


def hinton2006() -> RunConfig:
    """The perceptron 784-1000-500-250-30 of 2006 on Fashion-MNIST, pretrained by restricted Boltzmann machines.

    A tenth of the run for each of four machines, the rest for all layers together; exported is the linear code. The
    run's metrics have the squared error of as many principal components beside the autoencoder's.

    Data: the four IDX files of Fashion-MNIST; no label is used. Time: 32,400 steps, about 10 minutes on one core.

        embedkit train autoencoder:hinton2006 --data fashion-mnist/
    """
    binary = Optimizer(
        name="sgd", lr=0.1, momentum=0.9, weight_decay=2e-4, schedule="constant", warmup_steps=0
    )
    linear = dataclasses.replace(binary, lr=1e-3)
    return RunConfig(
        recipe="autoencoder:hinton2006",
        method=autoencoder.Config(code_dim=30, pretraining="rbm"),
        backbone="mlp",
        backbone_args={"hidden": (1000, 500, 250), "norm": "none", "activation": "sigmoid"},
        data=DataConfig(color="gray", image_size=28),
        optimizer=Optimizer(name="adamw", lr=1e-3, weight_decay=0.0, schedule="one_cycle", warmup_steps=200),
        optimizers={**{f"rbm{index}": binary for index in range(3)}, "rbm3": linear},
        batch_size=100,
        epochs=60,
    )
