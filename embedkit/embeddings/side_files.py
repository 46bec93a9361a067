"""The names of the files that lie beside embeddings."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["beside", "has_job", "scratch_folder"]


def beside(output: Path, suffix: str) -> Path:
    """The file of another suffix beside an output, or beside the file that the output is a link to."""
    there = output.with_suffix(suffix)
    if os.path.islink(output) and not os.path.lexists(there):
        return Path(os.path.realpath(output)).with_suffix(suffix)
    return there


def scratch_folder(output: Path) -> Path:
    """`OUT.partial`, where a job with one output file works: beside the file itself, not beside a link to it."""
    real = Path(os.path.realpath(output))
    return real.with_name(real.name + ".partial")


def has_job(output: Path) -> bool:
    """Whether a job works on an output, or was stopped: its lock, its record or a shard is in the scratch folder."""
    try:
        return any(scratch_folder(output).glob("*-of-*"))
    except (OSError, ValueError):  # a name that the system refuses
        return False
