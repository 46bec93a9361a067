"""Plain tar archives: which members are images, and their readers."""

from __future__ import annotations

import errno
import functools
import io
import os
import posixpath
import re
import tarfile
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from typing import BinaryIO

from embedkit._io.reading import open_regular
from embedkit._io.text import one_line
from embedkit.errors import SourceError
from embedkit.images.containers import EMPTY, ContainedImage, Contents, check_unchanged, latest
from embedkit.images.files import MAX_BYTES

_OPEN_ARCHIVES = 16
_HIDDEN_MEMBER = re.compile(r"(^|/)\.(?!\./)")
#: Greatest size of a header in bytes: a long name, or the extended attributes of one member.
_HEADER_BYTES = 1 << 20
#: How many zeros after an end mark are read, in bytes. tar pads to 10 kB, with a large blocking factor to 1 MB.
_PADDING_BYTES = 16 << 20


class Archives:
    """Lists the plain tar archives of one listing, and caches the last few open ones."""

    def __init__(self, is_image: Callable[[str], bool]):
        """Open nothing yet.

        Args:
            is_image: Whether to list a member of this name; hidden members are never listed.
        """
        self._is_image = is_image
        self._open = latest(_OpenArchive, _OPEN_ARCHIVES)

    def contents(self, path: str, status: os.stat_result) -> Contents:
        """List the archive at `path`, whose `os.stat` is `status`.

        Raises:
            SourceError: It is compressed, not a tar archive, or cannot be opened.
        """
        try:
            file = _Headers(open_regular(path))
        except OSError as error:
            raise _no_archive(path, error) from None
        with file:
            try:
                archive = tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape")
            except (tarfile.TarError, ValueError, OSError) as error:
                raise _no_archive(path, error) from None
            return self._listed(archive, file, path, status)

    def _listed(
        self, archive: tarfile.TarFile, file: _Headers, path: str, status: os.stat_result
    ) -> Contents:
        members: dict[
            str, tuple[int, int]
        ] = {}  # a later member of the same name replaces the first, as in tar
        passed: Counter[str] = Counter()
        cut, links, count, end, behind = "", 0, 0, -1, 0
        try:
            while (member := archive.next()) is not None and archive.offset > end:
                archive.members.clear()  # type: ignore[attr-defined]  # half a kilobyte each, and not needed again
                end, count = archive.offset, count + 1
                name = posixpath.normpath(member.name)
                if _HIDDEN_MEMBER.search(name):
                    continue
                if not self._is_image(name):
                    if member.isreg():
                        passed[posixpath.splitext(name)[1].lower() or "no suffix"] += 1
                elif not member.isreg() or member.issparse():
                    links += 1
                elif not 0 <= member.size <= status.st_size - member.offset_data:
                    cut = name
                else:
                    members[name] = (member.offset_data, member.size)
            # tarfile stops silently at a broken header, as at the block of zeros that marks the end
            file.seek(archive.offset)
            whole = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
            behind = _behind(file, status.st_size) if whole else 0
        except (tarfile.TarError, ValueError, OSError):
            whole = False
        damage = None
        if cut or not whole:
            reason = (
                f"the archive is truncated or damaged after {count} members; create it again to get the rest"
            )
            damage = (cut, reason)
        notes = []
        if links:
            notes.append(f"skipped {links} members of {path!r} that are links or sparse files")
        if behind:
            notes.append(
                f"skipped {behind} bytes of {path!r} after its end mark; if it is several archives in one file, "
                "unpack it with `tar --ignore-zeros -xf` and pass the folder"
            )
        opened = functools.partial(self._open, path, status.st_mtime_ns)
        return Contents(
            images=(
                ContainedImage(name, size, _Member(opened, offset, size), EMPTY)
                for name, (offset, size) in members.items()
            ),
            damage=damage,
            notes=tuple(notes),
            passed=passed,
        )


class _Headers(io.BufferedReader):
    """An archive during listing: only headers are read, each within a bound that tarfile itself does not have."""

    def __init__(self, file: BinaryIO):
        super().__init__(file.detach())  # type: ignore[attr-defined]

    def read(self, size: int | None = -1) -> bytes:
        """Read at most `_HEADER_BYTES`."""
        if size is None or not 0 <= size <= _HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


def _behind(file: _Headers, size: int) -> int:
    """Bytes from the first non-zero one (or the end of the search range) to the end of the file."""
    start = file.tell()
    while (at := file.tell()) < size:
        if at - start >= _PADDING_BYTES:
            return size - at
        block = file.read(1 << 16)
        if rest := block.lstrip(b"\0"):
            return size - file.tell() + len(rest)
        if not block:
            break
    return 0


def _no_archive(path: str, error: Exception) -> SourceError:
    return SourceError(
        f"{path!r} is not a plain tar archive ({one_line(error)}); decompress it, or create it again"
    )


class _Member:
    """Reads one member of a tar archive."""

    __slots__ = ("_offset", "_opened", "_size")

    def __init__(self, opened: Callable[[], _OpenArchive], offset: int, size: int):
        self._opened, self._offset, self._size = opened, offset, size

    def __call__(self) -> bytes:
        return self._opened().read(self._offset, self._size)


class _OpenArchive:
    """One descriptor that all threads read at their own offsets, closed with its last reference."""

    def __init__(self, path: str, mtime_ns: int):
        check_unchanged(path, mtime_ns)
        self._path, self._lock = path, threading.Lock()
        self._file = open_regular(path)
        weakref.finalize(self, self._file.close)

    def read(self, offset: int, size: int) -> bytes:
        """The `size` bytes at `offset`."""
        if size > MAX_BYTES:
            raise OSError(errno.EFBIG, f"has {size} bytes, more than {MAX_BYTES}")
        if hasattr(os, "pread"):
            data = os.pread(self._file.fileno(), size, offset)
        else:  # Windows
            with self._lock:
                self._file.seek(offset)
                data = self._file.read(size)
        if len(data) != size:
            raise SourceError(f"{self._path!r} became shorter after it was listed; run the command again")
        return data
