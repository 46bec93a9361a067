"""What is inside tar archives and Parquet files: the pictures in them, by name, and their readers.

Listing decodes no picture. Many readers share one open container, few containers stay open, and a reader
refuses one that changed after it was listed. What a name inside becomes outside is the caller's: this module
knows neither ids nor other sources.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import os
import posixpath
import re
import tarfile
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from embedkit.errors import ImageError, SourceError

#: Names that tell which of several binary columns of a Parquet file holds the pictures.
IMAGE_COLUMNS = frozenset("image img picture photo jpg jpeg png webp bytes image_bytes".split())
#: The labels of what has none.
EMPTY: Mapping[str, object] = MappingProxyType({})

# Arrow types by name, so that pyarrow is imported for a Parquet source only.
_BINARY = frozenset("binary large_binary binary_view".split())
_TEXT = frozenset("string large_string string_view".split())
_NUMBER = frozenset("bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 halffloat float double".split())

# A Parquet file is read forward, in batches. What was passed is kept for threads that ask a little later: so
# many rows and bytes at most (or one batch, if that is larger), and the oldest fall out as reading goes on.
_WINDOW_ROWS = 1024
_WINDOW_BYTES = 128 << 20
_BATCH_ROWS = 64
_BATCH_BYTES = 8 << 20
_OPEN_TABLES = 2
_OPEN_ARCHIVES = 16

_HIDDEN_MEMBER = re.compile(r"(^|/)\.(?!\./)")

T = TypeVar("T")


class Picture(NamedTuple):
    """One picture inside a container.

    Attributes:
        name: The normalised name of a tar member; the path of a Parquet row, or `#row` (from 0) where the
            path is missing or not unique. It may hold `surrogateescape` where it is not UTF-8.
        size: Bytes of the tar member; of the whole file for a Parquet row.
        read: Gives the encoded bytes, in any thread. Raises OSError, `ImageError` or `SourceError`.
        labels: The scalar columns of a Parquet row; empty for a tar member.
    """

    name: str
    size: int
    read: Callable[[], bytes]
    labels: Mapping[str, object]


@dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """What one container holds.

    Attributes:
        pictures: Each once, in the container's order; made one by one, so they can be gone through once.
        label_schema: Label column -> Arrow type name; empty for a tar archive.
        damage: (member or "", reason) where an archive ends early; its whole members are listed all the same.
        notes: Sentences for the user.
    """

    pictures: Iterator[Picture]
    label_schema: Mapping[str, str] = field(default_factory=dict)
    damage: tuple[str, str] | None = None
    notes: tuple[str, ...] = ()


class Archives:
    """Lists the plain tar archives of one listing; the last few that were read stay open."""

    def __init__(self, is_picture: Callable[[str], bool]):
        """Open nothing yet.

        Args:
            is_picture: Whether a member of this name is listed; hidden members never are.
        """
        self._is_picture = is_picture
        self._open = _latest(_OpenArchive, _OPEN_ARCHIVES)

    def contents(self, path: str, status: os.stat_result) -> Contents:
        """List the archive at `path`, whose `os.stat` is `status`.

        Raises:
            SourceError: It is compressed, no tar archive, or cannot be opened.
        """
        try:
            archive = tarfile.open(path, "r:", encoding="utf-8", errors="surrogateescape")
        except (tarfile.TarError, ValueError, OSError) as error:
            raise SourceError(
                f"{path!r} is not a plain tar archive ({one_line(error)}); decompress it, or make it again"
            ) from None
        members: dict[str, tuple[int, int]] = {}  # a name that comes again replaces the first, as in tar
        cut, links, count, end = "", 0, 0, -1
        with archive:
            try:
                while (member := archive.next()) is not None and archive.offset > end:
                    archive.members.clear()  # type: ignore[attr-defined]  # half a kilobyte each, kept for nothing
                    end, count = archive.offset, count + 1
                    name = posixpath.normpath(member.name)
                    if not self._is_picture(name) or _HIDDEN_MEMBER.search(name):
                        continue
                    if not member.isreg() or member.issparse():
                        links += 1
                    elif not 0 <= member.size <= status.st_size - member.offset_data:
                        cut = name
                    else:
                        members[name] = (member.offset_data, member.size)
                # tarfile ends as quietly at a broken header as at the block of zeros that marks the end
                archive.fileobj.seek(archive.offset)
                whole = archive.fileobj.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
            except (tarfile.TarError, ValueError, OSError):
                whole = False
        damage = None
        if cut or not whole:
            reason = f"the archive is cut short or damaged after {count} members; make it again for the rest"
            damage = (cut, reason)
        notes: tuple[str, ...] = ()
        if links:
            notes = (f"passed over {links} members of {path!r} that are links or sparse files",)
        opened = functools.partial(self._open, path, status.st_mtime_ns)
        return Contents(
            pictures=(
                Picture(name, size, _Member(opened, offset, size), EMPTY)
                for name, (offset, size) in members.items()
            ),
            damage=damage,
            notes=notes,
        )


class Tables:
    """Lists the Parquet files of one listing, by their image column; the last few that were read stay open."""

    def __init__(self) -> None:
        self._open = _latest(_OpenTable, _OPEN_TABLES)

    def contents(self, path: str, status: os.stat_result) -> Contents:
        """List the Parquet file at `path`, whose `os.stat` is `status`; its labels are read now.

        Raises:
            SourceError: It cannot be read, or has no image column, or several.
        """
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        try:
            with pa.OSFile(os.fsencode(path)) as raw, pq.ParquetFile(raw) as file:
                schema, rows = file.schema_arrow, file.metadata.num_rows
                image = _image_column(schema, path)
                fields = _fields(schema.field(image).type)
                with_path = fields.get("path") in _TEXT
                types = {
                    column.name: type_name
                    for column in schema
                    if (type_name := _label_type(column.type)) and schema.names.count(column.name) == 1
                }
                wanted = [*types, f"{image}.path"] if with_path else list(types)
                table = file.read(columns=wanted, use_threads=False)
                table.validate(full=True)  # finds text that is not UTF-8 now, not in the middle of the job
                paths = pc.struct_field(table.column(image), "path").to_pylist() if with_path else []
        except (pa.ArrowException, OSError, ValueError) as error:
            raise SourceError(f"{path!r} is not a Parquet file that can be read: {one_line(error)}") from None
        notes: tuple[str, ...] = ()
        if left := [repr(name) for name in schema.names if name not in types and name != image]:
            notes = (f"passed over columns of {path!r} that are no labels: {', '.join(left)}",)
        columns = {name: table.column(name) for name in types}
        column = f"{image}.bytes" if fields else image
        opened = functools.partial(self._open, path, status.st_mtime_ns, column)
        readers = (_Row(opened, columns, number) for number in range(rows))
        return Contents(
            pictures=(
                Picture(name, status.st_size, row, row)
                for name, row in zip(_row_names(paths, rows), readers, strict=True)
            ),
            label_schema=types,
            notes=notes,
        )


class _Member:
    """Reads one member of a tar archive."""

    __slots__ = ("_offset", "_opened", "_size")

    def __init__(self, opened: Callable[[], _OpenArchive], offset: int, size: int):
        self._opened, self._offset, self._size = opened, offset, size

    def __call__(self) -> bytes:
        return self._opened().read(self._offset, self._size)


class _Row(Mapping[str, object]):
    """Reads one row of a Parquet file; as a mapping it is the row's labels."""

    __slots__ = ("_columns", "_number", "_opened")

    def __init__(self, opened: Callable[[], _OpenTable], columns: Mapping[str, Any], number: int):
        self._opened, self._columns, self._number = opened, columns, number

    def __call__(self) -> bytes:
        return self._opened().read(self._number)

    def __getitem__(self, name: str) -> object:
        return self._columns[name][self._number].as_py()

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)


class _OpenArchive:
    """One descriptor that all threads read at their own offsets, closed when the last one lets go of it."""

    def __init__(self, path: str, mtime_ns: int):
        _check_unchanged(path, mtime_ns)
        self._path, self._lock = path, threading.Lock()
        self._file = open(path, "rb", buffering=0)
        weakref.finalize(self, self._file.close)

    def read(self, offset: int, size: int) -> bytes:
        """The `size` bytes at `offset`."""
        if hasattr(os, "pread"):
            data = os.pread(self._file.fileno(), size, offset)
        else:  # Windows
            with self._lock:
                self._file.seek(offset)
                data = self._file.read(size)
        if len(data) != size:
            raise SourceError(f"{self._path!r} became shorter after it was listed; run the command again")
        return data


class _OpenTable:
    """The image column of one Parquet file, read forward by whichever thread needs more.

    pyarrow holds a batch and the pages that it lies in; beside that, only the window is kept.
    """

    def __init__(self, path: str, mtime_ns: int, column: str):
        import pyarrow as pa
        import pyarrow.parquet as pq

        _check_unchanged(path, mtime_ns)
        # Unbuffered, pyarrow would read the column of a whole row group before it gives the first row.
        self._file = pq.ParquetFile(pa.OSFile(os.fsencode(path)), buffer_size=1 << 20, pre_buffer=False)
        self._path, self._column, self._lock = path, column, threading.Lock()
        groups = [self._file.metadata.row_group(i) for i in range(self._file.metadata.num_row_groups)]
        self._starts = [0, *itertools.accumulate(group.num_rows for group in groups)]
        row_bytes = sum(group.total_byte_size for group in groups) // max(1, self._starts[-1]) + 1
        self._batch_rows = min(_BATCH_ROWS, max(1, _BATCH_BYTES // row_bytes))
        self._window: OrderedDict[int, bytes | None] = OrderedDict()
        self._window_bytes = 0
        self._damaged: set[range] = set()
        self._batches: Iterator[Any] = iter(())
        self._next = self._end = 0  # the row that the next batch begins with, and the end of its row group

    def read(self, number: int) -> bytes:
        """The bytes of row `number`, counted from 0."""
        with self._lock:
            if number not in self._window and not any(number in rows for rows in self._damaged):
                self._read_to(number)
            if number not in self._window:
                raise SourceError(f"row {number} of {self._path!r} is in a damaged page; make the file again")
            data = self._window[number]
        if data is None:
            raise ImageError(f"row {number} of {self._path!r} holds no picture: its bytes are null")
        return data

    def _seek(self, number: int) -> None:
        """Stand at the beginning of the row group of row `number`."""
        group = bisect.bisect_right(self._starts, number) - 1
        self._next, self._end = self._starts[group], self._starts[group + 1]
        self._batches = self._file.iter_batches(
            self._batch_rows, row_groups=[group], columns=[self._column], use_threads=False
        )

    def _read_to(self, number: int) -> None:
        import pyarrow as pa
        import pyarrow.compute as pc

        if number < self._next:  # it fell out of the window
            self._window.clear()
            self._window_bytes = 0
            self._seek(number)
        elif number >= self._end + _WINDOW_ROWS:  # nearer, a row of the groups between may still be asked for
            self._seek(number)
        while self._next <= number:
            if self._next == self._end:
                self._seek(self._next)
            try:
                values = next(self._batches).column(0)
            except (StopIteration, pa.ArrowException, OSError):
                self._damaged.add(range(self._next, self._end))
                self._next = self._end
                continue
            if pa.types.is_struct(values.type):
                values = pc.struct_field(values, "bytes")
            for data in values.to_pylist():
                self._window[self._next] = data
                self._window_bytes += len(data or b"")
                self._next += 1
            while len(self._window) > len(values) and (
                len(self._window) > _WINDOW_ROWS or self._window_bytes > _WINDOW_BYTES
            ):
                self._window_bytes -= len(self._window.popitem(last=False)[1] or b"")


def _latest(factory: Callable[..., T], count: int) -> Callable[..., T]:
    """`factory`, its last `count` results kept, called by one thread at a time."""
    kept, lock = functools.lru_cache(count)(factory), threading.Lock()

    def get(*key: object) -> T:
        with lock:
            return kept(*key)

    return get


def _check_unchanged(path: str, mtime_ns: int) -> None:
    if os.stat(path).st_mtime_ns != mtime_ns:
        raise SourceError(f"{path!r} changed after it was listed; run the command again")


def _row_names(paths: list[str | None], rows: int) -> Iterator[str]:
    """What the rows are called: by their paths where these are there and unique, else by their numbers."""
    counts = Counter(paths)
    for number, path in itertools.zip_longest(range(rows), paths):
        yield f"#{number}" if not path or counts[path] > 1 or path.startswith("#") else path


def _fields(kind: Any) -> dict[str, str]:
    """The type names of a struct's fields; empty for other types."""
    return {member.name: str(member.type) for member in kind} if str(kind).startswith("struct<") else {}


def _image_column(schema: Any, path: str) -> str:
    """The name of the one column that holds pictures."""
    found = [column.name for column in schema if _fields(column.type).get("bytes") in _BINARY]
    found = found or [column.name for column in schema if str(column.type) in _BINARY]
    if len(found) > 1:
        found = [name for name in found if name.lower() in IMAGE_COLUMNS]
    if len(found) != 1:
        raise SourceError(
            f"{path!r}: expected one image column, binary or a struct with 'bytes', best named 'image'; "
            f"found the columns {', '.join(map(repr, schema.names))}"
        )
    return found[0]


def _label_type(kind: Any) -> str | None:
    """The Arrow type name of a label column; None for what is no label."""
    name = str(getattr(kind, "value_type", kind)) if str(kind).startswith("dictionary<") else str(kind)
    return "string" if name in _TEXT else name if name in _NUMBER else None


def one_line(error: Exception) -> str:
    """An exception's own words: one line that can be printed, whatever names it holds."""
    words = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return words.splitlines()[0].encode("utf-8", "backslashreplace").decode()
