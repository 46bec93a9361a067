"""Search in a LanceDB table: an index that stays on the disk, for embeddings larger than memory.

The engine scans the vectors from the disk, exactly; only the ids are held here. It has the face of `Index`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embedkit.analysis.neighbors import Hits, check_k
from embedkit.analysis.vectors import row_names
from embedkit.embeddings import lance as lancetable
from embedkit.embeddings.metadata import Metadata
from embedkit.errors import ConfigError

__all__ = ["OnDisk"]


class OnDisk:
    """A table that can be searched.

    Attributes:
        kind: `lance`.
        recall: 1: every vector is looked at.
        metadata: What the embeddings are.
        names: One per row: its id, or `id#part`.
        dim: Width D.
    """

    kind = "lance"
    recall = 1.0

    def __init__(self, table: Any, path: Path):
        """Take an open table; see `open`."""
        self._table = table
        self.metadata: Metadata = lancetable.metadata_of(table, path)
        self.dim: int = self.metadata.dim
        keys = [part for part in lancetable.read(table, ["id", "part"])]
        ids = [name for part in keys for name in part["id"].to_pylist()]
        parts = np.array([number for part in keys for number in part["part"].to_pylist()], np.int32)
        if not ids:
            raise ConfigError(f"{path}: expected embeddings, found no row")
        self.names = row_names(ids, parts, str(path))
        self._row_of = {name: row for row, name in enumerate(self.names)}

    @classmethod
    def open(cls, uri: str | os.PathLike[str]) -> OnDisk:
        """Open `lance://FOLDER/TABLE`.

        Raises:
            ConfigError: No name of a table, or no row in it.
            OutputError: There is no such table, or embedkit did not write it.
            MissingDependencyError: pylance is not installed.
        """
        path = lancetable.table_path(os.fspath(uri))
        return cls(lancetable.open_table(path), path)

    def __len__(self) -> int:
        return len(self.names)

    def search(self, queries: np.ndarray | Sequence[str], k: int = 10) -> Hits:
        """Find the k most similar rows.

        Args:
            queries: Vectors float (Q, D), or names of rows: then the row itself is not among what is found.
            k: How many.

        Raises:
            ConfigError: An unknown name, vectors of another width, or k larger than there are rows.
        """
        own: list[str | None]
        if isinstance(queries, np.ndarray):
            vectors, own = queries, [None] * len(queries)
            if vectors.ndim != 2 or vectors.shape[1] != self.dim:
                raise ConfigError(f"the table has {self.dim} columns and the queries are {vectors.shape}")
        else:
            own = list(queries)
            unknown = next((name for name in queries if name not in self._row_of), None)
            if unknown is not None:
                raise ConfigError(f"{unknown!r} is no id of the table")
            rows = [self._row_of[name] for name in queries]
            taken = self._table.take(rows, columns=["embedding"])["embedding"]
            vectors = np.array(taken.to_pylist(), np.float32)
        check_k(k, len(self), any(name is not None for name in own), "the table")
        ids: list[list[str]] = []
        cosines = np.empty((len(vectors), k), np.float32)
        for number, (vector, name) in enumerate(zip(vectors, own, strict=True)):
            found = self._nearest(vector, k + (name is not None))
            kept = [hit for hit in found if hit[0] != name][:k]
            ids.append([hit for hit, _ in kept])
            cosines[number] = [cosine for _, cosine in kept]
        rows_found = np.array([[self._row_of[hit] for hit in line] for line in ids], np.int64)
        return Hits(ids, rows_found, cosines)

    def _nearest(self, vector: np.ndarray, k: int) -> list[tuple[str, float]]:
        """Names and cosines of one query, exactly, the most similar first."""
        asked = {"column": "embedding", "q": vector, "k": k, "metric": "cosine", "use_index": False}
        found = self._table.to_table(columns=["id", "part", "_distance"], nearest=asked).to_pydict()
        names = row_names(found["id"], np.array(found["part"], np.int32), "the table")
        cosines = [1 - distance for distance in found["_distance"]]
        return sorted(
            zip(names, cosines, strict=True), key=lambda hit: (-np.float32(hit[1]), self._row_of[hit[0]])
        )
