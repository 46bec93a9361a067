"""Embeddings in memory: loaded from any format, and saved to any; made from arrays, Arrow and pandas, and back."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from embedkit._io.optional import requires
from embedkit._io.text import one_line
from embedkit.embeddings.arrays import as_list, key_array, label_array, row_numbers
from embedkit.embeddings.foreign import ForeignColumns, check_unique, check_unit, lengths_of
from embedkit.embeddings.formats import open_rows, save_rows
from embedkit.embeddings.metadata import METADATA_KEY, Metadata, check_same_space
from embedkit.embeddings.schema import (
    RESERVED,
    conform,
    metadata_of,
    no_column,
    schema_of,
    vectors_of,
    with_vectors,
)
from embedkit.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Embeddings"]

#: Where a data frame has the metadata: `frame.attrs["embedkit"]`, as JSON.
_ATTRIBUTE = METADATA_KEY.decode()
#: The types of pandas that hold missing values as well and can do all arithmetic, which Arrow's cannot.
_NULLABLE = {
    getattr(pa, name.lower())(): name
    for name in ("Int8", "Int16", "Int32", "Int64", "UInt8", "UInt16", "UInt32", "UInt64")
} | {pa.bool_(): "boolean"}


@dataclass(frozen=True)
class Embeddings:
    """Embeddings in memory, with their ids, labels and metadata.

    Attributes:
        ids: One per row.
        parts: int32 (N,), 0 unless an image has several rows.
        vectors: float32 (N, D).
        metadata: Which encoder made them, in which space.
        labels: Label columns by name, each of length N.

    Examples:
        >>> table = embedkit.Embeddings.load("things.parquet")
        >>> len(table), table.vectors.shape, table.metadata.dim, list(table.labels)
        (40, (40, 1280), 1280, ['thing'])
        >>> cats = table[[thing == "cat" for thing in table.label("thing")]]
        >>> cats.save("cats.parquet")
        >>> len(embedkit.Embeddings.load("cats.parquet"))
        4
    """

    ids: list[str]
    parts: npt.NDArray[np.int32]
    vectors: npt.NDArray[np.float32]
    metadata: Metadata
    labels: dict[str, list[Any]] = field(default_factory=dict)
    _where: str = field(default="the set of embeddings", repr=False, compare=False)
    #: The Arrow types of label columns that were read, so that an int32 or a date is written as one again.
    _types: Mapping[str, pa.DataType] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        labels = f", labels {', '.join(self.labels)}" if self.labels else ""
        return f"<Embeddings: {len(self)} rows of {self.vectors.shape[1]} by {self.metadata.entry}{labels}>"

    def __getitem__(self, rows: slice | Sequence[bool] | Sequence[int] | npt.NDArray[Any]) -> Embeddings:
        """Some of the rows, with their labels and the metadata.

        Args:
            rows: A boolean mask (N,), numbers of rows in any order, or a slice.

        Raises:
            ConfigError: A mask of another length, a number that is out of range or occurs twice, or something else.

        Examples:
            >>> table = embedkit.Embeddings.load("samples.parquet")
            >>> table[[9, 0]].ids, len(table[:3]), len(table[table.vectors[:, 0] >= -1])
            (['samples/rocket.jpg', 'samples/astronaut.jpg'], 3, 10)
        """
        picked = row_numbers(rows, len(self))
        return replace(
            self,
            ids=[self.ids[row] for row in picked],
            parts=self.parts[picked],
            vectors=self.vectors[picked],
            labels={name: [values[row] for row in picked] for name, values in self.labels.items()},
        )

    def label(self, name: str) -> list[Any]:
        """A label column.

        Raises:
            ConfigError: There is no such column; the message lists the label columns.

        Examples:
            >>> sorted(set(embedkit.Embeddings.load("things.parquet").label("thing")))[:3]
            ['astronaut', 'bricks', 'cat']
        """
        if name not in self.labels:
            raise no_column(self._where, name, self.labels)
        return self.labels[name]

    @classmethod
    def load(cls, source: str | os.PathLike[str]) -> Embeddings:
        """Read a Parquet file, a folder of shards, a `.npy` file with its ids and metadata, or a LanceDB table.

        Raises:
            OutputError: No embeddings of ours, a folder with a missing part, or damaged ones.
            SpaceMismatchError: Parts of different spaces.
            MissingDependencyError: A table, and pylance is not installed.

        Examples:
            >>> embedkit.Embeddings.load("samples.parquet").ids[:2]
            ['samples/astronaut.jpg', 'samples/bricks.jpg']
        """
        stored = open_rows(source)
        ids, parts = stored.keys()
        labels = {name: stored.column(name) for name in stored.labels}
        return cls(ids, parts, stored.vectors(), stored.metadata, labels, stored.where, stored.types)

    @classmethod
    def from_arrays(
        cls,
        vectors: npt.ArrayLike,
        ids: Sequence[str],
        metadata: Metadata,
        *,
        parts: Sequence[int] | npt.NDArray[np.integer[Any]] | None = None,
        labels: Mapping[str, Sequence[Any]] | None = None,
    ) -> Embeddings:
        """Embeddings of rows that were computed elsewhere.

        Args:
            vectors: Floating-point numbers (N, D).
            ids: N paths or names of images.
            metadata: Which encoder made them: `encoder.metadata()`, or the metadata of another set.
            parts: int (N,), which part of its image a row is; 0 when None.
            labels: Label columns by name, each of length N.

        Raises:
            ConfigError: Columns of different lengths, a width that is not the encoder's, rows with NaN, infinity or
                only zeros, rows that are not of length 1 under metadata that says so, an id that is not a text, or
                one part of one image twice.

        Examples:
            >>> encoder = embedkit.load_encoder()
            >>> paths = ["samples/cat.jpg", "samples/rocket.jpg"]
            >>> table = embedkit.Embeddings.from_arrays(encoder.encode(paths), paths, encoder.metadata())
            >>> table.vectors.shape, table.metadata.entry
            ((2, 1280), 'supervised-efficientnet_lite0.in1k')
        """
        try:
            array = np.asarray(vectors)
        except ValueError:
            array = np.empty(0)
        if array.ndim != 2 or array.dtype.kind != "f" or array.dtype.itemsize > 8:
            raise ConfigError(
                f"vectors: expected floating-point numbers (N, D), found {array.dtype} of shape {array.shape}"
            )
        metadata = _agreed(metadata, None, "the arrays")
        columns = {name: as_list(name, values) for name, values in (labels or {}).items()}
        ids = as_list("id", ids)
        parts = [0] * len(ids) if parts is None else as_list("part", parts)
        lengths = {name: len(column) for name, column in [("id", ids), ("part", parts), *columns.items()]}
        if set(lengths.values()) != {len(array)} or array.shape[1] != metadata.dim:
            raise ConfigError(
                f"expected one id, part and label for each of {len(array)} vectors of {metadata.dim} numbers; found "
                f"{lengths} and vectors {array.shape}"
            )
        arrays = {
            "id": key_array("id", ids, pa.string()),
            "part": key_array("part", parts, pa.int32()),
            **{name: label_array(name, values) for name, values in columns.items()},
        }
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinity, which is refused
            table = with_vectors(pa.table(arrays), array.astype(np.float32))
        return cls._checked(table, metadata, "the arrays")

    @classmethod
    def from_arrow(cls, table: Any, metadata: Metadata | None = None) -> Embeddings:
        """Embeddings of an Arrow table, or of what gives one: a Polars data frame, a DuckDB relation.

        Args:
            table: The columns `id` (texts) and `embedding` (lists of floating-point numbers), `part` where images have
                several rows, and label columns of any type. Sizes and times of images are left out.
            metadata: Which encoder made them; what the table's schema holds when None.

        Raises:
            ConfigError: No metadata, a column that is missing or of another type, or rows as for `from_arrays`.
            SpaceMismatchError: The table's own metadata says another space.

        Examples:
            >>> import pyarrow.compute
            >>> table = embedkit.Embeddings.load("things.parquet")
            >>> cats = table.to_arrow().filter(pyarrow.compute.field("thing") == "cat")
            >>> len(embedkit.Embeddings.from_arrow(cats, table.metadata))
            4
        """
        if not isinstance(table, pa.Table):
            if not hasattr(table, "__arrow_c_stream__"):
                raise ConfigError(f"expected an Arrow table, found {type(table).__name__}")
            try:
                table = pa.table(table)
            except (pa.ArrowException, ValueError, TypeError) as error:
                raise ConfigError(f"the table cannot be read as Arrow's ({one_line(error)})") from None
        own = None
        if METADATA_KEY in (table.schema.metadata or {}):
            own = metadata_of(table.schema, "the table", "a table")
        return cls._checked(table, _agreed(metadata, own, "the table"), "the table")

    @classmethod
    def from_pandas(cls, frame: pd.DataFrame, metadata: Metadata | None = None) -> Embeddings:
        """Embeddings of a pandas data frame.

        Args:
            frame: The columns of `from_arrow`; a vector is an array or a list.
            metadata: Which encoder made them; when None, what `to_pandas` left in `frame.attrs`. Most operations of
                pandas keep these, `pandas.read_parquet` and `merge` may not.

        Raises:
            ConfigError: As for `from_arrow`.
            SpaceMismatchError: The frame's own metadata says another space.

        Examples:
            >>> frame = embedkit.Embeddings.load("things.parquet").to_pandas()
            >>> embedkit.Embeddings.from_pandas(frame[frame.thing == "cat"]).ids[0]
            'things/cat/0.png'
        """
        text = frame.attrs.get(_ATTRIBUTE)
        own = Metadata.from_json(text, "the data frame") if isinstance(text, (str, bytes)) else None
        metadata = _agreed(metadata, own, "the data frame")
        try:
            table = pa.Table.from_pandas(frame)
        except (pa.ArrowException, ValueError, TypeError) as error:
            raise ConfigError(f"the data frame: a column holds several types ({one_line(error)})") from None
        return cls._checked(table, metadata, "the data frame")

    @classmethod
    def _checked(cls, table: pa.Table, metadata: Metadata, where: str) -> Embeddings:
        """Embeddings of a table's rows, after every check that needs no image."""
        columns = ForeignColumns.find(table.schema, where)
        ours = columns.conform(table, metadata.dim)
        check_unique(ours, where)
        ids, vectors = ours["id"].to_pylist(), vectors_of(ours, metadata.dim, where)

        def name(row: int) -> str:
            return f"row {row} ({ids[row]!r})"

        check_unit(lengths_of(vectors, name, where), metadata, name, where)
        labels = {name: ours[name].to_pylist() for name in columns.labels}
        return cls(ids, ours["part"].to_numpy(), vectors, metadata, labels, where, dict(columns.labels))

    @classmethod
    def concat(cls, tables: Sequence[Embeddings]) -> Embeddings:
        """The rows of several sets of one space, one after another. A label column that a set lacks is None there.

        Raises:
            ConfigError: No set, one part of one image twice, or a label column of types that do not go together.
            SpaceMismatchError: Sets of two spaces.

        Examples:
            >>> tables = [embedkit.Embeddings.load(f"{name}.parquet") for name in ("samples", "things")]
            >>> len(embedkit.Embeddings.concat(tables))
            50
        """
        tables = list(tables)
        if not tables:
            raise ConfigError("concat: expected at least one set of embeddings")
        first, *others = tables
        metadata = first.metadata
        for other in others:
            check_same_space(metadata, other.metadata, first._where, other._where)
            for run in other.metadata.runs:
                metadata = metadata.with_run(run)
        small = [table.to_arrow().drop_columns(["embedding"]).replace_schema_metadata() for table in tables]
        check_unique(pa.concat_tables([table.select(["id", "part"]) for table in small]), "concat")
        try:
            merged = pa.concat_tables(small, promote_options="permissive")
        except pa.ArrowException as error:
            raise ConfigError(
                f"concat: a label column holds two types that do not go together ({one_line(error)})"
            ) from None
        types = {field.name: field.type for field in merged.schema if field.name not in RESERVED}
        labels = {name: merged[name].to_pylist() for name in types}
        vectors = np.concatenate([table.vectors for table in tables])
        return cls(
            merged["id"].to_pylist(), merged["part"].to_numpy(), vectors, metadata, labels, _types=types
        )

    def to_arrow(self) -> pa.Table:
        """The columns `id`, `part`, `embedding` and the labels as an Arrow table, the metadata in its schema.

        Raises:
            ConfigError: Ids, parts, vectors and labels of different lengths or widths, or a label column that is
                reserved or holds several types.

        Examples:
            >>> embedkit.Embeddings.load("things.parquet").to_arrow().column_names
            ['id', 'part', 'embedding', 'thing']
        """
        rows = len(self.ids)
        lengths = {len(self.parts), *map(len, self.labels.values())}
        if lengths != {rows} or self.vectors.shape != (rows, self.metadata.dim):
            raise ConfigError(
                f"expected {rows} parts, labels and vectors of {self.metadata.dim} numbers, one per id; "
                f"found {sorted(lengths)} parts and labels, and vectors {self.vectors.shape}"
            )
        labels = {
            name: label_array(name, values, self._types.get(name)) for name, values in self.labels.items()
        }
        keys = {"id": key_array("id", self.ids, pa.string()), "part": pa.array(self.parts, pa.int32())}
        schema = schema_of(self.metadata, {name: one.type for name, one in labels.items()}, sha256=False)
        fields = [schema.field(name) for name in ("id", "part", "embedding", *labels)]
        table = with_vectors(pa.table({**keys, **labels}), self.vectors, self.metadata.dtype)
        return conform(table, pa.schema(fields, schema.metadata))

    def to_pandas(self) -> pd.DataFrame:
        """The columns of `to_arrow` as a data frame, the metadata in `frame.attrs`.

        `embedding` holds an array for each row. Whole numbers and booleans have the types of pandas that keep them
        beside missing ones; the other columns have Arrow's types, which keep dates and lists.

        Raises:
            ConfigError: As for `to_arrow`.
            MissingDependencyError: pandas is not installed.

        Examples:
            >>> frame = embedkit.Embeddings.load("things.parquet").to_pandas()
            >>> np.stack(frame.embedding).shape, frame.thing.nunique()
            ((40, 1280), 10)
        """
        with requires("a data frame", package="pandas"):
            import pandas as pd
        table = self.to_arrow().drop_columns(["embedding"]).replace_schema_metadata()
        numbers = {kind: pd.api.types.pandas_dtype(name) for kind, name in _NULLABLE.items()}
        frame = table.to_pandas(types_mapper=lambda kind: numbers.get(kind) or pd.ArrowDtype(kind))
        frame.insert(2, "embedding", pd.Series(list(self.vectors), dtype=object))
        frame.attrs[_ATTRIBUTE] = self.metadata.to_json()
        return frame

    def save(self, output: str | os.PathLike[str]) -> None:
        """Write a Parquet file, a new folder of shards, a `.npy` file or a LanceDB table.

        The rows hold no sizes and times of images, so `embedkit.embed` embeds all images again where it extends
        this output.

        Args:
            output: `X.parquet`, `X.npy`, a folder ending in `/`, or `lance://FOLDER/TABLE`. Embeddings that embedkit
                wrote there before are replaced.

        Raises:
            ConfigError: A name of no format, a label column of a type that the format does not hold, or columns as for
                `to_arrow`.
            OutputError: The output cannot be written, was not written by embedkit, or a job is not finished with it.
            MissingDependencyError: A table, and pylance is not installed.

        Examples:
            >>> embedkit.Embeddings.load("samples.parquet").save("samples.npy")
            >>> embedkit.Embeddings.load("samples.npy").vectors.shape
            (10, 1280)
        """
        table = self.to_arrow()
        kinds = {field.name: field.type for field in table.schema if field.name not in RESERVED}
        schema = schema_of(self.metadata, kinds, sha256=False)
        table = conform(table, schema)
        save_rows(output, lambda: [table], schema)


def _agreed(given: Metadata | None, own: Metadata | None, where: str) -> Metadata:
    """The metadata of a table, its own or the given one, which must agree.

    Raises:
        ConfigError: There is none, or something else was given.
        SpaceMismatchError: They are of two spaces.
    """
    if given is not None and not isinstance(given, Metadata):
        raise ConfigError(
            f"metadata: expected those of an encoder, encoder.metadata(), or of other embeddings; found "
            f"{type(given).__name__}"
        )
    found = own if own is not None else given
    if found is None:
        raise ConfigError(
            f"{where} has no metadata; give the encoder's as metadata=encoder.metadata(), or that of the file that "
            "the rows come from as metadata=Embeddings.load(FILE).metadata"
        )
    check_same_space(own, given, where, "the given metadata", "leave one of them out")
    return found
