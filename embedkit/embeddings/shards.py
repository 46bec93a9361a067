"""A folder of shards: the names of its files, and which of them belong to a finished job."""

from __future__ import annotations

import os
import re
from pathlib import Path

from embedkit.errors import OutputError

_SHARD = re.compile(r"part-(\d+)-of-(\d+)-(\d+)\.parquet")


_DONE = re.compile(r"_done-(\d+)-of-(\d+)\.json")


def shard_name(part: int, parts: int, number: int) -> str:
    """The file name of one shard of a folder of embeddings; parts count from 1."""
    return f"part-{part:05d}-of-{parts:05d}-{number:06d}.parquet"


def done_name(part: int, parts: int) -> str:
    """The file that says that a part is complete. The underscore hides it from readers of Parquet data sets."""
    return f"_done-{part:05d}-of-{parts:05d}.json"


def is_folder_of_shards(path: Path) -> bool:
    """Whether a folder holds embeddings, be they complete or not."""
    return path.is_dir() and any(_SHARD.fullmatch(name) or _DONE.fullmatch(name) for name in os.listdir(path))


def shards_of(folder: Path) -> list[Path]:
    """The shards of a complete folder of embeddings, in order.

    Raises:
        OutputError: No shard, parts of different counts, or a part that is missing or not finished.
    """
    found = {path: match.groups() for path in folder.iterdir() if (match := _SHARD.fullmatch(path.name))}
    done = {path.name: match[2] for path in folder.iterdir() if (match := _DONE.fullmatch(path.name))}
    counts = {int(parts) for parts in (*done.values(), *(parts for _, parts, _ in found.values()))}
    if not counts:
        raise OutputError(f"{folder} holds no embeddings; write some with `embedkit embed ... -o {folder}/`")
    if len(counts) > 1:
        raise OutputError(
            f"{folder} mixes runs of {' and '.join(map(str, sorted(counts)))} parts; start it again"
        )
    parts = counts.pop()
    missing = [part for part in range(1, parts + 1) if done_name(part, parts) not in done]
    if missing:
        raise OutputError(
            f"{folder}: part {missing[0]} of {parts} is missing or not finished; "
            f"run it with --worker {missing[0]}/{parts}"
        )
    return sorted(found)
