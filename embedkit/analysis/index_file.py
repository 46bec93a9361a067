"""The file of a search index: its sections, its footer, and the checks of every byte.

8 bytes of magic, vectors (or the form of faiss), ids, a JSON footer with the metadata and with the sizes and CRC-32 of
both sections, the footer's length and CRC-32, and the magic again.

Like every format that contains faiss' own: load only files that you trust.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Mapping
from typing import IO, Any, BinaryIO, NamedTuple

from embedkit._io.json import Fields, JsonFormat, canonical_json
from embedkit._io.text import one_line
from embedkit.analysis.similarity import faiss_module
from embedkit.errors import OutputError

__all__ = [
    "MAGIC",
    "IndexSection",
    "check_section",
    "parse_names",
    "read_engine",
    "read_footer",
    "sections_of",
    "write_footer",
]

VERSION = 1
MAGIC = b"ek-index"
#: Bytes after the footer: its length, its CRC-32, the magic.
TAIL = 12 + len(MAGIC)
_FOOTER = JsonFormat(error=OutputError, step="build the index again", limit=1 << 20)


class IndexSection:
    """A run of bytes of a file that is being written, with its size and CRC-32."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self.start, self.size, self.crc = file.tell(), 0, 0

    def write(self, data: bytes) -> int:
        """Append."""
        self.size += len(data)
        self.crc = zlib.crc32(data, self.crc)
        return self._file.write(data)


class _Range(NamedTuple):
    """A run of bytes of a file that is being read."""

    start: int
    size: int
    crc: int


def sections_of(footer: Fields, file: BinaryIO) -> tuple[_Range, _Range]:
    """Where the vectors and the ids lie, both inside of the file."""
    end = file.seek(0, os.SEEK_END)
    vectors, ids = (
        _Range(*row) if len(row) == 3 and all(type(value) is int for value in row) else _Range(-1, -1, -1)  # type: ignore[arg-type]
        for row in footer.rows("sections", count=2)
    )
    if not all(0 <= one.start <= end and 0 <= one.size <= end - one.start for one in (vectors, ids)):
        footer.fail("sections", f"two ranges of a file of {end} bytes, each a start, a size and a CRC-32")
    return vectors, ids


def check_section(file: BinaryIO, section: _Range, where: str) -> None:
    """Compare a section with its CRC-32, and seek back to its start."""
    file.seek(section.start)
    found, left = 0, section.size
    while left > 0 and (data := file.read(min(left, 1 << 22))):
        found, left = zlib.crc32(data, found), left - len(data)
    if left or found != section.crc:
        raise OutputError(f"{where} is a damaged index (bytes were changed); build it again")
    file.seek(section.start)


def parse_names(data: bytes, rows: int, where: str) -> list[str]:
    """The ids, a JSON text a line, no two equal."""
    lines = JsonFormat(error=OutputError, step="build the index again", limit=len(data) + 2, depth=2)
    names: list[str] = lines.parse(b"[" + data.strip().replace(b"\n", b",") + b"]", f"{where}: ids")
    if len(set(map(str, names))) != rows or not all(isinstance(name, str) for name in names):
        raise OutputError(f"{where}: ids: expected {rows} different texts; build the index again")
    return names


def write_footer(file: IO[bytes], footer: Mapping[str, Any]) -> None:
    """Append the footer and what follows it."""
    text = canonical_json({"version": VERSION, **footer})
    file.write(text + struct.pack("<QI", len(text), zlib.crc32(text)) + MAGIC)


def read_footer(file: BinaryIO, where: str) -> Fields:
    """Read the footer, and check its CRC-32 and its version.

    Raises:
        OutputError: Not an index, or one that is damaged or of another version.
    """
    end = file.seek(0, os.SEEK_END)
    file.seek(0)
    if file.read(len(MAGIC)) != MAGIC:
        raise OutputError(f"{where} is not an index of embedkit")
    file.seek(max(0, end - TAIL))
    tail = file.read(TAIL)
    if len(tail) < TAIL or tail[-len(MAGIC) :] != MAGIC:
        raise OutputError(f"{where} is cut off; build the index again, or copy it again")
    length, crc = struct.unpack("<QI", tail[: -len(MAGIC)])
    text = b""
    if length <= min(end - TAIL, _FOOTER.limit):
        file.seek(end - TAIL - length)
        text = file.read(length)
    if zlib.crc32(text) != crc:
        raise OutputError(f"{where} is a damaged index (bytes were changed); build it again")
    footer = _FOOTER.fields(_FOOTER.parse(text, where), where)
    footer.version("version", VERSION)
    return footer


def read_engine(file: BinaryIO, kind: str, where: str) -> Any:
    """Read faiss' own form of an index.

    Raises:
        OutputError: faiss cannot read it, or it is of another kind.
        MissingDependencyError: faiss is not installed.
    """
    faiss = faiss_module()
    try:
        engine = faiss.read_index(faiss.PyCallbackIOReader(file.read))
    except (RuntimeError, MemoryError) as error:
        raise OutputError(
            f"{where} is an index that this faiss cannot read ({one_line(error)}); build it again"
        ) from None
    if type(engine) is not (faiss.IndexIVFFlat if kind == "ivf" else faiss.IndexHNSWFlat):
        raise OutputError(f"{where}: kind: expected {kind}, found {type(engine).__name__}; build it again")
    return engine
