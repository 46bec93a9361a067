"""One process at a time: a lock on a file, which ends with the process that holds it, however that ends."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Wait for the lock on the file `path`, which is made where it is not there, and hold it for the block.

    Yields:
        Whether there is a lock: some network file systems have none, and then nobody is kept out.

    Raises:
        OSError: The file cannot be written.
    """
    with open(path, "a+b") as file, _held(file.fileno()) as held:
        yield held


@contextlib.contextmanager
def locked_folder(path: Path) -> Iterator[bool]:
    """Wait for the lock on the folder `path`, which must be there, and hold it for the block.

    Yields:
        Whether there is a lock: Windows has none for folders, nor have some network file systems.

    Raises:
        OSError: There is no such folder.
    """
    if os.name == "nt":
        yield False
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with _held(descriptor) as held:
            yield held
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _held(descriptor: int) -> Iterator[bool]:
    held = _lock(descriptor)
    try:
        yield held
    finally:
        if held:
            _unlock(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            while True:
                with contextlib.suppress(OSError):  # it gives up after ten seconds
                    msvcrt.locking(descriptor, msvcrt.LK_LOCK, 1)  # type: ignore[attr-defined, unused-ignore]
                    return True
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
            return False
        raise
    return True


def _unlock(descriptor: int) -> None:
    if os.name == "nt":
        import msvcrt

        os.lseek(descriptor, 0, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)  # type: ignore[attr-defined, unused-ignore]
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_UN)
