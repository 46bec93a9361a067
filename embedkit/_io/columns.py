"""Columns of Parquet files that anybody may have made: of known types, and small where the file is small.

Parquet compresses: a dictionary lets eight kilobytes stand for gigabytes of text, and a run length for a billion rows.
What a file may become in memory is bounded by its size; honest columns stay far below.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

__all__ = ["read_columns"]

#: What each byte of a file may become: rows, bytes before compression, bytes of text. zlib reaches a thousand at most.
_PER_BYTE, _SLACK = 1000, 1 << 20


def read_columns(file: BinaryIO, columns: Mapping[str, pa.DataType]) -> pa.Table:
    """Read some columns of a Parquet file.

    Args:
        file: The open file.
        columns: Name -> type, flat ones. The file may have others, which are not read.

    Returns:
        The columns in this order, without nulls, and the file's schema metadata.

    Raises:
        ValueError: A column is missing, of another type, holds a null, or grows beyond all measure.
        OSError: The file cannot be read.
        pyarrow.ArrowException: It is not Parquet, or damaged.
    """
    most = _SLACK + _PER_BYTE * os.fstat(file.fileno()).st_size
    texts = [name for name, kind in columns.items() if kind == pa.string()]
    # As dictionaries, texts take as much memory as in the file, until their lengths are known.
    with pq.ParquetFile(file, read_dictionary=texts) as reader:
        schema = reader.metadata.schema.to_arrow_schema()
        for name, kind in columns.items():
            found = schema.field(name).type if schema.names.count(name) == 1 else "nothing"
            if found != kind:
                raise ValueError(f"the column {name!r} should be {kind}, and is {found}")
        groups = [reader.metadata.row_group(at) for at in range(reader.metadata.num_row_groups)]
        plain = sum(group.total_byte_size for group in groups)
        if max(reader.metadata.num_rows, plain) > most:
            raise ValueError(
                f"it claims {reader.metadata.num_rows} rows of {plain} bytes, too many for its size"
            )
        table = reader.read(columns=list(columns))
    for name in columns:
        if table[name].null_count:
            raise ValueError(f"the column {name!r} has a row without a value")
    for name in texts:
        if (size := sum(map(_text_bytes, table[name].chunks))) > most:
            raise ValueError(f"the column {name!r} holds {size} bytes of text, too many for its size")
    return table.select(list(columns)).cast(pa.schema(list(columns.items()), table.schema.metadata))


def _text_bytes(chunk: pa.DictionaryArray) -> int:
    """Bytes of text that an array of a dictionary stands for."""
    import pyarrow.compute as pc

    lengths = pc.binary_length(chunk.dictionary.cast(pa.binary()))
    return pc.sum(lengths.take(chunk.indices).cast(pa.int64())).as_py() or 0
