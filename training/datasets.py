"""Where training pictures lie: IDX files, Parquet files, class folders, scikit-learn's digits, synthetic ones.

A source knows its labels at once and reads a picture by its row, so that the same source fills memory or is
streamed. Formats: IDX as Yann LeCun's MNIST page defined it; Parquet in the Hub's layout, an image column of
structs {bytes, path}.
"""

from __future__ import annotations

import gzip
import os
import struct
import threading
import zlib
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from embedkit.errors import ConfigError, ImageError, MissingDependencyError, SourceError
from embedkit.images.transform import ImageLike, read_pixels
from embedkit.model.preprocess import Preprocess

__all__ = ["Source", "open_source"]

Split = Literal["train", "test"]

_SUFFIXES = (
    ".png",
    ".jpg",
    ".jpeg",
    ".webp",
    ".gif",
    ".bmp",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
    ".avif",
    ".heic",
)
_HINT = "sklearn:digits and synthetic:1000 need no files"
#: Row groups of a Parquet file that are kept decoded from disk, at most: two shuffling windows.
_KEPT_GROUPS = 16


def open_source(path: str, split: Split, *, label: str = "label") -> Source:
    """The pictures that `path` names.

    Args:
        path: As `DataConfig.path`.
        split: Which part; formats that hold one part alone have it as `train`.
        label: Label column of a Parquet file.

    Raises:
        ConfigError: No path, a path that is not there, or a part that the data do not have.
        SourceError: Files that are not what their names say.
    """
    if not path:
        raise ConfigError(f"no data: pass --data PATH (IDX files, Parquet or class folders); {_HINT}")
    if path == "sklearn:digits":
        return _digits(split)
    if path.startswith("synthetic:"):
        return _synthetic(path, split)
    place = Path(path)
    if place.is_file() and place.suffix == ".parquet":
        if split == "test":
            raise ConfigError(
                f"{path}: one Parquet file has no test part; name a folder with train and test files"
            )
        return ParquetSource([place], label)
    if not place.is_dir():
        raise ConfigError(f"{path}: there is no such folder or Parquet file; {_HINT}")
    if _idx_file(place, "train", "images") is not None:
        return _idx(place, split)
    if any(place.rglob("*.parquet")):
        files = sorted(file for file in place.rglob("*.parquet") if file.name.startswith(split))
        if not files:
            raise ConfigError(f"{path}: expected Parquet files whose names begin with {split!r}, found none")
        return ParquetSource(files, label)
    parts = (place / "train", place / "test")
    if all(part.is_dir() for part in parts):
        return FolderSource(parts[split == "test"])
    if split == "test":
        raise ConfigError(
            f"{path}: expected the folders train and test, each with class folders, for a test part"
        )
    return FolderSource(place)


class Source(ABC):
    """Pictures in rows 0..len-1.

    Attributes:
        labels: int64 (N,), -1 where there is none.
        classes: Names of the labels.
        blocks: int64 (N,), rows of one block are read together; None where every row is alone.
        columns: Names of the columns that may be asked for as labels.
    """

    labels: np.ndarray
    classes: tuple[str, ...]
    blocks: np.ndarray | None = None
    columns: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def read(self, row: int) -> ImageLike:
        """What `read_pixels` takes for this row."""

    @abstractmethod
    def where(self, row: int) -> str:
        """The row's name in a message."""

    def decode(self, rows: np.ndarray, preprocess: Preprocess) -> Tensor:
        """uint8 (len(rows), C, H, W), by the contract.

        Raises:
            SourceError: A picture that cannot be read, by name.
        """
        out = np.empty((len(rows), preprocess.channels, *preprocess.size), np.uint8)

        def one(place: int) -> None:
            row = int(rows[place])
            try:
                read_pixels(self.read(row), preprocess, decode="exact", out=out[place])
            except (ImageError, OSError) as error:
                raise SourceError(f"{self.where(row)}: {error}; mend or remove it") from error

        if len(rows) < 256 or torch.utils.data.get_worker_info() is not None:
            for place in range(len(rows)):
                one(place)
        else:
            with ThreadPoolExecutor() as pool:  # Pillow decodes and resizes outside the interpreter's lock
                for _ in pool.map(one, range(len(rows))):
                    pass
        return torch.from_numpy(out)


class ArraySource(Source):
    """Pictures that are already decoded: uint8 (N, H, W) or (N, H, W, 3)."""

    def __init__(self, arrays: np.ndarray, labels: np.ndarray, classes: Sequence[str], name: str) -> None:
        self.arrays, self.labels, self.classes = arrays, labels.astype(np.int64), tuple(classes)
        self.name = name

    def read(self, row: int) -> np.ndarray:
        """The array of one picture."""
        return self.arrays[row]

    def where(self, row: int) -> str:
        """The data set and the row."""
        return f"{self.name}, picture {row}"

    def decode(self, rows: np.ndarray, preprocess: Preprocess) -> Tensor:
        """As they are where the contract changes nothing."""
        shape = self.arrays.shape
        if shape[1:3] == preprocess.size and preprocess.color == {3: "gray", 4: "rgb"}[len(shape)]:
            taken = self.arrays[rows]
            return torch.from_numpy(taken[:, None] if len(shape) == 3 else taken.transpose(0, 3, 1, 2).copy())
        return super().decode(rows, preprocess)


class FolderSource(Source):
    """One folder per class; the pictures of a folder without class folders have no labels."""

    def __init__(self, root: Path) -> None:
        self.files = sorted(file for file in root.rglob("*") if file.suffix.lower() in _SUFFIXES)
        if not self.files:
            raise ConfigError(f"{root}: no pictures, Parquet or IDX files in this folder; {_HINT}")
        names = [file.relative_to(root).parts for file in self.files]
        flat = any(len(parts) == 1 for parts in names)
        found = [""] * len(names) if flat else [parts[0] for parts in names]
        self.classes, self.labels = ((), np.full(len(names), -1)) if flat else _number(found)

    def read(self, row: int) -> str:
        """The path of one picture."""
        return str(self.files[row])

    def where(self, row: int) -> str:
        """The path of one picture."""
        return str(self.files[row])


class ParquetSource(Source):
    """Parquet files with one image column; pictures are read a row group at a time, and a few groups are kept."""

    def __init__(self, files: Sequence[Path], label: str) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.files = list(files)
        try:
            opened = [pq.ParquetFile(file) for file in files]
            schema = opened[0].schema_arrow
            self.column = _image_column(schema, files[0])
            self.columns = tuple(
                field.name
                for field in schema
                if pa.types.is_string(field.type) or pa.types.is_integer(field.type)
            )
            known = label in schema.names
            if known and (pa.types.is_nested(schema.field(label).type) or label == self.column):
                raise ConfigError(
                    f"{files[0]}: the column {label!r} holds no labels; take one of {', '.join(self.columns)}"
                )
            tables = [file.read([label]) for file in opened] if known else []
        except (OSError, pa.ArrowException) as error:
            raise SourceError(f"{files[0]}: not a Parquet file that can be read ({error})") from error
        sizes = [
            (number, group, file.metadata.row_group(group).num_rows)
            for number, file in enumerate(opened)
            for group in range(file.metadata.num_row_groups)
        ]
        counts = np.array([rows for *_, rows in sizes])
        self._groups = [(number, group) for number, group, _ in sizes]
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        self.blocks = self._block = np.repeat(np.arange(len(counts)), counts)
        if tables:
            self.classes, self.labels = _number(pa.concat_tables(tables)[label].to_pylist())
        else:
            self.classes, self.labels = (), np.full(int(counts.sum()), -1)
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        # a worker process opens the files itself, and keeps groups of its own
        return {**self.__dict__, "_kept": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def read(self, row: int) -> bytes:
        """The encoded bytes of one picture."""
        block = int(self._block[row])
        with self._lock:
            column = self._kept.pop(block, None)
            if column is None:
                column = self._read_group(*self._groups[block])
            self._kept[block] = column
            while len(self._kept) > _KEPT_GROUPS:
                self._kept.popitem(last=False)
        value = column[row - int(self._starts[block])].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise ImageError("the image column holds no bytes here")
        return data

    def where(self, row: int) -> str:
        """The file and the row within its row group."""
        block = int(self._block[row])
        number, group = self._groups[block]
        return f"{self.files[number]}, row {row - int(self._starts[block])} of row group {group}"

    def _read_group(self, number: int, group: int) -> Any:
        import pyarrow.parquet as pq

        with pq.ParquetFile(self.files[number]) as file:
            return file.read_row_group(group, columns=[self.column])[self.column].combine_chunks()


def _image_column(schema: Any, file: Path) -> str:
    """The first column of structs with `bytes`, or of bytes."""
    import pyarrow as pa

    for column in schema:
        kind = column.type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            return column.name
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            return column.name
    raise SourceError(f"{file}: expected an image column {{bytes, path}}, found {', '.join(schema.names)}")


def _number(names: Sequence[Any]) -> tuple[tuple[str, ...], np.ndarray]:
    """Labels numbered by their sorted values; a missing one is -1."""
    values = sorted({name for name in names if name is not None})
    numbers = {value: number for number, value in enumerate(values)}
    labels = np.array([numbers.get(name, -1) for name in names], np.int64)
    return tuple(map(str, values)), labels


def _idx_file(folder: Path, part: str, kind: str) -> Path | None:
    prefix = "t10k" if part == "test" else part
    stem = f"{prefix}-{kind}-idx{3 if kind == 'images' else 1}-ubyte"
    return next((folder / name for name in (stem, f"{stem}.gz") if (folder / name).is_file()), None)


def _idx(folder: Path, split: Split) -> ArraySource:
    images, labels = _idx_file(folder, split, "images"), _idx_file(folder, split, "labels")
    if images is None or labels is None:
        raise ConfigError(f"{folder}: expected the images and the labels of the {split} part as IDX files")
    pixels, numbers = _read_idx(images, 3), _read_idx(labels, 1).astype(np.int64)
    if len(pixels) != len(numbers):
        raise SourceError(f"{images}: {len(pixels)} pictures, but {labels.name} has {len(numbers)} labels")
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
            f"{file}: {shape} values are announced, and {len(data) - header} follow; fetch it again"
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def _digits(split: Split) -> ArraySource:
    """scikit-learn's 1,797 digits of 8x8: one in five, by class, is the test part."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingDependencyError("sklearn:digits needs `pip install 'embedkit[train,cpu]'`") from None
    digits = load_digits()
    order = np.argsort(digits.target, kind="stable")
    test = np.zeros(len(order), bool)
    test[order[::5]] = True
    taken = test if split == "test" else ~test
    pixels = np.round(digits.images[taken] * (255 / 16)).astype(np.uint8)
    return ArraySource(pixels, digits.target[taken], [str(n) for n in range(10)], "sklearn:digits")


def _synthetic(path: str, split: Split) -> ArraySource:
    """N coloured 32x32 pictures of 10 classes: a blurred pattern per class, shifted, with noise."""
    text = path.partition(":")[2]
    if not text.isdecimal() or int(text) < 10:
        raise ConfigError(f"{path}: expected synthetic:N with N of 10 or more pictures")
    count = int(text) if split == "train" else max(10, int(text) // 5)
    patterns = np.random.default_rng(0).random((10, 4, 4, 3)).repeat(8, 1).repeat(8, 2)  # (K, 32, 32, 3)
    rng = np.random.default_rng([1, split == "test"])
    labels = rng.permutation(np.arange(count) % 10)
    shift = (np.arange(32)[None] + rng.integers(-4, 5, (count, 1))) % 32
    pixels = patterns[labels[:, None], shift] * 0.8 + rng.random((count, 32, 32, 3)) * 0.2
    return ArraySource((pixels * 255).astype(np.uint8), labels, [str(n) for n in range(10)], path)


def absolute(path: str) -> str:
    """A data path that means the same from every working directory; names such as `sklearn:digits` as they are."""
    return path if not path or not Path(path).exists() else os.path.abspath(path)
