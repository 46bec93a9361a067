"""The files that lie beside an output."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from embedkit._io import atomic


def beside(output: Path, suffix: str) -> Path:
    """The file of another suffix beside an output, or beside the file that the output is a link to."""
    there = output.with_suffix(suffix)
    if output.is_symlink() and not os.path.lexists(there):
        return Path(os.path.realpath(output)).with_suffix(suffix)
    return there


def errors_path(output: Path) -> Path:
    """Where the images that failed are listed: `X.errors.parquet` of `X.parquet`, `X.npy.errors.parquet` of `X.npy`."""
    return beside(
        output, ".errors.parquet" if output.suffix == ".parquet" else f"{output.suffix}.errors.parquet"
    )


def aside_folder(output: Path) -> Path:
    """Where a job with one output file works until the file is there: beside the file itself, not beside a link."""
    real = Path(os.path.realpath(output))
    return real.with_name(real.name + ".partial")


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write to a file aside, flush it to the disk, and rename it to `path`, as `_io.atomic.replacing` does.

    Yields:
        The path of the file aside, for writers that open files themselves.
    """
    with atomic.replacing(path) as file:
        yield Path(file.name)
        os.fsync(file.fileno())
