"""Sources whose images are decoded already: IDX files, scikit-learn's digits, synthetic images.

IDX is the format that Yann LeCun's MNIST page defined.
"""

from __future__ import annotations

import gzip
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from embedkit._io.optional import requires
from embedkit.errors import ConfigError, SourceError
from embedkit.model.preprocess import Preprocess
from embedkit.training.data.source import Source

__all__ = ["ArraySource", "digits", "has_idx", "idx", "synthetic"]

Split = Literal["train", "test"]


class ArraySource(Source):
    """Images that are already decoded: uint8 (N, H, W) or (N, H, W, 3)."""

    def __init__(self, arrays: np.ndarray, labels: np.ndarray, classes: Sequence[str], name: str) -> None:
        super().__init__()
        self.arrays, self.labels, self.classes = arrays, labels.astype(np.int64), tuple(classes)
        self.name = name

    def read(self, row: int) -> np.ndarray:
        """The array of one image."""
        return self.arrays[row]

    def where(self, row: int) -> str:
        """The data set and the row."""
        return f"{self.name}, image {row}"

    def decode(
        self,
        rows: np.ndarray,
        preprocess: Preprocess,
        unreadable: dict[int, str] | None = None,
        *,
        reduced: bool = False,
    ) -> Tensor:
        """As they are where the contract changes nothing."""
        shape = self.arrays.shape
        if shape[1:3] == preprocess.size and preprocess.color == {3: "gray", 4: "rgb"}[len(shape)]:
            taken = self.arrays[rows]
            return torch.from_numpy(taken[:, None] if len(shape) == 3 else taken.transpose(0, 3, 1, 2).copy())
        return super().decode(rows, preprocess, unreadable, reduced=reduced)


def has_idx(folder: Path) -> bool:
    """Whether a folder holds the IDX files of a training part."""
    return _idx_file(folder, "train", "images") is not None


def _idx_file(folder: Path, part: str, kind: str) -> Path | None:
    prefix = "t10k" if part == "test" else part
    stem = f"{prefix}-{kind}-idx{3 if kind == 'images' else 1}-ubyte"
    return next((folder / name for name in (stem, f"{stem}.gz") if os.path.isfile(folder / name)), None)


def idx(folder: Path, split: Split) -> ArraySource:
    """The images and labels of a part, as IDX files.

    Raises:
        ConfigError: Images or labels are not there.
        SourceError: Damaged files, or another number of labels.
    """
    images, labels = _idx_file(folder, split, "images"), _idx_file(folder, split, "labels")
    if images is None or labels is None:
        raise ConfigError(f"{folder}: expected the images and the labels of the {split} part as IDX files")
    pixels, numbers = _read_idx(images, 3), _read_idx(labels, 1).astype(np.int64)
    if len(pixels) != len(numbers):
        raise SourceError(f"{images}: {len(pixels)} images, but {labels.name} has {len(numbers)} labels")
    return ArraySource(
        pixels, numbers, [str(n) for n in range(int(numbers.max(initial=-1)) + 1)], str(folder)
    )


def _read_idx(file: Path, axes: int) -> np.ndarray:
    """uint8 array of `axes` axes: magic number (0, 0, type 8, axes), big-endian sizes, the values."""
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise SourceError(f"{file}: cannot be read ({error}); fetch it again") from error
    header = 4 + 4 * axes
    if len(data) < header or data[:4] != bytes((0, 0, 8, axes)):
        raise SourceError(f"{file}: expected an IDX file of uint8 with {axes} axes; fetch it again")
    shape = struct.unpack(f">{axes}I", data[4:header])
    if len(data) - header != int(np.prod(shape)):
        raise SourceError(
            f"{file}: {shape} values are declared, and {len(data) - header} follow; fetch it again"
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def digits(split: Split) -> ArraySource:
    """scikit-learn's 1,797 digits of 8x8: one in five, by class, is the test part."""
    with requires("sklearn:digits", "train,cpu", package="scikit-learn"):
        from sklearn.datasets import load_digits
    found = load_digits()
    order = np.argsort(found.target, kind="stable")
    test = np.zeros(len(order), bool)
    test[order[::5]] = True
    taken = test if split == "test" else ~test
    pixels = np.round(found.images[taken] * (255 / 16)).astype(np.uint8)
    return ArraySource(pixels, found.target[taken], [str(n) for n in range(10)], "sklearn:digits")


def synthetic(path: str, split: Split) -> ArraySource:
    """N colored 32x32 images of 10 classes: a blurred pattern per class, shifted, with noise."""
    text = path.partition(":")[2]
    if not text.isdecimal() or len(text) > 7 or int(text) < 10:
        raise ConfigError(f"{path}: expected synthetic:N with N of 10 or more images, and 7 digits at most")
    count = int(text) if split == "train" else max(10, int(text) // 5)
    patterns = np.random.default_rng(0).random((10, 4, 4, 3)).repeat(8, 1).repeat(8, 2)  # (K, 32, 32, 3)
    rng = np.random.default_rng([1, split == "test"])
    labels = rng.permutation(np.arange(count) % 10)
    shift = (np.arange(32)[None] + rng.integers(-4, 5, (count, 1))) % 32
    pixels = patterns[labels[:, None], shift] * 0.8 + rng.random((count, 32, 32, 3)) * 0.2
    return ArraySource((pixels * 255).astype(np.uint8), labels, [str(n) for n in range(10)], path)
