"""A zoo in one tar, for machines without a network: written plain, and read member by member, never extracted."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Generator, Iterable
from pathlib import Path

from embedkit.entry import INDEX, MANIFEST
from embedkit.errors import EntryError, IntegrityError, OutputError, PlaceError
from embedkit.hub.index import build_facts, index_bytes, make_index
from embedkit.hub.place import VerifiedEntry

_CHUNK = 1 << 20
#: Members of an archive: 64 files of each of some hundred entries.
_MOST_MEMBERS = 20_000


class ArchiveStorage:
    """The files of a tar, by name; only plain files count, and each name may stand once."""

    def __init__(self, path: Path):
        """Read the list of members.

        Raises:
            EntryError: Not a tar, or one that no `embedkit zoo bundle` wrote.
        """
        self._path = path
        self._members: dict[str, tuple[int, int]] = {}
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    if not member.isreg() or member.issparse():
                        raise EntryError(
                            f"{path}: {member.name[:80]!r} is no plain file; this is not a zoo's archive"
                        )
                    if member.name in self._members or len(self._members) >= _MOST_MEMBERS:
                        raise EntryError(
                            f"{path}: {member.name[:80]!r} stands twice, or there are too many members"
                        )
                    self._members[member.name] = (member.offset_data, member.size)
        except (tarfile.TarError, OSError, ValueError) as error:
            raise EntryError(
                f"{path} is not an archive of a zoo ({' '.join(str(error).split())[:200]})"
            ) from None

    @property
    def uri(self) -> str:
        """The archive's path."""
        return str(self._path)

    def read(self, path: str, limit: int) -> bytes:
        """All bytes of a small member; see `Storage`."""
        size = self._find(path)[1]
        if size > limit:
            raise PlaceError(f"{self._path}: {path}: expected at most {limit} bytes, found {size}")
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
            with open(self._path, "rb") as file:
                file.seek(offset + start)
                left = size - start
                while left > 0 and (chunk := file.read(min(_CHUNK, left))):
                    left -= len(chunk)
                    yield chunk
        except OSError as error:
            raise PlaceError(f"{self._path} cannot be read ({error.strerror})") from None


def write_archive(entries: Iterable[VerifiedEntry], out: Path) -> list[str]:
    """Write entries as one tar: the index first, then each entry's folder; the same bytes for the same entries.

    Returns:
        The names of the entries.

    Raises:
        IntegrityError: An entry's bytes are not those of its manifest.
        OutputError: The file cannot be written.
    """
    chosen = sorted(entries, key=lambda entry: entry.name)
    index = make_index({entry.name: build_facts(entry) for entry in chosen}, {})
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        with tarfile.open(partial, "w", format=tarfile.PAX_FORMAT) as archive:
            _add(archive, INDEX, index_bytes(index))
            for entry in chosen:
                for name in sorted(entry.manifest.files):
                    _add(archive, f"{entry.name}/{name}", entry.read(name))
                _add(archive, f"{entry.name}/{MANIFEST}", entry.manifest_bytes)
        partial.replace(out)
    except OSError as error:
        raise OutputError(f"{out}: {error.strerror or error}; choose another place to write to") from None
    finally:
        partial.unlink(missing_ok=True)
    return [entry.name for entry in chosen]


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # no time, no owner: they would say something about the machine
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))
