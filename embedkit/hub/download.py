"""One file from a remote place to the disk: parts are kept, gone on with by any process, and hashed before use.

What is on the disk is only ever a beginning of what was asked for, so a file named by its sha256 needs no ETag: if a
beginning was of another version, the digest of the whole says so and the file is fetched once more from its first
byte. A second wrong whole is the place's fault and an error.
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar

from embedkit.errors import IntegrityError, OutputError, UnreachableError
from embedkit.model.manifest import FileRecord
from embedkit.storage.base import Storage

#: Tries in a row that brought not one byte, after which a place counts as down.
TRIES = 4
#: Tries of one file, whatever they bring: a place that always breaks off is not asked for ever.
MOST_TRIES = 100
#: Seconds before the second try; each further one waits twice as long, up to what a place may ask for.
PAUSE, LONGEST_PAUSE = 0.25, 30.0

Value = TypeVar("Value")


class Watcher(Protocol):
    """Is told how far a pull is."""

    def start(self, what: str, total: int) -> None:
        """`total` bytes of `what` are about to come."""

    def advance(self, count: int) -> None:
        """So many more bytes are there."""


def persistent(ask: Callable[[], Value]) -> Value:
    """What `ask` gives, asked again where the place gave no answer.

    Raises:
        UnreachableError: No answer in `TRIES` tries.
    """
    for turn in range(TRIES):
        try:
            return ask()
        except UnreachableError as error:
            if turn == TRIES - 1:
                raise
            _pause(turn, error)
    raise AssertionError  # the loop returns or raises


def download(
    storage: Storage, path: str, record: FileRecord, target: Path, watcher: Watcher | None = None
) -> None:
    """Bring `target` from what it holds (nothing, or a beginning) to the whole file.

    Args:
        storage: Where the file lies.
        path: Its name there.
        record: The size and sha256 that it must have.
        target: A file of the cache that nobody else writes.
        watcher: Is told about each byte, those of the beginning included.

    Raises:
        IntegrityError: The place gives other bytes.
        FileNotFoundError: The place does not have the file.
        ZooError: The place refuses, or (UnreachableError) gives no answer or breaks off again and again.
        OutputError: The disk is full or cannot be written.
    """
    try:
        with open(target, "a+b") as file:
            _fill(_Part(file, record.size, watcher), storage, path, record)
            file.flush()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise full_disk(error, target) from None


def full_disk(error: OSError, path: Path) -> OutputError:
    """What a failed write means to the user."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return OutputError(f"{path}: no space is left; make room, or name another cache with EMBEDKIT_CACHE")
    return OutputError(
        f"{path} cannot be written ({error.strerror or error}); name another cache with EMBEDKIT_CACHE"
    )


class _Part:
    """A file that grows at its end, its digest so far, and who is told about it."""

    def __init__(self, file: BinaryIO, size: int, watcher: Watcher | None):
        self.file, self.size, self._watcher = file, size, watcher
        self.have, self._hash = 0, hashlib.sha256()
        beginning = os.fstat(file.fileno()).st_size
        if beginning > size:
            self.reset()
            return
        file.seek(0)
        while chunk := file.read(1 << 20):
            self._count(chunk)

    def reset(self) -> None:
        """Begin again."""
        self.file.truncate(0)
        if self._watcher is not None:
            self._watcher.advance(-self.have)
        self.have, self._hash = 0, hashlib.sha256()

    def append(self, chunk: bytes) -> None:
        self.file.write(chunk)
        self._count(chunk)

    def _count(self, chunk: bytes) -> None:
        self._hash.update(chunk)
        self.have += len(chunk)
        if self._watcher is not None:
            self._watcher.advance(len(chunk))

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


def _fill(part: _Part, storage: Storage, path: str, record: FileRecord) -> None:
    idle = tries = wrong = 0
    while part.have < record.size or part.sha256 != record.sha256:
        before = part.have
        try:
            if before == record.size:
                raise IntegrityError(
                    f"{storage.uri}/{path}: expected sha256 {record.sha256[:12]}..., and the place gives "
                    f"{part.sha256[:12]}...; tell whoever keeps it, or pull from another place"
                )
            _receive(part, storage, path)
        except UnreachableError as error:
            tries += 1
            idle = 0 if part.have > before else idle + 1
            if idle >= TRIES or tries >= MOST_TRIES:
                raise
            _pause(idle, error)
        except IntegrityError:
            # A beginning of another version may be why, or a mishap on the way: once more, from the first byte.
            wrong += 1
            if wrong >= 2 or not before:
                raise
            part.reset()


def _receive(part: _Part, storage: Storage, path: str) -> None:
    """Append what one request brings."""
    begin, chunks = storage.stream(path, part.have, part.size)
    with closing(chunks):
        if begin != part.have:
            part.reset()
        for chunk in chunks:
            if part.have + len(chunk) > part.size:
                raise IntegrityError(f"{storage.uri}/{path}: expected {part.size} bytes, and more came")
            part.append(chunk)
    part.file.flush()
    if part.have < part.size:
        raise UnreachableError(f"{storage.uri}/{path}: {part.size - part.have} bytes are missing")


def _pause(turn: int, error: UnreachableError) -> None:
    time.sleep(min(max(PAUSE * 2**turn, error.retry_after), LONGEST_PAUSE))
