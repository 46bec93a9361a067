"""Groups that color the images of an atlas: clusters, or a label column of the embeddings."""

from __future__ import annotations

import os
from dataclasses import dataclass

from embedkit.analysis.clustering.cluster import Clustering
from embedkit.analysis.vectors import Rows, Source, row_names
from embedkit.embeddings.formats import open_rows
from embedkit.embeddings.metadata import check_same_space
from embedkit.errors import ConfigError

__all__ = ["Groups", "groups_of_clusters", "groups_of_labels"]


@dataclass(frozen=True)
class Groups:
    """Groups of rows, for colors.

    Attributes:
        title: What the groups are: `Cluster`, or the name of a column.
        of: Name of a row (`id`, or `id#part`) -> its group; other rows have no group.
        none: The label of rows without a group.
    """

    title: str
    of: dict[str, str]
    none: str = "none"


def groups_of_clusters(rows: Source, path: str | os.PathLike[str]) -> Groups:
    """Colors by a file that `embedkit cluster -o` wrote.

    Args:
        rows: The embeddings of the atlas.
        path: The clusters.

    Raises:
        OutputError: Not such a file.
        SpaceMismatchError: Clusters of another space.
        ConfigError: Clusters of other images.
    """
    found, opened = Clustering.load(path), Rows.of(rows)
    check_same_space(found.metadata, opened.metadata, os.fspath(path), opened.where)
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
    """Colors by a label column of the embeddings.

    Raises:
        ConfigError: There is no such column, or it has too many different values.
        OutputError: Not a file of embeddings.
    """
    stored = open_rows(source)
    values = stored.label(column)
    names = row_names(*stored.keys(), stored.where)
    of = {
        name: str(value)
        for name, value in zip(names, values, strict=True)
        if value not in (None, "") and value == value
    }
    return Groups(column, of)
