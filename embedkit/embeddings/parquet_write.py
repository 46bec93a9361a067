"""Parquet files of embeddings as they are written."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from embedkit.embeddings.metadata import METADATA_KEY, Metadata, first_line
from embedkit.embeddings.parquet import opened
from embedkit.embeddings.paths import replacing
from embedkit.embeddings.schema import RESERVED, ROW_GROUP, regroup
from embedkit.errors import OutputError


def read_metadata(path: str | os.PathLike[str]) -> Metadata:
    """The metadata of a Parquet file of embeddings.

    Raises:
        OutputError: Not such a file.
    """
    try:
        with opened(path) as file:
            schema = file.schema_arrow
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise OutputError(f"{os.fspath(path)} cannot be read as Parquet ({first_line(error)})") from None
    text = (schema.metadata or {}).get(METADATA_KEY)
    if text is None:
        raise OutputError(f"{os.fspath(path)} is a Parquet file without metadata: embedkit did not write it")
    return Metadata.from_json(text, os.fspath(path))


def write_table(table: pa.Table, path: Path) -> None:
    """Write one Parquet file aside, flush it to the disk, and rename it into place."""
    with replacing(path) as aside, parquet_writer(aside, table.schema) as writer:
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


def write_rows(tables: Iterable[pa.Table], path: Path, schema: pa.Schema) -> int:
    """Stream tables into one Parquet file of fixed row groups, so that equal rows give equal bytes.

    Returns:
        The number of rows.
    """
    count = 0
    with replacing(path) as aside, parquet_writer(aside, schema) as writer:
        for table in regroup(tables, ROW_GROUP):
            writer.write_table(table, row_group_size=ROW_GROUP)
            count += table.num_rows
    return count
