"""The Embeddings file: Parquet columns, the metadata in its schema, and what reads and writes them.

Columns: `id`, `part` (int32, 0 unless an image has several rows), `embedding` (fixed_size_list<float32>[D]),
`size` (bytes), `mtime_ns`, `sha256` (when contents were verified) and the source's label columns; (`id`, `part`)
is unique. The metadata stands in the schema metadata under `embedkit`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import numpy as np

from embedkit.embeddings.metadata import Metadata
from embedkit.embeddings.schema import no_column


@dataclass(frozen=True)
class Embeddings:
    """Embeddings in memory, with their ids, labels and metadata.

    Attributes:
        ids: One per row.
        parts: int32 (N,), 0 unless an image has several rows.
        vectors: float32 (N, D).
        metadata: What they are.
        labels: Label columns by name, each of length N.
    """

    ids: list[str]
    parts: np.ndarray
    vectors: np.ndarray
    metadata: Metadata
    labels: dict[str, list] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def label(self, name: str, where: str) -> list:
        """A label column.

        Raises:
            ConfigError: There is none of this name; those that there are, are named.
        """
        if name not in self.labels:
            raise no_column(where, name, self.labels)
        return self.labels[name]

    @classmethod
    def read(cls, source: str | os.PathLike[str]) -> Embeddings:
        """Read a Parquet file, a folder of shards, a `.npy` file with its ids and metadata, or a LanceDB table.

        Raises:
            OutputError: Not embeddings of ours, a folder with a missing part, or damaged ones.
            SpaceMismatchError: Parts of different spaces.
            MissingDependencyError: A table, and pylance is not installed.
        """
        from embedkit.embeddings.formats import open_stored  # which stands on this module

        stored = open_stored(source)
        ids, parts = stored.keys()
        labels = {name: stored.column(name) for name in stored.labels}
        return cls(ids, parts, stored.vectors(), stored.metadata, labels)
