"""The format of a folder of shards: a Parquet data set that a job, or several workers, write into.

A job's shards are the output, so `embedkit.pipeline.checkpoint` writes them; here are their names, and which of them
belong to a finished job.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pyarrow as pa

from embedkit._io import atomic
from embedkit._io.json import indented_json
from embedkit.embeddings.base import StoredRows, Tables, check_exists
from embedkit.embeddings.earlier import EarlierRows
from embedkit.embeddings.metadata import Metadata
from embedkit.embeddings.parquet import ParquetRows, write_rows
from embedkit.embeddings.schema import metadata_of
from embedkit.errors import OutputError

__all__ = [
    "ShardsFormat",
    "done_name",
    "errors_name",
    "holds_shards",
    "shard_name",
    "shards_of",
    "write_done",
]

_SHARD = re.compile(r"part-(\d+)-of-(\d+)-(\d+)\.parquet")
_DONE = re.compile(r"_done-(\d+)-of-(\d+)\.json")


class ShardsFormat:
    """A folder, named with a `/` at the end or existing."""

    example = "a folder ending in '/'"
    sharded = True

    def recognizes(self, name: str) -> bool:
        """By the `/` at the end, or by what exists."""
        return name.endswith(("/", os.sep)) or os.path.isdir(name)

    def locate(self, name: str) -> Path:
        """The folder."""
        return Path(name)

    def open(self, name: str) -> StoredRows:
        """Open the shards of a finished job for reading."""
        check_exists(name)
        return ParquetRows(shards_of(Path(name)), name)

    def files(self, path: Path) -> list[Path]:
        """The folder, and the Parquet files in it."""
        return [path, *sorted(path.glob("*.parquet"))]

    def side_files(self, path: Path) -> dict[str, Path]:
        """None: all files are in the folder."""
        return {}

    def errors_path(self, path: Path) -> Path:
        """The table of failures of the first part."""
        return path / errors_name(1, 1)

    def check_writable(self, path: Path) -> None:
        """Nothing: a job makes the folder at once."""

    def prepare(self, path: Path) -> None:
        """Nothing: one rename commits a shard."""

    def check_replaceable(self, path: Path) -> None:
        """Nothing: a job checks the shards that it replaces one by one."""

    def earlier(self, path: Path) -> EarlierRows | None:
        """None: a job finds the earlier shards among its own."""
        return None

    def write(self, tables: Tables, path: Path, schema: pa.Schema) -> None:
        """Write one shard into a new folder, and mark it as finished."""
        if holds_shards(path):
            raise OutputError(f"{path} holds embeddings already; choose another folder")
        path.mkdir(parents=True, exist_ok=True)
        rows = write_rows(tables(), path / shard_name(1, 1, 0), schema)
        write_done(path / done_name(1, 1), metadata_of(schema, str(path), "a folder"), rows, failed=0)


def shard_name(part: int, parts: int, number: int) -> str:
    """The file name of one shard of a folder of embeddings; parts count from 1."""
    return f"part-{part:05d}-of-{parts:05d}-{number:06d}.parquet"


def done_name(part: int, parts: int) -> str:
    """The file that marks a part as complete. The underscore hides it from readers of Parquet data sets."""
    return f"_done-{part:05d}-of-{parts:05d}.json"


def errors_name(part: int, parts: int) -> str:
    """The table of failures of one part."""
    return f"_errors-{part:05d}-of-{parts:05d}.parquet"


def write_done(path: Path, metadata: Metadata, rows: int, *, failed: int) -> None:
    """Mark a part as complete.

    Args:
        path: The mark.
        metadata: What the rows are.
        rows: How many rows the part has.
        failed: How many images could not be read.
    """
    atomic.write_file(path, indented_json({"rows": rows, "failed": failed, "entry": metadata.entry}))


def holds_shards(path: Path) -> bool:
    """Whether a path is a folder that holds embeddings, complete or not."""
    return os.path.isdir(path) and any(
        _SHARD.fullmatch(name) or _DONE.fullmatch(name) for name in os.listdir(path)
    )


def shards_of(folder: Path) -> list[Path]:
    """The shards of a complete folder of embeddings, in order.

    Raises:
        OutputError: No shard, parts of different counts, or a part that is missing or not finished.
    """
    found = {path: match.groups() for path in folder.iterdir() if (match := _SHARD.fullmatch(path.name))}
    done = {path.name: match[2] for path in folder.iterdir() if (match := _DONE.fullmatch(path.name))}
    counts = {int(parts) for parts in (*done.values(), *(parts for _, parts, _ in found.values()))}
    if not counts:
        raise OutputError(
            f"{folder} is a folder without embeddings; if it holds images, embed them first: `embedkit embed {folder} "
            f"-o {folder.name or 'images'}.parquet`, and give that file"
        )
    if len(counts) > 1:
        raise OutputError(
            f"{folder} mixes runs of {' and '.join(map(str, sorted(counts)))} parts; start it again"
        )
    parts = counts.pop()
    missing = [part for part in range(1, parts + 1) if done_name(part, parts) not in done]
    if missing and parts == 1:
        raise OutputError(
            f"{folder} is not finished: its job is running, or was stopped; the same `embedkit embed` command "
            "continues it"
        )
    if missing:
        raise OutputError(
            f"{folder}: part {missing[0]} of {parts} is missing or not finished; "
            f"run it with --worker {missing[0]}/{parts}"
        )
    return sorted(found)
