"""A LanceDB table as a place for embeddings: `lance://FOLDER/TABLE` is the table `TABLE` of the database `FOLDER`.

Rows have the columns of the Embeddings file, and the metadata stands in the schema metadata as it does there, so the
table is an ordinary one for LanceDB's own clients too. A write is one version of the table: it is there as a whole
or not at all, and the versions before it stay until LanceDB's `optimize` or `cleanup_old_versions` removes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa

from embedkit._io.optional import requires
from embedkit.embeddings.metadata import METADATA_KEY, Metadata
from embedkit.embeddings.schema import ROW_GROUP
from embedkit.errors import ConfigError, OutputError

__all__ = [
    "PREFIX",
    "exists",
    "is_table",
    "open_table",
    "metadata_of",
    "read",
    "read_range",
    "table_path",
    "write",
]

PREFIX = "lance://"
#: What the library throws at a table that is missing, damaged or not to be written.
_FAULTS = (OSError, ValueError, RuntimeError, pa.ArrowException)


def is_table(text: str) -> bool:
    """Whether `text` names a table."""
    return text.startswith(PREFIX)


def table_path(uri: str) -> Path:
    """Where a table lies: `FOLDER/TABLE.lance`, as LanceDB has it.

    Raises:
        ConfigError: No name of a table on this machine.
    """
    path = Path(uri.removeprefix(PREFIX))
    name = path.name.removesuffix(".lance")
    if not is_table(uri) or uri.endswith("/") or not name or name in (".", ".."):
        raise ConfigError(f"expected {PREFIX}FOLDER/TABLE, for example {PREFIX}db/photos, found {uri!r}")
    return path.with_name(f"{name}.lance")


def exists(path: Path) -> bool:
    """Whether a first version of the table was finished."""
    return any(path.glob("_versions/*.manifest"))


def open_table(path: Path) -> Any:
    """The newest version of a table, as the lance library's data set.

    Raises:
        MissingDependencyError: pylance is not installed.
        OutputError: There is no such table, or it cannot be read.
    """
    lance = _lance()
    if not exists(path):
        raise OutputError(
            f"{path} is no table; write one with `embedkit embed ... -o {PREFIX}{path.with_suffix('')}`"
        )
    try:
        return lance.dataset(str(path))
    except _FAULTS as error:
        raise OutputError(f"{path} cannot be read ({_reason(error)})") from None


def metadata_of(table: Any, path: Path) -> Metadata:
    """What the rows of a table are.

    Raises:
        OutputError: embedkit did not write it.
    """
    text = (table.schema.metadata or {}).get(METADATA_KEY)
    if text is None:
        raise OutputError(f"{path} is a table without metadata: embedkit did not write it")
    return Metadata.from_json(text, str(path))


def read(table: Any, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """A table's rows in bounded pieces, without their metadata."""
    for batch in table.to_batches(columns=columns, batch_size=ROW_GROUP):
        yield pa.Table.from_batches([batch]).replace_schema_metadata(None)


def read_range(table: Any, column: str, start: int, stop: int, where: str) -> pa.Table:
    """One column of rows `start` to `stop`.

    Raises:
        OutputError: They cannot be read; `where` names the table.
    """
    try:
        return table.to_table(columns=[column], offset=start, limit=stop - start)
    except _FAULTS as error:
        raise OutputError(f"{where} cannot be read ({_reason(error)}); embed the images again") from None


def write(tables: Iterable[pa.Table], path: Path, schema: pa.Schema) -> None:
    """Stream rows into a new version of a table.

    Raises:
        MissingDependencyError: pylance is not installed.
        OutputError: The table cannot be written.
    """
    lance = _lance()
    batches = (batch for table in tables for batch in table.cast(schema).to_batches(max_chunksize=ROW_GROUP))
    try:
        reader = pa.RecordBatchReader.from_batches(schema, batches)
        lance.write_dataset(reader, str(path), mode="overwrite" if exists(path) else "create")
    except _FAULTS as error:
        raise OutputError(f"{path} cannot be written ({_reason(error)})") from None


def _lance() -> ModuleType:
    with requires(f"a {PREFIX} table", "lance", package="pylance"):
        import lance
    return lance


def _reason(error: BaseException) -> str:
    """The first sentence of a message, without the place in the library's sources."""
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0].partition(", /")[0][:200]
