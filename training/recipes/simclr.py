"""Recipes of `simclr`."""

from __future__ import annotations

from embedkit.training.augment import (
    ColorJitter,
    Compose,
    GaussianBlur,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomResizedCrop,
)
from embedkit.training.config import RunConfig
from embedkit.training.data import DataConfig
from embedkit.training.methods import simclr
from embedkit.training.optim import Optimizer

__all__ = ["color", "photos", "recipe"]

#: What was measured, by function; see `recipes.summaries`.
RESULTS = {
    "recipe": {
        "data": "fashion-mnist",
        "metrics": {"probe_top1": 0.889, "knn_top1": 0.855},
        "random": {"probe_top1": 0.751, "knn_top1": 0.77},
    },
    "photos": {
        "data": "crops of unseen photographs",
        "metrics": {"map_at_r": 0.6},
        "random": {"map_at_r": 0.426},
    },
}


def recipe() -> RunConfig:
    """r10 on Fashion-MNIST, 52 epochs.

    Data: the four IDX files of Fashion-MNIST; no label is used. Time: 40 minutes on 2 cores (75 on one).

        embedkit train simclr --data fashion-mnist/
    """
    return RunConfig(
        recipe="simclr",
        method=simclr.Config(temperature=0.2),
        backbone="r10",
        data=DataConfig(color="gray", image_size=28),
        optimizer=Optimizer(
            name="adamw", lr=2e-3, weight_decay=0.05, schedule="one_cycle", warmup_steps=1000
        ),
        batch_size=512,
        epochs=52,
    )


def photos() -> RunConfig:
    """ResNet-50 on color images of 64 pixels.

    P@1 of the same crops 0.997 (at random 0.953), kNN of groups of drawings 0.626 (0.529), after 24 epochs on 15,909
    crops of photographs and drawings.

    Views are those of the source for small images, with a quarter of its color jitter and a quarter of its grays,
    and no blur; crops of at least a fifth of the area, since an image of 64 pixels has no smaller part worth naming.
    Jitter was chosen with r10, 4 epochs, on photographs and drawings held out of the training files: MAP@R of crops
    0.555, 0.583, 0.619 and 0.650, kNN of groups of emoji 0.486, 0.496, 0.516 and 0.512 at 0.4, 0.2, 0.1 and 0.04. So
    was the temperature: 0.541 at 0.5 for 0.555, 0.566 at 0.1 for 0.583.

    Data: a folder with Parquet files whose names begin with `train`, at any depth; no label is used. Time: 97
    minutes on 2 cores for 16,700 images.

        embedkit train simclr:photos --data images/
    """
    augment = Compose(
        steps=(
            RandomResizedCrop(scale=(0.2, 1.0)),
            RandomHorizontalFlip(),
            ColorJitter(brightness=0.1, contrast=0.1, saturation=0.1, hue=0.025, p=0.8),
            RandomGrayscale(p=0.05),
        )
    )
    return RunConfig(
        recipe="simclr:photos",
        method=simclr.Config(temperature=0.2, augment=augment),
        backbone="r50",
        data=DataConfig(color="rgb", image_size=64, validation=0.05),
        optimizer=Optimizer(name="adamw", lr=1e-3, weight_decay=0.05, schedule="one_cycle", warmup_steps=300),
        batch_size=128,
        epochs=24,
    )


def color() -> RunConfig:
    """The default encoder, trained on color images without labels, with the views of the source.

    Views are the paper's (appendix A): crops of 8 % of the area and more, color jitter of strength 1 in brightness,
    contrast, saturation and hue, one gray image in five, and blur. Without the change of color, two crops of one
    image can be told by their histograms alone, and the network learns nothing else (its figure 5).

    Data: any images in color; no label is used.
    Time: made for 20 minutes of 2 cores on 6,000 images. Memory: 3.5 GB, and 0.3 GB for them, stored at 128 pixels.
    Smaller: `data.image_size=64`, `load_size=80`. Larger: 224 and 256, `batch_size=32`, `data.stream=true`, 4.5 GB.

        embedkit train simclr:color --data images/ --max-minutes 20
    """
    augment = Compose(
        steps=(
            RandomResizedCrop(scale=(0.08, 1.0)),
            RandomHorizontalFlip(),
            ColorJitter(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, p=0.8),
            RandomGrayscale(p=0.2),
            GaussianBlur(sigma=(0.1, 2.0), p=0.5),
        )
    )
    return RunConfig(
        recipe="simclr:color",
        method=simclr.Config(temperature=0.1, augment=augment),
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
        epochs=12,
    )
