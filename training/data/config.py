"""The configuration of a run's data, and how it is opened: training and validation part, hidden labels."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from embedkit.errors import ConfigError
from embedkit.model.preprocess import Preprocess
from embedkit.training.data.datasets import check_label, open_source
from embedkit.training.data.images import ImageSet, Tried
from embedkit.training.data.samplers import Sampler, Shuffled
from embedkit.training.data.source import Source
from embedkit.training.hardware import free_memory

__all__ = ["CONTRACT", "DataConfig", "keep_labels", "load_images", "load_parts", "split_validation"]

#: Bytes of images in memory that are worth a line on stderr.
_LARGE = 100_000_000
#: Fields that stand in the preprocess contract of the encoder.
CONTRACT = ("color", "image_size", "resize", "resize_size", "interpolation", "pad", "mean", "std")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where images come from and how they are brought to size.

    Attributes:
        path: A folder with the IDX files of MNIST or Fashion-MNIST, a Parquet file or a folder of them with an
            image column, a CSV or Parquet file with a column `file`, `path` or `image` of paths relative to its folder,
            a folder of class folders (images beside those, and in a folder `unlabeled`, have no label),
            `sklearn:digits`, or `synthetic:N` (N seeded images).
        label: Column of a Parquet or CSV file; images with the same value are positives of the methods that compare
            pairs. `label`, the default, may be missing; with an empty name the images of a table have no labels.
        targets: Further columns that a method learns from, by name; `Batch.targets` holds them.
        color: `gray`, `rgb` or `lab_l`; `auto` for that of the encoder that `RunConfig.init` names.
        image_size: Side in pixels of what the encoder sees; 0 for that of the encoder that `RunConfig.init` names.
        resize: As in the preprocess contract: `shortest` brings the shorter side to `resize_size` and keeps the middle.
        resize_size: In pixels; 0 for `image_size`.
        load_size: Side in pixels of the training images as they are stored: squares of the whole shorter side, out of
            which random crops are cut to `image_size`, so that a crop keeps the detail of the file. 0 for `image_size`.
            An augmentation without a crop gets the whole square at `image_size`; held-out images follow the contract.
        interpolation: As in the preprocess contract.
        pad: As in the preprocess contract.
        mean: Per channel, in units of [0, 1]; by default those of the training images as they are stored.
        std: Likewise.
        validation: Share of the training images that is set aside; 0 for none.
        validation_of: `images` sets aside so much of every class; `classes` sets so many classes aside, whole, for an
            encoder of classes that it never saw.
        labels_per_class: Labels that are kept; 0 for all.
        stream: Decode batch by batch, for data larger than memory.
        workers: Processes that decode when streaming.
        sampler: How batches are drawn.
    """

    path: str = ""
    label: str = "label"
    targets: tuple[str, ...] = ()
    color: Literal["gray", "rgb", "lab_l", "auto"] = "gray"
    image_size: int = 28
    resize: Literal["shortest", "longest", "squash"] = "shortest"
    resize_size: int = 0
    load_size: int = 0
    interpolation: str = "bicubic"
    pad: int = 0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    validation: float = 0.1
    validation_of: Literal["images", "classes"] = "images"
    labels_per_class: int = 0
    stream: bool = False
    workers: int = 2
    sampler: Sampler = field(default_factory=Shuffled)

    def contract(self) -> Preprocess:
        """How images are brought to size; mean and standard deviation play no part in it."""
        channels = 3 if self.color == "rgb" else 1
        return self.preprocess((0.0,) * channels, (1.0,) * channels)

    def stored(self) -> Preprocess:
        """How the training images are brought to the size that they are stored at.

        Raises:
            ConfigError: A `load_size` below `image_size`.
        """
        side = self.load_size
        if not side:
            return self.contract()
        if not self.image_size <= side <= 4096:
            raise ConfigError(
                f"data.load_size: expected 0, or {self.image_size} (data.image_size) to 4096 pixels, found {side}"
            )
        return dataclasses.replace(self.contract(), size=(side, side), resize_size=side)

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
    """Open a data set, by the contract of an encoder of these images (`load_size` is not used).

    Example:
        images = load_images(DataConfig(path="labels.csv", label="species", color="rgb", image_size=96))

    Args:
        config: What is opened, and how its images are brought to size.
        split: `test` is for reporting alone; choices are made on a part of `train`.

    Returns:
        All images of the split that can be read (streamed: all); labels are numbered by the sorted names that the
        split holds.

    Raises:
        ConfigError: No path, nothing there that is understood, or more images than fit into memory.
        SourceError: A file of the data set that cannot be read, or more than half of the images.
    """
    return _load(config, _open(config, split), config.contract())


def load_parts(config: DataConfig, seed: int) -> tuple[ImageSet, ImageSet]:
    """The training images, at `load_size`, and the held-out ones, by the contract.

    Example:
        train, validation = load_parts(DataConfig(path="photos/", color="rgb", image_size=96, load_size=128), seed=0)

    Args:
        config: What is opened, and what is held out.
        seed: Of the choice of the held-out images and of the labels that are kept.

    Raises:
        ConfigError: As `load_images`, or a `load_size` below `image_size`.
        SourceError: As `load_images`.
    """
    source = _open(config, "train")
    images = _load(config, source, config.stored())
    train, validation = split_validation(images, config.validation, seed, config.validation_of)
    if config.labels_per_class:
        train = keep_labels(train, config.labels_per_class, seed)
    if config.stored() != config.contract():
        validation = _under(validation, source, config.contract())
    return train, validation


def _open(config: DataConfig, split: Literal["train", "test"]) -> Source:
    source = open_source(config.path, split, label=config.label, targets=config.targets)
    check_label(source, config.path, config.label)
    return source


def _load(config: DataConfig, source: Source, contract: Preprocess) -> ImageSet:
    """The images of a source by a contract, in memory unless they are streamed."""
    tried, rows = Tried(len(source)), torch.arange(len(source))
    images: Tensor | Source = source
    unreadable: dict[int, str] = {}
    if not config.stream:
        _check_memory(len(source), contract)
        images = source.decode(rows.numpy(), contract, unreadable, reduced=True)
        tried.add(rows.numpy(), unreadable)
        tried.say("left out")
    found = ImageSet(
        images,
        torch.from_numpy(source.labels),
        source.classes,
        rows,
        contract if config.stream else None,
        {name: torch.from_numpy(values) for name, values in source.targets.items()},
        dict(source.target_classes),
        tried if config.stream else None,
    )
    return found.subset(_readable(len(rows), unreadable)) if unreadable else found


def _under(images: ImageSet, source: Source, contract: Preprocess) -> ImageSet:
    """The same images by another contract; those in memory are decoded again."""
    if images.streamed:
        return dataclasses.replace(images, preprocess=contract)
    unreadable: dict[int, str] = {}
    pixels = source.decode(images.rows.numpy(), contract, unreadable, reduced=True)
    found = dataclasses.replace(images, images=pixels, rows=torch.arange(len(images)))
    return found.subset(_readable(len(images), unreadable)) if unreadable else found


def _readable(count: int, unreadable: Mapping[int, str]) -> Tensor:
    return torch.tensor([at for at in range(count) if at not in unreadable], dtype=torch.int64)


def _check_memory(count: int, contract: Preprocess) -> None:
    """Say how much memory many pixels take.

    Raises:
        ConfigError: More than is free.
    """
    side, needed = contract.size[0], count * contract.channels * math.prod(contract.size)
    free = free_memory()
    what = f"{count:,} images of {side}x{side} pixels take {needed / 1e9:.1f} GB of memory"
    if free is not None and needed > free:
        raise ConfigError(
            f"data: {what}, and {free / 1e9:.1f} GB are free; --set data.stream=true decodes them batch by batch"
        )
    if needed >= _LARGE:
        print(f"embedkit: {what}", file=sys.stderr)


def split_validation(
    images: ImageSet, share: float, seed: int, of: Literal["images", "classes"] = "images"
) -> tuple[ImageSet, ImageSet]:
    """Training and validation part: `share` of every class, or of the classes, drawn by `seed`, goes to the second.

    Images without a label are no class: of `images`, the same share of them is drawn on its own, so that methods which
    need no labels have held-out images too, and metrics of labels leave them out; of `classes`, all are trained on.

    Args:
        images: All of them.
        share: 0 to below 1.
        seed: Of the draw.
        of: With `classes` the training part's classes are numbered 0..K-1 in their old order, and those that are set
            aside K and on.

    Raises:
        ConfigError: Another share, or `classes` where fewer than two would be set aside or trained on.
    """
    if not 0 <= share < 1:
        raise ConfigError(f"data.validation: expected a share of 0 to below 1, found {share}")
    if of == "classes" and share:
        return _split_classes(images, share, seed)
    held_out = _first_per_class(images.labels, seed, lambda count: round(count * share))
    return images.subset(torch.nonzero(~held_out)[:, 0]), images.subset(torch.nonzero(held_out)[:, 0])


def _split_classes(images: ImageSet, share: float, seed: int) -> tuple[ImageSet, ImageSet]:
    count = len(images.classes)
    aside = round(count * share)
    if not 2 <= aside <= count - 2:
        raise ConfigError(
            f"data.validation: {share:g} of {count} classes are {aside}; expected two or more to set aside, and two or "
            "more to train on; --set data.validation_of=images sets aside images of each"
        )
    order = np.random.default_rng(seed).permutation(count)
    kept, held = np.sort(order[aside:]), np.sort(order[:aside])
    number = torch.empty(count + 1, dtype=torch.int64)
    number[torch.from_numpy(np.concatenate([kept, held]))] = torch.arange(count)
    number[-1] = -1  # the label -1 finds the last
    labels = number[images.labels]
    names = [images.classes[old] for old in (*kept, *held)]
    held_out = labels >= len(kept)
    train = dataclasses.replace(images, labels=labels, classes=tuple(names[: len(kept)]))
    every = dataclasses.replace(images, labels=labels, classes=tuple(names))
    return train.subset(torch.nonzero(~held_out)[:, 0]), every.subset(torch.nonzero(held_out)[:, 0])


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
