"""What the pictures of an atlas are coloured by: clusters, or a label column of the embeddings."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from embedkit.analysis.clustering import Clustering
from embedkit.analysis.rows import Rows, Source, check_same_space, row_names
from embedkit.embeddings import RESERVED, Embeddings, shards_of
from embedkit.errors import ConfigError, OutputError

__all__ = ["Groups", "groups_of_clusters", "groups_of_labels"]


@dataclass(frozen=True)
class Groups:
    """What pictures are coloured by.

    Attributes:
        title: What the groups are: `Cluster`, or the name of a column.
        of: Name of a row (`id`, or `id#part`) -> its group; a row that is not there is in none.
        none: What rows in no group are called.
    """

    title: str
    of: dict[str, str]
    none: str = "none"


def groups_of_clusters(rows: Source, path: str | os.PathLike[str]) -> Groups:
    """Colours by a file that `embedkit cluster -o` wrote.

    Args:
        rows: The embeddings that the atlas is of.
        path: The clusters.

    Raises:
        OutputError: Not such a file.
        SpaceMismatchError: Clusters of another space.
        ConfigError: Clusters of other pictures.
    """
    found, opened = Clustering.read(path), Rows.of(rows)
    check_same_space(found.passport, opened.passport, os.fspath(path), opened.where)
    names = row_names(found.ids, found.parts, os.fspath(path))
    of = {
        name: f"Cluster {label}"
        for name, label in zip(names, found.labels.tolist(), strict=True)
        if label >= 0
    }
    if set(names).isdisjoint(opened.names()):
        raise ConfigError(
            f"{os.fspath(path)} has none of the ids of {opened.where}; cluster these embeddings, with -o"
        )
    return Groups("Cluster", of, "In no cluster")


def groups_of_labels(source: str | os.PathLike[str], column: str) -> Groups:
    """Colours by a label column of the embeddings.

    Raises:
        ConfigError: There is no such column, or it has too many values to be told apart.
        OutputError: Not embeddings of ours.
    """
    path = Path(source)
    if path.suffix == ".npy":
        held = Embeddings.read(path)  # its vectors are mapped, not read
        columns: dict[str, list] = held.labels
        names = row_names(held.ids, held.parts, str(path))
    else:
        files = shards_of(path) if path.is_dir() else [path]
        known = {name for file in files for name in _schema_names(file)} - set(RESERVED)
        wanted = ["id", "part"] + [column] * (column in known)
        table = pa.concat_tables(
            [
                pq.read_table(file, columns=wanted).replace_schema_metadata(None)
                for file in files
            ],
            promote_options="default",
        )  # fmt: skip
        columns = {name: table[name].to_pylist() if name == column else [] for name in known}
        names = row_names(table["id"].to_pylist(), table["part"].to_numpy(), str(path))
    if column not in columns:
        there = ", ".join(sorted(columns)) or "no label column"
        raise ConfigError(f"label: {path} has no column {column!r}; it has {there}")
    of = {
        name: str(value)
        for name, value in zip(names, columns[column], strict=True)
        if value not in (None, "") and value == value
    }
    return Groups(column, of)


def _schema_names(file: Path) -> list[str]:
    try:
        return pq.read_schema(file).names
    except (OSError, pa.ArrowInvalid):
        raise OutputError(f"{file} cannot be read as Parquet; give a file of embeddings") from None
