"""Embeddings in memory: loaded from any format, and saved to any."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from embedkit._io.text import one_line
from embedkit.embeddings.formats import open_rows, output_format
from embedkit.embeddings.metadata import Metadata
from embedkit.embeddings.schema import RESERVED, conform, no_column, schema_of, with_vectors
from embedkit.embeddings.side_files import has_job
from embedkit.errors import ConfigError, OutputError

__all__ = ["Embeddings"]


@dataclass(frozen=True)
class Embeddings:
    """Embeddings in memory, with their ids, labels and metadata.

    Attributes:
        ids: One per row.
        parts: int32 (N,), 0 unless an image has several rows.
        vectors: float32 (N, D).
        metadata: Which encoder made them, in which space.
        labels: Label columns by name, each of length N.
    """

    ids: list[str]
    parts: npt.NDArray[np.int32]
    vectors: npt.NDArray[np.float32]
    metadata: Metadata
    labels: dict[str, list[Any]] = field(default_factory=dict)
    _where: str = field(default="the set of embeddings", repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.ids)

    def label(self, name: str) -> list[Any]:
        """A label column.

        Raises:
            ConfigError: There is no such column; the message lists the label columns.
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
        """
        stored = open_rows(source)
        ids, parts = stored.keys()
        labels = {name: stored.column(name) for name in stored.labels}
        return cls(ids, parts, stored.vectors(), stored.metadata, labels, stored.where)

    def save(self, output: str | os.PathLike[str]) -> None:
        """Write a Parquet file, a new folder of shards, a `.npy` file or a LanceDB table.

        The rows hold no sizes and times of images, so `embedkit.embed` embeds all images again where it extends
        this output.

        Args:
            output: `X.parquet`, `X.npy`, a folder ending in `/`, or `lance://FOLDER/TABLE`. Embeddings that embedkit
                wrote there before are replaced.

        Raises:
            ConfigError: A name of no format, ids, parts, vectors and labels of different lengths or widths, or a label
                column that is reserved or does not hold values of one simple type.
            OutputError: The output cannot be written, was not written by embedkit, or a job is not finished with it.
            MissingDependencyError: A table, and pylance is not installed.
        """
        rows = len(self.ids)
        lengths = {len(self.parts), *map(len, self.labels.values())}
        if lengths != {rows} or self.vectors.shape != (rows, self.metadata.dim):
            raise ConfigError(
                f"expected {rows} parts, labels and vectors of {self.metadata.dim} numbers, one per id; "
                f"found {sorted(lengths)} parts and labels, and vectors {self.vectors.shape}"
            )
        labels = {name: _label_array(name, values) for name, values in self.labels.items()}
        kinds = {name: str(values.type) for name, values in labels.items()}
        schema = schema_of(self.metadata, kinds, sha256=False)
        keys = {"id": pa.array(self.ids, pa.string()), "part": pa.array(self.parts, pa.int32())}
        table = conform(with_vectors(pa.table({**keys, **labels}), self.vectors), schema)
        form = output_format(os.fspath(output))
        path = form.locate(os.fspath(output))
        form.check_writable(path)
        if has_job(path):
            raise OutputError(
                f"{path}: a job is writing it, or was stopped; finish it with `embedkit embed`, or choose "
                "another output"
            )
        form.prepare(path)
        form.check_replaceable(path)
        form.write(lambda: [table], path, schema)


def _label_array(name: str, values: list[Any]) -> pa.Array:
    """A label column as Arrow has it.

    Raises:
        ConfigError: A reserved name, or values of several types or of none that a column may have.
    """
    if name in RESERVED:
        raise ConfigError(f"label column {name!r}: the name is reserved; choose another one")
    try:
        array = pa.array(values)
        pa.type_for_alias(str(array.type))
    except (pa.ArrowException, ValueError, TypeError) as error:
        raise ConfigError(
            f"label column {name!r}: expected texts, numbers or booleans, all of one type ({one_line(error)})"
        ) from None
    return array
