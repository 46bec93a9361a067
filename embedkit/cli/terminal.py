"""Standard streams that may be closed or full."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any


class StreamError(Exception):
    """Standard output cannot be written to, or standard input cannot be read."""


def prepare_streams() -> None:
    """Make standard streams that are closed or full give one sentence, not a traceback.

    What cannot be written to stdout is a `StreamError`, since data are lost. What cannot be written to stderr is
    dropped: the work continues. Streams that were replaced, as in tests, are not changed.
    """
    # Files that are opened later must not get these numbers: output would go into them.
    for descriptor, mode in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, mode)  # reading from it, or writing to it, is refused
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.BufferedReader(_NoInput(0, closefd=False)), encoding="utf-8")
    if sys.stdout is sys.__stdout__:
        # A file name or a model card may hold letters that the terminal's encoding does not.
        sys.stdout = _text(_Output(1, "w", closefd=False), sys.stdout, "backslashreplace")
    if sys.stderr is sys.__stderr__:
        sys.stderr = _text(_Notes(2, "w", closefd=False), sys.stderr, "backslashreplace")


def drop_output() -> None:
    """Discard buffered output, so that Python's own flush at the end does not fail."""
    _to_null(sys.stdout.fileno())


def _to_null(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, descriptor)
    finally:
        os.close(null)


class _NoInput(io.FileIO):
    def readall(self) -> bytes:
        raise StreamError("standard input cannot be read (it is closed)")

    def readinto(self, buffer: Any, /) -> int:
        return len(self.readall())


class _Output(io.FileIO):
    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            # Its reader has seen enough, as in `embedkit zoo list | head -1`. The command ends as it would have.
            _to_null(self.fileno())
            return super().write(data)
        except OSError as error:
            closed = error.errno == errno.EBADF
            reason = "it is closed" if closed else error.strerror or str(error)
            raise StreamError(f"standard output cannot be written to ({reason})") from None


class _Notes(io.FileIO):
    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def _text(raw: io.FileIO, like: Any, errors: str) -> io.TextIOWrapper:
    """A text stream over `raw`, with the encoding and the buffering of the stream that it replaces."""
    unbuffered = getattr(like, "write_through", False)
    return io.TextIOWrapper(
        raw if unbuffered else io.BufferedWriter(raw),  # type: ignore[arg-type, type-var, unused-ignore]
        encoding=getattr(like, "encoding", None) or "utf-8",
        errors=errors,
        line_buffering=getattr(like, "line_buffering", False),
        write_through=unbuffered,
    )
