"""Open Parquet files safely: by descriptor, and with a bound on their size in memory.

pyarrow takes a path with a colon for a URL, and waits for a FIFO. A file of some kilobytes may hold gigabytes: a
dictionary's value counts once in the file and once a row in memory. So every file is opened here, and the size of
its columns is checked before they are read.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedkit._io.reading import open_regular
from embedkit.errors import OutputError

__all__ = ["check_sizes", "opened"]

#: What texts and labels may take in memory: bytes a row on average, beyond a first allowance.
_BYTES_PER_ROW, _ALLOWANCE = 4096, 64 << 20
#: Vectors hardly compress; a file whose vectors are this many times its size was not made from images.
_UNFOLD = 64


@contextlib.contextmanager
def opened(
    path: str | os.PathLike[str],
    *,
    metadata: pq.FileMetaData | None = None,
    read_dictionary: list[str] | None = None,
) -> Iterator[pq.ParquetFile]:
    """A Parquet file, closed at the end of the block.

    Args:
        path: A regular file.
        metadata: Its footer, if it was read before: that of a large file takes long to parse.
        read_dictionary: Columns that are read as dictionaries.

    Raises:
        OSError: No regular file, or it cannot be opened.
        ArrowException: Not Parquet.
    """
    open_regular(path).close()
    with (
        pa.OSFile(os.fspath(path)) as file,  # reads without Python's lock
        pq.ParquetFile(file, metadata=metadata, read_dictionary=read_dictionary) as reader,
    ):
        yield reader


def check_sizes(reader: pq.ParquetFile, path: str | os.PathLike[str], columns: Iterable[str]) -> None:
    """Refuse a file whose columns take more memory than embeddings do. Only dictionaries are read.

    Args:
        reader: The file.
        path: Its path, for the message and the size on disk.
        columns: Those that will be read; names that the file lacks are ignored.

    Raises:
        OutputError: A column is too large in memory.
    """
    facts = reader.metadata
    wanted = [name for name in columns if name in reader.schema_arrow.names]
    leaves = {name: _leaves(facts, name) for name in wanted}
    allowed = _ALLOWANCE + _BYTES_PER_ROW * facts.num_rows
    for name in wanted:
        kind = reader.schema_arrow.field(name).type
        if pa.types.is_fixed_size_list(kind):
            size, most = 4 * kind.list_size * facts.num_rows, _ALLOWANCE + _UNFOLD * os.path.getsize(path)
        elif _is_list_of_numbers(kind):
            size = _values(facts, leaves[name]) * kind.value_type.bit_width // 8
            most = _ALLOWANCE + _UNFOLD * os.path.getsize(path)
        else:
            size, most = _unfolded(facts, leaves[name]), allowed
            if size <= most and _may_repeat(facts, leaves[name]) and _is_text(kind):
                size = _with_repeats(path, facts, name)
        if size > most:
            raise OutputError(
                f"{os.fspath(path)}: the column {name!r} takes {size / 1e6:.0f} MB in memory, where at most "
                f"{most / 1e6:.0f} MB are expected of {facts.num_rows} rows in a file of this size; "
                "embed the images again"
            )


def _leaves(facts: pq.FileMetaData, name: str) -> list[int]:
    paths = [facts.schema.column(index).path for index in range(facts.num_columns)]
    return [index for index, path in enumerate(paths) if path == name or path.startswith(f"{name}.")]


def _is_list_of_numbers(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return bool(is_list and (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)))


def _values(facts: pq.FileMetaData, leaves: list[int]) -> int:
    return sum(
        facts.row_group(group).column(leaf).num_values
        for group in range(facts.num_row_groups)
        for leaf in leaves
    )


def _unfolded(facts: pq.FileMetaData, leaves: list[int]) -> int:
    return sum(
        facts.row_group(group).column(leaf).total_uncompressed_size
        for group in range(facts.num_row_groups)
        for leaf in leaves
    )


def _may_repeat(facts: pq.FileMetaData, leaves: list[int]) -> bool:
    """Whether a column has a dictionary; without one it takes as much memory as its pages."""
    return any(
        "DICTIONARY" in encoding
        for group in range(facts.num_row_groups)
        for leaf in leaves
        for encoding in facts.row_group(group).column(leaf).encodings
    )


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return any(
        test(kind)
        for test in (
            pa.types.is_string,
            pa.types.is_large_string,
            pa.types.is_binary,
            pa.types.is_large_binary,
        )
    )


def _with_repeats(path: str | os.PathLike[str], facts: pq.FileMetaData, name: str) -> int:
    """The bytes of a column's texts in memory, where every row holds a copy of its text."""
    total = 0
    with opened(path, read_dictionary=[name]) as reader:
        for batch in reader.iter_batches(1 << 16, columns=[name]):
            column = batch.column(0)
            lengths = pc.binary_length(column.dictionary)
            longest = pc.max(lengths).as_py() or 0
            if longest * len(column) > _BYTES_PER_ROW * len(column):
                total += pc.sum(lengths.take(column.indices)).as_py() or 0
            else:
                total += longest * len(column)
    return total
