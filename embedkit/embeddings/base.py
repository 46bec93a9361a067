"""The protocol of a format of embeddings, and the rows that a format opens.

`Format` is what every format implements and all that the rest of embedkit knows of one; `embedkit.embeddings.formats`
lists the formats. `StoredRows` are the rows that it opens for reading.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from embedkit.embeddings.earlier import EarlierRows
from embedkit.embeddings.metadata import Metadata
from embedkit.embeddings.schema import RESERVED, guarded, no_column, vectors_of
from embedkit.embeddings.side_files import has_job
from embedkit.errors import ConfigError, OutputError

#: Rows that are read at once: a multiple of a row group's.
BLOCK = 1 << 14
#: Gives the rows to write in bounded tables; it may be called twice, for formats that need the count first.
Tables: TypeAlias = Callable[[], Iterable[pa.Table]]


class StoredRows(ABC):
    """Embeddings in a file, a folder or a table. Ranges are read on demand: the store may exceed memory.

    Attributes:
        where: The name by which it was opened.
        metadata: What the rows are; the runs of all shards are in it.
        labels: The names of the label columns.
        types: The Arrow types of the label columns; null where only the values tell.
        files: The files that hold the rows; they are newer than an index of the rows that is out of date.
        mapped: float (N, D), the rows where they are mapped into memory instead of read; None elsewhere.
    """

    def __init__(
        self,
        where: str,
        metadata: Metadata,
        rows: int,
        columns: Mapping[str, pa.DataType],
        files: Sequence[Path],
    ):
        """Take what is known without reading a row."""
        self.where, self.metadata, self.files = where, metadata, files
        self.types = {name: kind for name, kind in columns.items() if name not in RESERVED}
        self.labels = list(self.types)
        self.mapped: npt.NDArray[Any] | None = None
        self._rows = rows

    def __len__(self) -> int:
        return self._rows

    @abstractmethod
    def column(self, name: str, start: int = 0, stop: int | None = None) -> list[Any]:
        """The values of `id`, `part` or a label column, of rows `start` to `stop`.

        Raises:
            OutputError: They cannot be read.
        """

    @abstractmethod
    def vectors(self, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """Rows `start` to `stop` as they are stored, float32 (n, D).

        Raises:
            OutputError: They cannot be read.
        """

    def keys(self, start: int = 0, stop: int | None = None) -> tuple[list[str], npt.NDArray[np.int32]]:
        """Ids, and int32 (n,): which part of its image a row is."""
        return self.column("id", start, stop), np.array(self.column("part", start, stop), np.int32)

    def label(self, name: str) -> list[Any]:
        """A label column.

        Raises:
            ConfigError: There is no such column; the message lists the label columns. Or its values are lists or
                structures, which name no class.
        """
        if name not in self.labels:
            raise no_column(self.where, name, self.labels)
        values = self.column(name)
        if any(isinstance(value, (list, dict)) for value in values):
            raise ConfigError(
                f"{self.where}: the column {name!r} holds lists or structures; name one of single values"
            )
        return values


class TableRows(StoredRows):
    """Stored rows of a format that gives ranges of one column as Arrow tables."""

    @abstractmethod
    def _table(self, name: str, start: int, stop: int) -> pa.Table:
        """Rows `start` to `stop` of one column."""

    def column(self, name: str, start: int = 0, stop: int | None = None) -> list[Any]:
        """The values of a column; a row without an id or a part is damage."""
        stop = len(self) if stop is None else stop
        values = self._range(name, start, stop)[name]
        if name in ("id", "part") and values.null_count:
            raise OutputError(f"{self.where} is damaged (a row has no {name}); embed the images again")
        return guarded(self.where, values.to_pylist)

    def vectors(self, start: int = 0, stop: int | None = None) -> npt.NDArray[np.float32]:
        """The rows, read `BLOCK` at a time."""
        stop = len(self) if stop is None else stop
        block = np.empty((stop - start, self.metadata.dim), np.float32)
        for at in range(start, stop, BLOCK):
            end = min(at + BLOCK, stop)
            block[at - start : end - start] = vectors_of(
                self._range("embedding", at, end), self.metadata.dim, self.where
            )
        return block

    def _range(self, name: str, start: int, stop: int) -> pa.Table:
        """Exactly the rows that were asked for: fewer would be taken for rows of other images."""
        table = self._table(name, start, stop)
        if table.num_rows != max(0, min(stop, len(self)) - start):
            raise OutputError(
                f"{self.where} is damaged (it has fewer rows than it says); embed the images again"
            )
        return table


class SearchableRows(StoredRows):
    """Stored rows of a format whose engine finds neighbors itself, without reading all vectors into memory.

    Attributes:
        engine: The engine's name.
    """

    engine: str

    @abstractmethod
    def take(self, rows: Sequence[int]) -> npt.NDArray[np.float32]:
        """The vectors of these rows, in this order, float32 (n, D)."""

    @abstractmethod
    def nearest(
        self, vector: npt.NDArray[Any], k: int
    ) -> tuple[list[str], npt.NDArray[np.int32], list[float]]:
        """The k rows most similar to a vector, exactly: their ids, parts and cosines, in no fixed order."""


class Format(Protocol):
    """One format of embeddings. A path is what `locate` gives for the name that the user wrote.

    Attributes:
        example: An output of this format, for messages: `X.parquet`.
        sharded: Whether a job's shards stay and are the output, so that several workers may share it; else a job
            works aside and writes its rows with `write` at the end.
    """

    example: str
    sharded: bool

    def recognizes(self, name: str) -> bool:
        """Whether `name` is the name of embeddings of this format."""

    def locate(self, name: str) -> Path:
        """The path of embeddings.

        Raises:
            ConfigError: `name` is not a name of this format.
        """

    def open(self, name: str) -> StoredRows:
        """Open embeddings for reading.

        Raises:
            OutputError: No embeddings of ours, damaged ones, or a folder with a missing part.
            SpaceMismatchError: A folder of two spaces.
            MissingDependencyError: The format needs a package that is not installed.
        """

    def files(self, path: Path) -> list[Path]:
        """The files of embeddings, side files and table of failures included: no output of a command may be one."""

    def side_files(self, path: Path) -> dict[str, Path]:
        """The files beside the embeddings that belong to them: what it is -> its path."""

    def errors_path(self, path: Path) -> Path:
        """Where the images that failed are listed."""

    def check_writable(self, path: Path) -> None:
        """Refuse early what would only fail after all the work; the folder of a new database is made.

        Raises:
            OutputError: The folder of the output does not exist or cannot be written.
        """

    def prepare(self, path: Path) -> None:
        """Prepare to write: finish a commit that was killed, and refuse side files that embedkit did not write.

        Raises:
            OutputError: Such a file, or one that cannot be written.
        """

    def check_replaceable(self, path: Path) -> None:
        """Refuse to replace embeddings that embedkit did not write.

        Raises:
            OutputError: Naming them.
        """

    def earlier(self, path: Path) -> EarlierRows | None:
        """The output of an earlier job; None where there is none.

        Raises:
            OutputError: A file that embedkit did not write, or a damaged one.
        """

    def write(self, tables: Tables, path: Path, schema: pa.Schema) -> None:
        """Write embeddings, all or nothing.

        Args:
            tables: Gives the rows.
            path: Where. No other writer may be at it: a job holds its lock.
            schema: The columns, with the metadata.

        Raises:
            OutputError: They cannot be written.
        """


def check_exists(name: str) -> None:
    """Refuse a name that nothing has.

    Raises:
        OutputError: Saying how to write embeddings.
    """
    if not os.path.exists(name):
        if has_job(Path(name)):
            raise OutputError(
                f"{name} is not finished: its job is running, or was stopped; the same `embedkit embed` command "
                "continues it"
            )
        raise OutputError(
            f"{name} does not exist; check the path, or write embeddings with `embedkit embed ... -o {name}`"
        )


def check_folder(output: Path) -> None:
    """Refuse an output whose folder does not exist or cannot be written.

    Raises:
        OutputError: Naming the folder.
    """
    folder = Path(os.path.realpath(output)).parent
    if not os.path.isdir(folder):
        raise OutputError(f"the folder {folder} of the output does not exist; create it first")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"the folder {folder.resolve()} cannot be written; choose another output with -o")
