"""Writing whole: a file or a folder appears under its name complete, or not at all, whenever the writer is killed."""

from __future__ import annotations

import contextlib
import ctypes
import glob
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from embedkit.errors import OutputError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def write_file(path: Path, content: bytes) -> None:
    """Write `content` beside `path`, then rename it: a reader never sees half a file.

    Raises:
        OutputError: The place cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
    try:
        clear_up(path)
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror or error}; choose another place to write to") from None
    finally:
        with contextlib.suppress(OSError):  # where nothing can be written, there is nothing to take away
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Fill a folder aside and put it in the place of `folder` when the block ends well.

    On Linux the two change places in one step, so that a reader finds the old one or the new one at any moment.
    Elsewhere the old one steps aside first: between the two renames, for microseconds, there is none, and the
    next writer brings it back if this one was killed there. Whatever fails, the old one stays or comes back.

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
        clear_up(folder)
        partial.mkdir()
        yield partial
        if not folder.exists():
            partial.rename(folder)
        elif not _exchange(partial, folder):
            folder.rename(old)
            try:
                partial.rename(folder)
            except BaseException:
                old.rename(folder)
                raise
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise OutputError(f"{folder}: {error.strerror or error}; choose another place to write to") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # after an exchange, the old one


def _exchange(left: Path, right: Path) -> bool:
    """Let two folders change places in one step; False where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    function = getattr(ctypes.CDLL(None), "renameat2", None)
    if function is None:
        return False
    return function(_AT_FDCWD, os.fsencode(left), _AT_FDCWD, os.fsencode(right), _RENAME_EXCHANGE) == 0


def clear_up(path: Path) -> None:
    """Take away what writers that were killed left beside `path`; bring a folder's old version back if it is gone."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        pid = left.name.removeprefix(f".{path.name}.").partition(".")[0]
        if not pid.isdigit() or is_alive(int(pid)):
            continue
        if left.name.endswith(".old.partial") and not path.exists():
            left.rename(path)
        elif left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def is_alive(pid: int) -> bool:
    """Whether a process runs, or may: what it writes is not to be taken away."""
    if os.name == "nt":
        return True  # there, asking would end the process
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True
