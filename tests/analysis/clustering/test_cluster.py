"""Clusters of rows: each method against its definition or its library, files, folders and the command."""

import itertools
import json
import os
import shutil
import sys
import tarfile
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner

faiss = pytest.importorskip("faiss")
sklearn_cluster = pytest.importorskip("sklearn.cluster")
metrics = pytest.importorskip("sklearn.metrics")
pytest.importorskip("scipy")

from embedkit.analysis.clustering import cluster as clustering
from embedkit.analysis.clustering import kmeans
from embedkit.analysis.clustering import scores as agreement_
from embedkit.analysis.clustering.cluster import Clustering, cluster
from embedkit.analysis.clustering.dpmm import DPMMConfig
from embedkit.analysis.clustering.reduction import fit_reduction
from embedkit.analysis.clustering.scores import clustering_scores
from embedkit.cli.cluster import cluster as command
from embedkit.embeddings.metadata import Metadata
from embedkit.embeddings.parquet import read_metadata, write_rows
from embedkit.embeddings.schema import schema_of
from embedkit.embeddings.table import Embeddings
from embedkit.errors import (
    ConfigError,
    EntryError,
    MissingDependencyError,
    OutputError,
    SourceError,
    SpaceMismatchError,
)
from embedkit.model.mixture import GaussianMixture
from embedkit.workflows.cluster_folders import cluster_folders

#: The module: the attribute of its package is the function of the same name.
folders = sys.modules["embedkit.workflows.cluster_folders"]

CENTRES = np.array([[0.0, 8, 0], [9, 0, 0], [0, 0, 9], [9, 9, 9]])


def blobs(n=240, seed=0, scale=0.6):
    rng = np.random.default_rng(seed)
    labels = np.sort(rng.choice(4, n, p=[0.4, 0.3, 0.2, 0.1]))
    return (CENTRES[labels] + scale * rng.standard_normal((n, 3))).astype(np.float32), labels


def embeddings(vectors, ids=None, fingerprint="f" * 64, labels=None):
    dim = vectors.shape[1]
    metadata = Metadata(
        entry="a-b.c", manifest_sha256="0" * 64, fingerprint=fingerprint, dim=dim, normalized=False
    )
    ids = ids or [f"p/{i}.jpg" for i in range(len(vectors))]
    return Embeddings(ids, np.zeros(len(vectors), np.int32), vectors, metadata, labels or {})


def write(path, found):
    """An Embeddings file."""
    n, dim = found.vectors.shape
    schema = schema_of(found.metadata, dict.fromkeys(found.labels, "string"), sha256=False)
    columns = {
        "id": found.ids,
        "part": pa.array(found.parts),
        "embedding": pa.FixedSizeListArray.from_arrays(
            pa.array(found.vectors.reshape(-1), pa.float32()), dim
        ),
        "size": pa.array(np.zeros(n, np.int64)),
        "mtime_ns": pa.array(np.zeros(n, np.int64)),
        **found.labels,
    }
    write_rows([pa.table(columns).cast(schema)] if n else [], path, schema)
    return path


# ---- methods ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("kmeans", {"n_clusters": 4}),
        ("kmeans", {}),
        ("spherical_kmeans", {"n_clusters": 4}),
        ("spherical_kmeans", {}),
        ("hdbscan", {}),
        ("dpmm", {}),
        ("dpmm", {"dpmm": DPMMConfig(init_k=7)}),
        ("kmeans", {"n_clusters": 4, "reduce": "whiten:2"}),
    ],
)
def test_every_method_finds_what_is_there(method, settings):
    points, labels = blobs()
    found = cluster(embeddings(points), method, **settings)
    scores = found.scores(labels)
    assert len(found) == 4 and scores.acc > 0.95 and scores.ari > 0.95
    assert found.sizes.tolist() == np.bincount(found.labels[found.labels >= 0]).tolist()
    assert (np.diff(found.sizes) <= 0).all()  # the largest first
    assert found.probabilities.min() >= 0 and found.probabilities.max() <= 1
    assert found.algorithm == method and json.loads(json.dumps(found.parameters)) == found.parameters
    again = cluster(points, method, **settings)
    assert np.array_equal(again.labels, found.labels)  # the seed repeats, and an array is as good


def test_exemplars_are_the_rows_nearest_to_the_mean():
    points, _ = blobs()
    found = cluster(embeddings(points), "kmeans", 4)
    for k in range(4):
        rows = np.flatnonzero(found.labels == k)
        mean = points[rows].astype(float).mean(0)
        near = sorted(rows, key=lambda row: np.linalg.norm(points[row] - mean))[:3]
        assert found.exemplars[k] == near
        assert found.exemplar_ids(k) == [f"p/{row}.jpg" for row in near]


def test_k_means_is_as_good_as_scikit_learns():
    points = np.random.default_rng(0).standard_normal((3000, 8)).astype(np.float32)
    trained = kmeans.train(points, 30, seed=0)
    other = sklearn_cluster.KMeans(30, n_init=10, random_state=0).fit(points)
    assert kmeans.nearest(points, trained.centers)[1].sum() < 1.01 * other.inertia_


def test_probabilities_are_those_of_the_mixture_behind_k_means():
    points, _ = blobs(scale=4.0)
    trained = kmeans.train(points, 4)
    labels, probabilities = trained.assign(points)
    squares = np.square(points[:, None].astype(float) - trained.centers).sum(2)
    variance = squares.min(1).sum() / points.size
    p = np.exp(-squares / (2 * variance))
    p /= p.sum(1, keepdims=True)
    assert np.array_equal(labels, squares.argmin(1))
    np.testing.assert_allclose(probabilities, p.max(1), rtol=1e-3)

    unit = kmeans.unit(points)
    trained = kmeans.train(unit, 4, spherical=True)
    np.testing.assert_allclose(np.linalg.norm(trained.centers, axis=1), 1, atol=1e-5)
    cosines = unit.astype(float) @ trained.centers.T
    r = cosines.max(1).mean()
    p = np.exp((r * 3 - r**3) / (1 - r**2) * cosines)
    labels, probabilities = trained.assign(unit)
    assert np.array_equal(labels, cosines.argmax(1))
    np.testing.assert_allclose(probabilities, p.max(1) / p.sum(1), rtol=1e-3)


def test_spherical_k_means_sees_directions_alone():
    points, _ = blobs()
    lengths = np.random.default_rng(0).uniform(0.1, 50, (len(points), 1)).astype(np.float32)
    one, other = (cluster(rows, "spherical_kmeans", 4).labels for rows in (points, points * lengths))
    assert metrics.adjusted_rand_score(one, other) == 1


def test_starts_are_different_rows_even_where_many_are_equal():
    points = np.repeat(np.eye(4, dtype=np.float32), 30, axis=0)
    for seed in range(5):
        starts = kmeans.plus_plus(points, 4, np.random.default_rng(seed))
        assert len(np.unique(starts, axis=0)) == 4
    assert len(kmeans.plus_plus(points, 6, np.random.default_rng(0))) == 6
    found = cluster(points, "kmeans", 6)  # only 4 can have a row
    assert len(found) == 4 and found.parameters["n_clusters"] == 6 and found.sizes.tolist() == [30] * 4


def test_far_from_the_origin_nothing_is_lost():
    points, labels = blobs()
    assert cluster(points + 3000, "kmeans", 4).scores(labels).ari > 0.95


def test_silhouettes_are_scikit_learns():
    points, _ = blobs(100)
    rng = np.random.default_rng(0)
    distance = np.linalg.norm(points[:, None] - points, axis=2)
    for k in (2, 5, 30):
        labels = rng.integers(0, k, 100)
        labels[0] = k  # alone in its cluster
        expected = metrics.silhouette_score(points, labels)
        assert kmeans.mean_silhouette(distance, labels) == pytest.approx(expected, abs=1e-6)
    assert kmeans.mean_silhouette(distance, np.zeros(100, int)) == -1


def test_the_choice_of_k_is_recorded_and_bounded(monkeypatch):
    points, _ = blobs(900)
    monkeypatch.setattr(kmeans, "SILHOUETTE_ROWS", 200)
    found = cluster(points)
    tried = {int(k): value for k, value in found.parameters["silhouettes"].items()}
    assert found.parameters["n_clusters"] == 4 == max(tried, key=tried.get)
    assert list(tried)[:3] == [2, 3, 4] and max(tried) <= 200 // 3 and len(tried) < 30
    assert cluster(points[[0, 300, 899]]).parameters["n_clusters"] == 2


def test_hdbscan_is_scikit_learns_with_the_largest_first():
    points, _ = blobs(scale=1.5)
    points[::40] *= 5
    found = cluster(points, "hdbscan", min_cluster_size=8)
    other = sklearn_cluster.HDBSCAN(min_cluster_size=8, copy=True).fit(points.astype(float))
    assert metrics.adjusted_rand_score(found.labels, other.labels_) == 1
    assert (
        np.array_equal(found.labels < 0, other.labels_ < 0) and found.noise == (other.labels_ < 0).sum() > 0
    )
    np.testing.assert_allclose(found.probabilities, other.probabilities_)
    # no cluster at all is an answer
    alone = cluster(np.random.default_rng(0).random((9, 2)), "hdbscan", min_cluster_size=9)
    assert len(alone) in (0, 1) and alone.noise == 9 - alone.sizes.sum()


def test_reductions_are_fitted_or_taken_and_recorded():
    points, _ = blobs()
    found = cluster(points, "kmeans", 4, reduce="pca:2")
    assert found.parameters["reduction"]["method"] == "pca" and found.parameters["reduction"]["dim"] == 2
    assert cluster(points, "kmeans", 4).parameters["reduction"] is None
    taken = cluster(points, "kmeans", 4, reduce=fit_reduction(points, "pca", 2))
    assert np.array_equal(taken.labels, found.labels)
    with pytest.raises(ConfigError, match="fitted on 3 columns and the embeddings have 2"):
        cluster(points[:, :2], "kmeans", 4, reduce=fit_reduction(points, "pca", 2))


def test_a_mixture_that_dpmm_fitted_assigns_further_embeddings():
    points, labels = blobs()
    found = cluster(embeddings(points), "dpmm", reduce="whiten:2")
    assert found.mixture.spaces == ("f" * 64,)
    again, probabilities = found.mixture.assign(points)
    assert np.array_equal(again, found.labels)
    np.testing.assert_allclose(probabilities, found.probabilities, atol=1e-4)
    others, truth = blobs(seed=1)
    taken = cluster(embeddings(others), "dpmm", mixture=found.mixture)
    assert taken.scores(truth).acc > 0.95 and len(taken) == 4
    assert np.array_equal(taken.labels, found.mixture.assign(others)[0])  # the mixture's own numbers
    assert sum(found.parameters["k_share"].values()) == pytest.approx(1)
    # of clusters without a row there is nothing to show
    few = cluster(embeddings(others[truth == 0]), "dpmm", mixture=found.mixture)
    assert len(few) == 4 and sorted(map(len, few.exemplars)) == [0, 0, 0, 3]


def test_memory_does_not_grow_with_rows_times_clusters(monkeypatch):
    monkeypatch.setattr(kmeans, "_BLOCK", 1 << 16)
    monkeypatch.setattr(kmeans, "FEWEST_ROWS", 2000)
    monkeypatch.setattr(kmeans, "ITERATIONS", 3)
    monkeypatch.setattr(clustering, "_BLOCK", 1 << 12)
    points = np.random.default_rng(0).standard_normal((100_000, 4)).astype(np.float32)
    trained = kmeans.train(points, 60, starts=1)
    tracemalloc.start()
    try:
        trained.assign(points)
        assigned = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        cluster(points, "kmeans", 60, starts=1)
        clustered = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # all distances at once would be 24 MB; labels and probabilities of all rows are 1.6
    assert assigned < 5e6
    assert clustered < 20e6  # ids, labels, probabilities, distances and an order of 100,000 rows


# ---- scores ----------------------------------------------------------------------------------------------


def test_scores_are_scikit_learns_and_accuracy_is_the_best_of_all_matchings():
    rng = np.random.default_rng(0)
    for k, classes in ((3, 3), (5, 3), (3, 5)):
        found, truth = rng.integers(0, k, 80), rng.integers(0, classes, 80)
        truth[:40] = found[:40] % classes
        scores = clustering_scores(found, truth)
        assert scores.nmi == pytest.approx(metrics.normalized_mutual_info_score(truth, found))
        assert scores.ari == pytest.approx(metrics.adjusted_rand_score(truth, found))
        names = [*range(classes), *[-7] * max(0, k - classes)]
        best = max(
            sum(names[c] == t for c, t in zip(found, truth, strict=True))
            for names in itertools.permutations(names, k)
        )
        assert scores.acc == best / 80


def test_names_of_clusters_and_classes_do_not_matter():
    _, labels = blobs()
    scores = clustering_scores(labels * 3 % 5 + 2, [f"class {label}" for label in labels])
    assert (scores.acc, scores.nmi, scores.ari, scores.rows, scores.classes) == pytest.approx(
        (1, 1, 1, 240, 4)
    )


def test_noise_is_an_error_and_rows_without_a_label_are_left_out():
    found = np.array([0, 0, 1, 1, -1, -1])
    scores = clustering_scores(found, ["a", "a", "b", "b", "c", "c"])
    assert scores.acc == pytest.approx(4 / 6) and scores.nmi == pytest.approx(1)
    scores = clustering_scores(found, ["a", "a", "b", None, "", float("nan")])
    assert scores.acc == 1 and scores.rows == 3 and scores.classes == 2
    assert clustering_scores(np.full(3, -1), ["a", "b", "c"]).acc == 0


def test_labels_that_are_none(monkeypatch):
    with pytest.raises(ConfigError, match="one for each of 3 rows, found 2"):
        clustering_scores(np.zeros(3, int), ["a", "b"])
    with pytest.raises(ConfigError, match="all are empty"):
        clustering_scores(np.zeros(3, int), ["", None, ""])
    monkeypatch.setattr(agreement_, "_MOST_CELLS", 3)
    with pytest.raises(ConfigError, match="4 different ones among 4 rows are names rather than classes"):
        clustering_scores(np.zeros(4, int), ["a", "b", "c", "d"])


# ---- bad input -------------------------------------------------------------------------------------------


def with_row(row):
    points = blobs()[0]
    points[5] = row
    return points


@pytest.mark.parametrize(
    ("source", "method", "settings", "message"),
    [
        (
            embeddings(with_row(np.nan)),
            "kmeans",
            {"n_clusters": 2},
            r"row 5 \(p/5\.jpg\) holds NaN or infinity; embed",
        ),
        (with_row(np.inf), "dpmm", {}, r"row 5 \(5\) holds NaN"),
        (embeddings(with_row(0)), "kmeans", {"n_clusters": 2}, r"row 5 \(p/5\.jpg\) is all zeros"),
        (with_row(0), "spherical_kmeans", {"n_clusters": 2}, "is all zeros"),
        (np.ones((1, 3)), "kmeans", {"n_clusters": 1}, "2 rows or more to cluster, found one row"),
        (np.ones((0, 3)), "kmeans", {"n_clusters": 1}, "found no row"),
        (np.ones((3, 0)), "kmeans", {"n_clusters": 1}, "found no column"),
        (
            np.ones(3),
            "kmeans",
            {"n_clusters": 1},
            r"expected numbers \(N, D\), found float64 of shape \(3,\)",
        ),
        (np.array([["a"], ["b"]]), "kmeans", {}, r"expected numbers \(N, D\)"),
        (np.ones((9, 3)), "dpmm", {}, "all 9 rows are equal"),
        (
            blobs()[0],
            "kmeans",
            {"n_clusters": 241},
            "n_clusters: expected 1 to 240, the rows of the embeddings; found 241",
        ),
        (blobs()[0], "kmeans", {"n_clusters": 0}, "n_clusters: expected 1 to 240"),
        (blobs()[0][[0, -1]], "kmeans", {}, "has 2 rows, too few to choose from; give a number"),
        (blobs()[0], "dpmm", {"n_clusters": 4}, "dpmm infers the number of clusters; leave it out"),
        (blobs()[0], "agglomerative", {}, "expected one of kmeans, spherical_kmeans, hdbscan, dpmm"),
        (blobs()[0], "kmeans", {"dpmm": DPMMConfig()}, "go with algorithm='dpmm'"),
        (blobs()[0], "kmeans", {"starts": 0}, "starts of 1"),
        (blobs()[0], "hdbscan", {"min_cluster_size": 999}, "min_cluster_size: expected 2 to 240"),
        (np.random.rand(9, 65), "hdbscan", {}, r"65 dimensions \(at most 64\); reduce .*--reduce pca:32"),
        (np.random.rand(9, 65), "dpmm", {}, r"65 dimensions \(at most 64\); reduce .*--reduce pca:32"),
        (embeddings(blobs(2)[0], ["a", "a"]), "kmeans", {"n_clusters": 1}, "an id occurs twice"),
    ],
)
def test_what_cannot_be_clustered_is_one_sentence(source, method, settings, message):
    with pytest.raises(ConfigError, match=message) as error:
        cluster(source, method, **settings)
    assert "\n" not in str(error.value)


def test_the_origin_is_a_point_of_the_plane_and_parts_of_a_image_share_an_id():
    assert len(cluster(with_row(0), "kmeans", 4)) == 4
    points = blobs(4)[0]
    parts = Embeddings(["a"] * 4, np.arange(4, dtype=np.int32), points, embeddings(points).metadata)
    found = cluster(parts, "kmeans", 1)
    assert found.exemplar_ids(0) == [f"a#{part}" if part else "a" for part in found.exemplars[0]]


def test_hdbscan_of_too_many_rows(monkeypatch):
    monkeypatch.setattr(clustering, "HDBSCAN_ROWS", 100)
    with pytest.raises(ConfigError, match=r"240 rows \(at most 100\); use kmeans or dpmm"):
        cluster(blobs()[0], "hdbscan")


def test_embeddings_of_another_space_than_the_mixture():
    points, _ = blobs()
    mixture = cluster(embeddings(points), "dpmm", dpmm=DPMMConfig(iterations=5)).mixture
    with pytest.raises(
        SpaceMismatchError, match="belongs to space ffffffffffff and the set of embeddings to eeeeeeeeeeee"
    ):
        cluster(embeddings(points, fingerprint="e" * 64), "dpmm", mixture=mixture)
    with pytest.raises(ConfigError, match="already fitted"):
        cluster(points, "dpmm", mixture=mixture, reduce="pca:2")


@pytest.mark.parametrize(
    ("module", "act"),
    [
        ("faiss", lambda: cluster(blobs()[0], "kmeans", 2)),
        ("sklearn.cluster", lambda: cluster(blobs()[0], "hdbscan")),
        ("scipy.optimize", lambda: clustering_scores(np.zeros(2, int), ["a", "b"])),
    ],
)
def test_a_missing_package_is_named_with_its_pip_line(monkeypatch, module, act):
    import sys

    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=r"pip install '\.\[analysis\]'"):
        act()


# ---- files -----------------------------------------------------------------------------------------------


def test_saved_and_read_again(tmp_path):
    points, _ = blobs(scale=1.5)
    found = cluster(embeddings(points), "hdbscan", reduce="pca:2")
    found.save(tmp_path / "c.parquet")
    table = pq.read_table(tmp_path / "c.parquet")
    assert table.column_names == ["id", "part", "cluster", "probability"]
    card = json.loads(table.schema.metadata[b"embedkit.clusters"])
    assert card["fingerprint"] == "f" * 64 and card["parameters"]["reduction"]["dim"] == 2
    read = Clustering.load(tmp_path / "c.parquet")
    assert read.ids == found.ids and read.metadata == found.metadata and read.exemplars == found.exemplars
    assert np.array_equal(read.labels, found.labels) and np.array_equal(read.sizes, found.sizes)
    assert read.algorithm == "hdbscan" and read.parameters == found.parameters
    np.testing.assert_allclose(read.probabilities, found.probabilities, atol=1e-7)
    with pytest.raises(OutputError, match="without metadata"):
        read_metadata(tmp_path / "c.parquet")  # clusters are never taken for embeddings


def test_files_that_are_none(tmp_path):
    write(tmp_path / "e.parquet", embeddings(blobs()[0]))
    (tmp_path / "x.parquet").write_bytes(b"nothing")
    for name in ("e.parquet", "x.parquet", "gone.parquet"):
        with pytest.raises(OutputError, match=r"is not a file of clusters \(.*\); write one with"):
            Clustering.load(tmp_path / name)
    with pytest.raises(OutputError, match="cannot be read as Parquet"):
        cluster(tmp_path / "x.parquet", "kmeans", 2)
    write(tmp_path / "empty.parquet", embeddings(np.zeros((0, 3), np.float32)))
    with pytest.raises(
        ConfigError, match=r"empty\.parquet: expected 2 rows or more to cluster, found no row"
    ):
        cluster(tmp_path / "empty.parquet", "kmeans", 2)
    with pytest.raises(OutputError, match="cannot be written"):
        cluster(blobs()[0], "kmeans", 4).save(tmp_path / "no" / "c.parquet")


# ---- folders ---------------------------------------------------------------------------------------------


@pytest.fixture
def album(tmp_path, monkeypatch):
    """Images with clashing names, in the working folder, and a clustering of them."""
    monkeypatch.chdir(tmp_path)
    names = ["a/x.png", "b/x.png", "c/X.PNG", "c/x-2.png", "b/y.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    return names


def clusters(ids, labels, parts=None):
    labels = np.array(labels)
    sizes = np.bincount(labels[labels >= 0])
    parts = np.zeros(len(ids), np.int32) if parts is None else np.array(parts, np.int32)
    return Clustering(list(ids), parts, labels, np.ones(len(ids)), sizes, [[] for _ in sizes], "kmeans")


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_copies_lose_nothing_where_names_clash(album, tmp_path):
    before = contents(tmp_path)
    done = cluster_folders(clusters(album, [0, 0, 0, 0, -1]), "out")
    assert done.images == 5 and done.missing == []
    made = contents(tmp_path / "out")
    assert sorted(made.values()) == sorted(name.encode() for name in album)
    assert made["cluster-0/x.png"] == b"a/x.png" and made["noise/y.png"] == b"b/y.png"
    # also not where case does not tell names apart
    assert len({name.casefold() for name in made}) == 5
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_links_lead_to_the_originals(album, tmp_path):
    done = cluster_folders(clusters(album, [0, 1, 1, 1, 0]), tmp_path / "out", link=True)
    links = [path for path in done.folder.rglob("*") if path.is_symlink()]
    assert len(links) == done.images == 5
    assert sorted(path.read_bytes() for path in links) == sorted(name.encode() for name in album)
    assert all(os.path.isabs(os.readlink(path)) for path in links)


def test_a_folder_that_holds_something_is_refused_and_an_empty_one_is_not(album, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="full is not empty, and nothing is overwritten"):
        cluster_folders(clusters(album, [0] * 5), tmp_path / "full")
    assert contents(tmp_path / "full") == {"mine.txt": b"mine"}
    with pytest.raises(OutputError, match="is a file; choose another folder"):
        cluster_folders(clusters(album, [0] * 5), tmp_path / "a" / "x.png")
    with pytest.raises(OutputError, match="does not exist; create it first"):
        cluster_folders(clusters(album, [0] * 5), tmp_path / "no" / "out")
    (tmp_path / "empty").mkdir()
    assert cluster_folders(clusters(album, [0] * 5), tmp_path / "empty").images == 5


def test_images_that_are_gone_are_named_and_the_others_placed(album, tmp_path):
    (tmp_path / "a/x.png").unlink()
    done = cluster_folders(clusters(album, [0] * 5), "out")
    assert done.missing == ["a/x.png"] and done.images == 4
    with pytest.raises(SourceError, match=r"none of the 2 images exists \(the first is 'q'\).*--root"):
        cluster_folders(clusters(["q", "r"], [0, 0]), "other")
    assert not (tmp_path / "other").exists()


def test_ids_relative_to_a_root_and_names_that_are_not_utf8(album, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    odd = os.path.join(os.fsencode(tmp_path), b"\xff #.png")
    with open(odd, "wb") as file:
        file.write(b"odd")
    ids = [*album, "file:%FF%20%23.png"]
    done = cluster_folders(clusters(ids, [0] * 6), tmp_path / "out", root=tmp_path)
    assert done.images == 6 and b"odd" in contents(tmp_path / "out").values()


def test_parts_of_one_image_are_there_once_a_cluster(album, tmp_path):
    ids = ["a/x.png", "a/x.png", "a/x.png"]
    done = cluster_folders(clusters(ids, [0, 0, 1], [0, 1, 2]), "out")
    assert done.images == 2
    assert sorted(contents(tmp_path / "out")) == ["cluster-0/x.png", "cluster-1/x.png"]


def test_members_of_archives_and_rows_of_tables_are_copied_and_not_linked(album, tmp_path):
    with tarfile.open("pack.tar", "w") as tar:
        for name in album[:2]:
            tar.add(name)
    png = b"\x89PNG\r\n\x1a\nxyz"
    pq.write_table(pa.table({"image": pa.array([png, b"\xff\xd8jpg"], pa.binary())}), "rows.parquet")
    ids = [
        "pack.tar::a/x.png",
        "pack.tar::b/x.png",
        "rows.parquet::#0",
        "rows.parquet::#1",
        "pack.tar::gone.png",
    ]
    done = cluster_folders(clusters(ids, [0] * 5), "out")
    assert done.images == 4 and done.missing == ["pack.tar::gone.png"]
    assert contents(tmp_path / "out") == {
        "cluster-0/x.png": b"a/x.png",
        "cluster-0/x-2.png": b"b/x.png",
        "cluster-0/row-0.png": png,
        "cluster-0/row-1.jpg": b"\xff\xd8jpg",
    }
    with pytest.raises(
        SourceError, match=r"is inside 'pack\.tar', which a link cannot point into; use --copy-into"
    ):
        cluster_folders(clusters(ids, [0] * 5), "links", link=True)


def test_a_full_disk_leaves_nothing_half_done(album, tmp_path, monkeypatch):
    fits, calls = folders._free_name, []

    def fails(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return fits(*arguments)

    monkeypatch.setattr(folders, "_free_name", fails)
    before = contents(tmp_path)
    with pytest.raises(OutputError, match="out cannot be written .the disk is full."):
        cluster_folders(clusters(album, [0] * 5), "out")
    assert contents(tmp_path) == before and not (tmp_path / "out").exists()


def test_only_images_below_the_root_are_taken(album, tmp_path, monkeypatch):
    (tmp_path / "secret.txt").write_text("secret")
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        tar.add("a/x.png", "in.png")
    (tmp_path / "b" / "link").symlink_to(tmp_path / "a")
    monkeypatch.chdir(tmp_path / "b")
    stray = [str(tmp_path / "secret.txt"), "../secret.txt", "link/../../secret.txt", "link/../../all.tar::in.png",
             "../all.tar::in.png", "file:..%2Fsecret.txt", "/etc/passwd", "file:/etc/passwd"]  # fmt: skip
    ids = [*stray, "x.png", str(tmp_path / "b" / "y.png"), "link/x.png"]
    for root in (None, ".", tmp_path / "b"):
        done = cluster_folders(clusters(ids, [0] * len(ids)), tmp_path / "out", root=root)
        assert done.outside == stray and done.missing == []
        # A link below the root is the owner's, and so is what it leads to.
        assert sorted(contents(tmp_path / "out").values()) == [b"a/x.png", b"b/x.png", b"b/y.png"]
        shutil.rmtree(tmp_path / "out")
    with pytest.raises(SourceError, match=r"all 1 images lie outside .*b.*'../a/x.png'.*--root"):
        cluster_folders(clusters(["../a/x.png"], [0]), tmp_path / "out")
    # The folder that holds them all, for ids that are relative to the working folder.
    done = cluster_folders(clusters(["../a/x.png", "x.png"], [0, 0]), tmp_path / "out", root="..")
    assert (done.images, done.outside, done.missing) == (2, [], [])


def test_names_that_are_too_long_are_cut(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    longest, letters = "n" * 251 + ".png", "é" * 200 + ".png"
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / longest).write_bytes(folder.encode())
    with tarfile.open("pack.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name in (letters, "x/" + letters, "y." + "s" * 300):
            tar.add(tmp_path / "a" / longest, name)
    ids = [f"a/{longest}", f"b/{longest}", f"pack.tar::{letters}", f"pack.tar::x/{letters}"]
    done = cluster_folders(clusters(ids, [0] * 4), "out")
    assert done.images == 4 and done.missing == []
    made = sorted(contents(tmp_path / "out"))
    assert len(made) == 4 and all(name.endswith(".png") for name in made)


def test_an_image_that_cannot_be_read_does_not_end_it(album, tmp_path):
    (tmp_path / "a/x.png").unlink()
    os.mkfifo(tmp_path / "a/x.png")
    done = cluster_folders(clusters(album, [0] * 5), "out")
    assert done.missing == ["a/x.png"] and done.images == 4


# ---- the command -----------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run `cluster` alone: its result, whose `exception` is what the command line would print."""
    monkeypatch.chdir(tmp_path)
    app = typer.Typer()
    app.command()(command)
    points, labels = blobs(40)
    names = [f"p{i}.png" for i in range(40)]
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    found = embeddings(points, names, labels={"kind": [f"k{label}" for label in labels]})
    write(tmp_path / "e.parquet", found)
    return lambda *arguments: CliRunner().invoke(app, ["e.parquet", *map(str, arguments)])


def test_a_table_with_sizes_and_ids(run, tmp_path):
    done = run("-n", 4, "-o", "c.parquet", "--label", "kind", "--copy-into", "out")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    found = Clustering.load(tmp_path / "c.parquet")
    assert lines[0] == "cluster\trows\tshare\tnearest to its mean"
    share = f"{found.sizes[0] / 40:.1%}"
    assert lines[1] == f"0\t{found.sizes[0]}\t{share}\t{', '.join(found.exemplar_ids(0))}"
    assert lines[5:] == ["", "score\tvalue", "ACC\t1.0000", "NMI\t1.0000", "ARI\t1.0000"]
    assert "40 copies in out" in done.stderr and "c.parquet" in done.stderr
    made = contents(tmp_path / "out")
    assert all(f"cluster-{k}/{name}" in made for name, k in zip(found.ids, found.labels, strict=True))
    assert len(made) == 40


def test_json_and_links_and_reductions(run, tmp_path):
    done = run(
        "--algorithm", "dpmm", "--reduce", "pca:2", "--init-clusters", 3, "--json", "--link-into", "out"
    )
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert facts["rows"] == 40 == sum(c["size"] for c in facts["clusters"]) and facts["scores"] is None
    assert facts["parameters"]["reduction"]["dim"] == 2 and facts["parameters"]["dpmm"]["init_k"] == 3
    assert sum(path.is_symlink() for path in (tmp_path / "out").rglob("*")) == 40


def test_a_mixture_file_and_an_entry_without_one(run, tmp_path, tiny_entry):
    points = Embeddings.load(tmp_path / "e.parquet")
    mixture = cluster(points, "dpmm").mixture
    mixture.save(tmp_path / "m.safetensors")
    done = run("--algorithm", "dpmm", "--mixture", "m.safetensors", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["parameters"]["mixture"] == "m.safetensors"
    done = run("--algorithm", "dpmm", "--mixture", tiny_entry)
    assert isinstance(done.exception, EntryError) and "has no mixture.safetensors" in str(done.exception)


def test_an_entrys_mixture_takes_the_entrys_embeddings_alone(by_hand, tmp_path):
    from embedkit.hub.resolve import find_entry
    from embedkit.model.manifest import space_fingerprint

    entry = by_hand.TinyEntry()
    files = entry.files()
    dim = json.loads(files["config.json"])["embedkit"]["dim"]
    rng = np.random.default_rng(0)
    for transform, center, spaces in (("none", 0, 1), ("normalize", 0, 2), ("normalize", 1, 1)):
        mixture = GaussianMixture(
            np.ones(1), rng.random((1, dim)), np.eye(dim)[None], np.full(dim, center, float), np.eye(dim),
            transform == "normalize",
        )  # fmt: skip
        mixture.save(tmp_path / "m.safetensors")
        folder = entry.write(
            tmp_path / f"{transform}{center}" / entry.name,
            {**files, "mixture.safetensors": (tmp_path / "m.safetensors").read_bytes()},
        )
        found = find_entry(folder)
        loaded = GaussianMixture._of_entry(found)
        assert len(loaded.spaces) == spaces
        raw, unit = (space_fingerprint(found.manifest, found.config, normalized=n) for n in (False, True))
        points = rng.random((4, dim)).astype(np.float32)
        cluster(embeddings(points, fingerprint=raw), "dpmm", mixture=loaded)
        if spaces == 2:
            cluster(embeddings(points, fingerprint=unit), "dpmm", mixture=loaded)
        else:
            with pytest.raises(SpaceMismatchError, match="--no-normalize"):
                cluster(embeddings(points, fingerprint=unit), "dpmm", mixture=loaded)


def test_what_the_command_refuses(run, tmp_path):
    done = run("--label", "knid")
    assert isinstance(done.exception, ConfigError)
    assert str(done.exception) == "e.parquet has no column 'knid'; it has kind"
    assert run("--copy-into", "a", "--link-into", "b").exit_code == 2
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    done = run("-n", 2, "--copy-into", "full", "-o", "c.parquet")
    assert isinstance(done.exception, OutputError) and not (tmp_path / "c.parquet").exists()
    done = run("-n", 41)
    assert str(done.exception) == "n_clusters: expected 1 to 40, the rows of e.parquet; found 41"
