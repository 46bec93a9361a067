"""Duplicates and leaks against naive loops; the commands' streams, files and exit statuses."""

from __future__ import annotations

import csv
import json
import os

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from embedkit.analysis import vectors as blocks
from embedkit.analysis.duplicates import find_duplicates, threshold_for_precision
from embedkit.analysis.leaks import find_leaks
from embedkit.analysis.matching.pairs import Pairs
from embedkit.analysis.similarity import pair_similarity, similarity
from embedkit.cli.calibrate import calibrate
from embedkit.cli.duplicates import duplicates
from embedkit.cli.duplicates import leaks as leaks_command
from embedkit.embeddings.metadata import Metadata
from embedkit.embeddings.parquet import write_rows
from embedkit.embeddings.schema import schema_of
from embedkit.embeddings.table import Embeddings
from embedkit.errors import ConfigError, OutputError, SpaceMismatchError

METADATA = Metadata(
    entry="linear-tiny.noise", manifest_sha256="a" * 64, fingerprint="b" * 64, dim=8, normalized=True
)


@pytest.fixture
def vectors() -> np.ndarray:
    """200 rows, some of them copies, near copies, and a chain whose ends differ."""
    rng = np.random.default_rng(0)
    found = rng.normal(0, 1, (200, 8)).astype(np.float32)
    found[150] = found[2]
    found[20] = found[2] * 3
    found[90] = found[10] + rng.normal(0, 0.02, 8)
    angles = np.deg2rad([0, 10, 20, 30])  # neighbors at cosine 0.985, ends at 0.866
    for row, angle in zip((60, 180, 61, 120), angles, strict=True):
        found[row] = np.cos(angle) * np.eye(8)[0] + np.sin(angle) * np.eye(8)[1]
    return found


def write(path, vectors, metadata=METADATA, ids=None, labels=None):
    import pyarrow as pa

    schema = schema_of(metadata, dict.fromkeys(labels or {}, "string"), sha256=False)
    ids = ids or [f"p/{index}.jpg" for index in range(len(vectors))]
    rows = {
        "id": ids,
        "part": [0] * len(ids),
        "embedding": list(vectors),
        "size": [1] * len(ids),
        "mtime_ns": [1] * len(ids),
        **(labels or {}),
    }
    write_rows([pa.table(rows, schema=schema)], path, schema)
    return path


def naive_groups(vectors, threshold):
    """Groups of connected rows by a search from each row, one pair of rows at a time."""
    unit = vectors.astype(float) / np.linalg.norm(vectors.astype(float), axis=1, keepdims=True)
    close = [
        [j for j in range(len(unit)) if j != i and unit[i] @ unit[j] >= threshold - 1e-6]
        for i in range(len(unit))
    ]
    seen, groups = set(), []
    for start in range(len(unit)):
        if start in seen or not close[start]:
            continue
        todo, group = [start], set()
        while todo:
            row = todo.pop()
            if row not in group:
                group.add(row)
                todo += close[row]
        seen |= group
        kept = []
        for row in sorted(group):
            if not set(close[row]) & set(kept):
                kept.append(row)
        groups.append((kept, sorted(group - set(kept))))
    pairs = sum(map(len, close)) // 2
    return sorted(groups, key=lambda g: (-len(g[0]) - len(g[1]), g[0][0])), pairs


@pytest.mark.parametrize("threshold", [1.0, 0.99, 0.97, 0.8, 0.5, 0.2])
def test_against_a_naive_search(vectors, threshold):
    found = find_duplicates(vectors, threshold)
    groups, pairs = naive_groups(vectors, threshold)
    assert [(list(group.kept), list(group.redundant)) for group in found.groups] == groups
    assert found.pairs == pairs and found.threshold == threshold
    for group in found.groups:
        for row, of, cosine in zip(group.redundant, group.of, group.cosines, strict=True):
            a, b = vectors[row].astype(float), vectors[of].astype(float)
            exact = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
            assert of in group.kept and abs(cosine - exact) < 1e-6 and cosine >= threshold - 3e-6


def test_equal_rows_and_a_chain_by_hand(vectors):
    exact = find_duplicates(vectors, 1.0)
    assert [(group.kept, group.redundant) for group in exact.groups] == [((2,), (20, 150))]
    assert exact.pairs == 3 and exact.redundant == [20, 150]
    near = find_duplicates(vectors, 0.98)
    chain = near.groups[0]
    # 60 at 0 degrees, 61 at 20, 120 at 30, 180 at 10: 61 is too far from 60 to go, 120 goes with 61, 180 with 60.
    assert chain.kept == (60, 61) and chain.redundant == (120, 180) and chain.of == (61, 60)
    assert near.redundant == [20, 90, 120, 150, 180]


def test_many_copies_take_no_quadratic_memory():
    """All rows equal: every pair is one of duplicates, and none of them is stored."""
    import tracemalloc

    rows = np.ones((6000, 4), np.float32)
    tracemalloc.start()
    found = find_duplicates(rows, 0.99)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.pairs == 6000 * 5999 // 2 and len(found.groups) == 1
    assert found.groups[0].kept == (0,) and len(found.groups[0].redundant) == 5999
    assert peak < 250e6, f"{peak / 1e6:.0f} MB, where all pairs would take 360 MB"


def test_a_file_larger_than_memory(vectors, tmp_path, monkeypatch):
    path = write(tmp_path / "e.parquet", vectors)
    expected = find_duplicates(Embeddings.load(path), 0.8)
    monkeypatch.setattr(blocks, "HELD", 64)
    monkeypatch.setattr(blocks, "BLOCK", 32)
    found = find_duplicates(path, 0.8)
    assert [(g.kept, g.redundant) for g in found.groups] == [(g.kept, g.redundant) for g in expected.groups]
    assert found.names[3] == "p/3.jpg" and found.pairs == expected.pairs


def test_sample_of_pairs_is_even_and_seeded():
    rng = np.random.default_rng(1)
    rows = (rng.normal(0, 0.02, (100, 4)) + 1).astype(np.float32)  # 4,950 pairs
    counts = np.zeros((100, 100))
    for seed in range(40):
        a, b, cosines = find_duplicates(rows, 0.9, seed=seed).sample
        assert len(a) == 1000 and (a < b).all() and (np.diff(cosines) <= 0).all()
        counts[a, b] += 1
    chance = 1000 / 4950
    drawn = counts[np.triu_indices(100, 1)]
    assert drawn.max() <= 40 * chance + 5 * (40 * chance * (1 - chance)) ** 0.5
    assert abs(drawn.std() / (40 * chance * (1 - chance)) ** 0.5 - 1) < 0.1
    again = find_duplicates(rows, 0.9, seed=39).sample
    assert (again[0] == a).all() and (again[1] == b).all()


# --- precision --------------------------------------------------------------------------------------------


def test_precision_by_hand():
    pytest.importorskip("scipy", reason="pip install '.[analysis]'")
    # 59 right pairs are the fewest that bound a precision of 0.95: 0.95^59 < 0.05 < 0.95^58.
    scores = np.linspace(0.99, 0.6, 100)
    same = np.arange(100) < 70
    # With 70 right ones the bound holds on to the last of them, and with k wrong ones after it as long as the
    # exact bound of 70 of 70 + k is at least 0.95: 70 of 71 gives 0.935.
    assert threshold_for_precision(scores, same, 0.95) == pytest.approx(scores[69])
    with pytest.raises(ConfigError, match="58 labeled pairs cannot support a precision of 0.95: at least 59"):
        threshold_for_precision(scores[:58], same[:58], 0.95)
    same[3] = False
    with pytest.raises(ConfigError, match="of the 59 most similar labeled pairs 58 are duplicates"):
        threshold_for_precision(scores, same, 0.95)
    for precision in (0.0, 1.0):
        with pytest.raises(ConfigError, match="precision: expected"):
            threshold_for_precision(scores, same, precision)


def test_precision_holds_in_95_of_100_trials():
    pytest.importorskip("scipy", reason="pip install '.[analysis]'")
    rng = np.random.default_rng(2)
    population = rng.uniform(0.8, 1, 20_000)
    truth = rng.random(20_000) < 1 - (1 - population) * 1.5  # from 0.7 at 0.8 to 1 at 1
    broken = found = 0
    for _ in range(200):
        drawn = rng.choice(20_000, 300, replace=False)
        try:
            threshold = threshold_for_precision(population[drawn], truth[drawn], 0.9)
        except ConfigError:
            continue
        found += 1
        broken += truth[population >= threshold].mean() < 0.9
    assert found > 100 and broken <= 0.05 * 200 + 7


def test_find_duplicates_by_precision(vectors):
    pytest.importorskip("scipy", reason="pip install '.[analysis]'")
    a, b = np.triu_indices(200, 1)
    scores = pair_similarity(vectors, a, b)
    top = np.argsort(-scores)[:100]
    same = scores[top] > scores[top[40]]
    labeled = Pairs(a[top], b[top], same, np.stack([a[top], b[top]], 1))
    found = find_duplicates(vectors, target_precision=0.9, labeled=labeled)
    assert found.threshold == threshold_for_precision(scores[top], same, 0.9)
    # The pair at the threshold itself may fall to either side: a matrix product rounds differently.
    assert abs(found.pairs - (scores >= np.float32(found.threshold)).sum()) <= 1


# --- leaks ------------------------------------------------------------------------------------------------


def test_leaks_against_a_loop(vectors):
    rng = np.random.default_rng(3)
    test = np.concatenate([rng.normal(0, 1, (30, 8)), vectors[[7, 7, 11]] * 2, vectors[13:14] + 0.05]).astype(
        np.float32
    )
    cosines = similarity(test, vectors)
    for threshold in (1.0, 0.95, 0.8):
        found = find_leaks(vectors, test, threshold)
        expected = {
            (str(i), str(row.argmax())) for i, row in enumerate(cosines) if row.max() >= threshold - 2e-6
        }
        assert {(leak.test, leak.train) for leak in found.found} == expected
        assert found.rate == len(expected) / 34 and found.tested == 34
        assert [leak.cosine for leak in found.found] == sorted(
            (leak.cosine for leak in found.found), reverse=True
        )
    assert {leak.test for leak in find_leaks(vectors, test, 1.0).found} == {"30", "31", "32"}


# --- bad input --------------------------------------------------------------------------------------------


def test_bad_input(vectors, tmp_path):
    for arguments, message in (
        ({"embeddings": vectors[:1], "threshold": 0.9}, "expected at least 2 rows, found 1"),
        ({"embeddings": vectors[:0], "threshold": 0.9}, "found no row"),
        ({"embeddings": vectors}, "give a threshold, or a precision"),
        (
            {"embeddings": vectors, "threshold": 0.9, "target_precision": 0.9},
            "give a threshold, or a precision",
        ),
        ({"embeddings": vectors, "target_precision": 0.9}, "needs labeled pairs"),
        ({"embeddings": vectors, "threshold": 1.2}, r"threshold: expected a cosine in \(-1, 1\], found 1.2"),
    ):
        with pytest.raises(ConfigError, match=message):
            find_duplicates(**arguments)
    twice = Embeddings(["a", "a"], np.zeros(2, np.int32), vectors[:2], METADATA)
    with pytest.raises(ConfigError, match="the id 'a' occurs twice"):
        find_duplicates(twice, 0.9)
    with pytest.raises(ConfigError, match="threshold: expected"):
        find_leaks(vectors, vectors, 2.0)


def test_parts_of_images_make_no_delete_list(vectors, tmp_path):
    faces = Embeddings(["a", "a"], np.array([0, 1], np.int32), vectors[[2, 20]], METADATA)
    with pytest.raises(ConfigError, match="parts of images"):
        find_duplicates(faces, 0.9).write_delete_list(tmp_path / "list")
    assert not list(tmp_path.iterdir())


# --- commands ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run():
    """`run("duplicates", ...)` -> the result of the command in a small app."""
    app = typer.Typer()
    app.command("duplicates")(duplicates)
    app.command("leaks")(leaks_command)
    app.command("calibrate")(calibrate)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_command_duplicates(run, vectors, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p").mkdir()
    for index in range(len(vectors)):
        (tmp_path / f"p/{index}.jpg").write_bytes(b"x")
        os.utime(tmp_path / f"p/{index}.jpg", ns=(1, 1))
    path = write(tmp_path / "e.parquet", vectors)
    result = run("duplicates", path, "--threshold", 0.98, "--write-delete-list", tmp_path / "list.txt")
    assert result.exit_code == 0, result.output
    head, *lines = result.stdout.splitlines()
    assert head == "group\tid\tduplicate of\tcosine"
    assert [line.split("\t")[:3] for line in lines] == [
        ["1", "p/60.jpg", ""],
        ["1", "p/61.jpg", ""],
        ["1", "p/120.jpg", "p/61.jpg"],
        ["1", "p/180.jpg", "p/60.jpg"],
        ["2", "p/2.jpg", ""],
        ["2", "p/20.jpg", "p/2.jpg"],
        ["2", "p/150.jpg", "p/2.jpg"],
        ["3", "p/10.jpg", ""],
        ["3", "p/90.jpg", "p/10.jpg"],
    ]
    cosines = [line.split("\t")[3] for line in lines]
    assert cosines[:7] == ["", "", "0.9848", "0.9848", "", "1.0000", "1.0000"]  # 10 degrees, and copies
    assert "5 of 200 rows can be deleted" in result.stderr and "nothing was deleted" in result.stderr
    names = (tmp_path / "list.txt").read_text().splitlines()
    assert names == [str(tmp_path / f"p/{index}.jpg") for index in (20, 90, 120, 150, 180)]
    data = json.loads(run("duplicates", path, "--threshold", 1, "--json").stdout)
    assert data["redundant"] == 2 and data["pairs"] == 3
    for limit, status in ((0.01, 0), (0.009, 3)):  # 2 of 200 rows
        assert run("duplicates", path, "--threshold", 1, "--fail-over", limit).exit_code == status
    assert data["groups"][0]["redundant"][0] == {
        "id": "p/20.jpg",
        "of": "p/2.jpg",
        "cosine": pytest.approx(1),
    }


def test_command_duplicates_to_be_judged_and_by_precision(run, tmp_path):
    pytest.importorskip("scipy", reason="pip install '.[analysis]'")
    rng = np.random.default_rng(4)
    vectors = np.repeat(rng.normal(0, 1, (150, 8)), 2, 0) + rng.normal(0, 0.1, (300, 8))
    path = write(tmp_path / "e.parquet", vectors.astype(np.float32))
    assert run("duplicates", path, "--threshold", 0.6, "--write-pairs", tmp_path / "p.csv").exit_code == 0
    with open(tmp_path / "p.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) > 150 and set(rows[0]) == {"a", "b", "cosine", "same"}
    number = {f"p/{index}.jpg": index for index in range(300)}
    with open(tmp_path / "p.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        for row in rows:
            writer.writerow({**row, "same": int(number[row["a"]] // 2 == number[row["b"]] // 2)})
    result = run("duplicates", path, "--target-precision", 0.9, "--pairs", tmp_path / "p.csv", "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert 0.6 < data["threshold"] < 1 and data["pairs"] > 100
    assert run("duplicates", path).exit_code == 2
    assert run("duplicates", path, "--target-precision", 0.9).exit_code == 2
    assert run("duplicates", path, "--threshold", 0.9, "--pairs", tmp_path / "p.csv").exit_code == 2


def test_command_leaks(run, vectors, tmp_path):
    train = write(tmp_path / "train.parquet", vectors)
    rng = np.random.default_rng(5)
    rows = np.concatenate([rng.normal(0, 1, (9, 8)).astype(np.float32), vectors[7:8]])
    test = write(tmp_path / "test.parquet", rows, ids=[f"t/{index}" for index in range(10)])
    for limit, status in ((None, 0), (0.001, 3), (0.1, 0), (0.09, 3)):
        options = [] if limit is None else ["--fail-over", limit]
        result = run("leaks", train, test, "--threshold", 0.999, *options)
        assert result.exit_code == status, result.output
        assert result.stdout == "test\ttrain\tcosine\nt/9\tp/7.jpg\t1.0000\n"
        assert "1 of 10 test rows (10.000%)" in result.stderr
    data = json.loads(run("leaks", train, test, "--threshold", 0.999, "--json").stdout)
    assert data["rate"] == 0.1 and data["leaks"][0]["train"] == "p/7.jpg"
    assert run("leaks", train, test).exit_code == 2
    other = write(
        tmp_path / "other.parquet",
        rows,
        Metadata(entry="other.noise", manifest_sha256="c" * 64, fingerprint="d" * 64, dim=8, normalized=True),
    )
    error = run("leaks", train, other, "--threshold", 0.9).exception
    assert (
        isinstance(error, SpaceMismatchError)
        and "train.parquet" in str(error)
        and "other.parquet" in str(error)
    )
    assert isinstance(run("leaks", train, tmp_path / "no.parquet", "--threshold", 0.9).exception, OutputError)


def test_command_calibrate(run, tmp_path):
    pytest.importorskip("scipy", reason="pip install '.[analysis]'")
    rng = np.random.default_rng(6)
    vectors = np.repeat(rng.normal(0, 1, (60, 8)), 3, 0) + rng.normal(0, 0.4, (180, 8))
    who = [f"n{index // 3}" for index in range(180)]
    ids = [f"{name}/{index}.jpg" for index, name in enumerate(who)]
    labels = {"who": who, "sex": ["f" if index % 2 else "m" for index in range(180)]}
    path = write(tmp_path / "e.parquet", vectors.astype(np.float32), ids=ids, labels=labels)
    out = tmp_path / "c.json"
    common = ["--target-fmr", 0.01, "--replicates", 20, "-o", out]
    result = run("calibrate", path, "--label", "who", "--group", "sex", *common)
    assert result.exit_code == 0, result.output
    assert "180 genuine and 15930 impostor pairs of 60 identities" in result.stderr
    lines = [line.split("\t") for line in result.stdout.splitlines()]
    assert [line[0] for line in lines if line[0] in ("f", "m")] == ["f", "m"]
    first = json.loads(out.read_text())
    result = run("calibrate", path, "--label-from-folder", *common, "--json")
    again = json.loads(result.stdout)
    assert again["threshold"] == first["threshold"] and again["fingerprint"] == METADATA.fingerprint
    low, high = again["predicted_fmr_interval"]
    assert low < again["fmr"] < high
    with open(tmp_path / "p.csv", "w") as file:
        file.write("a,b,same\n")
        for i in range(180):
            for j in range(i):
                file.write(f"{ids[i]},{ids[j]},{int(who[i] == who[j])}\n")
    assert run("calibrate", path, "--pairs", tmp_path / "p.csv", *common).exit_code == 0
    assert json.loads(out.read_text())["threshold"] == first["threshold"]
    assert run("calibrate", path, *common).exit_code == 2
    assert run("calibrate", path, "--label", "who", "--label-from-folder", *common).exit_code == 2
    error = run("calibrate", path, "--label", "name", *common).exception
    assert isinstance(error, ConfigError) and "no column 'name'; it has sex, who" in str(error)
    error = run("calibrate", path, "--label", "who", "-o", out).exception  # 1e-3 from 15,930 pairs
    assert isinstance(error, ConfigError) and "30000 are needed" in str(error)
