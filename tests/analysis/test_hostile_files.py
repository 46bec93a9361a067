"""Files of indexes, clusters, calibrations and mixtures, changed in every way: one sentence, or what can be used.

What is read is also used: a value that passes a reader and breaks what comes after it is a fault of the reader.
"""

import json
import os
import signal
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from embedkit.analysis.clustering.cluster import Clustering
from embedkit.analysis.index_file import MAGIC
from embedkit.analysis.matching.calibrate import calibrate
from embedkit.analysis.matching.calibration import Calibration
from embedkit.analysis.neighbors import SearchIndex
from embedkit.errors import ConfigError, EmbedkitError, EntryError, OutputError
from embedkit.model.mixture import GaussianMixture

NESTED = "[" * 100_000
VALUES = [
    None, True, 0, -1, 1, 2**31, 2**63, 10**30, 10**400, 1e308, float("nan"), "", "x", "\x1b[31m", "\ud800",
    [], [[]], {}, {"a": 1}, [1], ["x"], [10**9], [[10**9]], [[-1]], [["x"]], [None, None], [[0], [0]],
]  # fmt: skip


def attempt(faults, what, act):
    try:
        act()
    except EmbedkitError as error:
        if "\n" in str(error) or not str(error).isprintable():
            faults.append(f"{what}: {error!r}")
    except BaseException as error:
        faults.append(f"{what}: {type(error).__name__}: {error}")


# --- indexes ----------------------------------------------------------------------------------------------


@pytest.fixture(params=["flat", "ivf", "hnsw"])
def index_file(request, tmp_path):
    if request.param != "flat":
        pytest.importorskip("faiss", reason="pip install '.[analysis]'")
    rows = np.random.default_rng(0).normal(size=(1200, 8)).astype(np.float32)
    path = tmp_path / "x.index"
    SearchIndex.build(rows, request.param).save(path)
    data = path.read_bytes()
    length, _ = struct.unpack("<QI", data[-20:-8])
    return path, data[: -20 - length], json.loads(data[-20 - length : -20]), rows


def with_footer(body, footer):
    text = footer if isinstance(footer, bytes) else json.dumps(footer).encode()
    return body + text + struct.pack("<QI", len(text), zlib.crc32(text)) + MAGIC


def use_index(path, data, rows):
    path.write_bytes(data)
    index = SearchIndex.load(path)
    index.search(rows[:2], 3)
    index.search([index.names[0]], 3)


def test_indexes_whose_checksums_are_right_and_whose_values_are_not(index_file):
    path, body, footer, rows = index_file
    use_index(path, with_footer(body, footer), rows)
    faults = []
    for key in (*footer, "more"):
        for value in VALUES:
            bad = with_footer(body, {**footer, key: value})
            attempt(faults, f"{key}={value!r:.40}", lambda bad=bad: use_index(path, bad, rows))
    for section in (0, 1):
        for position in range(3):
            for value in (None, True, -1, -(10**9), 2**62, 10**30, "x", 1.5):
                sections = json.loads(json.dumps(footer["sections"]))
                sections[section][position] = value
                bad = with_footer(body, {**footer, "sections": sections})
                attempt(
                    faults,
                    f"sections[{section}][{position}]={value}",
                    lambda bad=bad: use_index(path, bad, rows),
                )
    for deep in (b"", b"{}", b"[1]", NESTED.encode(), b'{"version":' + NESTED.encode(), b"\xff"):
        attempt(
            faults, f"footer {deep[:9]}", lambda deep=deep: use_index(path, with_footer(body, deep), rows)
        )
    start = footer["sections"][1][0]
    for line in (
        b"1\n",
        b"null\n",
        b"[]\n",
        b'"a"\n',
        b'"\\ud800"\n',
        b"[" * 1000 + b"\n",
        b"9" * 5000 + b"\n",
        b"\n",
        b"\xff\n",
    ):
        names = line * 1200
        sections = [footer["sections"][0], [start, len(names), zlib.crc32(names)]]
        bad = with_footer(body[:start] + names, {**footer, "sections": sections})
        attempt(faults, f"names {line[:9]}", lambda bad=bad: use_index(path, bad, rows))
    assert faults == []


def test_an_index_that_is_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for name in (tmp_path / "fifo", tmp_path, "/dev/null", "a\0b"):
        with pytest.raises(OutputError):
            SearchIndex.load(name)


# --- clusters ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clusters(tmp_path_factory):
    labels = np.array([0, 0, 0, 1, 1, -1])
    found = Clustering(
        [f"p/{n}.jpg" for n in range(6)], np.zeros(6, np.int32), labels, np.array([1, 0.5, 1, 1, 1, 0]),
        np.array([3, 2]), [[0, 1, 2], [3, 4]], "hdbscan", {"seed": 0},
    )  # fmt: skip
    path = tmp_path_factory.mktemp("clusters") / "c.parquet"
    found.save(path)
    return path, pq.read_table(path)


def use_clusters(path, table):
    pq.write_table(table, path)
    found = Clustering.load(path)
    for cluster in range(len(found)):
        found.exemplar_ids(cluster)
    assert 0 <= found.noise <= len(found.ids) and found.sizes.sum() == len(found.ids) - found.noise
    found.save(path)


def test_clusters_with_every_other_value(clusters):
    path, table = clusters
    key = b"embedkit.clusters"
    card = json.loads(table.schema.metadata[key])
    faults = []

    def with_card(text):
        return table.replace_schema_metadata(
            {key: text if isinstance(text, (bytes, str)) else json.dumps(text)}
        )

    use_clusters(path, with_card(card))
    for name in card:
        for value in VALUES:
            bad = with_card({**card, name: value})
            attempt(faults, f"{name}={value!r:.40}", lambda bad=bad: use_clusters(path, bad))
        bad = with_card({other: card[other] for other in card if other != name})
        attempt(faults, f"no {name}", lambda bad=bad: use_clusters(path, bad))
    for text in ("", "[]", "1", NESTED, b"\xff"):
        attempt(faults, f"card {text[:9]}", lambda text=text: use_clusters(path, with_card(text)))
    for name, values in {
        "cluster": [pa.array([10**9] * 6, pa.int64()), pa.array([-5] * 6, pa.int32()), pa.array([2] * 6, pa.int32()),
                    pa.nulls(6, pa.int32()), pa.array(["x"] * 6), pa.array([1.5] * 6), pa.array([[1]] * 6)],
        "id": [pa.nulls(6, pa.string()), pa.array([1] * 6), pa.array([b"x"] * 6),
               pa.array([b"\xff"] * 6).view(pa.string()) if hasattr(pa.Array, "view") else pa.array([1] * 6)],
        "part": [pa.nulls(6, pa.int32()), pa.array(["x"] * 6)],
        "probability": [pa.nulls(6, pa.float32()), pa.array(["x"] * 6), pa.array([np.nan] * 6, pa.float32()),
                        pa.array([2] * 6, pa.float32())],
    }.items():  # fmt: skip
        for column in values:
            bad = table.set_column(table.schema.get_field_index(name), name, column)
            with pytest.raises(OutputError) as caught:
                use_clusters(path, bad)
            assert "\n" not in str(caught.value), (name, column.type)
    assert faults == []


# --- calibrations -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calibration():
    scores = np.random.default_rng(0).normal(size=400) / 9
    same = np.arange(400) < 60
    groups = ["a", "b"] * 200
    return calibrate(scores + 0.3 * same, same, 0.1, groups=groups, replicates=5).to_json()


def use_calibration(path, text):
    path.write_text(text if isinstance(text, str) else json.dumps(text), "utf-8")
    found = Calibration.load(path)
    found.probability(0.1)
    found.false_match_rate(0.1)
    assert len(found.det[0]) == len(found.det[1])
    found.save(path)


def test_calibrations_with_every_other_value(calibration, tmp_path):
    path = tmp_path / "c.json"
    use_calibration(path, calibration)
    faults = []
    for key in (*calibration, "more"):
        for value in VALUES:
            bad = {**calibration, key: value}
            attempt(faults, f"{key}={value!r:.40}", lambda bad=bad: use_calibration(path, bad))
    for part in ("curve", "spread"):
        for key in (*calibration[part], "more"):
            for value in VALUES:
                bad = {**calibration, part: {**calibration[part], key: value}}
                attempt(faults, f"{part}.{key}={value!r:.40}", lambda bad=bad: use_calibration(path, bad))
    for key in (*calibration["groups"][0], "more"):
        for value in VALUES:
            bad = {**calibration, "groups": [{**calibration["groups"][0], key: value}]}
            attempt(faults, f"groups.{key}={value!r:.40}", lambda bad=bad: use_calibration(path, bad))
    attempt(faults, "nested", lambda: use_calibration(path, NESTED))
    assert faults == []


# --- mixtures ---------------------------------------------------------------------------------------------

MIXTURE = {
    "weights": np.ones(1),
    "means": np.zeros((1, 2)),
    "precision_cholesky": np.eye(2)[None],
    "center": np.zeros(4),
    "components": np.ones((4, 2)),
}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"weights": np.array(1.0)}, r"weights: expected shape \(K\), found \(\)"),
        ({"components": np.array(1.0)}, r"components: expected shape \(Dd\), found \(\)"),
        ({"center": np.array(1.0)}, r"center: expected shape \(D\), found \(\)"),
        ({"weights": np.ones(0), "means": np.zeros((0, 2))}, "weights: .*shape"),
        ({"components": np.ones((4, 0)), "means": np.zeros((1, 0))}, "means: .*shape"),
        ({"weights": np.array([True])}, "weights: expected floating-point numbers, found bool"),
        ({"weights": np.array([1])}, "weights: expected floating-point numbers, found int64"),
        ({"weights": np.array([1 + 0j], np.complex64)}, "weights: expected floating-point numbers, found complex64"),
        ({"weights": np.array([0.5])}, "do not sum to 1"),
        ({"weights": np.array([np.nan])}, "weights: expected numbers up to"),
        ({"means": np.zeros((1, 3))}, "another shape"),
        ({"center": np.zeros(5)}, "another shape"),
        ({"precision_cholesky": np.eye(2)[None] * 1e308}, r"precision_cholesky: expected numbers up to 1e\+30"),
        ({"precision_cholesky": -np.eye(2)[None]}, "above 0 on the diagonal"),
        ({"components": np.full((4, 2), np.inf)}, "components: expected numbers up to"),
    ],
)  # fmt: skip
def test_mixtures_that_are_none(change, why, recwarn):
    with pytest.raises(EntryError, match=why) as caught:
        GaussianMixture.load(save({**MIXTURE, **change}))
    assert "\n" not in str(caught.value) and not recwarn.list


def test_the_largest_mixture_takes_the_largest_embeddings(recwarn):
    """What a file may hold and what float32 may hold together stay finite."""
    big = {**MIXTURE, "components": np.full((4, 2), 1e30), "precision_cholesky": np.eye(2)[None] * 1e30}
    big |= {"weights": np.array([0.5, 0.5]), "means": np.array([[1e30, 0], [-1e30, 0]])}
    big["precision_cholesky"] = np.repeat(big["precision_cholesky"], 2, 0)
    rows = np.full((3, 4), np.finfo(np.float32).max, np.float32)
    labels, probabilities = GaussianMixture.load(save(big)).assign(rows)
    assert np.isfinite(probabilities).all() and not recwarn.list
    for bad in (rows * np.float64(2), np.full((3, 4), np.nan), np.full((3, 4), np.inf, np.float16)):
        with pytest.raises(ConfigError, match="NaN, infinity or numbers above"):
            GaussianMixture.load(save(big)).assign(bad)


@given(st.binary(max_size=60), st.integers(0, 500), st.integers(0, 30))
@settings(max_examples=150)
def test_any_bytes_are_a_mixture_or_one_sentence(noise, at, gone):
    good = save(MIXTURE, {"transform": "none", "spaces": ""})
    for data in (noise, good[:at] + noise + good[at + gone :]):
        try:
            GaussianMixture.load(data).assign(np.ones((1, 4)))
        except EmbedkitError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("metadata", [{"transform": "other"}, {"transform": ""}, {"spaces": "\x00"}])
def test_metadata_of_mixtures(metadata):
    try:
        GaussianMixture.load(save(MIXTURE, metadata))
    except EntryError as error:
        assert "transform: expected one of none, normalize" in str(error)
    else:
        assert "spaces" in metadata


# --- writers that are killed ------------------------------------------------------------------------------

WRITERS = {
    "clusters": (
        "from embedkit.analysis.clustering.cluster import Clustering\n"
        "def make(n): return Clustering([f'{i}.jpg' for i in range(n)], np.zeros(n, 'i4'), np.zeros(n, int), "
        "np.ones(n), np.array([n]), [[0]], 'kmeans')\n",
        lambda path: len(Clustering.load(path).ids),
    ),
    "calibration": (
        "from embedkit.analysis.matching.calibrate import calibrate\n"
        "def make(n): return calibrate(np.arange(n) / n, np.arange(n) % 2 == 0, 0.2, replicates=2)\n",
        lambda path: 2 * Calibration.load(path).genuine,
    ),
    "mixture": (
        "from embedkit.model.mixture import GaussianMixture\n"
        "def make(n):\n"
        "    return GaussianMixture(np.ones(1), np.zeros((1, 2)), np.eye(2)[None], np.zeros(n), np.ones((n, 2)))\n",
        lambda path: GaussianMixture.load(path).dim,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("pause", [0.03, 0.08, 0.13])
def test_whenever_a_writer_is_killed_the_file_is_one_of_the_two(kind, pause, tmp_path):
    make, read = WRITERS[kind]
    path = tmp_path / "file"
    code = (
        f"import sys, numpy as np\n{make}"
        "a, b = make(3000), make(4000)\n"
        "a.save(sys.argv[1]); print('on', flush=True)\n"
        "while True: b.save(sys.argv[1]); a.save(sys.argv[1])\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    try:
        assert writer.stdout.readline() == b"on\n"
        time.sleep(pause)
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
    assert read(path) in (3000, 4000)
    assert all(other.name.startswith(".file.") for other in tmp_path.iterdir() if other != path)
