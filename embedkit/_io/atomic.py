"""Atomic writes: a file or a folder appears under its name complete or not at all, even if its writer is killed.

Content is written to a scratch file or folder beside its target, `.NAME.RANDOM.partial`, and renamed. The scratch
name is random and created exclusively, so that threads and containers that share a folder do not collide, and a
link that another user made is not followed. Its writer holds a lock on it; scratch without a lock was left by a killed
writer and is deleted by the next one.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import os
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from embedkit._io.locks import LockedError, is_same_file, try_lock
from embedkit._io.text import one_line
from embedkit.errors import OutputError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_SCRATCH = r"\.[0-9a-f]{16}(\.old)?\.partial"
#: Where a file system has no locks, scratch older than this many seconds counts as left over.
_STALE = 7 * 24 * 3600
_MAX_NAME = 255  # bytes, of Linux and macOS


def write_file(path: Path, content: bytes) -> None:
    """Write `content` to `path` in one step. A link is written through, not replaced.

    Raises:
        OutputError: The file cannot be written.
    """
    with replacing(path) as file:
        file.write(content)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Write a scratch file, and rename it to `path` when the block succeeds.

    Args:
        path: The target. Where it is a link, the file that the link names is replaced. The permissions of an
            existing file are kept.

    Yields:
        A file, open for writing and reading, whose `name` is its path, for writers that open it themselves.

    Raises:
        OutputError: The target cannot be written, or is no regular file.
    """
    target = Path(os.path.realpath(path))
    scratch: Path | None = None
    try:
        mode = _mode_of(target)
        clear_leftovers(target)
        scratch, descriptor = _create_file(target)
        with os.fdopen(descriptor, "w+b") as file:
            if mode is not None:
                os.chmod(scratch, mode)
            named = _Named(file, str(scratch))
            yield named  # type: ignore[misc]
            file.flush()
            if os.name == "nt":
                file.close()  # an open file cannot be renamed there, nor deleted
            os.replace(scratch, target)  # before the lock ends, so that no other writer deletes it
            scratch = None
    except OSError as error:
        raise refusal(path, error) from None
    finally:
        if scratch is not None:
            with contextlib.suppress(OSError):
                scratch.unlink()


@contextlib.contextmanager
def replacing_folder(folder: Path, *, replace: bool = True) -> Iterator[Path]:
    """Fill a scratch folder, and put it in the place of `folder` when the block succeeds.

    On Linux the two folders are exchanged in one step: a reader finds one of them at any moment. Elsewhere the old
    folder is renamed first; if the writer is killed between the two renames, the next writer restores it. The old
    folder is never lost, whatever fails.

    Args:
        folder: The target; its parents are made.
        replace: Whether a folder that is already there is replaced; otherwise it must be empty or missing.

    Yields:
        An empty folder beside it.

    Raises:
        OutputError: The target cannot be written, or is there and may not be replaced.
    """
    target = Path(os.path.realpath(folder))
    scratch: Path | None = None
    descriptor = -1
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(target)
        scratch, descriptor = _create_folder(target)
        yield scratch
        _place(scratch, target, replace)
    except OSError as error:
        raise refusal(folder, error) from None
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)  # after an exchange, the old folder
        if descriptor >= 0:
            os.close(descriptor)


def remove_folder(folder: Path) -> None:
    """Delete a folder that embedkit wrote: it is renamed in one step, then its content is deleted.

    Raises:
        OutputError: It cannot be deleted.
    """
    target = Path(os.path.realpath(folder))
    aside = _scratch_name(target)
    try:
        target.rename(aside)
    except OSError as error:
        raise OutputError(f"{folder} cannot be removed ({one_line(error)})") from None
    shutil.rmtree(aside, ignore_errors=True)


def clear_leftovers(path: Path) -> None:
    """Delete the scratch of killed writers beside `path`; restore a folder's old version if it is missing.

    Only names in the form of a scratch name are deleted, and only those that no process has locked.
    """
    form = re.compile(re.escape(f".{_stem(path)}") + _SCRATCH)
    for left in sorted(path.parent.glob(f".{glob.escape(_stem(path))}.*.partial")):
        match = form.fullmatch(left.name)
        if match is None:
            continue
        with contextlib.suppress(OSError), _holding(left) as abandoned:
            if not abandoned:
                continue
            if match[1] and not os.path.exists(path):
                left.rename(path)
            elif os.path.isdir(left) and not os.path.islink(left):
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink()


def _stem(path: Path) -> str:
    """The target's name, cut where a scratch name made of it would be too long."""
    name = os.fsencode(path.name)
    return os.fsdecode(name[: _MAX_NAME - 40])


def _scratch_name(target: Path, suffix: str = "") -> Path:
    return target.with_name(f".{_stem(target)}.{secrets.token_hex(8)}{suffix}.partial")


def _create_file(target: Path) -> tuple[Path, int]:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    while True:
        scratch = _scratch_name(target)
        descriptor = os.open(scratch, flags, 0o666)
        if _is_ours(descriptor, scratch):
            return scratch, descriptor
        os.close(descriptor)


def _create_folder(target: Path) -> tuple[Path, int]:
    while True:
        scratch = _scratch_name(target)
        os.mkdir(scratch)
        if os.name == "nt":
            return scratch, -1
        try:
            descriptor = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        if _is_ours(descriptor, scratch):
            return scratch, descriptor
        os.close(descriptor)


def _is_ours(descriptor: int, scratch: Path) -> bool:
    """Lock new scratch; False where another writer deleted it between its creation and this lock."""
    if os.name == "nt":
        return True  # an open file cannot be deleted there
    try:
        try_lock(descriptor)
    except LockedError:
        return False
    return is_same_file(descriptor, scratch)


@contextlib.contextmanager
def _holding(left: Path) -> Iterator[bool]:
    """Whether scratch is left over. It stays locked for the block, since its writer may have just created it."""
    if os.name == "nt":
        yield not os.path.isdir(left) or time.time() - left.stat().st_mtime > _STALE
        return
    status = os.lstat(left)
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        yield False  # a link or a pipe is not ours
        return
    descriptor = os.open(left, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        locked = try_lock(descriptor)
        yield (locked and is_same_file(descriptor, left)) or time.time() - status.st_mtime > _STALE
    finally:
        os.close(descriptor)


def _mode_of(target: Path) -> int | None:
    """The permissions of an existing file; None where there is none."""
    try:
        status = os.stat(target)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "is not a regular file")
    return stat.S_IMODE(status.st_mode)


def _place(scratch: Path, target: Path, replace: bool) -> None:
    if not os.path.lexists(target):
        scratch.rename(target)
    elif not replace:
        target.rmdir()  # ENOTEMPTY where it holds anything
        scratch.rename(target)
    elif not _exchange(scratch, target):
        old = _scratch_name(target, ".old")
        target.rename(old)
        try:
            scratch.rename(target)
        except BaseException:
            old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _exchange(left: Path, right: Path) -> bool:
    """Exchange two folders in one step; False where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    function = getattr(ctypes.CDLL(None), "renameat2", None)
    if function is None:
        return False
    return bool(function(_AT_FDCWD, os.fsencode(left), _AT_FDCWD, os.fsencode(right), _RENAME_EXCHANGE) == 0)


def refusal(
    path: str | os.PathLike[str], error: OSError, step: str = "choose another path to write to"
) -> OutputError:
    """The error for a file or folder that cannot be written: one sentence, which ends with the next step."""
    if isinstance(error, OutputError):
        return error
    full = error.errno in (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", -1))
    reason = "the disk is full" if full else one_line(error)
    return OutputError(f"{os.fspath(path)} cannot be written ({reason}); {step}")


class _Named:
    """A binary file whose `name` is its path; `os.fdopen` uses the descriptor as the name."""

    def __init__(self, file: IO[bytes], name: str):
        self._file, self.name = file, name

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._file)
