"""Parquet files: which column holds images, which are labels, and the readers of their rows.

With dictionary encoding, a few bytes of a file can become gigabytes of rows. Text therefore stays encoded, one copy of
each value, and images are read row by row.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import itertools
import json
import os
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from embedkit._io.reading import open_regular
from embedkit._io.text import one_line
from embedkit.errors import ImageError, SourceError
from embedkit.images.containers import ContainedImage, Contents, check_unchanged, latest
from embedkit.images.files import read_file

#: Names that select the image column among several binary columns of a Parquet file.
IMAGE_COLUMNS = frozenset("image img picture photo jpg jpeg png webp bytes image_bytes".split())

# Arrow types by name, so that pyarrow is imported for a Parquet source only.
_BINARY = frozenset("binary large_binary binary_view".split())
_TEXT = frozenset("string large_string string_view".split())
_NUMBER = frozenset("bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 halffloat float double".split())
_INTEGER = frozenset("int8 int16 int32 int64 uint8 uint16 uint32 uint64".split())

#: Greatest length of a label's text and of a path in bytes. Every row of the output repeats its labels.
_LABEL_BYTES = 1 << 16
_PATH_BYTES = 4096

# A Parquet file is read forward, row by row: a batch of several rows could hold several large images, and is no
# faster. Rows that were read are cached for threads that ask a little later, up to this many rows and bytes (or one
# row, if that is larger); the oldest are dropped first.
_WINDOW_ROWS = 1024
_WINDOW_BYTES = 128 << 20
_OPEN_TABLES = 2


class Tables:
    """Lists the Parquet files of one listing by their image column, and caches the last few open ones."""

    def __init__(self, image_column: str | None = None) -> None:
        """Open nothing yet.

        Args:
            image_column: The column that holds the images; found by type and name when None.
        """
        self._image_column = image_column
        self._open = latest(_OpenTable, _OPEN_TABLES)

    def contents(self, path: str, status: os.stat_result) -> Contents:
        """List the Parquet file at `path`, whose `os.stat` is `status`; its labels are read now.

        Raises:
            SourceError: It cannot be read, or has no image column, or several.
        """
        import pyarrow as pa

        try:
            with _opened(path) as file:
                schema, rows = file.schema_arrow, file.metadata.num_rows
                image = _image_column(schema, path, self._image_column)
                fields = _fields(schema.field(image).type)
                with_path = fields.get("path") in _TEXT
                types = {
                    column.name: type_name
                    for column in schema
                    if (type_name := _label_type(column.type)) and schema.names.count(column.name) == 1
                }
                paths = _paths(file, image) if with_path else None
            text = [name for name, type_name in types.items() if type_name == "string"]
            with _opened(path, read_dictionary=text) as file:
                table = file.read(columns=list(types), use_threads=False)
            table.validate(full=True)  # finds text that is not UTF-8 now, not in the middle of the job
        except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
            raise SourceError(f"{path!r} is not a Parquet file that can be read: {one_line(error)}") from None
        notes = []
        if left := [repr(name) for name in schema.names if name not in types and name != image]:
            notes.append(f"skipped columns of {path!r} that are not labels: {', '.join(left)}")
        if long := [name for name in text if _longest(table.column(name)) > _LABEL_BYTES]:
            notes.append(
                f"skipped columns of {path!r} with text of more than {_LABEL_BYTES >> 10} KiB, too long for a "
                f"label: {', '.join(map(repr, long))}"
            )
        if with_path and paths is None:
            notes.append(f"named the rows of {path!r} by number: a path has more than {_PATH_BYTES} letters")
        names = {name: _class_names(schema, name) for name in types if types[name] in _INTEGER}
        columns = {name: (table.column(name), names.get(name)) for name in types if name not in long}
        opened = functools.partial(
            self._open, path, status.st_mtime_ns, f"{image}.bytes" if fields else image
        )
        readers = (_Row(opened, columns, paths, number) for number in range(rows))
        return Contents(
            images=(
                ContainedImage(name, status.st_size, row, row)
                for name, row in zip(_row_names(paths, rows), readers, strict=True)
            ),
            label_schema={name: "string" if names.get(name) else types[name] for name in columns},
            notes=tuple(notes),
        )


class _Row(Mapping[str, object]):
    """Reads one row of a Parquet file; as a mapping it is the row's labels."""

    __slots__ = ("_columns", "_number", "_opened", "_paths")

    def __init__(
        self,
        opened: Callable[[], _OpenTable],
        columns: Mapping[str, tuple[Any, list[str] | None]],
        paths: Any,
        number: int,
    ):
        self._opened, self._columns, self._paths, self._number = opened, columns, paths, number

    def __call__(self) -> bytes:
        table = self._opened()
        data = table.read(self._number)
        return table.beside(self._number, self._paths) if data is None else data

    def __getitem__(self, name: str) -> object:
        column, class_names = self._columns[name]
        value = column[self._number].as_py()
        if class_names is None or value is None:
            return value
        if value == -1:  # how Hugging Face marks a row without a class
            return None
        return class_names[value] if 0 <= value < len(class_names) else str(value)

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)


class _OpenTable:
    """The image column of one Parquet file, read forward by any thread that needs more.

    pyarrow holds one row and its page; apart from that, only the window is in memory.
    """

    def __init__(self, path: str, mtime_ns: int, column: str):
        check_unchanged(path, mtime_ns)
        # Unbuffered, pyarrow would read the column of a whole row group before it gives the first row.
        opened = _opened(path, buffer_size=1 << 20, pre_buffer=False)
        self._file = opened.__enter__()
        weakref.finalize(self, opened.__exit__, None, None, None)
        self._path, self._column, self._lock = path, column, threading.Lock()
        groups = [self._file.metadata.row_group(i) for i in range(self._file.metadata.num_row_groups)]
        self._starts = [0, *itertools.accumulate(group.num_rows for group in groups)]
        self._window: OrderedDict[int, bytes | None] = OrderedDict()
        self._window_bytes = 0
        self._damaged: set[range] = set()
        self._batches: Iterator[Any] = iter(())
        self._next = self._end = 0  # the row that comes next, and the end of its row group

    def read(self, number: int) -> bytes | None:
        """The bytes of row `number`, counted from 0; None where they are null.

        Raises:
            SourceError: The row is in a damaged page.
        """
        with self._lock:
            if number not in self._window and not any(number in rows for rows in self._damaged):
                self._read_to(number)
            if number not in self._window:
                raise SourceError(
                    f"row {number} of {self._path!r} is in a damaged page; create the file again"
                )
            return self._window[number]

    def beside(self, number: int, paths: Any) -> bytes:
        """The image that a row without bytes refers to by its path, if it is below the folder of the Parquet file.

        Raises:
            ImageError: It has no path, or the file cannot be read or is elsewhere: a data set must not choose which
                files are read.
        """
        row, name = f"row {number} of {self._path!r}", None if paths is None else paths[number].as_py()
        if not name or "\0" in name:
            raise ImageError(f"{row} holds no image: its bytes are null")
        folder = os.path.realpath(os.path.dirname(self._path) or os.curdir)
        file = os.path.realpath(os.path.join(folder, name))
        if os.path.isabs(name) or not file.startswith(os.path.join(folder, "")):
            raise ImageError(
                f"{row} holds no bytes, and its path {name!r} is not below the folder of the Parquet file: move them "
                "together, or embed the files themselves"
            )
        try:
            return read_file(file)
        except OSError as error:
            raise ImageError(
                f"{row} holds no bytes, and its path {name!r} cannot be read: {one_line(error)}"
            ) from None

    def _seek(self, number: int) -> None:
        """Move to the beginning of the row group of row `number`."""
        group = bisect.bisect_right(self._starts, number) - 1
        self._next, self._end = self._starts[group], self._starts[group + 1]
        self._batches = self._file.iter_batches(
            1, row_groups=[group], columns=[self._column], use_threads=False
        )

    def _read_to(self, number: int) -> None:
        import pyarrow as pa
        import pyarrow.compute as pc

        if number < self._next:  # the window does not hold it any more
            self._window.clear()
            self._window_bytes = 0
            self._seek(number)
        elif (
            number >= self._end + _WINDOW_ROWS
        ):  # at a smaller distance, a row in between may still be requested
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
            data = values[0].as_py() if len(values) else None
            self._window[self._next] = data
            self._window_bytes += len(data or b"")
            self._next += 1
            while len(self._window) > 1 and (
                len(self._window) > _WINDOW_ROWS or self._window_bytes > _WINDOW_BYTES
            ):
                self._window_bytes -= len(self._window.popitem(last=False)[1] or b"")


@contextlib.contextmanager
def _opened(path: str, **options: Any) -> Iterator[Any]:
    """A `ParquetFile` over a regular file opened here: pyarrow takes some paths for URLs."""
    import pyarrow.parquet as pq

    with open_regular(path) as file:
        yield pq.ParquetFile(file, **options)


def _longest(column: Any) -> int:
    """The length in bytes of the longest text of a column, dictionary-encoded or not."""
    import pyarrow as pa
    import pyarrow.compute as pc

    longest = 0
    for chunk in column.chunks:
        values = chunk.dictionary if pa.types.is_dictionary(chunk.type) else chunk
        longest = max(longest, pc.max(pc.binary_length(values)).as_py() or 0)
    return longest


def _paths(file: Any, image: str) -> Any:
    """The paths of an image column as one dictionary-encoded array; None if one is too long."""
    import pyarrow as pa

    codes: dict[str | None, int | None] = {None: None}
    numbers: list[int | None] = []
    # pyarrow does not keep a dictionary inside a struct: reading a few rows at a time bounds the memory of one value.
    for batch in file.iter_batches(8, columns=[f"{image}.path"], use_threads=False):
        for value in batch.column(0).to_pylist():
            text = value and value["path"]
            if text is not None and len(text) > _PATH_BYTES:
                return None
            numbers.append(codes.setdefault(text, len(codes) - 1))
    del codes[None]
    return pa.DictionaryArray.from_arrays(pa.array(numbers, pa.int32()), pa.array(list(codes), pa.string()))


def _class_names(schema: Any, column: str) -> list[str] | None:
    """The names that Hugging Face's metadata give the numbers of a `ClassLabel` column; None if there are none."""
    try:
        info = json.loads((schema.metadata or {})[b"huggingface"])
        feature = info["info"]["features"][column]
        names = feature["names"] if feature["_type"] == "ClassLabel" else None
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        return None
    return None if max(len(name.encode("utf-8", "surrogatepass")) for name in names) > _LABEL_BYTES else names


def _texts(paths: Any, rows: int) -> list[str | None]:
    """The path of every row; equal paths are one object."""
    if paths is None:
        return [None] * rows
    texts = paths.dictionary.to_pylist()
    return [None if number is None else texts[number] for number in paths.indices.to_pylist()]


def _row_names(paths: Any, rows: int) -> Iterator[str]:
    """The names of the rows: their paths where these are present and unique, else their numbers."""
    texts = _texts(paths, rows)
    counts = Counter(texts)
    for number, path in enumerate(texts):
        yield f"#{number}" if not path or counts[path] > 1 or path.startswith("#") else path


def _fields(kind: Any) -> dict[str, str]:
    """The type names of a struct's fields; empty for other types."""
    return {member.name: str(member.type) for member in kind} if str(kind).startswith("struct<") else {}


def _image_column(schema: Any, path: str, wanted: str | None) -> str:
    """The name of the one column that holds images."""
    found = [column.name for column in schema if _fields(column.type).get("bytes") in _BINARY]
    found = found or [column.name for column in schema if str(column.type) in _BINARY]
    if wanted is not None:
        if schema.names.count(wanted) == 1:
            kind = schema.field(wanted).type
            if str(kind) in _BINARY or _fields(kind).get("bytes") in _BINARY:
                return wanted
        raise SourceError(
            f"{path!r}: expected images in the column {wanted!r}, binary or a struct with 'bytes'; "
            f"found {_listed(found) or 'none of that kind'}"
        )
    if len(found) > 1:
        found = [name for name in found if name.lower() in IMAGE_COLUMNS]
    if len(found) != 1:
        raise SourceError(
            f"{path!r}: expected one image column, binary or a struct with 'bytes', named 'image' or selected with "
            f"--image-column (image_column in Python); found the columns {_listed(schema.names)}"
        )
    return str(found[0])


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names))


def _label_type(kind: Any) -> str | None:
    """The Arrow type name of a label column; None for another column."""
    name = str(getattr(kind, "value_type", kind)) if str(kind).startswith("dictionary<") else str(kind)
    return "string" if name in _TEXT else name if name in _NUMBER else None
