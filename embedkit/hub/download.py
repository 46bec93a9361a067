"""Resumable download of one file from a remote zoo: parts are kept, resumed by any process, and hashed before use.

The part on the disk is the beginning of a file that is named by its sha256, so no ETag is needed: if the part came
from another version, the digest of the whole file differs, and the file is downloaded once more from its first byte.
A second wrong digest is an error of the zoo.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar

from embedkit._io.atomic import refusal
from embedkit.errors import IntegrityError, OutputError, UnreachableError
from embedkit.model.manifest import FileRecord
from embedkit.storage.base import Storage

#: Attempts in a row without one byte, after which a zoo counts as down.
TRIES = 4
#: Attempts for one file in all: a zoo that always breaks off is not retried without end.
MOST_TRIES = 100
#: Seconds before the second attempt, doubled for each further one; and the longest wait a zoo may ask for.
PAUSE, LONGEST_PAUSE = 0.25, 30.0

Value = TypeVar("Value")


class Watcher(Protocol):
    """Receives the progress of a download."""

    def start(self, what: str, total: int) -> None:
        """The download of `what`, of `total` bytes, begins."""

    def advance(self, count: int) -> None:
        """`count` more bytes are on the disk; negative where a part was dropped."""


def persistent(ask: Callable[[], Value]) -> Value:
    """The result of `ask`, retried where the zoo gave no answer.

    Raises:
        UnreachableError: No answer in `TRIES` attempts.
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
    """Complete `target`, which is empty, missing, or the beginning of the file.

    Args:
        storage: The storage that has the file.
        path: Its path there.
        record: The size and sha256 that it must have.
        target: A file of the cache that no other process writes.
        watcher: Receives the progress, the bytes already there included.

    Raises:
        IntegrityError: The bytes differ from the record.
        FileNotFoundError: The zoo does not have the file.
        ZooError: The zoo refuses, or (UnreachableError) does not answer, or breaks off repeatedly.
        OutputError: The disk is full or cannot be written.
    """
    try:
        with open(target, "a+b") as file:
            _fill(_Part(file, record.size, watcher), storage, path, record)
            file.flush()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise cache_refusal(error, target) from None


def cache_refusal(error: OSError, path: Path) -> OutputError:
    """The error for a failed write to the cache."""
    return refusal(path, error, "make room, or name another cache with EMBEDKIT_CACHE")


class _Part:
    """A file that grows at its end, with its digest so far and the watcher of its progress."""

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
        """Drop all bytes and start from the first."""
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
                    f"{storage.uri}/{path}: expected sha256 {record.sha256[:12]}..., and the zoo gives "
                    f"{part.sha256[:12]}...; tell its maintainer, or pull from another zoo"
                )
            _receive(part, storage, path)
        except UnreachableError as error:
            tries += 1
            idle = 0 if part.have > before else idle + 1
            if idle >= TRIES or tries >= MOST_TRIES:
                raise
            _pause(idle, error)
        except IntegrityError:
            # The part may be of another version, or damaged in transit: once more, from the first byte.
            wrong += 1
            if wrong >= 2 or not before:
                raise
            part.reset()


def _receive(part: _Part, storage: Storage, path: str) -> None:
    """Append the bytes of one request."""
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
