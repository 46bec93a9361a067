"""What a source of training images is: rows of images that are decoded when they are asked for, and their labels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embedkit.errors import ImageError, SourceError
from embedkit.images.transform import ImageLike, read_pixels
from embedkit.model.preprocess import Preprocess

__all__ = ["FileSource", "Source", "number"]


class Source(ABC):
    """Images in rows 0..len-1.

    Attributes:
        labels: int64 (N,), -1 where there is none.
        classes: Names of the labels.
        blocks: int64 (N,), rows of one block are read together; None where every row is alone.
        columns: Names of the columns that may be asked for as labels.
        targets: int64 (N,) of each further target, -1 where there is none.
        target_classes: Names of their classes.
    """

    labels: np.ndarray
    classes: tuple[str, ...]
    blocks: np.ndarray | None = None
    columns: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.targets: dict[str, np.ndarray] = {}
        self.target_classes: dict[str, tuple[str, ...]] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, values: Mapping[str, Sequence[Any]], label: str, targets: Sequence[str]) -> None:
        """Take the labels and the further targets from columns, where there are such columns."""
        rows = len(next(iter(values.values()), ()))
        if label and label in values:
            self.classes, self.labels = number(values[label])
        elif rows:
            self.classes, self.labels = (), np.full(rows, -1)
        for name in targets:
            if name in values and name in self.columns:
                self.target_classes[name], self.targets[name] = number(values[name])

    @abstractmethod
    def read(self, row: int) -> ImageLike:
        """What `read_pixels` takes for this row."""

    @abstractmethod
    def where(self, row: int) -> str:
        """The row's name in a message."""

    def decode(
        self,
        rows: np.ndarray,
        preprocess: Preprocess,
        unreadable: dict[int, str] | None = None,
        *,
        reduced: bool = False,
    ) -> Tensor:
        """uint8 (len(rows), C, H, W), by the contract.

        Args:
            rows: Which images.
            preprocess: The contract.
            unreadable: Where given, it gets the position and the reason of each unreadable image, which is black.
            reduced: Decode a JPEG at a reduced scale where the contract allows it, as `embedkit embed` does.

        Raises:
            SourceError: An image that cannot be read, by name; not where `unreadable` is given.
        """
        out = np.empty((len(rows), preprocess.channels, *preprocess.size), np.uint8)

        def one(at: int) -> None:
            row = int(rows[at])
            try:
                read_pixels(self.read(row), preprocess, decode="auto" if reduced else "exact", out=out[at])
            except (ImageError, OSError, ValueError) as error:  # ValueError: a path with a NUL
                if unreadable is None:
                    raise SourceError(f"{self.where(row)}: {error}; repair or remove it") from error
                out[at] = 0
                unreadable[at] = f"{self.where(row)}: {error}"

        if len(rows) < 256 or torch.utils.data.get_worker_info() is not None:
            for at in range(len(rows)):
                one(at)
        else:
            with ThreadPoolExecutor() as pool:  # Pillow decodes and resizes outside the interpreter's lock
                for _ in pool.map(one, range(len(rows))):
                    pass
        return torch.from_numpy(out)


class FileSource(Source):
    """Image files; a subclass lists them and says which labels they have."""

    files: Sequence[Path]

    def read(self, row: int) -> str:
        """The path of one image."""
        return str(self.files[row])

    def where(self, row: int) -> str:
        """The path of one image."""
        return str(self.files[row])


def number(names: Sequence[Any]) -> tuple[tuple[str, ...], np.ndarray]:
    """Labels numbered by their sorted values; a missing one is -1."""
    values = sorted({name for name in names if name is not None})
    numbers = {value: number for number, value in enumerate(values)}
    labels = np.array([numbers.get(name, -1) for name in names], np.int64)
    return tuple(map(str, values)), labels
