"""Sources that are tables: CSV and Parquet files with labels, beside the images' bytes or their paths.

Parquet with bytes is the Hub's layout: an image column of structs {bytes, path}. A table of paths has them in one
column, relative to the folder of the table.
"""

from __future__ import annotations

import csv
import threading
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embedkit.errors import ConfigError, ImageError, SourceError
from embedkit.training.data.source import FileSource, Source

__all__ = ["read_csv", "read_parquet"]

#: Names of the column that holds paths, the first that is there.
_PATHS = ("file", "path", "image", "filename", "file_name")
#: Row groups of a Parquet file that are kept decoded from disk, at most: two shuffling windows.
_KEPT_GROUPS = 16


def read_csv(table: Path, label: str, targets: Sequence[str] = ()) -> Source:
    """A CSV file with a header: a column of paths and columns of labels; an empty cell is no label.

    Raises:
        ConfigError: No column of paths, or two columns of one name.
        SourceError: Not a CSV file.
    """
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            header = file.readline()
            file.seek(0)
            # spreadsheets write a semicolon where the comma is the decimal mark
            delimiter = max(",;\t", key=header.count)
            reader = csv.DictReader(file, delimiter=delimiter)
            _check_unique(reader.fieldnames or (), table)
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SourceError(f"{table}: not a CSV file that can be read ({error})") from error
    names = [name for name in (rows[0] if rows else ()) if name is not None]  # cells beyond the header
    column = _path_column(names, table)
    columns = {name: [row[name] or None for row in rows] for name in names}
    files = [table.parent / (path or "") for path in columns[column]]
    return _Paths(files, columns, [name for name in names if name != column], label, targets)


def read_parquet(files: Sequence[Path], label: str, targets: Sequence[str] = ()) -> Source:
    """Parquet files of one schema: with the bytes of the images, or with their paths.

    Raises:
        ConfigError: A label column that holds none, no column of images, two columns of one name, or a file whose
            columns are not those of the first.
        SourceError: Not Parquet.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        opened = [pq.ParquetFile(file) for file in files]
        schema = opened[0].schema_arrow
        _check_unique(schema.names, files[0])
        image = _image_column(schema)
        columns = [
            field.name
            for field in schema
            if not (pa.types.is_nested(field.type) or _is_bytes(field.type) or field.name == image)
        ]
        path = None if image else _path_column(columns, files[0])
        if label in schema.names and label not in columns:
            raise ConfigError(
                f"{files[0]}: the column {label!r} holds no labels; take one of {', '.join(columns)}"
            )
        asked = [name for name in dict.fromkeys([label, *targets, path or ""]) if name in columns]
        for file, other in zip(files, opened, strict=True):
            for name in [*asked, *([image] if image else [])]:
                if (
                    name not in other.schema_arrow.names
                    or other.schema_arrow.field(name).type != schema.field(name).type
                ):
                    raise ConfigError(
                        f"{file}: expected the column {name!r} as {schema.field(name).type}, as it is in {files[0]}; "
                        "write all files of a data set with the same columns"
                    )
        tables = [file.read(asked) for file in opened] if asked else []
    except (OSError, pa.ArrowException) as error:
        raise SourceError(f"{files[0]}: not a Parquet file that can be read ({error})") from error
    values = {name: [value for table in tables for value in table[name].to_pylist()] for name in asked}
    if image is not None:
        return ParquetSource(files, opened, image, values, columns, label, targets)
    folders = [file.parent for file, table in zip(files, tables, strict=True) for _ in range(len(table))]
    named = [folder / str(name or "") for folder, name in zip(folders, values[path or ""], strict=True)]
    return _Paths(named, values, [name for name in columns if name != path], label, targets)


class _Paths(FileSource):
    """Image files that a table names."""

    def __init__(
        self,
        files: Sequence[Path],
        values: Mapping[str, Sequence[Any]],
        columns: Sequence[str],
        label: str,
        targets: Sequence[str],
    ) -> None:
        super().__init__()
        self.files, self.columns = files, tuple(columns)
        self.take(values, label, targets)


class ParquetSource(Source):
    """Parquet files with one image column; images are read a row group at a time, and a few groups are kept."""

    def __init__(
        self,
        files: Sequence[Path],
        opened: Sequence[Any],
        image: str,
        values: Mapping[str, Sequence[Any]],
        columns: Sequence[str],
        label: str,
        targets: Sequence[str],
    ) -> None:
        super().__init__()
        self.files, self.column, self.columns = list(files), image, tuple(columns)
        sizes = [
            (at, group, file.metadata.row_group(group).num_rows)
            for at, file in enumerate(opened)
            for group in range(file.metadata.num_row_groups)
        ]
        counts = np.array([rows for *_, rows in sizes], np.int64)
        self._groups = [(at, group) for at, group, _ in sizes]
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        self.blocks = self._block = np.repeat(np.arange(len(counts)), counts)
        self.classes, self.labels = (), np.full(int(counts.sum()), -1)
        self.take(values, label, targets)
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
        at, group = self._groups[block]
        return f"{self.files[at]}, row {row - int(self._starts[block])} of row group {group}"

    def _read_group(self, at: int, group: int) -> Any:
        import pyarrow.parquet as pq

        with pq.ParquetFile(self.files[at]) as file:
            return file.read_row_group(group, columns=[self.column])[self.column].combine_chunks()


def _image_column(schema: Any) -> str | None:
    """The first column of structs with `bytes`, or of bytes; None where there is none."""
    import pyarrow as pa

    for column in schema:
        kind = column.type
        if (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0) or _is_bytes(kind):
            return str(column.name)
    return None


def _is_bytes(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _check_unique(names: Sequence[str], table: Path) -> None:
    """Refuse two columns of one name: which of them holds the labels?"""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ConfigError(f"{table}: there are two columns {twice[0]!r}; rename one of them")


def _path_column(columns: Sequence[str], table: Path) -> str:
    """The column of paths."""
    for name in _PATHS:
        if name in columns:
            return name
    raise ConfigError(
        f"{table}: expected a header with one of the columns {', '.join(_PATHS)} for the paths of the images, "
        f"found {', '.join(columns) or 'no rows'}"
    )
