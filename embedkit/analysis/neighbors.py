"""Search: the most similar rows of a set, exact while that is fast, else approximate with a measured recall.

`flat` compares with every row. `ivf` looks into the cells nearest to the query (Billion-scale similarity search with
GPUs, Johnson, Douze and Jegou, IEEE Transactions on Big Data 2019, arXiv 1702.08734), `hnsw` walks a graph of
neighbors (Efficient and robust approximate nearest neighbor search using Hierarchical Navigable Small World
graphs, Malkov and Yashunin, IEEE TPAMI 2018, arXiv 1603.09320); both by faiss. How many cells or candidates a search
visits is set at building, so that the recall measured against the exact answer reaches a target.

`embedkit.analysis.index_file` describes the file of an index.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embedkit._io.atomic import replacing
from embedkit._io.json import canonical_json
from embedkit._io.reading import open_regular
from embedkit._io.text import did_you_mean
from embedkit.analysis.index_file import (
    MAGIC,
    IndexSection,
    check_section,
    parse_names,
    read_engine,
    read_footer,
    sections_of,
    write_footer,
)
from embedkit.analysis.similarity import faiss_module, top_k, without_own
from embedkit.analysis.vectors import BLOCK, Rows, Source, as_count
from embedkit.embeddings.metadata import Metadata, check_same_space
from embedkit.errors import ConfigError, EmbedkitError, OutputError

__all__ = ["Hits", "SearchIndex"]

KINDS = ("auto", "flat", "ivf", "hnsw")
#: Numbers (rows x width) up to which `auto` is exact: one query reads them all, about 0.1 s on 2 cores.
EXACT = 1 << 28
#: Neighbors at which recall is measured.
RECALL_AT = 10
#: Queries that it is measured with.
PROBES = 500
#: Links of a node of the graph, and candidates while it is built.
LINKS, CONSTRUCTION = 32, 128


@dataclass(frozen=True)
class Hits:
    """Search results, one list per query, the most similar first.

    Attributes:
        ids: The names of the rows: `id`, or `id#part`.
        rows: int64 (Q, k), rows of the indexed embeddings.
        cosines: float32 (Q, k).
    """

    ids: list[list[str]]
    rows: np.ndarray
    cosines: np.ndarray


class SearchIndex:
    """A searchable set of embeddings.

    Attributes:
        kind: `flat`, `ivf` or `hnsw`.
        names: One per row: its id, or `id#part`.
        dim: Width D.
        metadata: Metadata of the embeddings; None for a plain array.
        recall: Share of the exact 10 nearest neighbors that are found, measured at building; 1 for `flat`. It was
            measured with rows of the index as queries; it may be lower for queries unlike all rows.
        effort: Number of cells (`ivf`) or candidates (`hnsw`) that a search visits; 0 for `flat`.

    Examples:
        >>> index = embedkit.SearchIndex.build("samples.parquet")
        >>> index.kind, len(index), index.dim
        ('flat', 10, 1280)
    """

    def __init__(
        self,
        kind: str,
        names: list[str],
        metadata: Metadata | None,
        rows: Rows | None,
        engine: Any,
        *,
        dim: int,
        recall: float = 1.0,
        effort: int = 0,
    ):
        """Take the parts; see `build` and `load`."""
        self.kind, self.names, self.metadata, self.dim = kind, names, metadata, dim
        self.recall, self.effort = recall, effort
        self._rows, self._engine = rows, engine
        self._where = "the index"
        self._row_of: dict[str, int] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"<SearchIndex {self.kind} of {len(self)} x {self.dim}, recall@{RECALL_AT} {self.recall:.3f}>"

    @classmethod
    def build(
        cls, embeddings: Source, kind: str = "auto", *, recall: float = 0.95, seed: int = 0
    ) -> SearchIndex:
        """Index embeddings.

        Args:
            embeddings: N rows; a file larger than memory is searched from the disk, exactly.
            kind: `flat` is exact; `ivf` and `hnsw` are approximate, `hnsw` faster and slower to build; `auto` is
                `flat` up to 268 million numbers (2 million rows of 128) and for what does not fit into
                memory, else `ivf`.
            recall: Target share of the exact 10 nearest neighbors for an approximate index.
            seed: Of the cells, and of the queries for the recall.

        Raises:
            ConfigError: No row, duplicate ids, an unknown kind, or too few rows for it.
            MissingDependencyError: faiss is not installed and the kind needs it.

        Examples:
            >>> embedkit.SearchIndex.build("samples.parquet")
            <SearchIndex flat of 10 x 1280, recall@10 1.000>
        """
        if kind not in KINDS:
            raise ConfigError(f"kind: expected one of {', '.join(KINDS)}, found {kind!r}")
        if not 0 < recall <= 1:
            raise ConfigError(f"recall: expected a share in (0, 1], found {recall}")
        rows = Rows.of(embeddings)
        names = rows.names()
        if kind == "auto":
            kind = "flat" if len(rows) * rows.dim <= EXACT or not rows.in_memory else "ivf"
        if kind == "flat":
            return cls("flat", names, rows.metadata, rows, None, dim=rows.dim)
        if not rows.in_memory:
            raise ConfigError(
                f"{rows.where} is larger than memory: use kind 'flat', which reads it in blocks"
            )
        if len(rows) < 1000:
            raise ConfigError(f"kind {kind!r} needs 1,000 rows or more, found {len(rows)}: use 'flat'")
        engine = _ivf(rows, seed) if kind == "ivf" else _hnsw(rows)
        index = cls(kind, names, rows.metadata, rows, engine, dim=rows.dim)
        index._tune(recall, seed)
        index._rows = None  # the engine has its own copy
        return index

    def _tune(self, target: float, seed: int) -> None:
        """Visit more cells or candidates until the measured recall reaches the target, or until all are visited."""
        assert self._rows is not None
        rng = np.random.default_rng(seed)
        probes = np.sort(rng.choice(len(self), min(PROBES, len(self)), replace=False))
        vectors = self._rows.take(probes)
        exact = without_own(*top_k(vectors, self._rows, RECALL_AT + 1), probes)[1]
        most = self._engine.nlist if self.kind == "ivf" else len(self)
        self.effort = 1 if self.kind == "ivf" else 16
        while True:
            found = without_own(*self._approximate(vectors, RECALL_AT + 1), probes)[1]
            self.recall = float(
                np.mean([len(np.intersect1d(a, b)) for a, b in zip(exact, found, strict=True)])
            )
            self.recall /= RECALL_AT
            if self.recall >= target or self.effort >= most:
                return
            self.effort = min(most, self.effort * 2)

    def search(self, queries: Source | str | Sequence[str], k: int = 10) -> Hits:
        """Find the k most similar rows.

        Args:
            queries: Vectors (Q, D) or (D,), embeddings, or names of rows of this index, which
                are excluded from their own results. A single text is a name, never a file.
            k: How many.

        Raises:
            ConfigError: An unknown name, k larger than the number of rows, or vectors that cannot be compared.
            SpaceMismatchError: Embeddings of another space.

        Examples:
            >>> index = embedkit.SearchIndex.build("samples.parquet")
            >>> index.search("samples/cat.jpg", k=1).ids
            [['samples/cat-closer.jpg']]
            >>> vectors = embedkit.load_encoder().encode(["samples/coffee.jpg", "samples/grass.jpg"])
            >>> index.search(vectors, k=1).ids
            [['samples/coffee.jpg'], ['samples/grass.jpg']]
        """
        own: np.ndarray | None = None
        if isinstance(queries, str) or (
            isinstance(queries, Sequence)
            and not isinstance(queries, np.ndarray)
            and len(queries)
            and isinstance(queries[0], str)
        ):
            own = self._find([queries] if isinstance(queries, str) else queries)
            vectors = self._take(own)
        else:
            if isinstance(queries, np.ndarray) and queries.ndim == 1:
                queries = queries[None]
            asked = Rows.of(queries, "the queries")  # type: ignore[arg-type]
            check_same_space(asked.metadata, self.metadata, asked.where, self._where)
            if asked.dim != self.dim:
                raise ConfigError(f"the index has {self.dim} columns and the queries have {asked.dim}")
            vectors = asked.unit(0, len(asked))
        check_k(k, len(self), own is not None, "the index")
        depth = k + (own is not None)
        if self._engine is not None:
            cosines, rows = self._approximate(vectors, depth)
        else:
            assert self._rows is not None
            cosines, rows = top_k(vectors, self._rows, depth)
        if own is not None:
            cosines, rows = without_own(cosines, rows, own)
        return Hits([[self.names[row] for row in line] for line in rows.tolist()], rows, cosines)

    def _find(self, names: Sequence[str]) -> np.ndarray:
        if self._row_of is None:
            self._row_of = {name: row for row, name in enumerate(self.names)}
        unknown = next((name for name in names if name not in self._row_of), None)
        if unknown is not None:
            raise ConfigError(
                f"{unknown!r} is no id of the index; "
                + did_you_mean(unknown, self.names, otherwise="check the spelling")
            )
        return np.array([self._row_of[name] for name in names], np.int64)

    def _take(self, rows: np.ndarray) -> np.ndarray:
        if self._rows is not None:
            return self._rows.take(rows)
        return np.stack([self._engine.reconstruct(int(row)) for row in rows])

    def _approximate(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Query the engine; a query that finds fewer than k rows is repeated with more effort."""
        faiss = faiss_module()
        vectors = np.ascontiguousarray(vectors, np.float32)
        effort = self.effort if self.kind == "ivf" else max(self.effort, k)
        most = self._engine.nlist if self.kind == "ivf" else len(self)
        cosines = np.empty((len(vectors), k), np.float32)
        rows = np.full((len(vectors), k), -1, np.int64)
        todo = np.arange(len(vectors))
        # `faiss.contrib.torch_utils`, which other packages import, replaces `search` by one without parameters.
        search = getattr(self._engine, "search_numpy", self._engine.search)
        while True:
            options = (
                faiss.SearchParametersIVF(nprobe=effort)
                if self.kind == "ivf"
                else faiss.SearchParametersHNSW(efSearch=effort)
            )
            distance, found = search(vectors[todo], k, params=options)
            # The graph is searched by squared distance, which for unit vectors is 2 - 2 cos.
            cosines[todo] = distance if self.kind == "ivf" else 1 - distance / 2
            rows[todo] = found
            todo = todo[(found < 0).any(1)]
            if not len(todo):
                return cosines, rows
            if effort >= most:
                break
            effort = min(most, effort * 4)
        # Some rows of a graph may be unreachable.
        raise ConfigError(
            f"the {self.kind} index finds fewer than {k} rows for a query: use a smaller k, or 'flat'"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one file, in one step.

        Raises:
            OutputError: It cannot be written.

        Examples:
            >>> embedkit.SearchIndex.build("samples.parquet").save("samples.index")
        """
        path = Path(path)
        if not os.path.isdir(path.parent):
            raise OutputError(f"the folder {path.parent} of the index does not exist; create it first")
        with replacing(path) as file:
            file.write(MAGIC)
            vectors = IndexSection(file)
            if self._engine is not None:
                faiss = faiss_module()
                faiss.write_index(self._engine, faiss.PyCallbackIOWriter(vectors.write))
            for block in self._blocks():
                vectors.write(block)
            ids = IndexSection(file)
            for start in range(0, len(self.names), BLOCK):
                lines = (canonical_json(name) + b"\n" for name in self.names[start : start + BLOCK])
                ids.write(b"".join(lines))
            footer = {
                "kind": self.kind,
                "rows": len(self),
                "dim": self.dim,
                "recall": self.recall,
                "effort": self.effort,
                "metadata": None if self.metadata is None else self.metadata.to_json(),
                "sections": [[section.start, section.size, section.crc] for section in (vectors, ids)],
            }
            write_footer(file, footer)

    def _blocks(self) -> Iterator[bytes]:
        for start in range(0, len(self) if self._rows is not None else 0, BLOCK):
            block = self._rows.unit(start, min(start + BLOCK, len(self)))  # type: ignore[union-attr]
            yield np.ascontiguousarray(block, "<f4").tobytes()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SearchIndex:
        """Read what `save` wrote, and check every byte of it.

        Raises:
            OutputError: Not such a file, one that is cut off or changed, or one of a later version.
            MissingDependencyError: faiss is not installed and the index needs it.

        Examples:
            >>> embedkit.SearchIndex.build("samples.parquet").save("samples.index")
            >>> len(embedkit.SearchIndex.load("samples.index"))
            10
        """
        where = os.fspath(path)
        try:
            with open_regular(path) as file:
                footer = read_footer(file, where)
                kind = footer.text("kind", choices=KINDS[1:])
                rows, dim = footer.whole("rows", 1, 1 << 40), footer.whole("dim", 1, 1 << 20)
                recall = footer.number("recall", 0, 1)
                effort = footer.whole("effort", 0 if kind == "flat" else 1, rows)
                metadata = footer.optional(
                    "metadata", lambda key: Metadata.from_json(footer.text(key), where)
                )
                vectors, ids = sections_of(footer, file)
                if kind == "flat" and vectors.size != rows * dim * 4:
                    footer.fail("rows", f"{vectors.size // (4 * dim)}, for which there are vectors")
                check_section(file, ids, where)
                names = parse_names(file.read(ids.size), rows, where)
                check_section(file, vectors, where)
                held, engine = None, None
                if kind == "flat":
                    # Memory-mapped: the rows of an index larger than memory stay on the disk.
                    held = Rows(np.memmap(file, np.dtype("<f4"), "r", vectors.start, (rows, dim)), where)
                else:
                    engine = read_engine(file, kind, where)
                    if engine.ntotal != rows or engine.d != dim:
                        footer.fail("rows", f"{engine.ntotal} of {engine.d} columns, which the vectors are")
        except EmbedkitError:
            raise
        except FileNotFoundError:
            raise OutputError(f"{where} does not exist; build an index and save it") from None
        except (OSError, ValueError) as error:  # ValueError: a path with a NUL
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise OutputError(f"{where} cannot be read ({reason}); build the index again") from None
        index = cls(kind, names, metadata, held, engine, dim=dim, recall=recall, effort=effort)
        index._where = where
        return index


def check_k(k: int, rows: int, own: bool, what: str) -> None:
    """Refuse a k larger than the number of rows.

    Args:
        k: Number of requested rows.
        rows: Number of rows.
        own: Whether the query is a row itself, which is excluded from the results.
        what: Name of the index in messages.

    Raises:
        ConfigError: There are fewer.
    """
    k, most = as_count(k, "k"), rows - own
    if not most:
        raise ConfigError(f"{what} has only one row, so it has no neighbors; embed more images into it")
    if not 1 <= k <= most:
        raise ConfigError(f"k: expected 1 to {most}, for {what} has {rows} row{'s' * (rows > 1)}, found {k}")


def _ivf(rows: Rows, seed: int) -> Any:
    """Cells around k-means centers, 4 sqrt(N) of them, trained on a sample of up to 64 rows per cell."""
    faiss = faiss_module()
    cells = max(1, min(round(4 * len(rows) ** 0.5), len(rows) // 39))  # faiss requires 39 rows per cell
    engine = faiss.index_factory(rows.dim, f"IVF{cells},Flat", faiss.METRIC_INNER_PRODUCT)
    engine.cp.spherical = True
    engine.cp.seed = seed
    engine.cp.min_points_per_centroid = 1
    sample = np.random.default_rng(seed).choice(len(rows), min(len(rows), 64 * cells), replace=False)
    engine.train(rows.take(np.sort(sample)))
    for start in range(0, len(rows), BLOCK):
        engine.add(np.ascontiguousarray(rows.unit(start, min(start + BLOCK, len(rows)))))
    engine.make_direct_map()
    return engine


def _hnsw(rows: Rows) -> Any:
    """A graph by squared distance, which orders unit vectors as their cosine does."""
    faiss = faiss_module()
    engine = faiss.IndexHNSWFlat(rows.dim, LINKS)
    engine.hnsw.efConstruction = CONSTRUCTION
    for start in range(0, len(rows), BLOCK):
        engine.add(np.ascontiguousarray(rows.unit(start, min(start + BLOCK, len(rows)))))
    return engine
