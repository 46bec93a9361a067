"""The format of a LanceDB table: `lance://FOLDER/TABLE` is the table `TABLE` of the database `FOLDER`.

Rows have the columns of a Parquet file of embeddings, and the metadata is in the schema as it is there, so the table
is an ordinary one for LanceDB's own clients too. A write is one version of the table: all or nothing. Earlier versions
stay until LanceDB's `optimize` or `cleanup_old_versions` removes them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from embedkit._io.optional import requires
from embedkit._io.outputs import check_ours
from embedkit._io.text import one_line
from embedkit.embeddings.base import SearchableRows, TableRows, Tables, check_folder
from embedkit.embeddings.earlier import EarlierRows, check_extendable, record_columns, records_of
from embedkit.embeddings.schema import ROW_GROUP, check_schema, guarded, metadata_of, vectors_of
from embedkit.embeddings.side_files import beside
from embedkit.errors import ConfigError, OutputError

__all__ = ["LanceFormat", "LanceRows"]

_PREFIX = "lance://"
#: What the library raises for a table that is missing, damaged or not to be written.
_FAULTS = (OSError, ValueError, RuntimeError, pa.ArrowException)


class LanceFormat:
    """`lance://FOLDER/TABLE`."""

    example = "lance://FOLDER/TABLE"
    sharded = False

    def recognizes(self, name: str) -> bool:
        """By the prefix."""
        return name.startswith(_PREFIX)

    def locate(self, name: str) -> Path:
        """`FOLDER/TABLE.lance`, where LanceDB puts the table."""
        path = Path(name.removeprefix(_PREFIX))
        table = path.name.removesuffix(".lance")
        if not self.recognizes(name) or name.endswith("/") or not table or table in (".", ".."):
            raise ConfigError(f"expected {self.example}, for example {_PREFIX}db/photos, found {name!r}")
        return path.with_name(f"{table}.lance")

    def open(self, name: str) -> LanceRows:
        """Open the newest version of a table for reading."""
        return LanceRows(self.locate(name), name)

    def files(self, path: Path) -> list[Path]:
        """The table's folder, and the table of failures beside it."""
        return [path, self.errors_path(path)]

    def side_files(self, path: Path) -> dict[str, Path]:
        """None: the metadata is in the table."""
        return {}

    def errors_path(self, path: Path) -> Path:
        """`TABLE.lance.errors.parquet` beside the table."""
        return beside(path, f"{path.suffix}.errors.parquet")

    def check_writable(self, path: Path) -> None:
        """Make the folder of a new database; refuse one that cannot be written."""
        if os.path.isdir(path.parent.parent):
            with contextlib.suppress(OSError):
                path.parent.mkdir(exist_ok=True)
        check_folder(path)

    def prepare(self, path: Path) -> None:
        """Nothing: a version of a table is there as a whole or not at all."""

    def check_replaceable(self, path: Path) -> None:
        """Refuse to add a version to a table without our metadata."""
        if _exists(path):
            schema = _open(path).schema
            check_ours(path, lambda table: bool(metadata_of(schema, str(table), "a table")), "embeddings")

    def earlier(self, path: Path) -> EarlierRows | None:
        """The table of an earlier job."""
        if not _exists(path):
            return None
        table = _open(path)
        metadata = metadata_of(table.schema, str(path), "a table")
        check_extendable(table.schema, metadata, path)
        blocks = _blocks(table, record_columns(table.schema))
        records = guarded(str(path), records_of, blocks)
        return EarlierRows(path, metadata, table.schema, records, lambda: _blocks(_open(path)))

    def write(self, tables: Tables, path: Path, schema: pa.Schema) -> None:
        """Stream rows into a new version of a table."""
        lance = _lance()
        try:
            reader = pa.RecordBatchReader.from_batches(schema, _batches(tables(), schema))
            lance.write_dataset(reader, str(path), mode="overwrite" if _exists(path) else "create")
        except _FAULTS as error:
            raise OutputError(f"{path} cannot be written ({_reason(error)})") from None


class LanceRows(TableRows, SearchableRows):
    """The rows of a table, as its newest version was when it was opened. The engine searches them from the disk."""

    engine = "lance"

    def __init__(self, path: Path, where: str):
        """Open a table.

        Raises:
            MissingDependencyError: pylance is not installed.
            OutputError: There is no such table, or embedkit did not write it.
        """
        self._lance = _open(path)
        metadata = metadata_of(self._lance.schema, str(path), "a table")
        check_schema(self._lance.schema, metadata, where)
        columns = {field.name: field.type for field in self._lance.schema}
        super().__init__(where, metadata, self._lance.count_rows(), columns, [path])

    def take(self, rows: Sequence[int]) -> npt.NDArray[np.float32]:
        """The vectors of these rows."""
        return vectors_of(self._lance.take(list(rows), columns=["embedding"]), self.metadata.dim, self.where)

    def nearest(
        self, vector: npt.NDArray[Any], k: int
    ) -> tuple[list[str], npt.NDArray[np.int32], list[float]]:
        """The neighbors of a vector by cosine; no index of the table is used, since it would be approximate."""
        asked = {"column": "embedding", "q": vector, "k": k, "metric": "cosine", "use_index": False}
        found = self._lance.to_table(columns=["id", "part", "_distance"], nearest=asked).to_pydict()
        cosines = [1 - distance for distance in found["_distance"]]
        return found["id"], np.array(found["part"], np.int32), cosines

    def _table(self, name: str, start: int, stop: int) -> pa.Table:
        try:
            return self._lance.to_table(columns=[name], offset=start, limit=stop - start)
        except _FAULTS as error:
            raise OutputError(
                f"{self.where} cannot be read ({_reason(error)}); embed the images again"
            ) from None


def _exists(path: Path) -> bool:
    """Whether a first version of the table was finished."""
    return any(path.glob("_versions/*.manifest"))


def _open(path: Path) -> Any:
    """The newest version of a table, as the library's data set."""
    lance = _lance()
    if not _exists(path):
        raise OutputError(
            f"{path} is no table; write one with `embedkit embed ... -o {_PREFIX}{path.with_suffix('')}`"
        )
    try:
        return lance.dataset(str(path))
    except _FAULTS as error:
        raise OutputError(f"{path} cannot be read ({_reason(error)})") from None


def _blocks(table: Any, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """A table's rows in bounded tables, without metadata."""
    for batch in table.to_batches(columns=columns, batch_size=ROW_GROUP):
        yield pa.Table.from_batches([batch]).replace_schema_metadata(None)


def _batches(tables: Iterable[pa.Table], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    for table in tables:
        yield from table.cast(schema).to_batches(max_chunksize=ROW_GROUP)


def _lance() -> ModuleType:
    with requires(f"a {_PREFIX} table", "lance", package="pylance"):
        import lance
    return lance


def _reason(error: BaseException) -> str:
    """The first sentence of a message, without the position in the library's sources."""
    return one_line(error).partition(", /")[0]
