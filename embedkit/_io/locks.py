"""Locks between processes and threads. A lock is released when its process ends, however it ends.

Locks are `flock` on Linux and macOS, and `msvcrt` on Windows (files only; Windows cannot lock a folder). They hold
between containers that share a folder, since the kernel keeps them, not a file's content. Some network file systems
have no locks: there the work continues without a lock, and the caller is told.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

#: Errors of `flock` where the file system has no locks; 524 is Linux's internal ENOTSUPP, which NFS passes on.
_UNSUPPORTED = frozenset(
    {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF, 524}
)


class LockedError(OSError):
    """Another process or thread holds the lock."""


def try_lock(descriptor: int) -> bool:
    """Lock an open file or folder without waiting.

    Returns:
        True with the lock; False where the file system has none.

    Raises:
        LockedError: Another process or thread holds it.
        OSError: The lock failed for another reason.
    """
    return _lock(descriptor, wait=False)


def unlock(descriptor: int) -> None:
    """Release a lock that `try_lock` gave; closing the descriptor does so too."""
    if os.name == "nt":
        import msvcrt

        os.lseek(descriptor, 0, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)  # type: ignore[attr-defined, unused-ignore]
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_UN)


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True, remove: bool = False) -> Iterator[bool]:
    """Hold the lock on the file `path`, which is made where it is missing, for the block.

    Args:
        path: The lock file. It is never followed through a link.
        wait: Wait until it is free; otherwise raise `LockedError`.
        remove: Delete the file at the end, while the lock is held. Processes that wait for it notice and retry.

    Yields:
        Whether there is a lock: some network file systems have none.

    Raises:
        LockedError: Another process or thread holds the lock, and `wait` is false.
        OSError: The file cannot be written.
    """
    descriptor, held = _open_locked(path, wait)
    try:
        yield held
    finally:
        if remove and (held or os.name == "nt"):
            with contextlib.suppress(OSError):
                os.unlink(path)
        if held:
            unlock(descriptor)
        os.close(descriptor)


@contextlib.contextmanager
def locked_folder(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock on the folder `path`, which must exist, for the block.

    Yields:
        Whether there is a lock: Windows has none for folders, nor have some network file systems.

    Raises:
        LockedError: Another process or thread holds the lock, and `wait` is false.
        OSError: There is no such folder.
    """
    if os.name == "nt":
        yield False
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield _lock(descriptor, wait)  # closing releases it
    finally:
        os.close(descriptor)


def is_same_file(descriptor: int, path: str | os.PathLike[str]) -> bool:
    """Whether `path` still names the file behind `descriptor`: a lock on a deleted file excludes no one."""
    try:
        at_path = os.lstat(path)
    except OSError:
        return False
    return os.path.samestat(os.fstat(descriptor), at_path)


def _open_locked(path: Path, wait: bool) -> tuple[int, bool]:
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
    while True:
        descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0), 0o666)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, "is not a regular file", str(path))
            held = _lock(descriptor, wait)
            if not held or os.name == "nt" or is_same_file(descriptor, path):
                return descriptor, held
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder deleted the file while this one waited


def _lock(descriptor: int, wait: bool) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            os.lseek(descriptor, 0, os.SEEK_SET)
            while True:
                try:
                    kind = msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK  # type: ignore[attr-defined, unused-ignore]
                    msvcrt.locking(descriptor, kind, 1)  # type: ignore[attr-defined, unused-ignore]
                    return True
                except OSError as error:  # LK_LOCK gives up after ten seconds
                    if not wait:
                        raise LockedError(error.errno, "is locked") from None
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except LockedError:
        raise
    except BlockingIOError as error:
        raise LockedError(error.errno, "is locked") from None
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return False
        raise
    return True
