"""Bounded reads of one image: a regular file, under either Unicode form of its name."""

from __future__ import annotations

import errno
import os
import unicodedata

from embedkit._io.reading import read_regular

#: Greatest size of one encoded image in bytes. 179 megapixels of 16-bit gray and alpha, uncompressed, are 0.7 GB.
MAX_BYTES = 1 << 30


def read_file(path: str | os.PathLike[str]) -> bytes:
    """The bytes of one image file.

    Args:
        path: A regular file or a link to one. If it does not exist, a file whose name differs only in its Unicode
            form (composed or decomposed) is read.

    Raises:
        OSError: The file does not exist, is not a regular file (this never waits for a FIFO), or has more than
            `MAX_BYTES` bytes.
    """
    try:
        return read_regular(path, MAX_BYTES)
    except FileNotFoundError:
        other = other_form(path)
        if other is None:
            raise
        return read_regular(other, MAX_BYTES)
    except MemoryError:
        raise OSError(errno.ENOMEM, "does not fit into memory", os.fspath(path)) from None


def other_form(path: str | os.PathLike[str]) -> str | None:
    """The path of the file or folder that has this name in another Unicode form; None if there is none.

    macOS writes `Mu\u0308ller.jpg` where a keyboard writes `M\u00fcller.jpg`. Both look the same.
    """
    name = os.fsdecode(path)
    if name.isascii() or "\0" in name:
        return None
    parent, last = os.path.split(name.rstrip(os.sep))
    if not last or parent == name:
        return None
    if parent and not os.path.lexists(parent):
        other = other_form(parent)
        if other is None:
            return None
        parent = other
        if os.path.lexists(os.path.join(parent, last)):
            return os.path.join(parent, last)
    wanted = unicodedata.normalize("NFC", last)
    try:
        with os.scandir(parent or os.curdir) as entries:
            found = [entry.name for entry in entries if unicodedata.normalize("NFC", entry.name) == wanted]
    except OSError:
        return None
    return os.path.join(parent, found[0]) if len(found) == 1 else None
