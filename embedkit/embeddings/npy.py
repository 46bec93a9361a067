"""The format of a `.npy` array with its ids and its metadata in files beside it.

The metadata holds the digest of the ids and a digest of rows spread over the array, so that files of two versions,
copied separately, are not taken for one. `embedkit.embeddings.npy_write` writes the three files.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from embedkit._io.outputs import check_ours
from embedkit._io.reading import open_regular, read_regular
from embedkit._io.text import one_line
from embedkit.embeddings.base import StoredRows, Tables, check_exists, check_folder
from embedkit.embeddings.earlier import RECORD_TYPES, EarlierRows, Record
from embedkit.embeddings.metadata import Metadata
from embedkit.embeddings.npy_write import (
    finish_commit,
    ids_path,
    is_uncommitted,
    map_array,
    metadata_path,
    rows_digest,
    write_npy,
)
from embedkit.embeddings.schema import RESERVED, ROW_GROUP, adopt_step, guarded, metadata_of, with_vectors
from embedkit.embeddings.side_files import beside
from embedkit.errors import ConfigError, OutputError

__all__ = ["MismatchError", "NpyFormat", "NpyRows"]

_MAGIC = b"\x93NUMPY"
_MAX_METADATA, _MAX_LINE = 16 << 20, 16 << 20
_INT64 = 1 << 63
#: How long in seconds, and how often, a reader waits for a writer that is between two renames.
_PAUSE, _TRIES = 0.05, 10


class MismatchError(OutputError):
    """Array, ids and metadata do not belong together."""


@dataclass(frozen=True)
class Beside:
    """What the files beside a `.npy` file hold.

    Attributes:
        lines: The other columns, row by row.
        metadata: What the rows are.
        labels: Label column -> the Arrow type name that it had before it became JSON; may be empty.
        rows_sha256: Digest of the array that they belong to; None where none was recorded.
    """

    lines: list[dict[str, Any]]
    metadata: Metadata
    labels: dict[str, str]
    rows_sha256: str | None


class NpyFormat:
    """`X.npy` with `X.ids.jsonl` and `X.metadata.json`."""

    example = "X.npy"
    sharded = False

    def recognizes(self, name: str) -> bool:
        """By the suffix."""
        return Path(name).suffix == ".npy"

    def locate(self, name: str) -> Path:
        """The array."""
        return Path(name)

    def open(self, name: str) -> StoredRows:
        """Map the array, and read the files beside it."""
        check_exists(name)
        return NpyRows(Path(name))

    def files(self, path: Path) -> list[Path]:
        """The array, its side files, and the table of failures."""
        return [path, self.errors_path(path), *self.side_files(path).values()]

    def side_files(self, path: Path) -> dict[str, Path]:
        """The ids and the metadata."""
        return {"ids": ids_path(path), "metadata": metadata_path(path)}

    def errors_path(self, path: Path) -> Path:
        """`X.npy.errors.parquet` beside `X.npy`."""
        return beside(path, f"{path.suffix}.errors.parquet")

    def check_writable(self, path: Path) -> None:
        """Refuse a folder that cannot be written."""
        check_folder(path)

    def prepare(self, path: Path) -> None:
        """Finish a commit that was killed, and refuse side files that embedkit did not write."""
        finish_commit(path)
        check_ours(ids_path(path), _is_ids, "ids")
        check_ours(metadata_path(path), _is_metadata, "metadata")

    def check_replaceable(self, path: Path) -> None:
        """Refuse to replace an array that our metadata is not beside."""
        check_ours(path, _has_metadata, "embeddings")

    def earlier(self, path: Path) -> EarlierRows | None:
        """The array of an earlier job; its rows are uncertain where the three files do not belong together."""
        if not os.path.exists(path):
            return None
        uncertain = False
        try:
            _, found = read_npy(path)
        except MismatchError:
            found, uncertain = read_beside(path), True
        records = {
            line["id"]: Record(line.get("size"), line.get("mtime_ns"), line.get("sha256"))
            for line in found.lines
        }
        schema = guarded(str(path), _schema_of, found)
        return EarlierRows(path, found.metadata, schema, records, lambda: _blocks(path), uncertain=uncertain)

    def write(self, tables: Tables, path: Path, schema: pa.Schema) -> None:
        """Write the three files. The rows are counted first, for the array's header."""
        for field in schema:
            if field.name not in RESERVED and not _is_json(field.type):
                raise ConfigError(
                    f"{path}: the label column {field.name!r} is {field.type}, and labels beside an array are texts, "
                    "numbers or booleans; write X.parquet, or leave the column out"
                )
        rows = sum(table.num_rows for table in tables())
        write_npy(tables(), path, metadata_of(schema, str(path), "an array"), rows)


class NpyRows(StoredRows):
    """The rows of an array, mapped into memory."""

    def __init__(self, path: Path):
        """Map the array, and read the files beside it.

        Raises:
            MismatchError: The three files do not belong together.
            OutputError: One of them is missing, damaged, or of another length.
        """
        self._array, found = read_npy(path)
        self._lines = found.lines
        names = dict.fromkeys(name for line in self._lines for name in line)
        columns = {name: _recorded_type(found.labels.get(name, "null")) for name in names}
        super().__init__(str(path), found.metadata, len(self._lines), columns, [path])
        self.mapped = self._array

    def column(self, name: str, start: int = 0, stop: int | None = None) -> list[Any]:
        """The values of a column, from memory."""
        return [line.get(name) for line in self._lines[start:stop]]

    def vectors(self, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """The mapped rows; those of float16 are read as float32."""
        rows = self._array[start:stop]
        return rows.astype(np.float32) if rows.dtype.itemsize < 4 else rows


def read_npy(path: Path) -> tuple[npt.NDArray[Any], Beside]:
    """A `.npy` file of embeddings, memory-mapped, and what the files beside it hold.

    Raises:
        MismatchError: The three files do not belong together.
        OutputError: One of the three files is missing, damaged, or of another length than the others.
    """
    for _ in range(_TRIES - 1):
        try:
            return _read(path)
        except MismatchError:
            time.sleep(_PAUSE)  # a writer may be between two renames
    return _read(path)


def read_beside(path: Path) -> Beside:
    """The ids and the metadata of a `.npy` file.

    Raises:
        OutputError: They are missing or damaged.
    """
    if not os.path.exists(metadata_path(path)):
        raise OutputError(
            f"{path} has no {metadata_path(path).name} beside it: embedkit did not write it; {adopt_step(str(path))}"
        )
    ids, digest = ids_path(path), hashlib.sha256()
    lines: list[dict[str, Any]] = []
    try:
        card = json.loads(read_regular(metadata_path(path), _MAX_METADATA))
        with open_regular(ids) as file:
            # Not splitlines: an id may hold U+2028 and the like, which JSON leaves as they are.
            while text := file.readline(_MAX_LINE + 1):
                if len(text) > _MAX_LINE:
                    raise ValueError(f"line {len(lines) + 1} of {ids.name} is longer than {_MAX_LINE} bytes")
                digest.update(text)
                line = json.loads(text)
                if not _is_line(line):
                    raise ValueError(
                        f"line {len(lines) + 1} of {ids.name} has no id that is a text, no part, or a size, a time "
                        "or a sha256 of another kind"
                    )
                lines.append(line)
    except RecursionError:
        raise OutputError(f"{ids} is damaged (it is nested too deep); embed the images again") from None
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} and its ids and metadata cannot be read ({one_line(error)})") from None
    metadata, files, labels = _parse_metadata(card, metadata_path(path))
    if files.get("ids_sha256", digest.hexdigest()) != digest.hexdigest():
        files["rows_sha256"] = ""  # matches no array
    return Beside(lines, metadata, labels, files.get("rows_sha256"))


def _is_ids(path: Path) -> bool:
    """Whether the first line of a file is one of our ids."""
    with open_regular(path) as file:
        line = file.readline(_MAX_LINE)
    return not line or _is_line(json.loads(line))


def _is_metadata(path: Path) -> bool:
    """Whether a file is metadata that embedkit wrote."""
    return bool(_parse_metadata(json.loads(read_regular(path, _MAX_METADATA)), path)[0])


def _has_metadata(npy: Path) -> bool:
    """Whether a file is an array with our metadata beside it."""
    with open_regular(npy) as file:
        return file.read(len(_MAGIC)) == _MAGIC and _is_metadata(metadata_path(npy))


def _parse_metadata(card: object, path: Path) -> tuple[Metadata, dict[str, str], dict[str, str]]:
    """The metadata, the digests of the files beside it, and the types of the labels."""
    files, labels = {}, {}
    if isinstance(card, dict):
        files, labels = card.pop("files", {}), card.pop("labels", {})
    metadata = Metadata.from_json(json.dumps(card), str(path))
    if not _is_mapping_of_texts(files) or not _is_mapping_of_texts(labels):
        raise OutputError(f"{path}: its metadata is damaged; was it written by another program?")
    return metadata, files, labels


def _read(path: Path) -> tuple[npt.NDArray[Any], Beside]:
    unfinished = is_uncommitted(path)
    try:
        vectors = map_array(path)
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} and its ids and metadata cannot be read ({one_line(error)})") from None
    found = read_beside(path)
    if unfinished or found.rows_sha256 not in (None, rows_digest(vectors)):
        raise MismatchError(
            f"{path}, {ids_path(path).name} and {metadata_path(path).name} do not belong together (one was changed or "
            "copied alone, or a run was stopped while it wrote them); run the same `embedkit embed` command again"
        )
    shape = (len(found.lines), found.metadata.dim)
    if vectors.shape != shape:
        raise OutputError(f"{path}: its ids and metadata say {shape} for its shape, found {vectors.shape}")
    return vectors, found


def _blocks(path: Path) -> Iterator[pa.Table]:
    """All rows in bounded tables."""
    vectors, found = read_npy(path)
    schema = guarded(str(path), _schema_of, found)
    for start in range(0, len(vectors), ROW_GROUP):
        table = pa.Table.from_pylist(found.lines[start : start + ROW_GROUP], schema)
        yield with_vectors(table, vectors[start : start + ROW_GROUP], found.metadata.dtype)


def _schema_of(found: Beside) -> pa.Schema:
    """The Arrow columns of the ids; labels have the types that they had before they became JSON."""
    fixed = {**RECORD_TYPES, "part": pa.int32()}
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


def _is_json(kind: pa.DataType) -> bool:
    """Whether JSON holds values of a type, and its name is enough to restore it."""
    return any(
        test(kind)
        for test in (
            pa.types.is_string,
            pa.types.is_large_string,
            pa.types.is_integer,
            pa.types.is_floating,
            pa.types.is_boolean,
            pa.types.is_null,
        )
    )


def _recorded_type(alias: str) -> pa.DataType:
    """A type by its name; null, which any value may follow, where embedkit did not write the name."""
    try:
        return pa.type_for_alias(alias)
    except ValueError:
        return pa.null()


def _is_line(line: object) -> bool:
    """Whether a row's columns are of our types: a file may hold anything."""
    return (
        isinstance(line, dict)
        and isinstance(line.get("id"), str)
        and type(line.get("part")) is int
        and -(1 << 31) <= line["part"] < 1 << 31
        and all(_is_int64(line.get(name)) for name in ("size", "mtime_ns"))
        and isinstance(line.get("sha256"), str | None)
    )


def _is_int64(value: object) -> bool:
    return value is None or (type(value) is int and -_INT64 <= value < _INT64)


def _is_mapping_of_texts(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
