"""Search: exact kinds against a naive loop, approximate ones by the recall that they state, files byte by byte."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import rounding

from embedkit._io.atomic import replacing
from embedkit.analysis import neighbors as module
from embedkit.analysis import vectors as blocks
from embedkit.analysis.neighbors import SearchIndex
from embedkit.embeddings.metadata import Metadata
from embedkit.embeddings.table import Embeddings
from embedkit.errors import ConfigError, MissingDependencyError, OutputError, SpaceMismatchError

METADATA = Metadata(
    entry="linear-tiny.noise", manifest_sha256="a" * 64, fingerprint="b" * 64, dim=12, normalized=True
)
KINDS = ("flat", "ivf", "hnsw")


def embeddings(count: int = 3000, metadata: Metadata = METADATA) -> Embeddings:
    """Rows around 60 centres, as embeddings lie."""
    rng = np.random.default_rng(0)
    centres = rng.normal(0, 1, (60, 12))
    vectors = centres[rng.integers(0, 60, count)] + rng.normal(0, 0.5, (count, 12))
    ids = [f"p/{index}.jpg" for index in range(count)]
    return Embeddings(ids, np.zeros(count, np.int32), vectors.astype(np.float32), metadata)


@pytest.fixture(scope="module")
def data() -> Embeddings:
    return embeddings()


@pytest.fixture(scope="module", params=KINDS)
def index(request, data) -> SearchIndex:
    if request.param != "flat":
        pytest.importorskip("faiss", reason="pip install '.[analysis]'")
    return SearchIndex.build(data, request.param)


def exact(data: Embeddings, queries: np.ndarray, k: int) -> np.ndarray:
    base = data.vectors.astype(float)
    base /= np.linalg.norm(base, axis=1, keepdims=True)
    unit = queries.astype(float) / np.linalg.norm(queries.astype(float), axis=1, keepdims=True)
    return np.array([np.argsort(-(base @ query), kind="stable")[:k] for query in unit])


def test_search_by_vectors(index, data):
    queries = np.random.default_rng(1).normal(0, 1, (40, 12)).astype(np.float32)
    expected = exact(data, queries, 5)
    found = index.search(queries, 5)
    share = np.mean([len(set(a) & set(b)) / 5 for a, b in zip(expected, found.rows, strict=True)])
    assert share == 1 if index.kind == "flat" else share > 0.6  # such queries are unlike all rows
    assert (np.diff(found.cosines, axis=1) <= rounding.cosine(12)).all()
    unit = data.vectors / np.linalg.norm(data.vectors, axis=1, keepdims=True)
    asked = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    assert np.abs(
        np.einsum("qkd,qd->qk", unit[found.rows], asked) - found.cosines
    ).max() <= 2 * rounding.cosine(12)
    assert found.ids[3] == [f"p/{row}.jpg" for row in found.rows[3]]
    one = index.search(queries[7], 5)
    assert one.rows.shape == (1, 5) and (one.rows[0] == found.rows[7]).all()


def test_search_by_id_leaves_the_row_itself_out(index, data):
    found = index.search(["p/5.jpg", "p/77.jpg"], 4)
    assert found.rows.shape == (2, 4) and not (found.rows == [[5], [77]]).any()
    if index.kind == "flat":
        assert (found.rows == exact(data, data.vectors[[5, 77]], 5)[:, 1:]).all()
    assert index.search("p/5.jpg", 4).ids == found.ids[:1]
    with pytest.raises(ConfigError, match="'p/5.jpeg' is no id of the index; did you mean 'p/5.jpg'"):
        index.search("p/5.jpeg")


def test_recall_is_what_was_measured(index, data):
    """Of many rows, and not only of those that recall was measured with."""
    asked = data.vectors[::3]
    expected = exact(data, asked, 11)
    found = index.search(asked, 11).rows
    share = np.mean(
        [len(set(a[1:]) & set(b)) / 10 for a, b in zip(expected.tolist(), found.tolist(), strict=True)]
    )
    assert index.recall >= 0.95
    assert abs(share - index.recall) < 0.02
    if index.kind == "flat":
        assert index.recall == 1 and index.effort == 0


def test_more_recall_takes_more_effort(data):
    pytest.importorskip("faiss", reason="pip install '.[analysis]'")
    low, high = (SearchIndex.build(data, "ivf", recall=recall) for recall in (0.5, 1.0))
    assert low.effort < high.effort and 0.5 <= low.recall < high.recall == 1.0


def test_auto(data, monkeypatch):
    assert SearchIndex.build(data).kind == "flat"
    pytest.importorskip("faiss", reason="pip install '.[analysis]'")
    monkeypatch.setattr(module, "EXACT", 3000 * 12 - 1)
    assert SearchIndex.build(data).kind == "ivf"


def test_every_row_can_be_asked_for(data):
    """A query that too few cells answer looks into more of them."""
    pytest.importorskip("faiss", reason="pip install '.[analysis]'")
    found = SearchIndex.build(data, "ivf", recall=0.1).search(data.vectors[:2], 3000)
    assert sorted(found.rows[0].tolist()) == list(range(3000))


def test_larger_than_memory(data, tmp_path, monkeypatch):
    flat = SearchIndex.build(data, "flat")
    flat.save(tmp_path / "x.index")
    expected = flat.search(["p/9.jpg"], 20)
    monkeypatch.setattr(blocks, "HELD", 64)
    monkeypatch.setattr(blocks, "BLOCK", 500)
    mapped = SearchIndex.load(tmp_path / "x.index")
    assert mapped._rows is not None and not mapped._rows.in_memory
    found = mapped.search(["p/9.jpg"], 20)
    assert found.ids == expected.ids and np.allclose(
        found.cosines, expected.cosines, rtol=0, atol=rounding.cosine(12)
    )
    assert SearchIndex.build(data).kind == "flat"
    with pytest.raises(ConfigError, match="larger than memory: use kind 'flat'"):
        SearchIndex.build(data, "ivf")


# --- files ------------------------------------------------------------------------------------------------


def test_saved_and_loaded_is_the_same(index, tmp_path):
    path = tmp_path / "x.index"
    index.save(path)
    again = SearchIndex.load(path)
    assert (again.kind, again.names, again.metadata) == (index.kind, index.names, METADATA)
    assert (again.recall, again.effort, again.dim, len(again)) == (index.recall, index.effort, 12, 3000)
    queries = np.random.default_rng(2).normal(0, 1, (9, 12)).astype(np.float32)
    a, b = again.search(queries, 6), index.search(queries, 6)
    assert (a.rows == b.rows).all() and (a.cosines == b.cosines).all()
    assert again.search("p/3.jpg", 2).ids == index.search("p/3.jpg", 2).ids
    again.save(path)  # over the file that it is mapped from
    assert SearchIndex.load(path).search(queries, 6).ids == b.ids
    assert [file.name for file in tmp_path.iterdir()] == ["x.index"]


def test_names_survive(tmp_path):
    names = ["a\nb", "ü/é.jpg", "tar.tar::x", '"', "\u2028", "#1"]
    data = Embeddings(names, np.array([0, 1, 0, 0, 0, 2], np.int32), np.eye(6, dtype=np.float32), METADATA)
    index = SearchIndex.build(data)
    index.save(tmp_path / "x")
    assert SearchIndex.load(tmp_path / "x").names == [
        "a\nb",
        "ü/é.jpg#1",
        "tar.tar::x",
        '"',
        "\u2028",
        "#1#2",
    ]


def test_every_changed_byte_is_found(tmp_path):
    """One bit in each byte of a small file, one after another; and each cut."""
    path = tmp_path / "x.index"
    SearchIndex.build(
        Embeddings(["a", "b"], np.zeros(2, np.int32), np.eye(2, dtype=np.float32), METADATA)
    ).save(path)
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(OutputError, match="x.index is "):
            SearchIndex.load(path)
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at])
        with pytest.raises(OutputError, match="x.index is "):
            SearchIndex.load(path)
    path.write_bytes(whole)
    assert len(SearchIndex.load(path)) == 2


def test_other_files(tmp_path):
    with pytest.raises(OutputError, match="does not exist; build an index"):
        SearchIndex.load(tmp_path / "no.index")
    (tmp_path / "e.parquet").write_bytes(b"PAR1" + b"\0" * 100)
    with pytest.raises(OutputError, match="is not an index of embedkit"):
        SearchIndex.load(tmp_path / "e.parquet")
    with pytest.raises(OutputError, match="folder .* does not exist"):
        SearchIndex.build(np.eye(3)).save(tmp_path / "no" / "x.index")


def test_a_killed_build_leaves_the_old_file(tmp_path):
    """Killed in the middle of writing, by a signal that nothing can catch."""
    path = tmp_path / "x.index"
    SearchIndex.build(np.eye(3, dtype=np.float32)).save(path)
    before = path.read_bytes()
    code = (
        "import os, signal, sys, numpy as np\n"
        "from embedkit.analysis import index_file as index\n"
        "from embedkit.analysis.neighbors import SearchIndex\n"
        "build = SearchIndex.build(np.random.default_rng(0).normal(0, 1, (50000, 8)).astype('f4'))\n"
        "write, calls = index.IndexSection.write, []\n"
        "def stop(self, data):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return write(self, data)\n"
        "index.IndexSection.write = stop\n"
        "build.save(sys.argv[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert path.read_bytes() == before and len(SearchIndex.load(path)) == 3
    (left,) = set(tmp_path.iterdir()) - {path}
    assert left.name.startswith(".x.index.") and left.name.endswith(".partial")
    # The next build takes it away, and leaves alone what a living process is writing.
    with replacing(path) as busy:
        busy.write(b"half")
        SearchIndex.build(np.eye(3, dtype=np.float32)).save(path)
        assert {file.name for file in tmp_path.iterdir()} == {"x.index", Path(busy.name).name}
        assert len(SearchIndex.load(path)) == 3
        busy.seek(0)
        busy.write(path.read_bytes())
    assert [file.name for file in tmp_path.iterdir()] == ["x.index"] and len(SearchIndex.load(path)) == 3


@pytest.mark.parametrize("step", [0.05, 0.11, 0.17, 0.23])
def test_whenever_a_build_is_killed_the_index_is_one_of_the_two(tmp_path, step):
    """A process that saves two indexes in turns is killed at any moment: what is there is whole."""
    path = tmp_path / "x.index"
    code = (
        "import sys, numpy as np\n"
        "from embedkit.analysis.neighbors import SearchIndex\n"
        "a, b = (SearchIndex.build(np.eye(n, 64, dtype='f4') + 1) for n in (60, 61))\n"
        "a.save(sys.argv[1]); print('on', flush=True)\n"
        "while True: b.save(sys.argv[1]); a.save(sys.argv[1])\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    try:
        assert writer.stdout.readline() == b"on\n"
        time.sleep(step)
    finally:
        writer.kill()
        writer.communicate()
    assert len(SearchIndex.load(path)) in (60, 61)
    SearchIndex.build(np.eye(3)).save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["x.index"]


# --- bad input --------------------------------------------------------------------------------------------


def test_bad_input(data, index, monkeypatch):
    for act, message in (
        (
            lambda: SearchIndex.build(data, "tree"),
            "kind: expected one of auto, flat, ivf, hnsw, found 'tree'",
        ),
        (lambda: SearchIndex.build(data, recall=0), r"recall: expected a share in \(0, 1\]"),
        (lambda: SearchIndex.build(np.eye(4), "hnsw"), "needs 1,000 rows or more, found 4"),
        (lambda: SearchIndex.build(np.empty((0, 4))), "found no row"),
        (lambda: index.search(np.eye(12)[:1], 3001), "k: expected 1 to 3000, .* found 3001"),
        (lambda: index.search("p/1.jpg", 3000), "k: expected 1 to 2999"),
        (lambda: index.search(np.eye(12)[0], 0), "k: expected 1 to 3000"),
        (lambda: index.search(np.eye(11)), "the index has 12 columns and the queries have 11"),
        (lambda: index.search(np.full(12, np.nan)), "the queries: row 0 .* NaN"),
        (lambda: index.search(np.zeros(12)), "the queries: row 0 .* zeros"),
    ):
        with pytest.raises(ConfigError, match=message):
            act()
    twice = Embeddings(["a", "a"], np.zeros(2, np.int32), np.eye(2, dtype=np.float32), METADATA)
    with pytest.raises(ConfigError, match="the id 'a' occurs twice"):
        SearchIndex.build(twice)
    other = embeddings(20, dataclasses.replace(METADATA, entry="other.noise", fingerprint="c" * 64))
    with pytest.raises(SpaceMismatchError, match="other.noise.*cccc.*linear-tiny.noise.*bbbb"):
        index.search(other)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingDependencyError, match=r"pip install '\.\[analysis\]'"):
        SearchIndex.build(data, "ivf")


def test_one_row():
    index = SearchIndex.build(np.ones((1, 3)))
    assert index.search(np.ones(3), 1).ids == [["0"]]
    with pytest.raises(ConfigError, match="the index has only one row, so it has no neighbors"):
        SearchIndex.build(np.eye(3)[:1]).search("0", 1)
    with pytest.raises(ConfigError, match="k: expected 1 to 1, for the index has 1 row, found 2"):
        index.search(np.ones(3), 2)


def test_a_search_works_where_another_package_patched_faiss():
    """`faiss.contrib.torch_utils`, which metric learning packages import, takes the parameters from `search`."""
    code = (
        "import numpy as np, faiss.contrib.torch_utils\n"
        "from embedkit.analysis.neighbors import SearchIndex\n"
        "x = np.random.default_rng(0).normal(size=(1500, 8)).astype(np.float32)\n"
        "index = SearchIndex.build(x, 'ivf')\n"
        "assert index.search(x[:5], 1).rows[:, 0].tolist() == [0, 1, 2, 3, 4]\n"
    )
    pytest.importorskip("torch")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
