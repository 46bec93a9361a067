"""Embeddings where they are stored: a Parquet file, a folder of shards, a `.npy` file or a LanceDB table.

Whatever reads embeddings opens them here, so that each kind of store is known in one place and every command takes
all of them. A range of rows or of one column is read at a time: what is stored may be larger than memory.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embedkit.embeddings import lance as lancetable
from embedkit.embeddings.metadata import Metadata, first_line
from embedkit.embeddings.npy import read_npy
from embedkit.embeddings.parquet import check_sizes, opened
from embedkit.embeddings.parquet_write import read_metadata
from embedkit.embeddings.schema import RESERVED, no_column, vectors_of
from embedkit.embeddings.shards import is_folder_of_shards, shards_of
from embedkit.errors import OutputError

#: Rows that are read at once: whole row groups, as `embedkit.embeddings.table` writes them.
BLOCK = 1 << 14


_T = TypeVar("_T")


class Stored(ABC):
    """Rows in a file, in a folder or in a table.

    Attributes:
        where: As it was named.
        metadata: What the rows are; the runs of all shards are in it.
        labels: The label columns' names.
        mapped: float (N, D), the rows where they are mapped into memory instead of read; None elsewhere.
    """

    def __init__(self, where: str, metadata: Metadata, rows: int, columns: list[str]):
        """Take what is known without reading a row; see `open_stored`."""
        self.where, self.metadata = where, metadata
        self.labels = [name for name in columns if name not in RESERVED]
        self.mapped: np.ndarray | None = None
        self._rows = rows

    def __len__(self) -> int:
        return self._rows

    @abstractmethod
    def column(self, name: str, start: int = 0, stop: int | None = None) -> list:
        """The values of `id`, `part` or a label column, of rows `start` to `stop`.

        Raises:
            OutputError: They cannot be read.
        """

    @abstractmethod
    def vectors(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start` to `stop` as they are stored, float32 (n, D).

        Raises:
            OutputError: They cannot be read.
        """

    def keys(self, start: int = 0, stop: int | None = None) -> tuple[list[str], np.ndarray]:
        """Ids, and int32 (n,) which part of its image a row is."""
        return self.column("id", start, stop), np.array(self.column("part", start, stop), np.int32)

    def label(self, name: str) -> list:
        """A label column.

        Raises:
            ConfigError: There is none of this name; those that there are, are named.
        """
        if name not in self.labels:
            raise no_column(self.where, name, self.labels)
        return self.column(name)


def is_stored(source: str | os.PathLike[str]) -> bool:
    """Whether `source` is to be opened as embeddings: all but a folder that holds none, which may hold images."""
    text = os.fspath(source)
    return lancetable.is_table(text) or not os.path.isdir(text) or is_folder_of_shards(Path(text))


def open_stored(source: str | os.PathLike[str]) -> Stored:
    """Open embeddings.

    Args:
        source: `X.parquet`, a folder of shards, `X.npy` beside its ids and metadata, or `lance://FOLDER/TABLE`.

    Raises:
        OutputError: Not embeddings of ours, damaged ones, or a folder with a missing part.
        SpaceMismatchError: A folder of two spaces.
        MissingDependencyError: A table, and pylance is not installed.
    """
    text = os.fspath(source)
    if lancetable.is_table(text):
        return _Table(text)
    path = Path(text)
    if not path.exists():
        raise OutputError(
            f"{text} does not exist; check the path, or write embeddings with `embedkit embed ... -o {text}`"
        )
    if path.suffix == ".npy":
        return _Npy(path)
    return _Parquet(shards_of(path) if path.is_dir() else [path], text)


class _Columns(Stored):
    """A store that gives tables of some columns."""

    @abstractmethod
    def _table(self, name: str, start: int, stop: int) -> pa.Table:
        """Rows `start` to `stop` of one column."""

    def column(self, name: str, start: int = 0, stop: int | None = None) -> list:
        stop = len(self) if stop is None else stop
        values = self._rows_of(name, start, stop)[name]
        if name in ("id", "part") and values.null_count:
            raise OutputError(f"{self.where} is damaged (a row has no {name}); embed the images again")
        return _guarded(self.where, values.to_pylist)

    def _rows_of(self, name: str, start: int, stop: int) -> pa.Table:
        """As many rows as were asked for: fewer would be taken for rows of other images."""
        table = self._table(name, start, stop)
        if table.num_rows != max(0, min(stop, len(self)) - start):
            raise OutputError(
                f"{self.where} is damaged (it has fewer rows than it says); embed the images again"
            )
        return table

    def vectors(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        stop = len(self) if stop is None else stop
        block = np.empty((stop - start, self.metadata.dim), np.float32)
        for at in range(start, stop, BLOCK):
            end = min(at + BLOCK, stop)
            block[at - start : end - start] = vectors_of(
                self._rows_of("embedding", at, end), self.metadata.dim, self.where
            )
        return block


class _Parquet(_Columns):
    """One file, or the shards of a folder one after another."""

    def __init__(self, files: list[Path], where: str):
        metadata: Metadata | None = None
        for file in files:
            found = read_metadata(file)
            if metadata is not None:
                metadata.check_same_space(found, where)
                for run in found.runs:
                    metadata = metadata.with_run(run)
            metadata = metadata or found
        if metadata is None:
            raise OutputError(f"{where} holds no rows yet")
        self._files = files
        self._checked: set[tuple[int, str]] = set()
        self._facts: list[pq.FileMetaData] = []
        self._schemas: list[pa.Schema] = []
        for file in files:
            facts, schema = _guarded(str(file), _read_footer, file)
            self._facts.append(facts)
            self._schemas.append(schema)
        columns = dict.fromkeys(_guarded(where, lambda: [n for one in self._schemas for n in one.names]))
        for file, schema in zip(files, self._schemas, strict=True):
            check_schema(schema, metadata.dim, str(file))
        self._groups = [
            (index, group) for index, facts in enumerate(self._facts) for group in range(facts.num_row_groups)
        ]
        sizes = [self._facts[index].row_group(group).num_rows for index, group in self._groups]
        self._starts = np.cumsum([0, *sizes])
        super().__init__(where, metadata, int(self._starts[-1]), list(columns))

    def _table(self, name: str, start: int, stop: int) -> pa.Table:
        starts, groups = self._starts, self._groups
        pieces = []
        at = int(np.searchsorted(starts, start, side="right")) - 1
        while at < len(groups) and starts[at] < stop:
            file, offset, wanted = groups[at][0], int(starts[at]), []
            while at < len(groups) and starts[at] < stop and groups[at][0] == file:
                wanted.append(groups[at][1])
                at += 1
            piece = self._read(file, wanted, name)
            pieces.append(piece.slice(max(0, start - offset), stop - max(start, offset)))
        if not pieces:
            field = next(schema.field(name) for schema in self._schemas if name in schema.names)
            return pa.schema([field]).empty_table()
        try:
            return pa.concat_tables(pieces, promote_options="default")
        except pa.ArrowException:
            kinds = {str(piece.schema.field(name).type): None for piece in pieces}
            raise OutputError(
                f"{self.where}: the column {name!r} is {' in one shard and '.join(kinds)} in another; "
                "embed the images again"
            ) from None

    def _read(self, file: int, groups: list[int], name: str) -> pa.Table:
        """Whole row groups of one column; nulls where this shard lacks it."""
        if name not in self._schemas[file].names:
            rows = sum(self._facts[file].row_group(group).num_rows for group in groups)
            return pa.table({name: pa.nulls(rows)})
        path = self._files[file]

        def read() -> pa.Table:
            # With the footer that is known already: a large file's takes long to parse.
            with opened(path, metadata=self._facts[file]) as reader:
                if (file, name) not in self._checked:
                    check_sizes(reader, path, [name])
                    self._checked.add((file, name))
                return reader.read_row_groups(groups, columns=[name]).replace_schema_metadata(None)

        return _guarded(str(path), read)


class _Table(_Columns):
    """A table of a LanceDB database, as its newest version was when it was opened."""

    def __init__(self, uri: str):
        path = lancetable.table_path(uri)
        self._lance = lancetable.open_table(path)
        metadata = lancetable.metadata_of(self._lance, path)
        check_schema(self._lance.schema, metadata.dim, uri)
        super().__init__(uri, metadata, self._lance.count_rows(), self._lance.schema.names)

    def _table(self, name: str, start: int, stop: int) -> pa.Table:
        return lancetable.read_range(self._lance, name, start, stop, self.where)


class _Npy(Stored):
    """An array with its ids and metadata beside it."""

    def __init__(self, path: Path):
        vectors, found = read_npy(path)
        self._lines = found.lines
        columns = dict.fromkeys(name for line in self._lines for name in line)
        super().__init__(str(path), found.metadata, len(self._lines), list(columns))
        self.mapped = vectors

    def column(self, name: str, start: int = 0, stop: int | None = None) -> list:
        return [line.get(name) for line in self._lines[start:stop]]

    def vectors(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        assert self.mapped is not None
        return self.mapped[start:stop]


def _read_footer(path: Path) -> tuple[pq.FileMetaData, pa.Schema]:
    with opened(path) as file:
        return file.metadata, file.schema_arrow


def column_type(schema: pa.Schema, name: str) -> pa.DataType | str:
    """The type of a column, or what there is instead of one."""
    return schema.field(name).type if name in schema.names else "nothing"


def check_schema(schema: pa.Schema, dim: int, where: str) -> None:
    """Refuse a file whose columns are not those that its metadata promises.

    Raises:
        OutputError: Naming the first column of another type.
    """
    twice = [name for name, count in Counter(schema.names).items() if count > 1]
    if twice:
        raise OutputError(f"{where}: there are two columns {twice[0]!r}; embed the images again")
    expected = {"id": pa.string(), "part": pa.int32(), "embedding": pa.list_(pa.float32(), dim)}
    for name, kind in expected.items():
        found = column_type(schema, name)
        if found != kind:
            raise OutputError(
                f"{where}: the column {name!r} should be {kind}, and is {found}: another program changed the file; "
                "embed the images again"
            )


def _guarded(where: str, read: Callable[..., _T], *arguments: Any) -> _T:
    """What `read` gives, with its faults as one sentence."""
    try:
        return read(*arguments)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise OutputError(f"{where} is damaged ({first_line(error)}); embed the images again") from None
