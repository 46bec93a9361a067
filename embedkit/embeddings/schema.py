"""The columns of embeddings: reserved names, Arrow schema, checks of what a file holds, row groups."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from embedkit._io.text import one_line
from embedkit.embeddings.metadata import METADATA_KEY, Metadata
from embedkit.errors import ConfigError, OutputError

#: Columns that are ours; a label column of the same name is stored as `source_<name>`.
RESERVED = ("id", "part", "embedding", "size", "mtime_ns", "sha256")
#: How numbers are stored -> the type of one in Arrow.
_VALUE_TYPES = {"float32": pa.float32(), "float16": pa.float16()}
#: Rows of a row group: 2.6 MB at D = 1280; several are in memory while a file is assembled.
ROW_GROUP = 512

_RESERVED_LABEL = re.compile(f"(source_)*({'|'.join(RESERVED)})")
_T = TypeVar("_T")


def schema_of(metadata: Metadata, labels: Mapping[str, str | pa.DataType], *, sha256: bool) -> pa.Schema:
    """The Arrow schema of embeddings with this metadata and these label columns (name -> Arrow type or its name)."""
    fields = [
        pa.field("id", pa.string(), nullable=False),
        pa.field("part", pa.int32(), nullable=False),
        pa.field("embedding", vector_type(metadata), nullable=False),
        pa.field("size", pa.int64()),
        pa.field("mtime_ns", pa.int64()),
    ]
    if sha256:
        fields.append(pa.field("sha256", pa.string()))
    fields += [
        pa.field(name, pa.type_for_alias(kind) if isinstance(kind, str) else kind)
        for name, kind in labels.items()
    ]
    return pa.schema(fields, metadata={METADATA_KEY: metadata.to_json().encode()})


def vector_type(metadata: Metadata) -> pa.DataType:
    """The Arrow type of the `embedding` column."""
    return pa.list_(_VALUE_TYPES[metadata.dtype], metadata.dim)


def metadata_of(schema: pa.Schema, where: str, what: str, step: str = "") -> Metadata:
    """The metadata that an Arrow schema holds.

    Args:
        schema: The schema.
        where: How messages name the file.
        what: What the file is, for the message: "a Parquet file".
        step: What the message tells the user to do if there is none.

    Raises:
        OutputError: There is none, or it is damaged.
    """
    text = (schema.metadata or {}).get(METADATA_KEY)
    if text is None:
        raise OutputError(
            f"{where} is {what} without metadata: embedkit did not write it{step and f'; {step}'}"
        )
    return Metadata.from_json(text, where)


def label_column(label: str) -> str:
    """The column of a source's label: the label's own name, unless that is reserved.

    `id` becomes `source_id`, and `source_id` becomes `source_source_id`, so that no two labels share a column.
    """
    return f"source_{label}" if _RESERVED_LABEL.fullmatch(label) else label


def no_column(where: str, name: str, labels: Iterable[str]) -> ConfigError:
    """The error for a label column that does not exist."""
    return ConfigError(
        f"{where} has no column {name!r}; it has {', '.join(sorted(labels)) or 'no label column'}"
    )


def column_type(schema: pa.Schema, name: str) -> pa.DataType | str:
    """The type of a column; `nothing` where the column is missing."""
    return schema.field(name).type if name in schema.names else "nothing"


def adopt_step(where: str) -> str:
    """The next step for a file that another program wrote."""
    return f"if it holds embeddings, `embedkit adopt {where} --encoder NAME` writes a file with metadata"


def check_schema(
    schema: pa.Schema, metadata: Metadata, where: str, step: str = "embed the images again"
) -> None:
    """Refuse a file whose columns are not those that its metadata promises.

    Args:
        schema: The columns.
        metadata: What the file says of its rows.
        where: How messages name the file.
        step: What the message tells the user to do.

    Raises:
        OutputError: Naming the first column of another type.
    """
    twice = [name for name, count in Counter(schema.names).items() if count > 1]
    if twice:
        raise OutputError(f"{where}: there are two columns {twice[0]!r}; embed the images again")
    expected = {"id": pa.string(), "part": pa.int32(), "embedding": vector_type(metadata)}
    for name, kind in expected.items():
        found = column_type(schema, name)
        if found != kind:
            raise OutputError(
                f"{where}: the column {name!r} should be {kind}, and is {found}: another program changed the file; "
                f"{step}"
            )


def guarded(where: str, read: Callable[..., _T], *arguments: Any) -> _T:
    """What `read` gives; whatever damage it meets becomes one sentence.

    Raises:
        OutputError: `where` is damaged.
    """
    try:
        return read(*arguments)
    except (OSError, ValueError, TypeError, OverflowError, pa.ArrowException) as error:
        raise OutputError(f"{where} is damaged ({one_line(error)}); embed the images again") from None


def vectors_of(table: pa.Table, dim: int, where: str) -> npt.NDArray[np.float32]:
    """The `embedding` column as float32 (N, D), however its numbers are stored.

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
    return vectors.astype(np.float32, copy=False).reshape(-1, dim)


def with_vectors(
    table: pa.Table, vectors: npt.NDArray[np.floating[Any]], dtype: str = Metadata.dtype
) -> pa.Table:
    """A table with an `embedding` column appended.

    Args:
        table: N rows.
        vectors: float (N, D).
        dtype: How their numbers are stored.

    Raises:
        OutputError: A number that float16 cannot hold.
    """
    return table.append_column("embedding", vector_array(vectors, dtype))


def vector_array(vectors: npt.NDArray[np.floating[Any]], dtype: str) -> pa.FixedSizeListArray:
    """Rows, float (N, D), as an `embedding` column.

    Raises:
        OutputError: A number that float16 cannot hold: it would become infinity.
    """
    with np.errstate(over="ignore"):
        stored = np.asarray(vectors, dtype)
    if dtype == "float16" and np.isfinite(vectors).all() and not np.isfinite(stored).all():
        raise OutputError(
            f"an embedding holds {np.abs(vectors).max():.3g}, and float16 at most {np.finfo(np.float16).max:g}: store "
            "the rows as float32, or normalized"
        )
    return pa.FixedSizeListArray.from_arrays(
        pa.array(stored.reshape(-1), _VALUE_TYPES[dtype]), vectors.shape[1]
    )


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
        _as_type(table[field.name], field.type) if field.name in names else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def _as_type(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    return column if column.type == kind else column.cast(kind)
