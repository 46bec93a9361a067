"""Search by image: queries are images, which the encoder of the searched file embeds, or ids of that file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from embedkit.analysis.neighbors import MAGIC, Index
from embedkit.analysis.neighbors_on_disk import OnDisk
from embedkit.analysis.vectors import Rows
from embedkit.embeddings.base import SearchableRows
from embedkit.embeddings.formats import open_rows
from embedkit.embeddings.metadata import check_same_space
from embedkit.encoder import Encoder
from embedkit.errors import ConfigError
from embedkit.images.originals import Originals
from embedkit.workflows.embedding import Image, embed_images, encoder_of_space, find_image

__all__ = ["Match", "Matches", "keep_index", "open_index", "search"]

#: Neighbors that are given when nothing else is said.
K = 10


@dataclass(frozen=True)
class Match:
    """One row that was found: its name (`id`, or `id#part`) and the cosine with the query, in [-1, 1]."""

    name: str
    cosine: float


@dataclass(frozen=True)
class Matches:
    """What was found for one query.

    Attributes:
        query: As it was given.
        is_row: Whether it is the name of a row; then that row itself is not among the matches.
        found: The most similar first.
    """

    query: str
    is_row: bool
    found: list[Match]


def open_index(source: str | os.PathLike[str]) -> Index | OnDisk:
    """What can be searched: a saved index, or a file, a folder or a LanceDB table, whose rows are all compared.

    Raises:
        OutputError: None of these.
        ConfigError: No row in it.
    """
    if _is_index(source):
        return Index.load(source)
    stored = open_rows(source)
    return OnDisk(stored) if isinstance(stored, SearchableRows) else Index.build(Rows(stored), "flat")


def keep_index(source: str | os.PathLike[str], path: str | os.PathLike[str]) -> tuple[Index, bool]:
    """The index of `source` that is kept in `path`: taken from there while it is current, else built.

    An index is written only where it pays: exact search of up to 268 million numbers takes about 0.1 s, and a
    file of them would be a copy of the embeddings and nothing else.

    Args:
        source: A file or a folder of embeddings.
        path: Where the index is kept.

    Returns:
        The index, and whether `path` holds it.

    Raises:
        ConfigError: `source` is an index itself, or a database.
        OutputError: `path` holds something that is no index, or cannot be written.
        SpaceMismatchError: `path` is an index of another space.
    """
    path = Path(path)
    if _is_index(source):
        raise ConfigError(f"{os.fspath(source)} is an index already; search it without --index")
    stored = open_rows(source)
    if isinstance(stored, SearchableRows):
        raise ConfigError(f"{os.fspath(source)} is a database, which searches by itself; leave --index out")
    rows = Rows(stored)
    if path.exists():
        index = Index.load(path)
        step = "name another file with --index"
        check_same_space(index.metadata, rows.metadata, f"the index {path}", rows.where, step)
        if _is_current(index, rows, stored.files, path):
            return index, True
    index = Index.build(rows)
    if index.kind != "flat":
        index.save(path)
    return index, index.kind != "flat"


def search(
    index: Index | OnDisk,
    queries: Sequence[str],
    k: int | None = None,
    *,
    encoder: Encoder | str | os.PathLike[str] | None = None,
    where: str = "the index",
    device: str = "auto",
    threads: int | str = "auto",
) -> list[Matches]:
    """Find what is most similar to images.

    Args:
        index: See `open_index`.
        queries: Names of rows of the index, or images: paths, or archive members as `file.tar::member`. A text
            that is both is the row.
        k: How many; 10, or all there are, when None.
        encoder: What embeds query images; by default the encoder that the index names. It is not loaded while
            all queries are rows.
        where: How messages name the index.
        device: For an encoder that is loaded here.
        threads: For an encoder that is loaded here.

    Returns:
        What was found, in the order of the queries.

    Raises:
        ConfigError: No query, one that is neither an image nor a row, a k that is too large, or an index of plain
            vectors and a query image.
        ImageError: A query cannot be read as an image; the message names it.
        EntryNotFoundError: No zoo has the encoder.
        SpaceMismatchError: The encoder's space is not the index's.
    """
    if not queries:
        raise ConfigError("expected a query: an image, or the id of a row")
    names = set(index.names)
    by_row = [query in names for query in queries]
    if k is None:
        k = max(1, min(K, len(index) - any(by_row)))
    images = [query for query, known in zip(queries, by_row, strict=True) if not known]
    rows = [query for query, known in zip(queries, by_row, strict=True) if known]
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
    return [Matches(query, known, found[known].pop(0)) for query, known in zip(queries, by_row, strict=True)]


def _listed(index: Index | OnDisk, queries: np.ndarray | list[str], k: int) -> list[list[Match]]:
    hits = index.search(queries, k)
    return [
        [Match(name, cosine) for name, cosine in zip(names, cosines, strict=True)]
        for names, cosines in zip(hits.ids, hits.cosines.tolist(), strict=True)
    ]


def _image(query: str, originals: Originals, index: Index | OnDisk, where: str) -> Image:
    """A query that is no row.

    Raises:
        ConfigError: It is no image either.
    """
    if not os.path.isdir(query) and not originals.has(query):
        import difflib

        near = difflib.get_close_matches(query, index.names[:100_000], 1)
        hint = f"did you mean {near[0]!r}?" if near else "check the path"
        raise ConfigError(f"{query!r} is neither an image that is there nor an id of {where}; {hint}")
    return find_image(query, originals)


def _is_index(source: str | os.PathLike[str]) -> bool:
    try:
        with open(source, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def _is_current(index: Index, rows: Rows, files: Sequence[Path], path: Path) -> bool:
    """Whether an index of the same space is of these very rows, by their names and the files' times."""
    newest = max(file.stat().st_mtime_ns for file in files)
    return path.stat().st_mtime_ns >= newest and index.names == rows.names()
