"""The configuration of a run's data, and how it is opened: training and validation part, hidden labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from embedkit.errors import ConfigError
from embedkit.model.preprocess import Preprocess
from embedkit.training.data.datasets import open_source
from embedkit.training.data.images import ImageSet, say_unreadable
from embedkit.training.data.samplers import Sampler, Shuffled

__all__ = ["DataConfig", "keep_labels", "load_images", "split_validation"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where images come from and how they are brought to size.

    Attributes:
        path: A folder with the IDX files of MNIST or Fashion-MNIST, a Parquet file or a folder of them with an
            image column, a CSV file with a column `file` of paths beside it, a folder of class folders (images beside
            those have no label), `sklearn:digits`, or `synthetic:N` (N seeded images).
        label: Column of a Parquet or CSV file; where there is no such column the images have no labels.
        targets: Further columns that a method learns from, by name; `Batch.targets` holds them.
        color: `gray`, `rgb` or `lab_l`.
        image_size: Side in pixels of what the encoder sees.
        resize: As in the preprocess contract: `shortest` brings the shorter side to `resize_size` and keeps the middle.
        resize_size: In pixels; 0 for `image_size`.
        interpolation: As in the preprocess contract.
        pad: As in the preprocess contract.
        mean: Per channel, in units of [0, 1]; by default those of the training images.
        std: Likewise.
        validation: Share of the training images that is set aside, by class; 0 for none.
        labels_per_class: Labels that are kept; 0 for all.
        stream: Decode batch by batch, for data larger than memory.
        workers: Processes that decode when streaming.
        sampler: How batches are drawn.
    """

    path: str = ""
    label: str = "label"
    targets: tuple[str, ...] = ()
    color: Literal["gray", "rgb", "lab_l"] = "gray"
    image_size: int = 28
    resize: Literal["shortest", "longest", "squash"] = "shortest"
    resize_size: int = 0
    interpolation: str = "bicubic"
    pad: int = 0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    validation: float = 0.1
    labels_per_class: int = 0
    stream: bool = False
    workers: int = 2
    sampler: Sampler = field(default_factory=Shuffled)

    def preprocess(self, mean: tuple[float, ...], std: tuple[float, ...]) -> Preprocess:
        """The contract that an encoder of these images is exported with."""
        return Preprocess(
            color=self.color,
            size=(self.image_size, self.image_size),
            resize=self.resize,
            resize_size=self.resize_size or self.image_size,
            interpolation=self.interpolation,
            pad=self.pad,
            mean=mean,
            std=std,
        )


def load_images(config: DataConfig, split: Literal["train", "test"] = "train") -> ImageSet:
    """Open a data set.

    Args:
        config: `path`, `label`, `color`, `image_size` and `stream` are used.
        split: `test` is for reporting alone; choices are made on a part of `train`.

    Returns:
        All images of the split that can be read (streamed: all); labels are numbered by the sorted names that the
        split holds.

    Raises:
        ConfigError: No path, or nothing there that is understood.
        SourceError: A file of the data set that cannot be read, or no image that can.
    """
    source = open_source(config.path, split, label=config.label, targets=config.targets)
    channels = 3 if config.color == "rgb" else 1
    preprocess = config.preprocess((0.0,) * channels, (1.0,) * channels)
    labels, rows = torch.from_numpy(source.labels), torch.arange(len(source))
    targets = {name: torch.from_numpy(values) for name, values in source.targets.items()}
    unreadable: dict[int, str] = {}
    images = source if config.stream else source.decode(rows.numpy(), preprocess, unreadable)
    found = ImageSet(
        images,
        labels,
        source.classes,
        rows,
        preprocess if config.stream else None,
        targets,
        dict(source.target_classes),
    )
    if unreadable:
        say_unreadable(unreadable, len(rows))
        return found.subset(torch.tensor([row for row in range(len(rows)) if row not in unreadable]))
    return found


def split_validation(images: ImageSet, share: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """Training and validation part: `share` of every class, drawn by `seed`, goes to the second.

    Images without a label are no class: the same share of them is drawn on its own, so that methods which need no
    labels have held-out images too, and metrics of labels leave them out.
    """
    if not 0 <= share < 1:
        raise ConfigError(f"data.validation: expected a share of 0 to below 1, found {share}")
    held_out = _first_per_class(images.labels, seed, lambda count: round(count * share))
    return images.subset(torch.nonzero(~held_out)[:, 0]), images.subset(torch.nonzero(held_out)[:, 0])


def keep_labels(images: ImageSet, per_class: int, seed: int) -> ImageSet:
    """The same images with `per_class` labels of each class, drawn by `seed`; the others become -1.

    Raises:
        ConfigError: A class has fewer images.
    """
    counts = torch.bincount(images.labels[images.labels >= 0], minlength=len(images.classes))
    if per_class < 1 or not len(counts) or int(counts.min()) < per_class:
        fewest = int(counts.min()) if len(counts) else 0
        raise ConfigError(
            f"data.labels_per_class: expected 1 to {fewest}, the smallest class; found {per_class}"
        )
    kept = _first_per_class(images.labels, seed, lambda count: per_class)
    labels = torch.where(kept, images.labels, -1)
    return dataclasses.replace(images, labels=labels)


def _first_per_class(labels: Tensor, seed: int, how_many: Callable[[int], int]) -> Tensor:
    """Mask (N,): of each class the first `how_many(count)` of a random order."""
    order = np.random.default_rng(seed).permutation(len(labels))
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():  # MISSING is one of them
        own = order[labels.numpy()[order] == int(label)]
        chosen[torch.from_numpy(own[: how_many(len(own))])] = True
    return chosen
