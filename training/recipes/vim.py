"""Recipe of `vim`."""

from __future__ import annotations

import dataclasses

from embedkit.training.config import RunConfig
from embedkit.training.data import DataConfig
from embedkit.training.methods import vim
from embedkit.training.optim import Optimizer

__all__ = ["recipe"]

#: By function: what was measured; {} until it was.
RESULTS = {
    "recipe": {"data": "fashion-mnist", "metrics": {}, "random": {}, "steps": 0, "minutes": 0.0, "cores": 1}
}


def recipe() -> RunConfig:
    """vit_t4 on Fashion-MNIST: a prior of six blocks over 49 tokens, its third block exported.

    Data: the four IDX files of Fashion-MNIST; no label is used.

        embedkit train vim --data fashion-mnist/ --max-minutes 30
    """
    adam = Optimizer(
        name="adamw",
        lr=5e-4,
        weight_decay=1e-4,
        betas=(0.9, 0.99),
        schedule="cosine",
        warmup_steps=200,
        end=0.1,
    )
    return RunConfig(
        recipe="vim",
        method=vim.Config(),
        backbone="vit_t4",
        data=DataConfig(color="gray", image_size=28),
        optimizer=adam,
        optimizers={
            "discriminator": dataclasses.replace(adam, lr=2e-4, betas=(0.5, 0.99)),
            "prior": dataclasses.replace(adam, lr=1e-3, weight_decay=0.045, betas=(0.9, 0.96), clip_norm=1.0),
        },
        batch_size=128,
        epochs=12,
    )


def tiny() -> RunConfig:
    """The smallest run that has every part of both stages."""
    config = recipe()
    method = dataclasses.replace(
        config.method,
        codes=32,
        code_dim=4,
        decoder_depth=1,
        adversarial_start=0.1,
        discriminator_width=4,
        restart_after=3,
        codec_share=0.5,
        dim=24,
        depth=2,
        heads=2,
        block=1,
    )
    args = {"embed_dim": 32, "depth": 2, "num_heads": 2}
    return dataclasses.replace(config, method=method, backbone_args=args, batch_size=16)
