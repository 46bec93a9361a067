"""Search in embeddings whose own engine finds neighbors: an index on the disk, for more rows than fit into memory.

The engine scans the vectors on the disk, exactly; only the ids are in memory. Its interface is that of `SearchIndex`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from embedkit._io.text import did_you_mean
from embedkit.analysis.neighbors import Hits, check_k
from embedkit.analysis.vectors import row_names
from embedkit.embeddings.base import SearchableRows
from embedkit.embeddings.metadata import Metadata
from embedkit.errors import ConfigError

__all__ = ["OnDiskIndex"]


class OnDiskIndex:
    """Stored embeddings that their own engine searches.

    Attributes:
        kind: The engine's name.
        recall: 1, since every vector is compared.
        metadata: Which encoder made the embeddings, in which space.
        names: One per row: its id, or `id#part`.
        dim: Width D.
    """

    recall = 1.0

    def __init__(self, stored: SearchableRows):
        """Read the ids.

        Raises:
            ConfigError: There is no row, or two have one name.
            OutputError: The ids cannot be read.
        """
        self._stored = stored
        self._where = stored.where
        self.kind = stored.engine
        self.metadata: Metadata = stored.metadata
        self.dim: int = self.metadata.dim
        if not len(stored):
            raise ConfigError(f"{stored.where}: expected embeddings, found no row")
        self.names = row_names(*stored.keys(), stored.where)
        self._row_of = {name: row for row, name in enumerate(self.names)}

    def __len__(self) -> int:
        return len(self.names)

    def search(self, queries: np.ndarray | Sequence[str], k: int = 10) -> Hits:
        """Find the k most similar rows.

        Args:
            queries: Vectors float (Q, D), or names of rows, which are excluded from their own results.
            k: How many.

        Raises:
            ConfigError: An unknown name, vectors of another width, or k larger than the number of rows.
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
                hint = did_you_mean(unknown, self.names, otherwise="check the spelling")
                raise ConfigError(f"{unknown!r} is not an id of the table; {hint}")
            vectors = self._stored.take([self._row_of[name] for name in queries])
        check_k(k, len(self), any(name is not None for name in own), "the table")
        ids: list[list[str]] = []
        cosines = np.empty((len(vectors), k), np.float32)
        for number, (vector, name) in enumerate(zip(vectors, own, strict=True)):
            found = self._nearest(vector, k + (name is not None))
            others = [hit for hit in found if hit[0] != name][:k]
            ids.append([hit for hit, _ in others])
            cosines[number] = [cosine for _, cosine in others]
        rows_found = np.array([[self._row_of[hit] for hit in line] for line in ids], np.int64)
        return Hits(ids, rows_found, cosines)

    def _nearest(self, vector: np.ndarray, k: int) -> list[tuple[str, float]]:
        """Names and cosines of one query, exactly, the most similar first."""
        ids, parts, cosines = self._stored.nearest(vector, k)
        names = row_names(ids, parts, "the table")
        return sorted(
            zip(names, cosines, strict=True), key=lambda hit: (-np.float32(hit[1]), self._row_of[hit[0]])
        )
