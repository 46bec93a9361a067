"""A set of images of one size with their labels and targets, in memory or streamed, and the batches taken from it."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from embedkit.errors import ConfigError, SourceError
from embedkit.model.preprocess import Preprocess
from embedkit.training.data.datasets import Source

__all__ = ["Batch", "ImageSet"]


def say_unreadable(unreadable: dict[int, str], count: int) -> None:
    """Say on stderr that images are left out, and why the first of them is.

    Raises:
        SourceError: None of the `count` images can be read.
    """
    first = next(iter(unreadable.values()))
    if len(unreadable) == count:
        raise SourceError(f"{first}; none of {count} images can be read")
    print(
        f"embedkit: {len(unreadable)} of {count} images cannot be read and are left out: {first}",
        file=sys.stderr,
    )


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
    """

    images: Tensor | Source
    labels: Tensor
    classes: tuple[str, ...]
    rows: Tensor
    preprocess: Preprocess | None = None
    targets: dict[str, Tensor] = field(default_factory=dict)
    target_classes: dict[str, tuple[str, ...]] = field(default_factory=dict)

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
        """The images `indices` (N,), each in 0..len(self)-1."""
        if isinstance(self.images, Tensor):
            images = self.images[self.rows[indices]]
        else:
            images, indices = self._decode(self.images, indices)
        targets = {name: values[indices] for name, values in self.targets.items()}
        return Batch(images, self.labels[indices], indices, targets)

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

    def _decode(self, source: Source, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The images `indices`; one that cannot be read is replaced by the next that can."""
        unreadable: dict[int, str] = {}
        images = source.decode(self.rows[indices].numpy(), self._contract(), unreadable)
        if unreadable:
            say_unreadable(unreadable, len(indices))
            fine = torch.tensor([place for place in range(len(indices)) if place not in unreadable])
            places = torch.arange(len(indices))
            bad = torch.tensor(list(unreadable))
            places[bad] = fine[torch.searchsorted(fine, bad) % len(fine)]
            images, indices = images[places], indices[places]
        return images, indices

    def _contract(self) -> Preprocess:
        if self.preprocess is None:
            raise ConfigError("images in memory need no preprocessing")
        return self.preprocess
