"""Recipe of `supervised`."""

from __future__ import annotations

from embedkit.training.config import RunConfig
from embedkit.training.data import DataConfig
from embedkit.training.methods import supervised
from embedkit.training.optim import Optimizer

__all__ = ["recipe"]

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
