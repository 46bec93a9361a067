"""Writing whole: a file or a folder appears under its name complete, or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from embedkit.errors import OutputError


def write_file(path: Path, content: bytes) -> None:
    """Write `content` beside `path`, then rename it: a reader never sees half a file.

    Raises:
        OutputError: The place cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror or error}; choose another place to write to") from None
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Fill a folder aside and put it in the place of `folder` when the block ends well.

    A directory cannot be renamed over another one that holds files, so the old one steps aside first: between
    the two renames, for microseconds, there is none. Whatever fails, the old one stays or comes back.

    Args:
        folder: The final place; its parents are made.

    Yields:
        An empty folder beside it, which is gone afterwards.

    Raises:
        OutputError: The place cannot be written.
    """
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        if folder.exists():
            folder.rename(old)
        try:
            partial.rename(folder)
        except BaseException:
            if old.exists():
                old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise OutputError(f"{folder}: {error.strerror or error}; choose another place to write to") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
