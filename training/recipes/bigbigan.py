"""Recipe of `bigbigan`."""

from __future__ import annotations

import dataclasses

from embedkit.training.config import RunConfig
from embedkit.training.data import DataConfig
from embedkit.training.methods import bigbigan
from embedkit.training.optim import Optimizer

__all__ = ["recipe"]

#: By function: what was measured; {} until it was.
RESULTS = {
    "recipe": {"data": "fashion-mnist", "metrics": {}, "random": {}, "steps": 0, "minutes": 0.0, "cores": 1}
}


def recipe() -> RunConfig:
    """r10 on Fashion-MNIST: three hinged scores, an encoder that draws its code.

    Data: the four IDX files of Fashion-MNIST; no label is used.

        embedkit train bigbigan --data fashion-mnist/ --max-minutes 30
    """
    adam = Optimizer(
        name="adamw", lr=2e-4, weight_decay=0.0, betas=(0.5, 0.999), schedule="cosine", warmup_steps=0
    )
    return RunConfig(
        recipe="bigbigan",
        method=bigbigan.Config(),
        backbone="r10",
        data=DataConfig(color="gray", image_size=28),
        optimizer=adam,
        optimizers={"encoder": dataclasses.replace(adam, lr=6e-4)},
        batch_size=128,
        epochs=12,
    )


def tiny() -> RunConfig:
    """The smallest run that has every part, spectral norm in the encoder among them."""
    config = recipe()
    return dataclasses.replace(
        config,
        method=dataclasses.replace(
            config.method, latent_dim=8, generator_width=4, discriminator_width=4, spectral_encoder=True
        ),
        batch_size=16,
    )
