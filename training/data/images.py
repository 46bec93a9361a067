"""A set of images of one size with their labels and targets, in memory or streamed, and the batches taken from it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from embedkit.errors import ConfigError, SourceError
from embedkit.model.preprocess import Preprocess
from embedkit.training.data.source import Source

__all__ = ["Batch", "ImageSet", "Tried"]

#: So many tried images stand for all of a stream; of fewer, half of all must be unreadable to refuse it.
_ENOUGH = 1024
#: Unreadable images that are named.
_NAMED = 3
#: A batch of which no image can be read is taken so many images further on, before the run ends.
_FURTHER = 8


class Batch(NamedTuple):
    """One step's images.

    Attributes:
        images: uint8 (N, C, H, W).
        labels: int64 (N,), a class 0..K-1, or -1 where there is no label or it is hidden.
        indices: int64 (N,), which images these are.
        targets: Further targets by name (`DataConfig.targets`), each int64 (N,) like `labels`.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    targets: dict[str, Tensor] = {}

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        targets = {name: values.to(device) for name, values in self.targets.items()}
        return Batch(self.images.to(device), self.labels.to(device), self.indices.to(device), targets)


class Tried:
    """Which images of a source were tried, and how many of them cannot be read: said once, with the first names."""

    def __init__(self, count: int) -> None:
        """Nothing tried yet of `count` images."""
        self._tried, self._unreadable = np.zeros(count, bool), np.zeros(count, bool)
        self._first: dict[int, str] = {}

    def add(self, rows: np.ndarray, unreadable: Mapping[int, str]) -> None:
        """Count images that were tried.

        Args:
            rows: Which rows of the source.
            unreadable: Name and reason of those that cannot be read, by row.

        Raises:
            SourceError: More than half cannot be read.
        """
        self._tried[rows] = True
        for row, reason in sorted(unreadable.items()):
            self._unreadable[row] = True
            if len(self._first) < _NAMED:
                self._first[row] = reason
        tried, bad = int(self._tried.sum()), int(self._unreadable.sum())
        if 2 * bad > (tried if tried >= _ENOUGH else len(self._tried)):
            raise SourceError(
                f"{bad} of {tried} images cannot be read, more than half: {self._names()}; "
                "repair the data, or name others with --data"
            )

    def say(self, instead: str) -> None:
        """Say on stderr how many images cannot be read, and what happens to them instead; nothing if all can."""
        if self._first:
            bad, tried = int(self._unreadable.sum()), int(self._tried.sum())
            print(
                f"embedkit: {bad:,} of {tried:,} images cannot be read and are {instead}: {self._names()}",
                file=sys.stderr,
            )

    def _names(self) -> str:
        more = int(self._unreadable.sum()) - len(self._first)
        return "; ".join(self._first.values()) + (f"; and {more:,} more" if more else "")


@dataclass(frozen=True)
class ImageSet:
    """A set of images of one size.

    Attributes:
        images: uint8 (N, C, H, W) in memory, or the source that they are decoded from, batch by batch.
        labels: int64 (N,), -1 where there is none.
        classes: Names of the labels 0..K-1.
        rows: int64 (N,), which rows of `images` these images are.
        preprocess: How an image of the source is brought to size; None in memory.
        targets: Further targets by name, each int64 (N,), -1 where there is none.
        target_classes: Names of their classes.
        tried: Where streamed images that cannot be read are counted.
    """

    images: Tensor | Source
    labels: Tensor
    classes: tuple[str, ...]
    rows: Tensor
    preprocess: Preprocess | None = None
    targets: dict[str, Tensor] = field(default_factory=dict)
    target_classes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    tried: Tried | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def streamed(self) -> bool:
        """Whether images are decoded when a batch asks for them."""
        return self.preprocess is not None

    @property
    def blocks(self) -> Tensor | None:
        """int64 (N,), the block (row group) that each image is read with; None where any order is as fast."""
        blocks = None if isinstance(self.images, Tensor) else self.images.blocks
        return None if blocks is None else torch.from_numpy(blocks)[self.rows]

    def batch(self, indices: Tensor) -> Batch:
        """The images `indices` (N,), each in 0..len(self)-1.

        A streamed image that cannot be read is replaced by the next of the batch that can, with its label.

        Raises:
            SourceError: More than half of the images cannot be read.
        """
        batch, unreadable = self.read(indices)
        self.count(indices, unreadable)
        return batch

    def read(self, indices: Tensor) -> tuple[Batch, dict[int, str]]:
        """As `batch`, with the name and reason of the unreadable images by row of the source, which are not counted."""
        unreadable: dict[int, str] = {}
        if isinstance(self.images, Tensor):
            images = self.images[self.rows[indices]]
        else:
            images, indices = self._decode(self.images, indices, unreadable)
        targets = {name: values[indices] for name, values in self.targets.items()}
        return Batch(images, self.labels[indices], indices, targets), unreadable

    def count(self, indices: Tensor, unreadable: Mapping[int, str]) -> None:
        """Count what `read` found: in the process that trains, where workers read."""
        if self.tried is not None:
            self.tried.add(self.rows[indices].numpy(), unreadable)

    def subset(self, indices: Tensor) -> ImageSet:
        """The images `indices` (M,) alone; pixels are not copied."""
        return dataclasses.replace(
            self,
            labels=self.labels[indices],
            rows=self.rows[indices],
            targets={name: values[indices] for name, values in self.targets.items()},
        )

    def statistics(self, most: int = 4096) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation per channel, in units of [0, 1], over `most` evenly spread images."""
        images = self.batch(torch.linspace(0, len(self) - 1, min(most, len(self))).long()).images
        values = images.movedim(1, 0).flatten(1).double() / 255  # (C, pixels)
        mean, std = values.mean(1), values.std(1, correction=0).clamp(min=1 / 255)
        return tuple(round(v, 5) for v in mean.tolist()), tuple(round(v, 5) for v in std.tolist())

    def _decode(self, source: Source, indices: Tensor, unreadable: dict[int, str]) -> tuple[Tensor, Tensor]:
        """The images `indices`; one that cannot be read is replaced by the next that can."""
        if self.preprocess is None:
            raise ConfigError("images in memory need no preprocessing")
        for _ in range(_FURTHER):
            rows = self.rows[indices]
            bad: dict[int, str] = {}
            images = source.decode(rows.numpy(), self.preprocess, bad, reduced=True)
            unreadable.update({int(rows[at]): reason for at, reason in bad.items()})
            if not bad:
                return images, indices
            fine = torch.tensor([at for at in range(len(indices)) if at not in bad], dtype=torch.int64)
            if len(fine):
                places = torch.arange(len(indices))
                missing = torch.tensor(list(bad))
                places[missing] = fine[torch.searchsorted(fine, missing) % len(fine)]
                return images[places], indices[places]
            indices = (indices + 1) % len(self)
        first = next(iter(unreadable.values()))
        raise SourceError(f"{first}; nor can any image of the batch be read, or of those after it")
