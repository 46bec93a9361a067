"""Every figure of the lint against a naive loop, and every fault that it is there to find."""

import json
import math
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import rounding
import typer
from typer.testing import CliRunner

from embedkit.analysis.lint import lint
from embedkit.cli.lint import lint as command
from embedkit.embeddings.metadata import Metadata
from embedkit.embeddings.npy_write import write_npy
from embedkit.embeddings.parquet import write_rows
from embedkit.embeddings.schema import schema_of
from embedkit.embeddings.table import Embeddings
from embedkit.errors import ConfigError, OutputError

#: The module: the attribute of its package is the function of the same name.
module = sys.modules["embedkit.analysis.lint"]


def healthy(n=400, dim=8, seed=0):
    return np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)


def check(found, name):
    return next(check for check in found.checks if check.name == name)


def same_figures(found, expected, *, swaps=0):
    """Both are the figures of one set of rows, up to the order of their sums; of hubs, up to `swaps` near-ties."""
    rows, dim = expected.rows, expected.dim
    allowed = {
        "collapse": rounding.mean_cosine(rows),
        "uniformity": rounding.log_potential(dim),
        "effective_rank": rounding.effective_rank(rows, dim) * check(expected, "effective_rank").value,
        "hubness": rounding.effective_rank(rows, dim) + swaps,
    }
    for mine, other in zip(found.checks, expected.checks, strict=True):
        assert mine.value == pytest.approx(other.value, rel=0, abs=allowed.get(mine.name, 0)), mine.name


def decisive(make, k=10):
    """Rows among whose nearest k no rounding changes anything: the first such of a number of seeds."""
    for seed in range(200):
        rows = make(seed)
        unit = rows[np.isfinite(rows).all(1)].astype(float)
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
        cosines = unit @ unit.T
        np.fill_diagonal(cosines, -2)
        if rounding.gaps_are_wide(cosines, k, rows.shape[1]):
            return rows
    raise AssertionError("no seed gives such rows")


def metadata(dim):
    return Metadata(entry="a-b.c", manifest_sha256="0" * 64, fingerprint="f" * 64, dim=dim, normalized=False)


def table(vectors):
    n, dim = vectors.shape
    flat = pa.array(vectors.reshape(-1), pa.float32())
    columns = {
        "id": [f"p/{i}.jpg" for i in range(n)],
        "part": pa.array(np.zeros(n, np.int32)),
        "embedding": pa.FixedSizeListArray.from_arrays(flat, dim),
        "size": pa.array(np.zeros(n, np.int64)),
        "mtime_ns": pa.array(np.zeros(n, np.int64)),
    }
    return pa.table(columns)


def write(path, vectors):
    dim = vectors.shape[1]
    schema = schema_of(metadata(dim), {}, sha256=False)
    write_rows([table(vectors).cast(schema)] if len(vectors) else [], path, schema)
    return path


def test_healthy_rows_have_no_warning():
    found = lint(healthy())
    assert found.warnings == () and len(found.checks) == 7 and found.sample == "all rows"
    assert json.loads(json.dumps(found.to_json()))["ok"] is True


def test_effective_rank_by_its_equation():
    rows = healthy() * np.array([1, 1, 1, 1, 0.1, 0.01, 0, 0], np.float32)
    p = np.linalg.svd(rows.astype(float), compute_uv=False)
    p = p / p.sum() + 1e-7
    expected = math.exp(-sum(x * math.log(x) for x in p))
    assert check(lint(rows), "effective_rank").value == pytest.approx(expected, rel=1e-5)
    # equal singular values: all D of them
    even = np.vstack([np.eye(8), -np.eye(8)]).astype(np.float32)
    assert check(lint(even), "effective_rank").value == pytest.approx(8, rel=1e-4)
    # fewer rows than dimensions
    assert check(lint(np.eye(3, 50, dtype=np.float32)), "effective_rank").value == pytest.approx(3, rel=1e-4)


def test_uniformity_and_mean_cosine_by_a_loop_over_pairs():
    rows = healthy(40)
    unit = rows / np.linalg.norm(rows.astype(float), axis=1, keepdims=True)
    pairs = [(i, j) for i in range(40) for j in range(40) if i != j]
    potential = np.mean([math.exp(-2 * np.square(unit[i] - unit[j]).sum()) for i, j in pairs])
    cosine = np.mean([unit[i] @ unit[j] for i, j in pairs])
    found = lint(rows)
    assert abs(check(found, "uniformity").value - math.log(potential)) <= rounding.log_potential(8)
    assert abs(check(found, "collapse").value - cosine) <= rounding.mean_cosine(40)
    # the even sphere, of whose value the words speak
    assert check(lint(healthy(3000, 64)), "uniformity").value == pytest.approx(-4 + 8 / 64, abs=0.01)


def test_hubness_by_counting_neighbors():
    rows = decisive(lambda seed: healthy(60, 5, seed), 4)
    unit = rows / np.linalg.norm(rows.astype(float), axis=1, keepdims=True)
    counts = np.zeros(60)
    for i in range(60):
        near = sorted((j for j in range(60) if j != i), key=lambda j: -(unit[i] @ unit[j]))[:4]
        counts[near] += 1
    centered = counts - counts.mean()
    expected = (centered**3).mean() / (centered**2).mean() ** 1.5
    found = check(lint(rows, neighbors=4), "hubness")
    assert found.value == pytest.approx(expected, rel=1e-6)
    assert f"row {counts.argmax()} is {int(counts.max())} times" in found.words


def test_a_hub_is_found_and_named():
    # axes are as far from each other as from nobody, and all of them are near to their sum
    rows = np.eye(60, dtype=np.float32) + 0.001 * healthy(60, 60)
    rows[7] = 1
    found = check(lint(rows, neighbors=2), "hubness")
    assert not found.ok and "row 7 is 59 times" in found.words and found.value > 2


def test_collapse_in_direction_and_in_dimensions():
    one_way = healthy() * 0.01 + np.array([1, 2, 3, 4, 5, 6, 7, 8], np.float32)
    found = check(lint(one_way), "collapse")
    assert not found.ok and found.value > 0.99 and "collapsed into one direction" in found.words
    flat = healthy(400, 1) @ healthy(1, 64, seed=2)
    found = check(lint(flat), "effective_rank")
    assert not found.ok and found.value == pytest.approx(1, abs=0.01)


def test_dead_dimensions_are_named_whatever_their_value():
    rows = healthy()
    rows[:, 2], rows[:, 5] = 0, 1234.567
    found = check(lint(rows), "dead_dimensions")
    assert found.value == 2 and "(2, 5)" in found.words and not found.ok


def test_near_duplicates_are_counted_with_their_partners():
    rows = healthy(200, 32)
    rows[10:20] = rows[0:10] * 3  # the same direction
    found = check(lint(rows), "near_duplicates")
    assert found.value == 20 / 200 and not found.ok
    assert check(lint(rows, threshold=1.0), "near_duplicates").value == 20 / 200
    assert check(lint(healthy(200, 32)), "near_duplicates").value == 0


def test_bad_rows_are_counted_named_and_left_out():
    rows = np.vstack([healthy(3), decisive(lambda seed: healthy(397, seed=seed))])
    good = lint(rows[3:])
    rows[0], rows[1, 3], rows[2, 0] = 0, np.nan, np.inf
    found = lint(rows)
    bad = check(found, "bad_rows")
    assert (
        bad.value == 3
        and not bad.ok
        and "2 of 400 rows hold NaN or infinity and 1 are all zeros" in bad.words
    )
    assert "the first is row 0" in bad.words
    assert check(good, "bad_rows").value == 0
    good = replace(good, checks=(bad, *good.checks[1:]))
    same_figures(found, good)


def test_a_file_is_streamed_to_the_same_figures(tmp_path):
    rows = healthy(5000, 8)
    rows[4321] = np.nan
    held = lint(rows)
    for path in (write(tmp_path / "x.parquet", rows), tmp_path / "x.npy"):
        if path.suffix == ".npy":
            write_npy([table(rows)], path, metadata(8), len(rows))
        found = lint(path)
        assert found.rows == 5000 and found.dim == 8
        assert "the first is p/4321.jpg" in check(found, "bad_rows").words
        same_figures(found, held, swaps=0.05)  # of 5,000 rows some have near-ties
    same_figures(lint(Embeddings.load(tmp_path / "x.parquet")), held, swaps=0.05)


def test_of_many_rows_samples_are_drawn_by_the_seed_and_said(monkeypatch):
    rows = healthy(6000, 16)
    rows[::100] = rows[1::100]  # 2 % have a partner, mostly outside of the sample
    exact = lint(rows)
    monkeypatch.setattr(module, "RANK_ROWS", 2000)
    monkeypatch.setattr(module, "NEIGHBOR_ROWS", 1000)
    monkeypatch.setattr(module, "QUERIES", 900)
    found = lint(rows, seed=5)
    assert found == lint(rows, seed=5) != lint(rows, seed=6)
    assert "drawn with seed 5: 2000 for the rank, 1000 for neighbors, 900 for near-duplicates" in found.sample
    for name, allowed in (("effective_rank", 0.05), ("uniformity", 0.01), ("collapse", 0.01)):
        assert check(found, name).value == pytest.approx(check(exact, name).value, abs=allowed)
    # partners are looked for among all rows: 900 draws of 0.02 have a standard error of 0.005
    assert check(exact, "near_duplicates").value == 0.02
    assert check(found, "near_duplicates").value == pytest.approx(0.02, abs=0.02)
    assert check(found, "near_duplicates").value > 0.004


def with_twins(seed):
    rows = healthy(300, 8, seed)
    rows[[5, 290]] = rows[100]
    rows[200] = np.nan
    return rows


@pytest.mark.parametrize(("block", "cells"), [(1 << 14, 1 << 23), (37, 3000), (1, 1), (299, 300 * 7)])
@pytest.mark.parametrize("order", ["as they are", "rows", "columns", "both"])
def test_neither_blocks_nor_the_order_of_rows_and_columns_change_anything(monkeypatch, block, cells, order):
    rows = decisive(with_twins)
    whole = lint(rows)
    rng = np.random.default_rng(1)
    if order in ("rows", "both"):
        rows = rows[rng.permutation(300)]
    if order in ("columns", "both"):
        rows = rows[:, rng.permutation(8)]
    monkeypatch.setattr(module, "_BLOCK", block)
    monkeypatch.setattr(module, "_CELLS", cells)
    same_figures(lint(rows), whole)


def test_the_mean_cosine_is_exact_where_single_products_are_not():
    """In float32 the mean of many products of wide rows is off by more than float64's sum of the rows is."""
    rows = healthy(500, 512) + 3
    unit = (rows / np.linalg.norm(rows.astype(float), axis=1, keepdims=True)).astype(np.float32)
    exact = [math.fsum(column) for column in unit.T.astype(float)]
    expected = (math.fsum(x * x for x in exact) - math.fsum((unit.astype(float) ** 2).ravel())) / (500 * 499)
    found = check(lint(rows), "collapse").value
    assert abs(found - expected) <= 4 * 500 * rounding.eps(np.float64)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.zeros((0, 4)), "expected 2 rows or more, found none"),
        (np.ones((1, 4)), "expected 2 rows or more, found one"),
        (np.zeros((5, 4)), "of 5 rows all but 0 hold NaN, infinity or zeros alone"),
        (np.full((5, 4), np.nan), "all but 0 hold NaN"),
        (np.ones(4), r"expected numbers \(N, D\)"),
        (np.array([["a"]]), r"expected numbers \(N, D\)"),
    ],
)
def test_what_cannot_be_judged(rows, message):
    with pytest.raises(ConfigError, match=message):
        lint(rows)


def test_two_rows_and_equal_rows_are_judged():
    assert len(lint(np.eye(2)).checks) == 7
    found = lint(np.ones((50, 4)))
    assert {check.name for check in found.warnings} >= {"collapse", "dead_dimensions", "near_duplicates"}


def test_files_that_are_none(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(OutputError, match="cannot be read as Parquet"):
        lint(tmp_path / "x.parquet")
    with pytest.raises(ConfigError, match="found none"):
        lint(write(tmp_path / "empty.parquet", healthy(0)))


def test_the_command(tmp_path):
    app = typer.Typer()
    app.command()(command)
    run = CliRunner().invoke
    good = str(write(tmp_path / "good.parquet", healthy()))
    rows = healthy()
    rows[:, 0] = 3
    bad = str(write(tmp_path / "bad.parquet", rows))
    done = run(app, [good, "--fail-on-warning"])
    assert done.exit_code == 0 and done.stdout.count("ok\t") == 7
    assert "400 rows of 8; metrics of all rows" in done.stderr
    done = run(app, [bad])
    assert done.exit_code == 0 and "WARNING\tdead dimensions\t" in done.stdout
    assert run(app, [bad, "--fail-on-warning"]).exit_code == 3
    facts = json.loads(run(app, [bad, "--json"]).stdout)
    assert facts["ok"] is False and facts["rows"] == 400 and len(facts["checks"]) == 7
