"""The finished output of an earlier job, which this one extends: all but its vectors in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa

from embedkit.embeddings import lance as lancetable
from embedkit.embeddings.formats import check_schema, column_type
from embedkit.embeddings.metadata import Metadata, first_line
from embedkit.embeddings.npy import Beside, MismatchError, read_beside, read_npy
from embedkit.embeddings.parquet import check_sizes, opened
from embedkit.embeddings.parquet_write import read_metadata
from embedkit.embeddings.schema import RESERVED, ROW_GROUP
from embedkit.errors import OutputError

_KNOWN = {"id": pa.string(), "size": pa.int64(), "mtime_ns": pa.int64(), "sha256": pa.string()}
_T = TypeVar("_T")


@dataclass(frozen=True)
class Known:
    """What is known of an image that has a row: enough to tell whether the file has changed since."""

    size: int | None
    mtime_ns: int | None
    sha256: str | None


class Finished:
    """A finished `.parquet`, `.npy` or LanceDB table that a job extends.

    Attributes:
        metadata: What it says of itself.
        known: What is known of its images, by id.
        labels: Its label columns, name -> Arrow type name.
        has_sha256: Whether contents were recorded.
        uncertain: Ids whose vectors cannot be told: the files that hold them do not belong together.
    """

    def __init__(self, path: Path, metadata: Metadata, known: dict[str, Known], schema: pa.Schema):
        """Take what was read; see `open`.

        Raises:
            OutputError: A label column of a type that embedkit does not write.
        """
        self._path, self.metadata, self.known = path, metadata, known
        self.labels = {field.name: str(field.type) for field in schema if field.name not in RESERVED}
        self.has_sha256 = "sha256" in schema.names
        self.uncertain: frozenset[str] = frozenset()
        for name, kind in self.labels.items():
            try:
                pa.type_for_alias(kind)
            except ValueError:
                raise OutputError(
                    f"{path}: its column {name!r} is {kind}, which embedkit cannot extend; write to another file"
                ) from None

    @classmethod
    def open(cls, path: Path) -> Finished:
        """Read all but the vectors.

        Raises:
            OutputError: A file that embedkit did not write, or a damaged one.
        """
        if path.suffix == ".lance":
            table = lancetable.open_table(path)
            metadata = lancetable.metadata_of(table, path)
            _check(table.schema, metadata, path)
            blocks = lancetable.read(table, _known_columns(table.schema))
            return cls(path, metadata, _guarded(path, _known, blocks), table.schema)
        if path.suffix == ".npy":
            return cls._open_npy(path)
        metadata = read_metadata(path)
        known, schema = read_known(path, metadata)
        return cls(path, metadata, known, schema)

    @classmethod
    def _open_npy(cls, path: Path) -> Finished:
        uncertain = False
        try:
            _, found = read_npy(path)
        except MismatchError:
            found, uncertain = read_beside(path), True
        known = {
            line["id"]: Known(line.get("size"), line.get("mtime_ns"), line.get("sha256"))
            for line in found.lines
        }
        finished = cls(path, found.metadata, {} if uncertain else known, _guarded(path, _schema_of, found))
        finished.uncertain = frozenset(known if uncertain else ())
        return finished

    def tables(self) -> Iterator[pa.Table]:
        """Its rows in bounded pieces.

        Raises:
            OutputError: They cannot be read.
        """
        if self.uncertain:
            return
        if self._path.suffix == ".lance":
            yield from lancetable.read(lancetable.open_table(self._path))
            return
        if self._path.suffix == ".npy":
            vectors, found = read_npy(self._path)
            schema = _guarded(self._path, _schema_of, found)
            for start in range(0, len(vectors), ROW_GROUP):
                table = pa.Table.from_pylist(found.lines[start : start + ROW_GROUP], schema)
                flat = pa.array(
                    np.asarray(vectors[start : start + ROW_GROUP], np.float32).reshape(-1), pa.float32()
                )
                yield table.append_column(
                    "embedding", pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
                )
            return
        with opened(self._path) as file:
            batches = file.iter_batches(ROW_GROUP)
            while (batch := _guarded(self._path, next, batches, None)) is not None:
                yield pa.Table.from_batches([batch]).replace_schema_metadata(None)


def read_known(path: Path, metadata: Metadata) -> tuple[dict[str, Known], pa.Schema]:
    """What is known of every image in a Parquet file of embeddings, by id, and the file's schema.

    Raises:
        OutputError: The file is damaged, is not what its metadata promises, or unfolds to too much.
    """

    def read() -> tuple[dict[str, Known], pa.Schema]:
        with opened(path) as file:
            schema = file.schema_arrow
            _check(schema, metadata, path)
            check_sizes(file, path, schema.names)
            return _known(file.iter_batches(65536, columns=_known_columns(schema))), schema

    return _guarded(path, read)


def _check(schema: pa.Schema, metadata: Metadata, path: Path) -> None:
    check_schema(schema, metadata.dim, str(path))
    for name, kind in _KNOWN.items():
        found = column_type(schema, name)
        if found != kind and not (name == "sha256" and found == "nothing"):
            raise OutputError(
                f"{path}: the column {name!r} should be {kind}, and is {found}, so that it cannot be told which images "
                "have changed; write to another file"
            )


def _known_columns(schema: pa.Schema) -> list[str]:
    return [name for name in _KNOWN if name in schema.names]


def _known(blocks: Iterable[pa.RecordBatch | pa.Table]) -> dict[str, Known]:
    rows: dict[str, Known] = {}
    for block in blocks:
        data = block.to_pydict()
        digests = data.get("sha256") or [None] * block.num_rows
        for name, size, mtime, digest in zip(
            data["id"], data["size"], data["mtime_ns"], digests, strict=True
        ):
            if name is None:
                raise ValueError("a row has no id")
            rows[name] = Known(size, mtime, digest)
    return rows


def _schema_of(found: Beside) -> pa.Schema:
    """The Arrow columns of a `.npy` file's ids; labels have the types that they had before they were text."""
    fixed = {**_KNOWN, "part": pa.int32()}
    fields = []
    for name in dict.fromkeys(name for line in found.lines for name in line):
        if name in fixed:
            kind = fixed[name]
        elif name in found.labels:
            kind = pa.type_for_alias(found.labels[name])
        else:
            kind = pa.array([line.get(name) for line in found.lines]).type
        fields.append(pa.field(name, kind))
    schema = pa.schema(fields)
    for start in range(0, len(found.lines), ROW_GROUP):  # refuses a value of another type
        pa.Table.from_pylist(found.lines[start : start + ROW_GROUP], schema)
    return schema


def _guarded(path: Path, read: Callable[..., _T], *arguments: object) -> _T:
    """What `read` gives, with the faults of a damaged file as one sentence."""
    try:
        return read(*arguments)
    except (OSError, ValueError, TypeError, OverflowError, pa.ArrowException) as error:
        raise OutputError(f"{path} is damaged ({first_line(error)}); embed the images again") from None
