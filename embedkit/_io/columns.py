"""Read columns of untrusted Parquet files: of known types, and bounded by the size of the file.

Parquet compresses: a dictionary lets eight kilobytes stand for gigabytes of text, and a run length for a billion rows.
The memory of a file is bounded by its size; honest files stay far below.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

__all__ = ["read_columns"]

#: Bounds for each byte of a file: bytes before compression or of text (zlib reaches a thousand), and rows (honest ones
#: have an id each, which takes at least one byte).
_PER_BYTE, _ROWS_PER_BYTE, _SLACK = 1000, 100, 1 << 20


def read_columns(file: BinaryIO, columns: Mapping[str, pa.DataType]) -> pa.Table:
    """Read some columns of a Parquet file.

    Args:
        file: The open file.
        columns: Name -> type, flat ones. The file may have others, which are not read.

    Returns:
        The columns in this order, without nulls, and the file's schema metadata.

    Raises:
        ValueError: A column is missing, of another type, holds a null, or is too large for the file's size.
        OSError: The file cannot be read.
        pyarrow.ArrowException: It is not Parquet, or damaged.
    """
    size = os.fstat(file.fileno()).st_size
    most = _SLACK + _PER_BYTE * size
    texts = [name for name, kind in columns.items() if kind == pa.string()]
    facts = pq.read_metadata(file)
    schema = facts.schema.to_arrow_schema()
    for name, kind in columns.items():
        found = schema.field(name).type if schema.names.count(name) == 1 else "nothing"
        if found != kind:
            raise ValueError(f"the column {name!r} should be {kind}, and is {found}")
    plain = sum(facts.row_group(at).total_byte_size for at in range(facts.num_row_groups))
    if plain > most or facts.num_rows > _SLACK + _ROWS_PER_BYTE * size:
        raise ValueError(f"it claims {facts.num_rows} rows of {plain} bytes, too many for its size")
    file.seek(0)
    # As dictionaries, texts take as much memory as in the file, until their lengths are known.
    with pq.ParquetFile(file, metadata=facts, read_dictionary=texts) as reader:
        table = reader.read(columns=list(columns))
    for name in columns:
        if table[name].null_count:
            raise ValueError(f"the column {name!r} has a row without a value")
    for name in texts:
        if (length := sum(map(_text_bytes, table[name].chunks))) > most:
            raise ValueError(f"the column {name!r} holds {length} bytes of text, too many for its size")
    return table.select(list(columns)).cast(pa.schema(list(columns.items()), table.schema.metadata))


def _text_bytes(chunk: pa.DictionaryArray) -> int:
    """Bytes of text of a dictionary array when it is expanded."""
    import pyarrow.compute as pc

    lengths = pc.binary_length(chunk.dictionary.cast(pa.binary()))
    return pc.sum(lengths.take(chunk.indices).cast(pa.int64())).as_py() or 0
