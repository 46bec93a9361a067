"""The output of an earlier job, as the job that extends it sees it: all but the vectors in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from embedkit.embeddings.metadata import Metadata
from embedkit.embeddings.schema import RESERVED, check_schema, column_type
from embedkit.errors import OutputError

__all__ = ["RECORD_TYPES", "EarlierRows", "Record", "check_extendable", "record_columns", "records_of"]

#: The columns that tell whether an image has changed.
RECORD_TYPES = {"id": pa.string(), "size": pa.int64(), "mtime_ns": pa.int64(), "sha256": pa.string()}


@dataclass(frozen=True)
class Record:
    """What an output records of an image beside its row: enough to tell whether the file has changed since."""

    size: int | None
    mtime_ns: int | None
    sha256: str | None


class EarlierRows:
    """The finished output of an earlier job, which a job extends: all but its vectors in memory.

    Attributes:
        metadata: What the rows are.
        records: What is recorded of the images, by id.
        labels: The label columns, name -> Arrow type name.
        has_sha256: Whether digests of the images' bytes were recorded.
        uncertain: Ids of rows whose vectors cannot be trusted: their files do not belong together.
    """

    def __init__(
        self,
        path: Path,
        metadata: Metadata,
        schema: pa.Schema,
        records: dict[str, Record],
        tables: Callable[[], Iterator[pa.Table]],
        *,
        uncertain: bool = False,
    ):
        """Take what was read.

        Args:
            path: The output.
            metadata: What the rows are.
            schema: The columns.
            records: What is recorded of the images, by id.
            tables: Gives the rows in bounded tables.
            uncertain: Whether the rows cannot be trusted; then they are not given.

        Raises:
            OutputError: A label column of a type that embedkit does not write.
        """
        self.metadata = metadata
        self.records = {} if uncertain else records
        self.uncertain = frozenset(records if uncertain else ())
        self.labels = {field.name: str(field.type) for field in schema if field.name not in RESERVED}
        self.has_sha256 = "sha256" in schema.names
        self._tables = tables
        for name, kind in self.labels.items():
            try:
                pa.type_for_alias(kind)
            except ValueError:
                raise OutputError(
                    f"{path}: its column {name!r} is {kind}, which embedkit cannot extend; write to another file"
                ) from None

    def tables(self) -> Iterator[pa.Table]:
        """The rows in bounded tables, without metadata.

        Raises:
            OutputError: They cannot be read.
        """
        return iter(()) if self.uncertain else self._tables()


def check_extendable(schema: pa.Schema, metadata: Metadata, path: Path) -> None:
    """Refuse embeddings without the columns that tell which images have changed.

    Raises:
        OutputError: Naming the first column of another type.
    """
    check_schema(schema, metadata, str(path))
    for name, kind in RECORD_TYPES.items():
        found = column_type(schema, name)
        if found != kind and not (name == "sha256" and found == "nothing"):
            raise OutputError(
                f"{path}: the column {name!r} should be {kind}, and is {found}, so that it cannot be told which images "
                "have changed; write to another file"
            )


def record_columns(schema: pa.Schema) -> list[str]:
    """The columns that records are made of, as far as `schema` has them."""
    return [name for name in RECORD_TYPES if name in schema.names]


def records_of(blocks: Iterable[pa.RecordBatch | pa.Table]) -> dict[str, Record]:
    """What is recorded of each image, by id.

    Args:
        blocks: The `record_columns` of all rows.

    Raises:
        ValueError: A row has no id.
    """
    records: dict[str, Record] = {}
    for block in blocks:
        data = block.to_pydict()
        digests = data.get("sha256") or [None] * block.num_rows
        for name, size, mtime, digest in zip(
            data["id"], data["size"], data["mtime_ns"], digests, strict=True
        ):
            if name is None:
                raise ValueError("a row has no id")
            records[name] = Record(size, mtime, digest)
    return records
