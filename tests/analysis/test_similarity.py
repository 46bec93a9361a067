"""Cosines and the exact joins, against a naive loop in float64; rows from memory, from files, in blocks."""

from __future__ import annotations

import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rounding

from embedkit.analysis import vectors as blocks
from embedkit.analysis.similarity import (
    UnionFind,
    pair_similarity,
    pairs_above,
    similarity,
    top_k,
)
from embedkit.analysis.vectors import Rows, row_names
from embedkit.embeddings.metadata import Metadata
from embedkit.embeddings.npy_write import write_npy
from embedkit.embeddings.parquet import write_rows
from embedkit.embeddings.schema import schema_of
from embedkit.embeddings.table import Embeddings
from embedkit.errors import ConfigError, MissingDependencyError, OutputError, SpaceMismatchError

METADATA = Metadata(
    entry="linear-tiny.noise", manifest_sha256="a" * 64, fingerprint="b" * 64, dim=6, normalized=False
)

#: The module: the attribute of its package is the function of the same name.
module = sys.modules["embedkit.analysis.similarity"]
#: Between two cosines of rows of width 6.
ROUNDING = rounding.cosine(6)


@pytest.fixture
def vectors() -> np.ndarray:
    """Rows of many lengths, some of them equal, some opposite."""
    rng = np.random.default_rng(0)
    found = rng.normal(0, 1, (57, 6)).astype(np.float32) * rng.uniform(0.01, 50, (57, 1)).astype(np.float32)
    found[40] = found[3] * 2
    found[41] = found[3]
    found[50] = -found[7]
    return found


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The definition, pair by pair."""
    a, b = a.astype(float), b.astype(float)
    return np.array([[sum(x * y) / (sum(x * x) ** 0.5 * sum(y * y) ** 0.5) for y in b] for x in a])


def embeddings(vectors: np.ndarray, metadata: Metadata = METADATA, **changes) -> Embeddings:
    fields = {
        "ids": [f"p/{index}.jpg" for index in range(len(vectors))],
        "parts": np.zeros(len(vectors), np.int32),
        "vectors": vectors,
        "metadata": metadata,
    }
    return Embeddings(**{**fields, **changes})


def table(vectors: np.ndarray) -> pa.Table:
    rows = {
        "id": [f"p/{index}.jpg" for index in range(len(vectors))],
        "part": [0] * len(vectors),
        "embedding": list(vectors),
        "size": [1] * len(vectors),
        "mtime_ns": [1] * len(vectors),
    }
    return pa.table(rows, schema=schema_of(METADATA, {}, sha256=False))


@pytest.fixture
def parquet(tmp_path, vectors):
    """A file of row groups of 10 rows."""
    path = tmp_path / "e.parquet"
    pq.write_table(table(vectors), path, row_group_size=10)
    return path


# --- cosines ----------------------------------------------------------------------------------------------


def test_similarity_is_the_definition(vectors):
    expected = cosines(vectors, vectors[:9])
    assert np.abs(similarity(vectors, vectors[:9]) - expected).max() <= ROUNDING
    assert similarity(embeddings(vectors)).shape == (57, 57)
    assert similarity(vectors[:2]).dtype == np.float32


def test_length_of_rows_does_not_matter(vectors):
    assert np.allclose(similarity(vectors * 1e-12), similarity(vectors * 1e12), rtol=0, atol=ROUNDING)


def test_pairs(vectors):
    a, b = np.array([0, 3, 7, 3]), np.array([1, 40, 50, 41])
    found = pair_similarity(vectors, a, b)
    assert np.abs(found - cosines(vectors, vectors)[a, b]).max() <= ROUNDING
    assert found[1:] == pytest.approx([1, -1, 1], abs=ROUNDING)


def test_a_matrix_too_large_is_refused(vectors, monkeypatch):
    monkeypatch.setattr(module, "LARGEST", 100)
    with pytest.raises(ConfigError, match="top_k"):
        similarity(vectors)


def test_unit_rows_are_not_copied(vectors):
    unit = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    assert np.shares_memory(Rows(unit).unit(0, 5), unit)
    assert not np.shares_memory(Rows(vectors).unit(0, 5), vectors)


# --- joins ------------------------------------------------------------------------------------------------


def naive_top_k(a, b, k, exclude_self=False):
    found = cosines(a, b)
    if exclude_self:
        np.fill_diagonal(found, -np.inf)
    return -np.sort(-found, axis=1)[:, :k], found


@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("k", [1, 5, 56])
def test_top_k_is_exact(vectors, k, exclude_self):
    expected, all_ = naive_top_k(vectors, vectors, k, exclude_self)
    found, rows = top_k(vectors, None, k, exclude_self=exclude_self)
    assert np.abs(found - expected).max() <= ROUNDING
    assert np.abs(np.take_along_axis(all_, rows, 1) - expected).max() <= 2 * ROUNDING  # near-ties may swap
    assert all(len(set(line)) == k for line in rows.tolist())
    if exclude_self:
        assert not (rows == np.arange(57)[:, None]).any()


def test_many_equal_rows_do_not_crowd_out_k_neighbors():
    rows = np.ones((20, 3), np.float32)
    found, index = top_k(rows, None, 4, exclude_self=True)
    assert found.shape == (20, 4) and (index != np.arange(20)[:, None]).all()
    assert np.abs(found - 1).max() <= rounding.cosine(3)


def test_faiss_and_numpy_find_the_same(vectors, monkeypatch):
    pytest.importorskip("faiss", reason="pip install '.[analysis]'")
    by_numpy = top_k(vectors, vectors[:30], 7)
    monkeypatch.setattr(module, "SMALL", 0)
    by_faiss = top_k(vectors, vectors[:30], 7)
    assert np.abs(by_numpy[0] - by_faiss[0]).max() <= ROUNDING
    apart = np.abs(np.diff(by_numpy[0], axis=1, prepend=2, append=-2)).min(1) > 2 * ROUNDING
    assert (by_numpy[1] == by_faiss[1])[apart].all()


def test_without_faiss_the_message_has_the_pip_line(vectors, monkeypatch):
    monkeypatch.setattr(module, "SMALL", 0)
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(MissingDependencyError, match=r"pip install '\.\[analysis\]'"):
        top_k(vectors, None, 1)


@pytest.mark.parametrize("threshold", [-0.5, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("tile", [(4, 7), (16, 16), (256, 2048)])
def test_pairs_above_finds_every_pair_once(vectors, threshold, tile):
    all_ = cosines(vectors, vectors)
    expected = {(i, j) for i in range(57) for j in range(i + 1, 57) if all_[i, j] >= min(threshold, 1 - 1e-6)}
    found = [
        (i, j, c)
        for block in pairs_above(vectors, threshold, tile=tile)
        for i, j, c in zip(*(side.tolist() for side in block), strict=True)
    ]
    assert {(i, j) for i, j, _ in found} == expected and len(found) == len(expected)
    assert all(abs(c - all_[i, j]) <= ROUNDING for i, j, c in found)
    assert {(3, 40), (3, 41), (40, 41)} <= expected  # equal rows at every threshold, 1 included


@pytest.mark.parametrize("tile", [(1, 1), (5, 3), (57, 57), (256, 2048)])
@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_rows_and_columns_and_the_tiles_change_nothing(vectors, tile, seed):
    rng = np.random.default_rng(seed)
    rows, columns = rng.permutation(57), rng.permutation(6)
    mixed = vectors[rows][:, columns]
    assert np.abs(similarity(mixed) - similarity(vectors)[np.ix_(rows, rows)]).max() <= ROUNDING
    assert np.abs(top_k(mixed, None, 9)[0] - top_k(vectors, None, 9)[0][rows]).max() <= ROUNDING

    def found(source, tile, names):
        pairs = [
            zip(*(side.tolist() for side in block), strict=True)
            for block in pairs_above(source, 0.5, tile=tile)
        ]
        return {tuple(sorted((names[i], names[j]))): c for block in pairs for i, j, c in block}

    expected = found(vectors, (256, 2048), np.arange(57))
    assert np.abs(cosines(vectors, vectors) - 0.5).min() > 2 * ROUNDING  # no pair is undecided
    other = found(mixed, tile, rows)
    assert other.keys() == expected.keys() and len(expected) > 30
    assert max(abs(other[pair] - expected[pair]) for pair in expected) <= ROUNDING


# --- files and blocks -------------------------------------------------------------------------------------


def test_a_file_in_blocks_gives_what_memory_gives(vectors, parquet, monkeypatch):
    whole = Rows(parquet)
    assert whole.in_memory and len(whole) == 57 and whole.dim == 6
    monkeypatch.setattr(blocks, "HELD", 64)
    monkeypatch.setattr(blocks, "BLOCK", 8)
    parts = Rows(parquet)
    assert not parts.in_memory
    for start, stop in ((0, 57), (0, 3), (8, 25), (19, 21), (50, 57)):
        assert np.array_equal(parts.unit(start, stop), whole.unit(start, stop))
    some = np.array([50, 3, 3, 11])
    assert np.array_equal(parts.take(some), whole.take(some))
    assert parts.names() == whole.names()
    for k in (1, 9, 56):
        a, b = top_k(parts, None, k, exclude_self=True), top_k(vectors, None, k, exclude_self=True)
        assert np.allclose(a[0], b[0], rtol=0, atol=ROUNDING)
    pairs = [
        {tuple(p) for f in pairs_above(rows, 0.5) for p in zip(*f[:2], strict=True)}
        for rows in (parts, whole)
    ]
    assert pairs[0] == pairs[1] and len(pairs[0]) > 3
    assert np.allclose(similarity(parts, parts), similarity(vectors), rtol=0, atol=ROUNDING)


def test_every_kind_of_file(vectors, parquet, tmp_path):
    write_npy([table(vectors)], tmp_path / "e.npy", METADATA, 57)
    folder = tmp_path / "folder"
    folder.mkdir()
    write_rows([table(vectors)], folder / "part-00001-of-00001-000000.parquet", table(vectors).schema)
    (folder / "_done-00001-of-00001.json").write_text(json.dumps({"rows": 57}))
    expected = Rows(vectors).unit(0, 57)
    for source in (parquet, str(parquet), tmp_path / "e.npy", folder, Embeddings.load(parquet)):
        rows = Rows(source)
        assert np.array_equal(rows.unit(0, 57), expected)
        assert rows.names()[3] == "p/3.jpg" and rows.metadata == METADATA and not rows.has_parts()


# --- bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_name_the_row(vectors, bad):
    vectors[13, 2] = bad
    with pytest.raises(ConfigError, match=r"row 13 \(p/13.jpg\) holds NaN or infinity"):
        Rows(embeddings(vectors))


def test_zero_rows_name_the_row(vectors, tmp_path, monkeypatch):
    vectors[20] = 0
    with pytest.raises(ConfigError, match="row 20 .* is all zeros"):
        Rows(vectors)
    path = tmp_path / "zero.parquet"
    pq.write_table(table(vectors), path, row_group_size=10)
    monkeypatch.setattr(blocks, "HELD", 64)
    with pytest.raises(ConfigError, match=r"zero.parquet: row 20 \(p/20.jpg\) is all zeros"):
        list(Rows(path).chunks())


def test_duplicate_ids_and_parts():
    assert row_names(["a", "a", "b"], np.array([0, 1, 0]), "x") == ["a", "a#1", "b"]
    with pytest.raises(ConfigError, match="x: the id 'b' occurs twice"):
        row_names(["a", "b", "b"], np.zeros(3, np.int32), "x")


def test_spaces_do_not_mix(vectors):
    other = Metadata(
        entry="other-tiny.noise", manifest_sha256="c" * 64, fingerprint="d" * 64, dim=6, normalized=True
    )
    a, b = embeddings(vectors), embeddings(vectors, other)
    for act in (lambda: similarity(a, b), lambda: top_k(a, b, 1)):
        with pytest.raises(
            SpaceMismatchError, match="linear-tiny.noise.*bbbbbbbbbbbb.*other-tiny.noise.*dddddddddddd"
        ):
            act()
    with pytest.raises(ConfigError, match="6 columns .* 5"):
        similarity(vectors, vectors[:, :5])


def test_other_bad_input(vectors, tmp_path):
    with pytest.raises(ConfigError, match="found no row"):
        Rows(vectors[:0])
    empty = tmp_path / "empty.parquet"
    pq.write_table(table(vectors[:0]), empty)
    with pytest.raises(ConfigError, match="empty.parquet: expected embeddings, found no row"):
        Rows(empty)
    with pytest.raises(ConfigError, match="expected numbers"):
        Rows(np.array([["a"]]))
    with pytest.raises(ConfigError, match="k: expected 1 to 57, .* found 58"):
        top_k(vectors, None, 58)
    with pytest.raises(ConfigError, match="k: expected 1 to 56, .* found 57"):
        top_k(vectors, None, 57, exclude_self=True)
    with pytest.raises(ConfigError, match="k: expected 1 to 57"):
        top_k(vectors, None, 0)
    with pytest.raises(OutputError, match="missing.parquet"):
        Rows(tmp_path / "missing.parquet")


# --- groups -----------------------------------------------------------------------------------------------


def test_groups_are_the_connected_ones():
    rng = np.random.default_rng(1)
    for edges in (0, 5, 60, 200, 1000):
        a, b = rng.integers(0, 300, (2, edges))
        label = list(range(300))  # the naive way: rename all members of one group at every edge
        for i, j in zip(a.tolist(), b.tolist(), strict=True):
            low, high = sorted((label[i], label[j]))
            label = [low if name == high else name for name in label]
        groups = UnionFind(300)
        for part in np.array_split(np.arange(edges), 3):
            groups.join(a[part], b[part])
        assert groups.find(np.arange(300)).tolist() == label


def test_a_long_chain_is_one_group():
    groups = UnionFind(5000)
    order = np.random.default_rng(2).permutation(4999)
    groups.join(order, order + 1)
    assert not groups.find(np.arange(5000)).any()
