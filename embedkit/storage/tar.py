"""Files in a plain tar, read member by member and never extracted, for machines without a network."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import BinaryIO

from embedkit._io.reading import open_regular
from embedkit._io.text import one_line, quoted
from embedkit.errors import EntryError, IntegrityError, ZooError

_CHUNK = 1 << 20


#: Members of an archive: 64 files of each of some hundred entries.
_MOST_MEMBERS = 20_000


_BLOCK = 512


#: Greatest size in bytes of a header for a long name or a large size.
_LONGEST_HEADER = 1 << 16


class ArchiveStorage:
    """The files of a tar by name; members must be plain files with unique names."""

    def __init__(self, path: Path):
        """Read the list of members.

        Raises:
            EntryError: Not a tar, or not one of `embedkit zoo bundle`.
        """
        self._path = path
        self._members: dict[str, tuple[int, int]] = {}
        try:
            with open_regular(path) as file:
                for name, start, size in read_members(file):
                    if name in self._members or len(self._members) >= _MOST_MEMBERS:
                        raise ValueError(f"{name[:80]!r} occurs twice, or there are too many members")
                    self._members[name] = (start, size)
        except (tarfile.TarError, OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise EntryError(f"{path} is not an archive of a zoo ({quoted(reason)})") from None

    @property
    def uri(self) -> str:
        """The archive's path."""
        return str(self._path)

    def __contains__(self, path: str) -> bool:
        """Whether the tar has a file of this name."""
        return path in self._members

    def read(self, path: str, limit: int) -> bytes:
        """All bytes of a small member; see `Storage`."""
        size = self._find(path)[1]
        if size > limit:
            raise ZooError(f"{self._path}: {path}: expected at most {limit} bytes, found {size}")
        return b"".join(self._chunks(path, 0))

    def stream(self, path: str, start: int, size: int) -> tuple[int, Generator[bytes]]:
        """The bytes of a member from `start` on; see `Storage`."""
        found = self._find(path)[1]
        if found != size:
            raise IntegrityError(f"{self._path}: {path}: expected {size} bytes, found {found}")
        return start, self._chunks(path, start)

    def _find(self, path: str) -> tuple[int, int]:
        if path not in self._members:
            raise FileNotFoundError(2, "No such member", f"{self._path}: {path}")
        return self._members[path]

    def _chunks(self, path: str, start: int) -> Generator[bytes]:
        offset, size = self._find(path)
        try:
            with open_regular(self._path) as file:
                file.seek(offset + start)
                left = size - start
                while left > 0 and (chunk := file.read(min(_CHUNK, left))):
                    left -= len(chunk)
                    yield chunk
        except OSError as error:
            raise ZooError(f"{self._path} cannot be read ({one_line(error)})") from None


def read_members(file: BinaryIO) -> Iterator[tuple[str, int, int]]:
    """The plain files of a tar as `embedkit zoo bundle` writes them: name, first byte and size in bytes.

    The standard library reads a long name or a pax header of any claimed size (1 TB in a sparse file), and lets a pax
    header hide, move or resize members. Here a header is bounded, and may only give a path and a size.

    Args:
        file: The tar, at its start.

    Raises:
        ValueError: A member that is not a plain file, or extends beyond the end of the tar.
        tarfile.TarError: A damaged header.
        OSError: It cannot be read.
    """
    end = os.fstat(file.fileno()).st_size
    at, said = 0, dict[str, str]()
    while True:
        file.seek(at)
        block = file.read(_BLOCK)
        if len(block) < _BLOCK:
            raise ValueError("it ends early")
        if not any(block):
            return
        member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        at += _BLOCK
        if member.type in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
            if said or not 0 < member.size <= _LONGEST_HEADER:
                raise ValueError(f"a header of {member.size} bytes")
            content = file.read(member.size)
            pax = member.type == tarfile.XHDTYPE
            said = _pax(content) if pax else {"path": content.rstrip(b"\0").decode()}
        else:
            name = said.get("path", member.name)
            size = int(said.get("size", member.size))
            if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or name.endswith("/"):
                raise ValueError(f"{name[:80]!r} is not a plain file")
            if not 0 <= size <= end - at:
                raise ValueError(f"{name[:80]!r} is cut off")
            yield name, at, size
            member.size, said = size, {}
        at += -(-member.size // _BLOCK) * _BLOCK


def _pax(content: bytes) -> dict[str, str]:
    """The records of a pax header: `LENGTH KEY=VALUE`, a line each."""
    said: dict[str, str] = {}
    while content:
        length, _, rest = content.partition(b" ")
        if not re.fullmatch(rb"[1-9]\d{0,5}", length) or int(length) > len(content):
            raise ValueError("a pax header that cannot be read")
        record, content = content[len(length) + 1 : int(length)], content[int(length) :]
        key, equal, value = record.decode().partition("=")
        if not equal or not value.endswith("\n") or key not in ("path", "size") or key in said:
            raise ValueError(f"a pax header with {key[:40]!r}")
        said[key] = value[:-1]
    if not re.fullmatch(r"\d{1,18}", said.get("size", "0"), re.ASCII):
        raise ValueError("a pax header with a size that cannot be read")
    return said
