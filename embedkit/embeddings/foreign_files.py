"""Files of vectors that another program wrote, read in bounded tables.

A Parquet file has its ids in a column. An array has them beside it: `X.ids.txt`, one id a line, or `X.ids.jsonl`, one
JSON object a line with `id` and any labels.
"""

from __future__ import annotations

import codecs
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from embedkit._io.reading import open_regular
from embedkit._io.text import one_line
from embedkit.embeddings.foreign import ForeignColumns
from embedkit.embeddings.metadata import METADATA_KEY, Metadata
from embedkit.embeddings.npy_write import ids_path, map_array
from embedkit.embeddings.parquet_file import check_sizes, opened
from embedkit.embeddings.schema import guarded, metadata_of
from embedkit.embeddings.side_files import beside
from embedkit.errors import ConfigError, OutputError

__all__ = ["ForeignFile", "open_foreign"]

#: Bytes of vectors that are read at once, and the most rows of these.
_BLOCK, _MOST_ROWS = 32 << 20, 1 << 14
_MAX_LINE = 16 << 20
_MAX_COLUMNS = 1000


class ForeignFile(ABC):
    """The rows of a file that may have no metadata.

    Attributes:
        path: The file.
        columns: What its columns become.
        metadata: What its schema says; None where it says nothing.
        files: The file, and the one of ids beside it.
    """

    path: Path
    columns: ForeignColumns
    metadata: Metadata | None
    files: list[Path]

    @abstractmethod
    def __len__(self) -> int:
        """The number of rows."""

    @abstractmethod
    def _read(self, columns: Sequence[str], rows: int) -> Iterator[pa.Table]:
        """Some columns of all rows, in tables of at most `rows` rows."""

    def keys(self) -> pa.Table:
        """The columns `id` and `part` of all rows, and `size` (int64, may be null) where it is recorded.

        Raises:
            ConfigError: A row has no id.
            OutputError: The file is damaged.
        """
        tables, at = [], 0
        for block in self._read(self.columns.key_columns, _MOST_ROWS):
            keys = self.columns.keys(block, at)
            if "size" in self.columns.names:
                size = self.columns.cast(block[self.columns.names["size"]], pa.int64(), "size")
                keys = keys.append_column("size", size)
            tables.append(keys)
            at += len(block)
        return pa.concat_tables(tables)

    def blocks(self, dim: int) -> Iterator[pa.Table]:
        """All rows with our names and types, in bounded tables.

        Args:
            dim: Width D.

        Raises:
            ConfigError: A row without a vector, or with one of another width.
            OutputError: The file is damaged.
        """
        rows, at = max(1, min(_MOST_ROWS, _BLOCK // (8 * dim))), 0
        for block in self._read(list(self.columns.names.values()), rows):
            yield self.columns.conform(block, dim, at)
            at += len(block)


def open_foreign(path: Path, *, id: str, embedding: str) -> ForeignFile:
    """Open a Parquet file, or a `.npy` file with its ids beside it.

    Args:
        path: The file.
        id: The column of ids.
        embedding: The column of vectors; an array has none.

    Raises:
        OutputError: It cannot be read, or takes too much memory.
        ConfigError: It has no such columns.
    """
    return _Npy(path, id) if path.suffix == ".npy" else _Parquet(path, id, embedding)


class _Parquet(ForeignFile):
    def __init__(self, path: Path, id: str, embedding: str):
        self.path, self.files = path, [path]
        try:
            with opened(path) as reader:
                schema, self._rows = reader.schema_arrow, reader.metadata.num_rows
                self.columns = ForeignColumns.find(schema, str(path), id=id, embedding=embedding)
                check_sizes(reader, path, self.columns.names.values())
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            raise OutputError(f"{path} cannot be read as Parquet ({one_line(error)})") from None
        self.metadata = None
        if METADATA_KEY in (schema.metadata or {}):
            self.metadata = metadata_of(schema, str(path), "a Parquet file")

    def __len__(self) -> int:
        return int(self._rows)

    def _read(self, columns: Sequence[str], rows: int) -> Iterator[pa.Table]:
        with opened(self.path) as reader:
            batches = reader.iter_batches(rows, columns=list(columns))
            while (batch := guarded(str(self.path), next, batches, None)) is not None:
                yield pa.Table.from_batches([batch]).replace_schema_metadata(None)


class _Npy(ForeignFile):
    def __init__(self, path: Path, id: str):
        self.path, self.metadata = path, None
        try:
            self._array = map_array(path)
        except (OSError, ValueError) as error:
            raise OutputError(f"{path} cannot be read ({one_line(error)})") from None
        if self._array.ndim != 2 or not self._array.shape[1] or self._array.dtype.itemsize > 8:
            raise ConfigError(
                f"{path}: expected float16, float32 or float64 (N, D), found {self._array.dtype} of shape "
                f"{self._array.shape}"
            )
        ids = _ids_beside(path)
        self.files = [path, ids]
        self._labels = _read_ids(ids, id, len(self._array))
        if len(self._labels) != len(self._array):
            raise ConfigError(f"{path} has {len(self._array)} rows, and {ids.name} {len(self._labels)} ids")
        vector = pa.field("embedding", pa.list_(pa.from_numpy_dtype(self._array.dtype.newbyteorder("=")), -1))
        if "embedding" in self._labels.column_names:
            raise ConfigError(f"{ids}: the name 'embedding' is reserved; rename that column")
        self.columns = ForeignColumns.find(self._labels.schema.append(vector), str(path), id=id)

    def __len__(self) -> int:
        return len(self._labels)

    def _read(self, columns: Sequence[str], rows: int) -> Iterator[pa.Table]:
        dim = self._array.shape[1]
        for start in range(0, len(self), rows):
            table = self._labels.slice(start, rows)
            if "embedding" in columns:
                block = self._array[start : start + rows]
                flat = pa.array(np.ascontiguousarray(block, block.dtype.newbyteorder("=")).reshape(-1))
                table = table.append_column("embedding", pa.FixedSizeListArray.from_arrays(flat, dim))
            yield table.select(list(columns))


def _ids_beside(path: Path) -> Path:
    """The file of ids of an array."""
    places = [beside(path, ".ids.txt"), ids_path(path)]
    for place in places:
        if os.path.exists(place):
            return place
    raise OutputError(
        f"{path} has no ids beside it; write them to {places[0].name}, one id a line in the order of the rows"
    )


def _read_ids(path: Path, id: str, rows: int) -> pa.Table:
    """The ids of an array of `rows` rows, and the labels beside them."""
    lines: list[dict[str, Any]] = []
    names = {id: None}
    try:
        with open_regular(path) as file:
            while text := file.readline(_MAX_LINE + 1):
                if len(text) > _MAX_LINE:
                    raise ValueError(f"line {len(lines) + 1} is longer than {_MAX_LINE} bytes")
                if len(lines) == rows:
                    raise ValueError(f"it has more lines than the array has rows, {rows}")
                if not lines:
                    text = text.removeprefix(codecs.BOM_UTF8)  # some editors begin a file with it
                name = text.rstrip(b"\r\n").decode()
                line = {id: name} if path.suffix == ".txt" else json.loads(text)
                if not isinstance(line, dict):
                    raise ValueError(f"line {len(lines) + 1} is no JSON object")
                lines.append(line)
                names.update(dict.fromkeys(line))
                if len(names) > _MAX_COLUMNS:  # each takes a value in every row
                    raise ValueError(f"its lines name more than {_MAX_COLUMNS} columns")
    except RecursionError:
        raise OutputError(f"{path} cannot be read (it is nested too deep)") from None
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} cannot be read ({one_line(error)})") from None
    return pa.table({name: _column(name, [line.get(name) for line in lines], path) for name in names})


def _column(name: str, values: list[Any], path: Path) -> pa.Array:
    try:
        name.encode()  # JSON has an escape for half a character
        return pa.array(values)
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
        raise ConfigError(f"{path}: the column {name!r} holds several types ({one_line(error)})") from None
