"""Clustering of embeddings by k-means, spherical k-means, HDBSCAN, or a mixture that infers the number of clusters.

Sources: HDBSCAN: Density-Based Clustering Based on Hierarchical Density Estimates (Campello, Moulavi and Sander,
PAKDD 2013), scikit-learn's. The modules of the other methods name theirs.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from embedkit._io.atomic import replacing
from embedkit._io.columns import read_columns
from embedkit._io.json import Fields, JsonFormat, canonical_json
from embedkit._io.optional import requires
from embedkit._io.reading import open_regular
from embedkit._io.text import one_line
from embedkit.analysis.clustering import dpmm as dpmm_
from embedkit.analysis.clustering import kmeans
from embedkit.analysis.clustering.dpmm import DPMMConfig
from embedkit.analysis.clustering.reduction import Reduction, fit_reduction, parse_reduction
from embedkit.analysis.clustering.scores import ClusteringScores, clustering_scores
from embedkit.analysis.vectors import LARGEST_SQUARED, SMALLEST_SQUARED, as_count, as_numbers, check_rows
from embedkit.embeddings.metadata import Metadata
from embedkit.embeddings.parquet import parquet_writer
from embedkit.embeddings.schema import ROW_GROUP
from embedkit.embeddings.table import Embeddings
from embedkit.errors import ConfigError, OutputError
from embedkit.model.mixture import GaussianMixture

__all__ = ["ALGORITHMS", "Clustering", "cluster"]

ALGORITHMS = ("kmeans", "spherical_kmeans", "hdbscan", "dpmm")

#: Above these limits, HDBSCAN takes hours or finds nothing, and a mixture of full Gaussians has too many parameters.
HDBSCAN_ROWS = 100_000
WIDEST = 64
#: Rows named for each cluster.
EXEMPLARS = 3

_KEY = b"embedkit.clusters"
_VERSION = 1
#: Rows of one block.
_BLOCK = 1 << 16


@dataclass(frozen=True, eq=False)
class Clustering:
    """Clusters of rows.

    Attributes:
        ids: One per row.
        parts: int32 (N,), 0 unless an image has several rows.
        labels: int64 (N,), 0..K-1, the largest cluster first; -1 is noise (HDBSCAN). A given mixture keeps its
            own numbering.
        probabilities: float64 (N,), of a row's cluster, in [0, 1]; 0 for noise. k-means: of the mixture
            of equal Gaussians (von Mises-Fisher distributions, if spherical) that it is the limit of. HDBSCAN:
            strength of membership. dpmm: of the mixture.
        sizes: int64 (K,).
        exemplars: For each cluster its rows nearest to the cluster's mean, nearest first; at most `EXEMPLARS`.
        algorithm: One of `ALGORITHMS`.
        parameters: Everything but the rows that the clusters depend on, and intermediate results.
        metadata: Of the embeddings, None for arrays.
        mixture: The mixture that `dpmm` fitted or was given; it assigns further embeddings. None for others,
            and for clusters that were read from a file.

    Examples:
        >>> found = embedkit.cluster("things.parquet", n_clusters=10)
        >>> found.algorithm, found.labels.shape, int(found.sizes.sum())
        ('kmeans', (40,), 40)
    """

    ids: list[str]
    parts: np.ndarray
    labels: np.ndarray
    probabilities: np.ndarray
    sizes: np.ndarray
    exemplars: list[list[int]]
    algorithm: str
    parameters: dict[str, Any] = field(default_factory=dict)
    metadata: Metadata | None = None
    mixture: GaussianMixture | None = None

    def __len__(self) -> int:
        """K, noise not counted."""
        return len(self.sizes)

    def __repr__(self) -> str:
        return f"<Clustering: {len(self.ids)} rows in {len(self)} clusters by {self.algorithm}, {self.noise} noise>"

    @property
    def noise(self) -> int:
        """Rows in no cluster."""
        return int((self.labels < 0).sum())

    def exemplar_ids(self, cluster: int) -> list[str]:
        """The names of a cluster's exemplars: the id, with `#part` for further parts of an image.

        Examples:
            >>> found = embedkit.cluster("things.parquet", n_clusters=10)
            >>> things = {name.split("/")[1] for name in found.exemplar_ids(9)}
            >>> len(things)
            1
        """
        rows = self.exemplars[cluster]
        return [f"{self.ids[row]}#{self.parts[row]}" if self.parts[row] else self.ids[row] for row in rows]

    def scores(self, labels: Sequence[Hashable] | np.ndarray) -> ClusteringScores:
        """Compare the clusters with labels.

        Args:
            labels: One per row; rows with None, NaN or the empty text are left out.

        Raises:
            ConfigError: Of another length, or no label at all.
            MissingDependencyError: scipy is not installed.

        Examples:
            >>> table = embedkit.Embeddings.load("things.parquet")
            >>> embedkit.cluster(table, n_clusters=10).scores(table.label("thing")).acc > 0.7
            True
        """
        return clustering_scores(self.labels, labels)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `id, part, cluster, probability` as Parquet; the schema metadata describe the clusters.

        Raises:
            OutputError: The file cannot be written.

        Examples:
            >>> embedkit.cluster("things.parquet", n_clusters=10).save("clusters.parquet")
        """
        metadata = self.metadata
        header = {
            "version": _VERSION,
            "algorithm": self.algorithm,
            "parameters": self.parameters,
            "sizes": self.sizes.tolist(),
            "exemplars": self.exemplars,
            "fingerprint": metadata.fingerprint if metadata else None,
            "metadata": metadata.to_json() if metadata else None,
        }
        columns = {
            "id": pa.array(self.ids, pa.string()),
            "part": pa.array(self.parts, pa.int32()),
            "cluster": pa.array(self.labels, pa.int32()),
            "probability": pa.array(self.probabilities.astype(np.float32), pa.float32()),
        }
        table = pa.table(columns, metadata={_KEY: canonical_json(header)})
        with replacing(path) as file, parquet_writer(Path(file.name), table.schema) as writer:
            writer.write_table(table, row_group_size=ROW_GROUP)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Clustering:
        """Read what `save` wrote.

        Raises:
            OutputError: Not such a file.

        Examples:
            >>> found = embedkit.cluster("things.parquet", n_clusters=10)
            >>> found.save("clusters.parquet")
            >>> bool((embedkit.Clustering.load("clusters.parquet").labels == found.labels).all())
            True
        """
        where = os.fspath(path)
        try:
            with open_regular(path) as file:
                table = read_columns(file, _COLUMNS)
            ids, text = table["id"].to_pylist(), (table.schema.metadata or {})[_KEY]
        except KeyError:
            reason = "it is another Parquet file"
        except (OSError, pa.ArrowException, ValueError) as error:
            reason = one_line(error)
        else:
            return cls(ids=ids, **_parsed(_HEADER.fields(_HEADER.parse(text, where), where), table, where))
        raise OutputError(
            f"{where} is not a file of clusters ({reason}); write one with `embedkit cluster EMB.parquet -o {where}`"
        )


_COLUMNS = {"id": pa.string(), "part": pa.int32(), "cluster": pa.int32(), "probability": pa.float32()}
_HEADER = JsonFormat(
    error=OutputError, step="write the clusters again with `embedkit cluster`", limit=64 << 20
)


def _parsed(header: Fields, table: pa.Table, where: str) -> dict[str, Any]:
    """The fields of a clustering except its ids, from its header and its columns, checked against each other."""
    header.version("version", _VERSION)
    sizes = np.array(header.wholes("sizes", 0, len(table)), np.int64)
    labels = table["cluster"].to_numpy().astype(np.int64)
    probabilities = table["probability"].to_numpy().astype(np.float64)
    if len(labels) and not -1 <= labels.min() <= labels.max() < len(sizes):
        header.fail("sizes", f"those of clusters {labels.min()} to {labels.max()}")
    if (np.bincount(labels[labels >= 0], minlength=len(sizes)) != sizes).any():
        header.fail("sizes", "as many rows as each cluster has")
    if not ((probabilities >= 0) & (probabilities <= 1 + 1e-6)).all():
        raise OutputError(f"{where}: probability: expected numbers of 0 to 1; {_HEADER.step}")
    exemplars = header.rows("exemplars", count=len(sizes))
    rows = range(len(labels))
    if not all(type(row) is int and row in rows for line in exemplars for row in line):
        header.fail("exemplars", f"rows 0 to {len(labels) - 1} for each of {len(sizes)} clusters")
    return {
        "parts": table["part"].to_numpy(),
        "labels": labels,
        "probabilities": probabilities,
        "sizes": sizes,
        "exemplars": exemplars,
        "algorithm": header.text("algorithm", choices=ALGORITHMS),
        "parameters": header.mapping("parameters"),
        "metadata": header.optional("metadata", lambda key: Metadata.from_json(header.text(key), where)),
    }


def cluster(
    embeddings: Embeddings | np.ndarray | str | os.PathLike[str],
    algorithm: str = "kmeans",
    n_clusters: int | None = None,
    *,
    reduce: str | Reduction | None = None,
    starts: int | None = None,
    min_cluster_size: int = 5,
    dpmm: DPMMConfig | None = None,
    mixture: GaussianMixture | None = None,
    seed: int = 0,
) -> Clustering:
    """Find clusters.

    Args:
        embeddings: Embeddings, their file, or an array float (N, D), N of 2 or more. They are in memory
            once; everything else runs in blocks.
        algorithm: `kmeans`, `spherical_kmeans` (by cosine), `hdbscan` or `dpmm`.
        n_clusters: Clusters of k-means; None chooses the K of the largest mean silhouette (Rousseeuw 1987) on a
            sample of rows, see `embedkit.analysis.clustering.kmeans.choose_k`. The others infer K.
        reduce: `pca:N` or `whiten:N`, fitted on these rows, or a `Reduction` that was fitted before.
        starts: Number of starts of k-means, of which the best counts; by default 10, and fewer above 100 clusters.
        min_cluster_size: Of HDBSCAN.
        dpmm: The prior and the chain of `dpmm`.
        mixture: With `dpmm`: a fitted mixture to whose clusters the rows are assigned, instead of new ones.
        seed: Of samples, starts and the chain.

    Raises:
        ConfigError: Rows or settings that cannot be used; the message says which.
        SpaceMismatchError: The mixture belongs to another space than the embeddings.
        OutputError: Not a file of embeddings.
        MissingDependencyError: faiss or scikit-learn is not installed.

    Examples:
        >>> found = embedkit.cluster("samples.parquet", n_clusters=8)
        >>> cats = [found.labels[found.ids.index(f"samples/{name}.jpg")] for name in ("cat", "cat-closer")]
        >>> bool(cats[0] == cats[1])
        True
    """
    if algorithm not in ALGORITHMS:
        raise ConfigError(f"algorithm: expected one of {', '.join(ALGORITHMS)}, found {algorithm!r}")
    if n_clusters is not None and algorithm not in ("kmeans", "spherical_kmeans"):
        raise ConfigError(f"n_clusters: {algorithm} infers the number of clusters; leave it out")
    if algorithm != "dpmm" and (dpmm is not None or mixture is not None):
        raise ConfigError(f"dpmm and mixture go with algorithm='dpmm', found {algorithm!r}")
    if mixture is not None and (dpmm is not None or reduce is not None):
        raise ConfigError(
            "mixture: it is already fitted and has its own projection; leave dpmm and reduce out"
        )
    if (starts is not None and starts < 1) or min_cluster_size < 2:
        raise ConfigError(
            f"expected starts of 1 and min_cluster_size of 2 or more, found {starts} and {min_cluster_size}"
        )
    source = _Source.open(embeddings, directions=algorithm == "spherical_kmeans")
    points = source.vectors
    n_clusters = None if n_clusters is None else as_count(n_clusters, "n_clusters")
    if n_clusters is not None and not 1 <= n_clusters <= len(points):
        raise ConfigError(
            f"n_clusters: expected 1 to {len(points)}, the rows of {source.where}; found {n_clusters}"
        )
    if mixture is not None:
        fingerprint = source.metadata.fingerprint if source.metadata else None
        mixture._check(points.shape[1], fingerprint, source.where)
        labels, probabilities = mixture.assign(points)
        found = {"mixture": mixture.name, "mixture_k": len(mixture)}
        return _finish(
            source, mixture.project, labels, probabilities, algorithm, found, mixture, k=len(mixture)
        )

    reduction = _reduction(reduce, points, algorithm, seed)
    if reduction is not None:
        points = reduction.apply(points)
    parameters: dict[str, Any] = {
        "seed": seed,
        "reduction": reduction.to_json() if reduction else None,
        "rows": len(points),
    }
    fitted: GaussianMixture | None = None
    if algorithm == "hdbscan":
        labels, probabilities = _hdbscan(points, min_cluster_size, source.where)
        parameters["min_cluster_size"] = min_cluster_size
    elif algorithm == "dpmm":
        _check_width(points, "a mixture of full Gaussians", source.where)
        config = dpmm or DPMMConfig()
        fit = dpmm_.fit(points, config, seed=seed)
        labels, probabilities = fit.labels, fit.probabilities
        fitted = _over_embeddings(fit.mixture, reduction, source.metadata)
        parameters |= {"dpmm": asdict(config), "log_joint": round(fit.log_joint, 3)}
        parameters["k_share"] = {
            str(count): round(times / sum(fit.k_counts.values()), 4) for count, times in fit.k_counts.items()
        }
    else:
        spherical = algorithm == "spherical_kmeans"
        if spherical:
            points = kmeans.unit(points)
        if n_clusters is None:
            if len(points) < 3:
                raise ConfigError(
                    f"n_clusters: {source.where} has {len(points)} rows, too few to choose from; give a number"
                )
            n_clusters, silhouettes = kmeans.choose_k(points, spherical=spherical, seed=seed)
            parameters["silhouettes"] = {str(tried): round(value, 6) for tried, value in silhouettes.items()}
        starts = max(1, min(10, 1000 // n_clusters)) if starts is None else starts
        trained = kmeans.train(points, n_clusters, spherical=spherical, starts=starts, seed=seed)
        labels, probabilities = trained.assign(points)
        parameters |= {"n_clusters": n_clusters, "starts": starts, "trained_rows": trained.rows}
    order = _largest_first(labels)
    number = np.full(int(labels.max(initial=-1)) + 2, -1)  # the last one is for noise
    number[order] = np.arange(len(order))
    return _finish(source, points, number[labels], probabilities, algorithm, parameters, fitted, k=len(order))


@dataclass(frozen=True, eq=False)
class _Source:
    """The rows to cluster, checked."""

    ids: list[str]
    parts: np.ndarray
    vectors: np.ndarray
    metadata: Metadata | None
    where: str

    @classmethod
    def open(
        cls,
        source: Embeddings | np.ndarray | str | os.PathLike[str],
        *,
        directions: bool,
    ) -> _Source:
        """Check rows; `directions`: refuse rows of zeros. In embeddings of images these are always refused."""
        where = "the embeddings"
        if isinstance(source, (str, os.PathLike)):
            where = os.fspath(source)
            source = Embeddings.load(source)
        elif isinstance(source, Embeddings):
            where = source._where
        metadata: Metadata | None = None
        if isinstance(source, Embeddings):
            ids, parts, vectors, metadata = source.ids, source.parts, source.vectors, source.metadata
            if len(set(ids)) < len(ids) and len(set(zip(ids, parts.tolist(), strict=True))) < len(ids):
                raise ConfigError(f"{where}: an id occurs twice; embed the images into a new file")
        else:
            vectors = as_numbers(source, where)
            ids, parts = [str(row) for row in range(len(vectors))], np.zeros(len(vectors), np.int32)
        if len(vectors) < 2 or not vectors.shape[1]:
            rows = {0: "no row", 1: "one row"}.get(len(vectors), "no column")
            raise ConfigError(f"{where}: expected 2 rows or more to cluster, found {rows}")
        zeros = not directions and metadata is None
        largest, different = 0.0, False
        for start in range(0, len(vectors), _BLOCK):
            block = vectors[start : start + _BLOCK]
            found = check_rows(block, start, ids.__getitem__, where, zeros=zeros, largest=LARGEST_SQUARED)
            largest = max(largest, float(found.max()))
            different = different or bool((block != vectors[0]).any())
        if not different:
            raise ConfigError(f"{where}: all {len(vectors)} rows are equal, so there is nothing to cluster")
        if largest < SMALLEST_SQUARED:  # squared distances would vanish in float32
            raise ConfigError(
                f"{where}: the largest number is {largest:.3g}, and {SMALLEST_SQUARED:g} is the least that can be "
                "clustered; scale all rows up"
            )
        vectors = vectors.astype(np.float32, copy=False)
        return cls(ids, parts, vectors, metadata, where)


def _reduction(
    reduce: str | Reduction | None, points: np.ndarray, algorithm: str, seed: int
) -> Reduction | None:
    if reduce is None:
        return None
    if isinstance(reduce, str):
        name, dim = parse_reduction(reduce)
        return fit_reduction(points, name, dim, seed=seed)
    if len(reduce.center) != points.shape[1]:
        raise ConfigError(
            f"reduce: it was fitted on {len(reduce.center)} columns and the embeddings have {points.shape[1]}"
        )
    return reduce


def _check_width(points: np.ndarray, what: str, where: str) -> None:
    if points.shape[1] > WIDEST:
        raise ConfigError(
            f"{where}: {what} does not work in {points.shape[1]} dimensions (at most {WIDEST}); "
            "reduce them first, for example with reduce='pca:32' (--reduce pca:32)"
        )


def _hdbscan(points: np.ndarray, min_cluster_size: int, where: str) -> tuple[np.ndarray, np.ndarray]:
    _check_width(points, "HDBSCAN", where)
    if len(points) > HDBSCAN_ROWS:
        raise ConfigError(
            f"{where}: HDBSCAN would take hours for {len(points)} rows (at most {HDBSCAN_ROWS}); "
            "use kmeans or dpmm, or a sample of the rows"
        )
    if min_cluster_size > len(points):
        raise ConfigError(
            f"min_cluster_size: expected 2 to {len(points)}, the rows; found {min_cluster_size}"
        )
    with requires("algorithm='hdbscan'", "analysis", package="scikit-learn"):
        from sklearn.cluster import HDBSCAN
    found = HDBSCAN(min_cluster_size=min_cluster_size, copy=True).fit(points.astype(np.float64))
    return found.labels_.astype(np.int64), found.probabilities_.astype(np.float64)


def _over_embeddings(
    mixture: GaussianMixture, reduction: Reduction | None, metadata: Metadata | None
) -> GaussianMixture:
    """Convert a mixture over reduced rows to one over the embeddings."""
    center, components = mixture.center, mixture.components
    if reduction is not None:
        center, components = reduction.center, reduction.components
    spaces = (metadata.fingerprint,) if metadata else ()
    return GaussianMixture(
        mixture.weights, mixture.means, mixture.precision_cholesky, center, components, False, spaces
    )


def _largest_first(labels: np.ndarray) -> np.ndarray:
    """The labels that occur, by descending size, without noise."""
    count = np.bincount(labels[labels >= 0]) if (labels >= 0).any() else np.zeros(0, np.int64)
    order = np.argsort(-count, kind="stable")
    return order[count[order] > 0]


def _finish(
    source: _Source,
    points: Any,
    labels: np.ndarray,
    probabilities: np.ndarray,
    algorithm: str,
    parameters: dict[str, Any],
    mixture: GaussianMixture | None,
    *,
    k: int,
) -> Clustering:
    """Compute sizes and exemplars; `points`: the clustered rows, or a function that computes them for a block."""

    def block(rows: slice) -> np.ndarray:
        result: np.ndarray = (
            points(source.vectors[rows]) if callable(points) else points[rows].astype(np.float64)
        )
        return result

    slices = [slice(start, start + _BLOCK) for start in range(0, len(labels), _BLOCK)]
    sizes = np.bincount(labels[labels >= 0], minlength=k)
    sums = np.zeros((k + 1, block(slice(0, 1)).shape[1]))  # the last one is for noise
    for rows in slices:
        order = np.argsort(labels[rows], kind="stable")
        here, starts = np.unique(labels[rows][order], return_index=True)
        sums[here] += np.add.reduceat(block(rows)[order], starts, axis=0)
    means = sums / np.maximum(np.append(sizes, 1), 1)[:, None]
    distances = np.empty(len(labels))
    for rows in slices:
        distances[rows] = np.square(block(rows) - means[labels[rows]]).sum(1)
    order = np.lexsort((distances, labels))
    starts = np.searchsorted(labels[order], np.arange(k))
    exemplars = [
        order[start : start + min(EXEMPLARS, size)].tolist()
        for start, size in zip(starts, sizes, strict=True)
    ]
    return Clustering(
        source.ids,
        source.parts,
        labels,
        probabilities,
        sizes,
        exemplars,
        algorithm,
        parameters,
        source.metadata,
        mixture,
    )
