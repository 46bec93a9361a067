"""The formats of embeddings, and which of them a name belongs to.

Only this module finds the format of a name: the rest of embedkit opens embeddings with `open_rows`, or takes a
`Format` and asks it. A new format is one more class in `FORMATS`.
"""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa

from embedkit._io.text import one_line
from embedkit.embeddings.base import Format, StoredRows, Tables
from embedkit.embeddings.lance import LanceFormat
from embedkit.embeddings.npy import NpyFormat
from embedkit.embeddings.parquet import ParquetFormat
from embedkit.embeddings.shards import ShardsFormat, holds_shards
from embedkit.embeddings.side_files import has_job
from embedkit.errors import ConfigError, OutputError

__all__ = ["FORMATS", "files_of", "is_embeddings", "open_rows", "output_format", "save_rows"]

#: What a name that no format recognizes is read as.
_PARQUET = ParquetFormat()
#: The first that recognizes a name has it: a folder is a folder of shards, whatever its suffix.
FORMATS: tuple[Format, ...] = (LanceFormat(), ShardsFormat(), NpyFormat(), _PARQUET)


def output_format(name: str) -> Format:
    """The format that embeddings of this name are written in.

    Raises:
        ConfigError: No format recognizes the name.
    """
    examples = [one.example for one in reversed(FORMATS)]
    if not name:
        raise ConfigError(f"output: the name is empty; give {_alternatives(examples)}")
    scheme = name.partition("://")[0] if "://" in name else ""
    if scheme and not any(one.example.startswith(f"{scheme}://") for one in FORMATS):
        raise ConfigError(
            f"output: {name!r} is a URL, which cannot be written to; give a path, and copy it there"
        )
    for one in FORMATS:
        if one.recognizes(name):
            return one
    raise ConfigError(f"output: expected {_alternatives(examples)}, found {name!r}")


def open_rows(source: str | os.PathLike[str]) -> StoredRows:
    """Open embeddings for reading.

    Args:
        source: `X.parquet`, a folder of shards, `X.npy` beside its ids and metadata, or `lance://FOLDER/TABLE`.

    Raises:
        OutputError: No embeddings of ours, damaged ones, or a folder with a missing part.
        SpaceMismatchError: A folder of two spaces.
        MissingDependencyError: A table, and pylance is not installed.
    """
    return _format_of(os.fspath(source)).open(os.fspath(source))


def save_rows(output: str | os.PathLike[str], tables: Tables, schema: pa.Schema) -> None:
    """Write embeddings that no job writes, all or nothing.

    Args:
        output: `X.parquet`, `X.npy`, a folder ending in `/`, or `lance://FOLDER/TABLE`. Embeddings that embedkit wrote
            there before are replaced.
        tables: Gives the rows.
        schema: The columns, with the metadata.

    Raises:
        ConfigError: A name of no format, or a label column of a type that the format does not hold.
        OutputError: The output cannot be written, was not written by embedkit, or a job is not finished with it.
        MissingDependencyError: A table, and pylance is not installed.
    """
    form = output_format(os.fspath(output))
    path = form.locate(os.fspath(output))
    form.check_writable(path)
    if has_job(path):
        raise OutputError(
            f"{path}: a job is writing it, or was stopped; finish it with `embedkit embed`, or choose another output"
        )
    form.prepare(path)
    form.check_replaceable(path)
    try:
        form.write(tables, path, schema)
    except pa.ArrowNotImplementedError as error:
        raise ConfigError(
            f"{path}: a label column is of a type that it cannot hold ({one_line(error)})"
        ) from None


def is_embeddings(source: str | os.PathLike[str]) -> bool:
    """Whether `source` is to be opened as embeddings: all but a folder without any, which may hold images."""
    return not os.path.isdir(source) or holds_shards(Path(source))


def files_of(source: str | os.PathLike[str]) -> list[Path]:
    """The files of embeddings, their side files included: a command that reads them may not write to one."""
    name = os.fspath(source)
    found = _format_of(name)
    return found.files(found.locate(name))


def _format_of(name: str) -> Format:
    """The format that embeddings of this name are read in."""
    return next((one for one in FORMATS if one.recognizes(name)), _PARQUET)


def _alternatives(examples: list[str]) -> str:
    return f"{', '.join(examples[:-1])} or {examples[-1]}"
