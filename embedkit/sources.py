"""Where pictures come from: files, folders, patterns, lists, tar archives and Parquet files, as one listing.

Listing decodes no picture. It names each one once, in an order that is the same on every machine, and gives
it a small object that reads its bytes when asked. Ids, sizes and times are those of the Embeddings file.

Above 400 lines because both halves are one contract: `_Lister` makes ids and readers, the `_Open...` classes
below it are what those readers share.
"""

from __future__ import annotations

import bisect
import difflib
import functools
import itertools
import os
import posixpath
import re
import stat
import sys
import tarfile
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, BinaryIO, TypeVar
from urllib.parse import quote

from embedkit.errors import ImageError, SourceError

SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .ppm .pgm .heic .heif .avif".split()
)
#: Names that tell which of several binary columns of a Parquet file holds the pictures.
IMAGE_COLUMNS = frozenset("image img picture photo jpg jpeg png webp bytes image_bytes".split())
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

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_MAGIC = re.compile(r"[*?[]")
_PACKED = re.compile(r"\.(zip|7z|tgz|tbz2?|txz|tar\.\w+)$", re.IGNORECASE)
_HIDDEN_MEMBER = re.compile(r"(^|/)\.(?!\./)")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Item:
    """One picture of a listing.

    Attributes:
        id: The normalised path as given, with `/` separators, or relative to the root; `file.tar::member`;
            `file.parquet::path`, or `file.parquet::#row` (from 0) where the path is missing or not unique.
            A name that is not valid UTF-8 becomes a percent-encoded `file:` URI.
        size: Bytes of the file or the tar member; of the whole file for a Parquet row.
        mtime_ns: Of the file; of the container for members and rows, whose own times are often 0.
        read: Gives the encoded bytes, in any thread. Raises OSError, `ImageError` or `SourceError`.
        labels: The scalar columns of a Parquet row; empty elsewhere.
        path: The file itself (`surrogateescape` where it is not UTF-8); None for members and rows.
    """

    id: str
    size: int
    mtime_ns: int
    read: Callable[[], bytes]
    labels: Mapping[str, object] = field(default_factory=lambda: EMPTY)  # the same one for all
    path: str | None = None


@dataclass(frozen=True, slots=True)
class Listing:
    """What the sources hold.

    Attributes:
        items: Every picture once, in source order.
        label_schema: Label column -> Arrow type name; empty when no source is a Parquet file.
        errors: (id, error class name, reason) of what was found but cannot be listed.
        notes: Sentences for the user.
    """

    items: list[Item]
    label_schema: dict[str, str]
    errors: list[tuple[str, str, str]]
    notes: list[str]


def list_sources(
    sources: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    recursive: bool = True,
    null: bool = False,
    stdin: BinaryIO | None = None,
) -> Listing:
    """List the pictures of `sources`, each once, at its first position.

    A file is taken whatever its suffix, but a `.tar` or `.parquet` is opened. A folder gives its files that
    have a picture's suffix and are not hidden, then its folders, both sorted by the bytes of their names;
    containers in it stay closed. A pattern (`*`, `?`, `[a-z]`, `**`) stands for its matches, as if the shell
    had written them out. `-` is a list of paths on standard input.

    Args:
        sources: Paths, patterns or `-`.
        root: The folder that ids are relative to; without it they are the paths as given.
        recursive: Whether folders inside folders are entered.
        null: Whether the list on standard input is separated by NUL bytes instead of lines.
        stdin: Stands in for standard input.

    Raises:
        SourceError: A source does not exist, cannot be opened, is of no known kind, or lies outside `root`.
    """
    lister = _Lister(None if root is None else os.fspath(root), recursive)
    for source in [sources] if isinstance(sources, str | bytes | os.PathLike) else sources:
        given = os.fsdecode(source)
        if given != "-":
            lister.add(given)
            continue
        text = (stdin or sys.stdin.buffer).read()
        if b"\0" in text and not null:
            raise SourceError("the list on standard input is separated by NUL bytes, not lines; add --null")
        for line in text.split(b"\0" if null else b"\n"):
            if path := os.fsdecode(line if null else line.rstrip(b"\r")):
                lister.add(path, listed=True)
    return Listing(
        items=list(lister.items.values()),
        label_schema={name: type_name for name, (type_name, _) in lister.labels.items()},
        errors=[(name, kind, reason) for name, (kind, reason) in lister.errors.items()],
        notes=lister.notes(),
    )


class _Lister:
    """A listing while it grows. Its dicts keep the order of what comes and drop what comes again."""

    def __init__(self, root: str | None, recursive: bool):
        if root is not None and not os.path.isdir(root):
            raise SourceError(f"the root {root!r} is not a folder; give one that holds every source")
        self._root = None if root is None else os.path.abspath(root)
        self._recursive = recursive
        self._opened: set[str] = set()  # containers
        self._passed: dict[str, None] = {}  # what folders hold beside pictures
        self._remarks: list[str] = []
        self._archive = _latest(_OpenArchive, _OPEN_ARCHIVES)
        self._table = _latest(_OpenTable, _OPEN_TABLES)
        self.items: dict[str, Item] = {}
        self.errors: dict[str, tuple[str, str]] = {}
        self.labels: dict[str, tuple[str, str]] = {}  # name -> Arrow type name, and the file that brought it

    def add(self, given: str, listed: bool = False) -> None:
        """Add one source; a missing path of a list (`listed`) is one bad row, not the end of the job."""
        try:
            status = os.stat(given)
        except (OSError, ValueError) as error:
            if _URL.match(given):
                raise SourceError(f"{given!r} is a URL; download or mount it, and give that path") from None
            if listed and isinstance(error, OSError):
                return self._fail(given, error)
            if _MAGIC.search(given) and not os.path.lexists(given):
                return self._add_pattern(given)
            if isinstance(error, FileNotFoundError | NotADirectoryError):
                raise SourceError(f"{given!r} does not exist; {_nearest(given)}") from None
            raise SourceError(f"{given!r} cannot be opened: {_reason(error)}") from None
        if stat.S_ISDIR(status.st_mode):
            return self._add_folder(given)
        if not stat.S_ISREG(status.st_mode):
            raise SourceError(f"{given!r} is neither a file nor a folder; write its content to a file first")
        if _PACKED.search(given):
            raise SourceError(f"{given!r} is compressed; unpack it and give the folder or the plain .tar")
        container = {".tar": self._add_archive, ".parquet": self._add_table}.get(_suffix(given))
        if container is None:
            self._add_file(given, status)
        elif (name := self._name(given)) not in self._opened:
            self._opened.add(name)
            container(given, status)

    def notes(self) -> list[str]:
        """What the user should know and no row says."""
        notes = list(self._remarks)
        left = [_suffix(name) for name in self._passed if name not in self.items and name not in self._opened]
        closed = [suffix for suffix in left if suffix in (".tar", ".parquet")]
        other = [suffix or "no suffix" for suffix in left if suffix not in (".tar", ".parquet")]
        for kinds, what in (
            (other, "without a picture's suffix ({}); name a file itself to take it whatever its suffix"),
            (closed, "in folders that may hold pictures ({}); name them as sources to open them"),
        ):
            if kinds:
                common = ", ".join(kind for kind, _ in Counter(kinds).most_common(5))
                notes.append(f"passed over {len(kinds)} file{'s' * (len(kinds) > 1)} {what.format(common)}")
        return notes

    def _name(self, path: str, inner: str = "") -> str:
        """The id of `path`, or of what a container at `path` calls `inner`."""
        if self._root is None:
            name = os.path.normpath(path)
        else:
            name, above = os.path.abspath(path), os.path.join(self._root, "")
            if not os.path.join(name, "").startswith(above):
                raise SourceError(f"{path!r} is outside the root {self._root!r}; give a root that holds both")
            name = name[len(above) :] or os.curdir
        name = name.replace(os.sep, "/") + inner
        try:
            name.encode()
        except UnicodeEncodeError:
            return "file:" + quote(os.fsencode(name), safe="/:")
        # A path that looks like such a URI is written as one too, or two files could share an id.
        return "file:" + quote(name, safe="/:") if name.startswith("file:") else name

    def _fail(self, path: str, error: OSError) -> None:
        self.errors[self._name(path)] = (type(error).__name__, _reason(error))

    def _scan(self, path: str) -> list[os.DirEntry[str]]:
        """The entries of a folder in the order of their names' bytes; an error row if it cannot be read."""
        try:
            with os.scandir(path or os.curdir) as entries:
                return sorted(entries, key=lambda entry: os.fsencode(entry.name))
        except OSError as error:
            self._fail(path, error)
            return []

    def _add_pattern(self, pattern: str) -> None:
        drive, tail = os.path.splitdrive(pattern.replace(os.sep, "/"))
        parts = [part for part in tail.split("/") if part]
        while parts and parts[-1] == "**":  # what a folder gives already
            parts.pop()
        matches = list(self._match(drive + tail[: tail.startswith("/")], parts))
        if not matches:
            raise SourceError(f"nothing matches the pattern {pattern!r}; {_nearest(pattern)}")
        for path in matches:
            self.add(path, listed=True)

    def _match(self, base: str, parts: Sequence[str]) -> Iterator[str]:
        """The paths below `base` that match `parts`; `**` is any number of folders, and follows no links."""
        if not parts:
            yield base or os.curdir
        elif not _MAGIC.search(parts[0]):
            path = os.path.join(base, parts[0])
            if os.path.lexists(path):
                yield from self._match(path, parts[1:])
        elif parts[0] == "**":
            pending = [base]
            while pending:
                folder = pending.pop()
                yield from self._match(folder, parts[1:])
                for entry in reversed(self._scan(folder)):
                    if not entry.name.startswith(".") and _is_folder(entry) and not entry.is_symlink():
                        pending.append(entry.path)
        else:
            for entry in self._scan(base):
                hidden = entry.name.startswith(".") and not parts[0].startswith(".")
                if (
                    not hidden
                    and fnmatchcase(entry.name, parts[0])
                    and (len(parts) == 1 or _is_folder(entry))
                ):
                    yield from self._match(entry.path, parts[1:])

    def _add_folder(self, top: str) -> None:
        """Walk `top`, through links to folders too, but never into a folder that the walk stands in.

        Below a link, a further link is entered only when nothing has led to its folder yet: a web of links
        then costs a few walks, where following every one would cost the factorial of their number.
        """
        entered: set[tuple[int, int]] = set()
        # A folder to walk, the folders above it, whether it lies below a link, whether it must be new.
        pending: list[tuple[str, tuple[tuple[int, int], ...], bool, bool]] = [(top, (), False, False)]
        while pending:
            path, above, linked, must_be_new = pending.pop()
            try:
                status = os.stat(path)
            except OSError as error:
                self._fail(path, error)
                continue
            here = (status.st_dev, status.st_ino)
            if here in above or (must_be_new and here in entered):
                continue
            entered.add(here)
            folders = []
            for entry in self._scan(path):
                if entry.name.startswith("."):
                    continue
                if _is_folder(entry):
                    link = entry.is_symlink()
                    folders.append((entry.path, (*above, here), linked or link, linked and link))
                elif _suffix(entry.name) in SUFFIXES:
                    self._add_entry(entry)
                else:
                    self._passed[self._name(entry.path)] = None
            if self._recursive:
                pending.extend(reversed(folders))

    def _add_entry(self, entry: os.DirEntry[str]) -> None:
        try:
            status = os.stat(entry.path)  # entry.stat() would keep half a kilobyte as long as the entry lives
        except OSError as error:
            return self._fail(entry.path, error)
        if stat.S_ISREG(status.st_mode):
            self._add_file(entry.path, status)
        else:  # a FIFO would hang its reader
            self.errors[self._name(entry.path)] = ("SourceError", "neither a file nor a folder")

    def _add_file(self, path: str, status: os.stat_result) -> None:
        name = self._name(path)
        if name not in self.items:
            if ".." not in path:  # elsewhere `..` may follow a link, and the normalised path be another file
                path = os.path.normpath(path)
            path = name if name == path else path  # one string in memory instead of two
            self.items[name] = Item(name, status.st_size, status.st_mtime_ns, _File(path), path=path)

    def _add_archive(self, path: str, status: os.stat_result) -> None:
        try:
            archive = tarfile.open(path, "r:", encoding="utf-8", errors="surrogateescape")
        except (tarfile.TarError, ValueError, OSError) as error:
            raise SourceError(
                f"{path!r} is not a plain tar archive ({_reason(error)}); decompress it, or make it again"
            ) from None
        members: dict[str, tuple[int, int]] = {}  # a name that comes again replaces the first, as in tar
        cut, links, count, end = "", 0, 0, -1
        with archive:
            try:
                while (member := archive.next()) is not None and archive.offset > end:
                    archive.members.clear()  # type: ignore[attr-defined]  # half a kilobyte each, kept for nothing
                    end, count = archive.offset, count + 1
                    name = posixpath.normpath(member.name)
                    if _suffix(name) not in SUFFIXES or _HIDDEN_MEMBER.search(name):
                        continue
                    if not member.isreg() or member.issparse():
                        links += 1
                    elif not 0 <= member.size <= status.st_size - member.offset_data:
                        cut = f"::{name}"
                    else:
                        members[name] = (member.offset_data, member.size)
                # tarfile ends as quietly at a broken header as at the block of zeros that marks the end
                archive.fileobj.seek(archive.offset)
                whole = archive.fileobj.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
            except (tarfile.TarError, ValueError, OSError):
                whole = False
        if cut or not whole:
            reason = f"the archive is cut short or damaged after {count} members; make it again for the rest"
            self.errors[self._name(path, cut)] = ("SourceError", reason)
        if links:
            self._remarks.append(f"passed over {links} members of {path!r} that are links or sparse files")
        opened = functools.partial(self._archive, path, status.st_mtime_ns)
        for name, (offset, size) in members.items():
            read = _Member(opened, offset, size)
            id = self._name(path, f"::{name}")
            self.items.setdefault(id, Item(id, size, status.st_mtime_ns, read))

    def _add_table(self, path: str, status: os.stat_result) -> None:
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
            raise SourceError(f"{path!r} is not a Parquet file that can be read: {_reason(error)}") from None
        for name, type_name in types.items():
            known, where = self.labels.setdefault(name, (type_name, path))
            if known != type_name:
                raise SourceError(
                    f"the column {name!r} is {known} in {where!r}, {type_name} in {path!r}; embed them apart"
                )
        if left := [repr(name) for name in schema.names if name not in types and name != image]:
            self._remarks.append(f"passed over columns of {path!r} that are no labels: {', '.join(left)}")
        columns = {name: table.column(name) for name in types}
        column = f"{image}.bytes" if fields else image
        opened = functools.partial(self._table, path, status.st_mtime_ns, column)
        counts = Counter(paths)
        for number, inner in itertools.zip_longest(range(rows), paths):
            if not inner or counts[inner] > 1 or inner.startswith("#"):
                inner = f"#{number}"
            row = _Row(opened, columns, number)
            id = self._name(path, f"::{inner}")
            self.items.setdefault(id, Item(id, status.st_size, status.st_mtime_ns, row, row))


class _File:
    """Reads one file."""

    __slots__ = ("_path",)

    def __init__(self, path: str):
        self._path = path

    def __call__(self) -> bytes:
        with open(self._path, "rb", buffering=0) as file:
            return file.read()


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


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or into a closed folder
        return False


def _reason(error: Exception) -> str:
    """An exception's own words: one line that can be printed, whatever names it holds."""
    words = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return words.splitlines()[0].encode("utf-8", "backslashreplace").decode()


def _nearest(path: str) -> str:
    """The way from a path that does not exist to one that does."""
    if os.path.islink(path):
        return f"it is a link to {os.readlink(path)!r}"
    parent, name = os.path.split(os.path.normpath(path))
    while parent and not os.path.isdir(parent):
        parent, name = os.path.split(parent)
    try:
        near = difflib.get_close_matches(name, os.listdir(parent or os.curdir)[:10_000])
    except OSError:
        near = []
    if near:
        return f"did you mean {' or '.join(repr(os.path.join(parent, match)) for match in near)}?"
    return f"the nearest folder that exists is {parent or os.getcwd()!r}"
