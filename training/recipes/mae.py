"""Recipes of `mae`: small gray images, and color."""

from __future__ import annotations

from embedkit.training.config import RunConfig
from embedkit.training.data import DataConfig
from embedkit.training.methods import mae
from embedkit.training.optim import Optimizer

__all__ = ["color", "recipe"]

#: What was measured, by function; see `recipes.summaries`.
RESULTS = {
    "recipe": {
        "data": "fashion-mnist",
        "metrics": {"probe_top1": 0.867, "knn_top1": 0.842},
        "random": {"probe_top1": 0.753, "knn_top1": 0.612},
    }
}


def recipe() -> RunConfig:
    """vit_t4 on Fashion-MNIST.

    Data: the four IDX files of Fashion-MNIST; no label is used. Time: 2,100 steps, 52 minutes on one core.

        embedkit train mae --data fashion-mnist/
    """
    return RunConfig(
        recipe="mae",
        method=mae.Config(norm_pix_eps=1e-2),
        backbone="vit_t4",
        data=DataConfig(color="gray", image_size=28),
        optimizer=Optimizer(
            name="adamw", lr=1e-3, weight_decay=0.05, betas=(0.9, 0.95), schedule="cosine", warmup_steps=300
        ),
        batch_size=512,
        epochs=20,
    )


def color() -> RunConfig:
    """vit_t4 with patches of 8 on color images of 64 pixels, without labels.

    Views are the paper's: crops of a fifth of the area and more, and flips; no color is changed, since masking is
    task enough (its table 1e). The 64 patches of an image are a fourth of those of 4 pixels, so a step takes a fifth
    of the time.

    Data: any images in color; no label is used. Time: made for 20 minutes of 2 cores on 6,000 images; MAE goes on
    learning for hundreds of epochs. Memory: 1.8 GB, and 0.2 GB for 6,000 images stored at 96 pixels.
    Larger: `data.image_size=96`, `data.load_size=128`, 2.6 GB; or 224 and 256 with `backbone=vit_small_patch16_224`,
    `backbone_args.patch_size=16` and `data.stream=true`.

        embedkit train mae:color --data images/ --max-minutes 20
    """
    return RunConfig(
        recipe="mae:color",
        method=mae.Config(norm_pix_eps=1e-2),
        backbone="vit_t4",
        backbone_args={"patch_size": 8},
        data=DataConfig(color="rgb", image_size=64, load_size=96),
        optimizer=Optimizer(
            name="adamw", lr=1e-3, weight_decay=0.05, betas=(0.9, 0.95), schedule="cosine", warmup_steps=300
        ),
        batch_size=256,
        epochs=60,
    )
