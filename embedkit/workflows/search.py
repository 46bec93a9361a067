"""Search by image: queries are ids of the searched embeddings, or images that their encoder embeds."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from embedkit._io.text import did_you_mean
from embedkit.analysis.index_file import MAGIC
from embedkit.analysis.neighbors import SearchIndex
from embedkit.analysis.neighbors_on_disk import OnDiskIndex
from embedkit.analysis.vectors import Rows
from embedkit.embeddings.base import SearchableRows
from embedkit.embeddings.formats import open_rows
from embedkit.embeddings.metadata import check_same_space
from embedkit.encoder import Encoder
from embedkit.errors import ConfigError
from embedkit.images.originals import Originals
from embedkit.workflows.embedding import ImageSource, embed_images, encoder_of_space, find_image

__all__ = ["Match", "Matches", "cached_index", "open_index", "search"]

#: Default number of neighbors.
K = 10


@dataclass(frozen=True)
class Match:
    """One row that was found: its name (`id`, or `id#part`) and the cosine with the query, in [-1, 1]."""

    name: str
    cosine: float


@dataclass(frozen=True)
class Matches:
    """The matches of one query.

    Attributes:
        query: The query as given.
        is_row: Whether it is the name of a row, which is excluded from its own matches.
        found: The most similar first.
    """

    query: str
    is_row: bool
    found: list[Match]


def open_index(source: str | os.PathLike[str]) -> SearchIndex | OnDiskIndex:
    """Open a saved index, or a file, a folder or a LanceDB table, whose rows are all compared.

    Raises:
        OutputError: None of these.
        ConfigError: It has no row.

    Examples:
        >>> index = embedkit.workflows.open_index("samples.parquet")
        >>> index.kind, len(index)
        ('flat', 10)
    """
    if _is_index(source):
        return SearchIndex.load(source)
    stored = open_rows(source)
    if isinstance(stored, SearchableRows):
        return OnDiskIndex(stored)
    index = SearchIndex.build(Rows(stored), "flat")
    index._where = os.fspath(source)
    return index


def cached_index(source: str | os.PathLike[str], path: str | os.PathLike[str]) -> tuple[SearchIndex, bool]:
    """The index of `source`, cached in `path`: read from there while it is current, else built.

    An index is written only if it pays off: exact search of up to 268 million numbers takes about 0.1 s, and a
    file of them would only be a copy of the embeddings.

    Args:
        source: A file or a folder of embeddings.
        path: The file of the cached index.

    Returns:
        The index, and whether `path` holds it.

    Raises:
        ConfigError: `source` is an index itself, or a database.
        OutputError: `path` is not an index, or cannot be written.
        SpaceMismatchError: `path` is an index of another space.

    Examples:
        >>> index, is_cached = embedkit.workflows.cached_index("samples.parquet", "samples.index")
        >>> len(index), is_cached
        (10, False)
    """
    path = Path(path)
    if _is_index(source):
        raise ConfigError(f"{os.fspath(source)} is an index already; search it without --cache-index")
    stored = open_rows(source)
    if isinstance(stored, SearchableRows):
        raise ConfigError(
            f"{os.fspath(source)} is a database, which searches by itself; leave --cache-index out"
        )
    rows = Rows(stored)
    if os.path.exists(path):
        index = SearchIndex.load(path)
        step = "name another file with --cache-index"
        check_same_space(index.metadata, rows.metadata, f"the index {path}", rows.where, step)
        if _is_current(index, rows, stored.files, path):
            return index, True
    index = SearchIndex.build(rows)
    index._where = os.fspath(source)
    if index.kind != "flat":
        index.save(path)
    return index, index.kind != "flat"


def search(
    index: SearchIndex | OnDiskIndex | str | os.PathLike[str],
    queries: str | Sequence[str],
    k: int | None = None,
    *,
    encoder: Encoder | str | os.PathLike[str] | None = None,
    device: str = "auto",
    threads: int | str = "auto",
) -> list[Matches]:
    """Find the rows that are most similar to queries.

    Args:
        index: An index, or what `open_index` opens.
        queries: One or several: names of rows of the index, or images by their paths or as `file.tar::member`. A text
            that is both is the row.
        k: Number of matches; 10, or all rows if there are fewer, when None.
        encoder: What embeds query images; by default the encoder that the index names. It is not loaded if all
            queries are rows.
        device: For an encoder that is loaded here.
        threads: For an encoder that is loaded here.

    Returns:
        The matches, in the order of the queries.

    Raises:
        ConfigError: No query, one that is neither an image nor a row, a k that is too large, or an index of plain
            vectors and a query image.
        ImageError: A query cannot be read as an image; the message names it.
        EntryNotFoundError: No zoo has the encoder.
        SpaceMismatchError: The encoder's space is not the index's.

    Examples:
        >>> matches = embedkit.search("samples.parquet", "samples/cat.jpg", k=1)
        >>> matches[0].found[0].name
        'samples/cat-closer.jpg'
    """
    if isinstance(index, (str, os.PathLike)):
        index = open_index(index)
    if isinstance(queries, str):
        queries = [queries]
    where = index._where
    if not queries:
        raise ConfigError("expected at least one query: an image, or the id of a row")
    names = set(index.names)
    by_row = [query in names for query in queries]
    if k is None:
        k = max(1, min(K, len(index) - any(by_row)))
    images = [query for query, is_row in zip(queries, by_row, strict=True) if not is_row]
    rows = [query for query, is_row in zip(queries, by_row, strict=True) if is_row]
    found: dict[bool, list[list[Match]]] = {True: [], False: []}
    if images:
        originals = Originals()
        asked = [_image(query, originals, index, where) for query in images]
        embeds = encoder_of_space(index.metadata, encoder, where, device=device, threads=threads)
        vectors, faults = embed_images(embeds, asked)
        if faults:
            raise faults[min(faults)]
        found[False] = _listed(index, vectors, k)
    if rows:
        found[True] = _listed(index, rows, k)
    return [
        Matches(query, is_row, found[is_row].pop(0)) for query, is_row in zip(queries, by_row, strict=True)
    ]


def _listed(index: SearchIndex | OnDiskIndex, queries: np.ndarray | list[str], k: int) -> list[list[Match]]:
    hits = index.search(queries, k)
    return [
        [Match(name, cosine) for name, cosine in zip(names, cosines, strict=True)]
        for names, cosines in zip(hits.ids, hits.cosines.tolist(), strict=True)
    ]


def _image(query: str, originals: Originals, index: SearchIndex | OnDiskIndex, where: str) -> ImageSource:
    """The image of a query that is not a row.

    Raises:
        ConfigError: It is not an image either.
    """
    if not os.path.isdir(query) and not originals.has(query):
        hint = did_you_mean(query, index.names, otherwise="check the path")
        raise ConfigError(f"{query!r} is neither an existing image nor an id of {where}; {hint}")
    return find_image(query, originals)


def _is_index(source: str | os.PathLike[str]) -> bool:
    try:
        with open(source, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def _is_current(index: SearchIndex, rows: Rows, files: Sequence[Path], path: Path) -> bool:
    """Whether an index of the same space is of these rows, by their names and the times of the files."""
    newest = max(file.stat().st_mtime_ns for file in files)
    return path.stat().st_mtime_ns >= newest and index.names == rows.names()
