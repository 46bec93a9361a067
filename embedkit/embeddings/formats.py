"""The formats of embeddings, and which of them a name belongs to.

Only this module finds the format of a name: the rest of embedkit opens embeddings with `open_rows`, or takes a
`Format` and asks it. A new format is one more class in `FORMATS`.
"""

from __future__ import annotations

import os
from pathlib import Path

from embedkit.embeddings.base import Format, StoredRows
from embedkit.embeddings.lance import LanceFormat
from embedkit.embeddings.npy import NpyFormat
from embedkit.embeddings.parquet import ParquetFormat
from embedkit.embeddings.shards import ShardsFormat, holds_shards
from embedkit.errors import ConfigError

__all__ = ["FORMATS", "files_of", "is_embeddings", "open_rows", "output_format"]

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
