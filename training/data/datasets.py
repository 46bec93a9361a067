"""Sources of training images: IDX files, Parquet files, class folders, scikit-learn's digits, synthetic ones.

A source has its labels in memory and reads an image by its row, so that it can be loaded whole or streamed. Formats:
IDX as Yann LeCun's MNIST page defined it; Parquet in the Hub's layout, an image column of structs {bytes, path}.
"""

from __future__ import annotations

import csv
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

from embedkit._io.optional import requires
from embedkit.errors import ConfigError, ImageError, SourceError
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
_FILE_COLUMNS = ("file", "path", "image", "filename")
#: Row groups of a Parquet file that are kept decoded from disk, at most: two shuffling windows.
_KEPT_GROUPS = 16


def open_source(path: str, split: Split, *, label: str = "label", targets: Sequence[str] = ()) -> Source:
    """The images that `path` names.

    Args:
        path: As `DataConfig.path`.
        split: Which part; formats that hold one part alone have it as `train`.
        label: Label column of a Parquet or CSV file.
        targets: Further columns that must be there.

    Raises:
        ConfigError: No path, a path that is not there, or a part that the data lack.
        SourceError: Files whose content does not fit their names.
    """
    source = _open(path, split, label, tuple(targets))
    for name in targets:
        if name not in source.targets:
            raise ConfigError(
                f"data.targets: {path} has no column {name!r}; it has {', '.join(source.columns) or 'none'}"
            )
    return source


def _open(path: str, split: Split, label: str, targets: tuple[str, ...]) -> Source:
    if not path:
        raise ConfigError(f"no data: pass --data PATH (IDX files, Parquet, CSV or class folders); {_HINT}")
    if path == "sklearn:digits":
        return _digits(split)
    if path.startswith("synthetic:"):
        return _synthetic(path, split)
    found = Path(path)
    if found.is_file() and found.suffix == ".parquet":
        if split == "test":
            raise ConfigError(
                f"{path}: one Parquet file has no test part; name a folder with train and test files"
            )
        return ParquetSource([found], label, targets)
    if found.is_file() and found.suffix.lower() == ".csv":
        if split == "test":
            raise ConfigError(f"{path}: one CSV file has no test part")
        return CSVSource(found, label, targets)
    if not found.is_dir():
        raise ConfigError(f"{path}: there is no such folder, Parquet or CSV file; {_HINT}")
    if _idx_file(found, "train", "images") is not None:
        return _idx(found, split)
    if any(found.rglob("*.parquet")):
        files = sorted(file for file in found.rglob("*.parquet") if file.name.startswith(split))
        if not files:
            raise ConfigError(f"{path}: expected Parquet files whose names begin with {split!r}, found none")
        return ParquetSource(files, label, targets)
    parts = (found / "train", found / "test")
    if all(part.is_dir() for part in parts):
        return FolderSource(parts[split == "test"])
    if split == "test":
        raise ConfigError(
            f"{path}: expected the folders train and test, each with class folders, for a test part"
        )
    return FolderSource(found)


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
            except (ImageError, OSError) as error:
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


class FolderSource(Source):
    """One folder per class; images beside the class folders, and those of a folder without any, have no label."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.files = sorted(file for file in root.rglob("*") if file.suffix.lower() in _SUFFIXES)
        if not self.files:
            raise ConfigError(f"{root}: no images, Parquet or IDX files in this folder; {_HINT}")
        names = [file.relative_to(root).parts for file in self.files]
        self.classes, self.labels = _number([parts[0] if len(parts) > 1 else None for parts in names])

    def read(self, row: int) -> str:
        """The path of one image."""
        return str(self.files[row])

    def where(self, row: int) -> str:
        """The path of one image."""
        return str(self.files[row])


class CSVSource(Source):
    """A CSV file with a header: the column `file` (or `path`, `image`, `filename`) of paths beside it, and labels."""

    def __init__(self, table: Path, label: str, targets: Sequence[str] = ()) -> None:
        super().__init__()
        try:
            with open(table, newline="", encoding="utf-8-sig") as file:
                rows = list(csv.DictReader(file))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise SourceError(f"{table}: not a CSV file that can be read ({error})") from error
        self.columns = tuple(rows[0]) if rows else ()
        column = next((name for name in _FILE_COLUMNS if name in self.columns), None)
        if column is None:
            raise ConfigError(
                f"{table}: expected a header with one of the columns {', '.join(_FILE_COLUMNS)}, "
                f"found {', '.join(map(str, self.columns)) or 'no rows'}"
            )
        self.files = [table.parent / (row[column] or "") for row in rows]
        self.classes, self.labels = _number([row.get(label) or None for row in rows])
        for name in targets:
            if name in self.columns:
                self.target_classes[name], self.targets[name] = _number([row[name] or None for row in rows])

    def read(self, row: int) -> str:
        """The path of one image."""
        return str(self.files[row])

    def where(self, row: int) -> str:
        """The path of one image."""
        return str(self.files[row])


class ParquetSource(Source):
    """Parquet files with one image column; images are read a row group at a time, and a few groups are kept."""

    def __init__(self, files: Sequence[Path], label: str, targets: Sequence[str] = ()) -> None:
        super().__init__()
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
            asked = [*([label] if known else []), *(name for name in targets if name in self.columns)]
            tables = [file.read(list(dict.fromkeys(asked))) for file in opened] if asked else []
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
        table = pa.concat_tables(tables) if tables else None
        self.classes, self.labels = (), np.full(int(counts.sum()), -1)
        if table is not None and known:
            self.classes, self.labels = _number(table[label].to_pylist())
        for name in asked[known:]:
            assert table is not None  # every column that was asked for is in it
            self.target_classes[name], self.targets[name] = _number(table[name].to_pylist())
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        # a worker process opens the files itself, and keeps groups of its own
        return {**self.__dict__, "_kept": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def read(self, row: int) -> bytes:
        """The encoded bytes of one image."""
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


def _digits(split: Split) -> ArraySource:
    """scikit-learn's 1,797 digits of 8x8: one in five, by class, is the test part."""
    with requires("sklearn:digits", "train,cpu", package="scikit-learn"):
        from sklearn.datasets import load_digits
    digits = load_digits()
    order = np.argsort(digits.target, kind="stable")
    test = np.zeros(len(order), bool)
    test[order[::5]] = True
    taken = test if split == "test" else ~test
    pixels = np.round(digits.images[taken] * (255 / 16)).astype(np.uint8)
    return ArraySource(pixels, digits.target[taken], [str(n) for n in range(10)], "sklearn:digits")


def _synthetic(path: str, split: Split) -> ArraySource:
    """N colored 32x32 images of 10 classes: a blurred pattern per class, shifted, with noise."""
    text = path.partition(":")[2]
    if not text.isdecimal() or int(text) < 10:
        raise ConfigError(f"{path}: expected synthetic:N with N of 10 or more images")
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
