"""The columns of embeddings: reserved names, Arrow schema, row groups."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import pyarrow as pa

from embedkit.embeddings.metadata import METADATA_KEY, Metadata
from embedkit.errors import ConfigError, OutputError

#: Columns that are ours; a label column of the same name is stored as `source_<name>`.
RESERVED = ("id", "part", "embedding", "size", "mtime_ns", "sha256")


#: Rows of a row group: 2.6 MB at D = 1280; several are in memory while a file is put together.
ROW_GROUP = 512


_RESERVED_LABEL = re.compile(f"(source_)*({'|'.join(RESERVED)})")


def schema_of(metadata: Metadata, labels: Mapping[str, str], *, sha256: bool) -> pa.Schema:
    """The Parquet schema of a file with this metadata and these label columns (name -> Arrow type name)."""
    fields = [
        pa.field("id", pa.string(), nullable=False),
        pa.field("part", pa.int32(), nullable=False),
        pa.field("embedding", pa.list_(pa.float32(), metadata.dim), nullable=False),
        pa.field("size", pa.int64()),
        pa.field("mtime_ns", pa.int64()),
    ]
    if sha256:
        fields.append(pa.field("sha256", pa.string()))
    fields += [pa.field(name, pa.type_for_alias(kind)) for name, kind in labels.items()]
    return pa.schema(fields, metadata={METADATA_KEY: metadata.to_json().encode()})


def label_column(label: str) -> str:
    """The column of a source's label: its own name, unless that is one of ours.

    `id` becomes `source_id`, and `source_id` becomes `source_source_id`, so that no two labels share a column.
    """
    return f"source_{label}" if _RESERVED_LABEL.fullmatch(label) else label


def no_column(where: str, name: str, known: Iterable[str]) -> ConfigError:
    """The error for a label column that is not there."""
    return ConfigError(
        f"{where} has no column {name!r}; it has {', '.join(sorted(known)) or 'no label column'}"
    )


def vectors_of(table: pa.Table, dim: int, where: str) -> np.ndarray:
    """The `embedding` column as float32 (N, D).

    Raises:
        OutputError: A row, or a number of a row, is missing; `where` names what was read.
    """
    chunks = table["embedding"].chunks
    blocks = [chunk.flatten() for chunk in chunks]  # which leaves rows of null out
    if any(array.null_count for array in (*chunks, *blocks)):
        raise OutputError(
            f"{where} is damaged (an embedding, or a number of one, is missing); embed the images again"
        )
    vectors = np.concatenate([block.to_numpy() for block in blocks] or [np.empty(0, np.float32)])
    if len(vectors) != table.num_rows * dim:
        raise OutputError(
            f"{where} is damaged (expected {table.num_rows} rows of {dim} numbers, found {len(vectors)} numbers); "
            "embed the images again"
        )
    return vectors.reshape(-1, dim)


def regroup(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of exactly `rows` rows, the last one shorter."""
    held: list[pa.Table] = []
    count = 0
    for table in tables:
        held.append(table)
        count += table.num_rows
        while count >= rows:
            merged = pa.concat_tables(held)
            yield merged.slice(0, rows).combine_chunks()
            held, count = [merged.slice(rows)], count - rows
    if count:
        yield pa.concat_tables(held).combine_chunks()


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The same rows under `schema`: columns that the table lacks become nulls."""
    names = table.column_names
    columns = [
        table[field.name].cast(field.type) if field.name in names else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)
