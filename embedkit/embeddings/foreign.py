"""Tables of other programs: their columns found, checked, and turned into ours.

pandas, Polars and DuckDB keep the rows of a file of embeddings and drop its metadata. They change types too: ids become
large or dictionary texts, vectors become lists of any length, and pandas adds a column for its index.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from embedkit._io.text import one_line
from embedkit.embeddings.metadata import Metadata
from embedkit.embeddings.schema import RESERVED, schema_of, with_vectors
from embedkit.errors import ConfigError

__all__ = ["ForeignColumns", "are_unit", "check_unique", "check_unit", "lengths_of"]

#: How far the length of a normalized row may be from 1; rounding to float16 changes it by less.
_UNIT = 1e-3
_INDEX = re.compile(r"__index_level_\d+__")


@dataclass(frozen=True)
class ForeignColumns:
    """The columns of a table that embedkit did not write, and what each becomes.

    Attributes:
        where: The name of the table in messages.
        names: Our column -> theirs: `id`, `embedding`, what there is of `part`, `size`, `mtime_ns` and `sha256`, and
            the labels.
        labels: The types of the label columns.
    """

    where: str
    names: Mapping[str, str]
    labels: Mapping[str, pa.DataType]

    @classmethod
    def find(
        cls, schema: pa.Schema, where: str, *, id: str = "id", embedding: str = "embedding"
    ) -> ForeignColumns:
        """Find our columns by name and type. Columns of a pandas index that has no name are left out.

        Args:
            schema: The columns.
            where: The name of the table in messages.
            id: The column of ids.
            embedding: The column of vectors.

        Raises:
            ConfigError: No such column, one of another type, or two columns of one name.
        """
        twice = [name for name, count in Counter(schema.names).items() if count > 1]
        if twice:
            raise ConfigError(f"{where}: there are two columns {twice[0]!r}; rename one of them")
        for key, name, fits, what in (
            ("id", id, _is_text, "ids (texts)"),
            ("embedding", embedding, _is_vector, "vectors (lists of floating-point numbers)"),
        ):
            if name not in schema.names:
                found = [repr(field.name) for field in schema if fits(field.type)]
                hint = f"name the right one of {', '.join(found)}" if found else "no other column holds such"
                raise ConfigError(f"{key}: {where} has no column {name!r} of {what}; {hint}")
            if not fits(kind := schema.field(name).type):
                raise ConfigError(f"{where}: the column {name!r} should hold {what}, and is {kind}")
        names, labels = {"id": id, "embedding": embedding}, {}
        for field in schema:
            if field.name in (id, embedding) or _INDEX.fullmatch(field.name):
                continue
            name = field.name if _is_ours(field) or field.name not in RESERVED else f"source_{field.name}"
            if name in names or (name != field.name and name in schema.names):
                raise ConfigError(
                    f"{where}: the column {field.name!r} would become {name!r}, which is there; rename it"
                )
            names[name] = field.name
            if name not in RESERVED:
                labels[name] = field.type
        return cls(where, names, labels)

    @property
    def key_columns(self) -> list[str]:
        """Their columns that say which image a row is of."""
        return [self.names[name] for name in ("id", "part", "size") if name in self.names]

    def schema(self, metadata: Metadata) -> pa.Schema:
        """The columns as embedkit writes them, with metadata."""
        return schema_of(metadata, self.labels, sha256="sha256" in self.names)

    def keys(self, table: pa.Table, start: int = 0) -> pa.Table:
        """The columns `id` (string) and `part` (int32) of some rows.

        Args:
            table: The rows, with at least the `key_columns`.
            start: The number of the first row.

        Raises:
            ConfigError: A row has no id or no part, or one that is out of range.
        """
        part = table[self.names["part"]] if "part" in self.names else _zeros(len(table))
        keys = {
            "id": self.cast(table[self.names["id"]], pa.string(), "id"),
            "part": self.cast(part, pa.int32(), "part"),
        }
        for name, column in keys.items():  # after the cast: a null may lie in a dictionary
            if column.null_count:
                row = start + pc.index(column.is_null(), True).as_py()
                raise ConfigError(f"{self.where}: row {row} has no {name}; leave the row out")
        return pa.table(keys)

    def conform(self, table: pa.Table, dim: int, start: int = 0) -> pa.Table:
        """Some rows with our names and types; labels keep their types.

        Args:
            table: The rows.
            dim: Width D.
            start: The number of the first row.

        Raises:
            ConfigError: A row without an id, or whose vector is missing or has another width.
        """
        ours = self.keys(table, start)
        vectors = self._vectors(table[self.names["embedding"]], ours["id"], dim, start)
        ours = with_vectors(ours, vectors)
        for name, theirs in self.names.items():
            if name not in ours.column_names:
                kind = pa.string() if name == "sha256" else pa.int64()
                column = table[theirs]
                column = self._label(column, theirs) if name in self.labels else self.cast(column, kind, name)
                ours = ours.append_column(name, column)
        return ours

    def _vectors(
        self, column: pa.ChunkedArray, ids: pa.ChunkedArray, dim: int, start: int
    ) -> npt.NDArray[np.float32]:
        """The vectors, float32 (n, D); what float32 cannot hold becomes infinity."""
        rows, at = np.empty((len(column), dim), np.float32), 0

        def fail(row: int, fault: str) -> ConfigError:
            row += at
            return ConfigError(
                f"{self.where}: row {start + row} ({ids[row].as_py()!r}) {fault}; expected {dim} numbers"
            )

        for chunk in column.chunks:
            if not len(chunk):
                continue
            if chunk.null_count:
                raise fail(pc.index(chunk.is_null(), True).as_py(), "has no vector")
            widths = pc.list_value_length(chunk).to_numpy(zero_copy_only=False)
            if (widths != dim).any():
                row = int((widths != dim).argmax())
                raise fail(row, f"has a vector of {widths[row]} numbers")
            values = chunk.flatten()
            if values.null_count:
                row = pc.index(values.is_null(), True).as_py() // dim
                raise fail(row, "has a vector with a number missing")
            with np.errstate(over="ignore"):
                rows[at : at + len(chunk)] = values.to_numpy(zero_copy_only=False).reshape(-1, dim)
            at += len(chunk)
        return rows

    def cast(self, column: pa.ChunkedArray, kind: pa.DataType, name: str) -> pa.ChunkedArray:
        """One of our columns, from theirs.

        Args:
            column: Theirs.
            kind: The type of ours.
            name: The name of ours.

        Raises:
            ConfigError: A value that the type does not hold, or a text that is not UTF-8.
        """
        try:
            result = column.cast(kind)
            result.validate(full=True)  # a cast from texts to texts looks at no letter
            return result
        except (pa.ArrowException, ValueError) as error:
            raise ConfigError(
                f"{self.where}: the column {self.names[name]!r} cannot be read as {kind} ({one_line(error)})"
            ) from None

    def _label(self, column: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
        """A label column, as it is, after a look at each value: what Python cannot hold could be read by no command.

        Raises:
            ConfigError: A text that is not UTF-8, or a date beyond the year 9999.
        """
        try:
            column.to_pylist()
        except (pa.ArrowException, ValueError, OverflowError) as error:
            raise ConfigError(
                f"{self.where}: the column {name!r} holds a value that cannot be read ({one_line(error)}); repair it, "
                "or leave the column out"
            ) from None
        return column


def check_unique(keys: pa.Table, where: str) -> None:
    """Refuse two rows of one part of one image.

    Args:
        keys: The columns `id` and `part`.
        where: The name of the rows in messages.

    Raises:
        ConfigError: Naming the first that occurs twice.
    """
    counts = keys.group_by(["id", "part"], use_threads=False).aggregate([([], "count_all")])
    twice = counts.filter(pc.greater(counts["count_all"], 1))
    if len(twice):
        name, part = twice["id"][0].as_py(), twice["part"][0].as_py()
        raise ConfigError(
            f"{where}: the id {name!r} with part {part} occurs {twice['count_all'][0]} times; keep one row of each"
        )


def lengths_of(
    vectors: npt.NDArray[np.float32], name: Callable[[int], str], where: str
) -> npt.NDArray[np.float64]:
    """The Euclidean lengths of rows, float64 (n,).

    Args:
        vectors: float32 (n, D).
        name: From the position of a row to how messages name it.
        where: The name of the rows in messages.

    Raises:
        ConfigError: A row holds NaN or infinity, or is all zeros.
    """
    lengths: npt.NDArray[np.float64] = np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))
    bad = ~((lengths > 0) & np.isfinite(lengths))
    if bad.any():
        row = int(bad.argmax())
        fault = "is all zeros" if lengths[row] == 0 else "holds NaN or infinity"
        raise ConfigError(f"{where}: {name(row)} {fault}; leave the row out, or embed that image again")
    return lengths


def are_unit(lengths: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Whether rows of these lengths are normalized, bool (n,)."""
    result: npt.NDArray[np.bool_] = np.abs(lengths - 1) <= _UNIT
    return result


def check_unit(
    lengths: npt.NDArray[np.float64], metadata: Metadata, name: Callable[[int], str], where: str
) -> None:
    """Refuse rows that are not normalized under metadata that says they are.

    Raises:
        ConfigError: Naming the first.
    """
    if metadata.normalized and not (unit := are_unit(lengths)).all():
        row = int(unit.argmin())
        raise ConfigError(
            f"{where}: {name(row)} has length {lengths[row]:.4g}, and its metadata says that rows have length 1; "
            "divide rows by their lengths, or take encoder.metadata(normalize=False) for raw rows"
        )


def _zeros(count: int) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(np.zeros(count, np.int32))])


def _is_text(kind: pa.DataType) -> bool:
    """Texts; a column of an empty data frame has no type."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    return any(test(kind) for test in tests)


def _is_vector(kind: pa.DataType) -> bool:
    """Lists of floating-point numbers, or no type."""
    if pa.types.is_null(kind):
        return True
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(is_list and pa.types.is_floating(kind.value_type))


def _is_ours(field: pa.Field) -> bool:
    """Whether a column of a reserved name holds what ours of that name does."""
    if field.name == "sha256":
        return _is_text(field.type)
    return bool(field.name in ("part", "size", "mtime_ns") and pa.types.is_integer(field.type))
