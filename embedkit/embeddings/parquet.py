"""The format of one Parquet file: the columns of `embedkit.embeddings.schema`, the metadata in its schema."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embedkit._io import atomic
from embedkit._io.outputs import check_ours
from embedkit._io.text import one_line
from embedkit.embeddings.base import StoredRows, TableRows, Tables, check_exists, check_folder
from embedkit.embeddings.earlier import EarlierRows, Record, check_extendable, record_columns, records_of
from embedkit.embeddings.metadata import Metadata, check_same_space
from embedkit.embeddings.parquet_file import check_sizes, opened
from embedkit.embeddings.schema import (
    RESERVED,
    ROW_GROUP,
    adopt_step,
    check_schema,
    guarded,
    metadata_of,
    regroup,
)
from embedkit.embeddings.side_files import beside
from embedkit.errors import OutputError

__all__ = [
    "ParquetFormat",
    "ParquetRows",
    "parquet_writer",
    "read_metadata",
    "read_records",
    "write_rows",
    "write_table",
]

#: Rows of the small columns that are read at once.
_RECORDS = 1 << 16


class ParquetFormat:
    """`X.parquet`, and any other file when it is read."""

    example = "X.parquet"
    sharded = False

    def recognizes(self, name: str) -> bool:
        """By the suffix."""
        return Path(name).suffix == ".parquet"

    def locate(self, name: str) -> Path:
        """The file."""
        return Path(name)

    def open(self, name: str) -> StoredRows:
        """Open a file for reading."""
        check_exists(name)
        return ParquetRows([Path(name)], name)

    def files(self, path: Path) -> list[Path]:
        """The file, and the table of failures beside it."""
        return [path, self.errors_path(path)]

    def side_files(self, path: Path) -> dict[str, Path]:
        """None: the metadata is in the file."""
        return {}

    def errors_path(self, path: Path) -> Path:
        """`X.errors.parquet` beside `X.parquet`."""
        return beside(path, ".errors.parquet")

    def check_writable(self, path: Path) -> None:
        """Refuse a folder that cannot be written."""
        check_folder(path)

    def prepare(self, path: Path) -> None:
        """Nothing: one rename commits the file."""

    def check_replaceable(self, path: Path) -> None:
        """Refuse to replace a file without our metadata."""
        check_ours(path, lambda file: bool(read_metadata(file)), "embeddings")

    def earlier(self, path: Path) -> EarlierRows | None:
        """The file of an earlier job."""
        if not os.path.exists(path):
            return None
        metadata = read_metadata(path)
        records, schema = read_records(path, metadata)
        return EarlierRows(path, metadata, schema, records, lambda: _blocks(path))

    def write(self, tables: Tables, path: Path, schema: pa.Schema) -> None:
        """Write one file."""
        write_rows(tables(), path, schema)


class ParquetRows(TableRows):
    """The rows of one file, or of several files one after another."""

    def __init__(self, files: Sequence[Path], where: str):
        """Read the footers.

        Args:
            files: Parquet files of one space.
            where: How messages name them.

        Raises:
            OutputError: No file, or one that is damaged or not ours.
            SpaceMismatchError: Files of two spaces.
        """
        if not files:
            raise OutputError(f"{where} holds no rows yet")
        metadata = read_metadata(files[0])
        for file in files[1:]:
            found = read_metadata(file)
            check_same_space(metadata, found, where, str(file), "embed the images again into another folder")
            if found.dtype != metadata.dtype:
                raise OutputError(
                    f"{where} mixes rows of {metadata.dtype} and, in {file.name}, of {found.dtype}; embed the images "
                    "again into another folder"
                )
            for run in found.runs:
                metadata = metadata.with_run(run)
        self._checked: set[tuple[int, str]] = set()
        self._footers: list[pq.FileMetaData] = []
        self._schemas: list[pa.Schema] = []
        for file in files:
            footer, schema = guarded(str(file), _read_footer, file)
            self._footers.append(footer)
            self._schemas.append(schema)
        # The first shard that has a value of a column has its type.
        columns: dict[str, pa.DataType] = {}
        for field in guarded(where, lambda: [one for schema in self._schemas for one in schema]):
            if pa.types.is_null(columns.get(field.name, pa.null())):
                columns[field.name] = field.type
        for file, schema in zip(files, self._schemas, strict=True):
            check_schema(schema, metadata, str(file), adopt_step(str(file)))
        self._groups = [
            (index, group)
            for index, footer in enumerate(self._footers)
            for group in range(footer.num_row_groups)
        ]
        sizes = [self._footers[index].row_group(group).num_rows for index, group in self._groups]
        self._starts = np.cumsum([0, *sizes])
        super().__init__(where, metadata, int(self._starts[-1]), columns, files)

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
        """Whole row groups of one column; nulls where this file lacks it."""
        if name not in self._schemas[file].names:
            rows = sum(self._footers[file].row_group(group).num_rows for group in groups)
            return pa.table({name: pa.nulls(rows)})
        path = self.files[file]

        def read() -> pa.Table:
            # With the footer that was read already: a large file's takes long to parse.
            with opened(path, metadata=self._footers[file]) as reader:
                if (file, name) not in self._checked:
                    check_sizes(reader, path, [name])
                    self._checked.add((file, name))
                return reader.read_row_groups(groups, columns=[name]).replace_schema_metadata(None)

        return guarded(str(path), read)


def read_metadata(path: str | os.PathLike[str]) -> Metadata:
    """The metadata of a Parquet file of embeddings.

    Raises:
        OutputError: Not such a file.
    """
    try:
        with opened(path) as file:
            schema = file.schema_arrow
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise OutputError(f"{os.fspath(path)} cannot be read as Parquet ({one_line(error)})") from None
    where = os.fspath(path)
    return metadata_of(schema, where, "a Parquet file", adopt_step(where))


def read_records(path: Path, metadata: Metadata) -> tuple[dict[str, Record], pa.Schema]:
    """What a Parquet file of embeddings records of every image, by id, and the file's schema.

    Raises:
        OutputError: The file is damaged, is not what its metadata promises, or takes too much memory.
    """

    def read() -> tuple[dict[str, Record], pa.Schema]:
        with opened(path) as file:
            schema = file.schema_arrow
            check_extendable(schema, metadata, path)
            check_sizes(file, path, schema.names)
            return records_of(file.iter_batches(_RECORDS, columns=record_columns(schema))), schema

    return guarded(str(path), read)


def write_rows(tables: Iterable[pa.Table], path: Path, schema: pa.Schema) -> int:
    """Stream tables into one Parquet file of fixed row groups, so that equal rows give equal bytes.

    Returns:
        The number of rows.
    """
    count = 0
    with _replacing(path) as aside, parquet_writer(aside, schema) as writer:
        for table in regroup(tables, ROW_GROUP):
            writer.write_table(table, row_group_size=ROW_GROUP)
            count += table.num_rows
    return count


def write_table(table: pa.Table, path: Path) -> None:
    """Write one Parquet file aside, flush it to the disk, and rename it to `path`."""
    with _replacing(path) as aside, parquet_writer(aside, table.schema) as writer:
        writer.write_table(table, row_group_size=ROW_GROUP)


@contextlib.contextmanager
def parquet_writer(path: Path, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    """A writer with our settings: floats do not compress, ids and labels do."""
    compression: dict[str, str] = {name: "zstd" for name in schema.names if name != "embedding"}
    dictionary = [name for name in schema.names if name not in RESERVED]
    with (
        pa.OSFile(os.fspath(path), "wb") as file,  # pyarrow takes a path with a colon for a URL
        pq.ParquetWriter(
            file,
            schema,
            compression=compression or "none",
            use_dictionary=dictionary,
            write_statistics=["id"],
        ) as writer,
    ):
        yield writer


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """As `_io.atomic.replacing`, but yields a path: the writer opens the file itself."""
    with atomic.replacing(path) as file:
        yield Path(file.name)
        os.fsync(file.fileno())


def _read_footer(path: Path) -> tuple[pq.FileMetaData, pa.Schema]:
    with opened(path) as file:
        return file.metadata, file.schema_arrow


def _blocks(path: Path) -> Iterator[pa.Table]:
    """All rows of a file in bounded tables, without metadata."""
    with opened(path) as file:
        batches = file.iter_batches(ROW_GROUP)
        while (batch := guarded(str(path), next, batches, None)) is not None:
            yield pa.Table.from_batches([batch]).replace_schema_metadata(None)
