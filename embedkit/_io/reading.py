"""Bounded reads: only regular files up to a known size. Never a pipe, a device or an endless file."""

from __future__ import annotations

import errno
import os
import stat
from typing import BinaryIO


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading; a FIFO or a device is refused without waiting for it. Links are followed.

    Raises:
        OSError: There is no such file, it cannot be opened, or it is no regular file (`EINVAL`).
    """
    flags = (
        os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
    )
    descriptor = os.open(path, flags)
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
            raise OSError(code, "is not a regular file", os.fspath(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: str | os.PathLike[str], limit: int) -> bytes:
    """All bytes of a regular file of at most `limit` bytes.

    Args:
        path: The file; links are followed.
        limit: Greatest size in bytes.

    Raises:
        OSError: As for `open_regular`, or the file is larger (`EFBIG`). No more than `limit + 1` bytes are read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise _too_large(path, limit)
        data = file.read(min(size, limit) + 1)
        if len(data) > size:  # it grew during the read
            data += file.read(limit + 1 - len(data))
        if len(data) > limit:
            raise _too_large(path, limit)
        return data


def _too_large(path: str | os.PathLike[str], limit: int) -> OSError:
    return OSError(errno.EFBIG, f"is larger than {limit} bytes", os.fspath(path))
