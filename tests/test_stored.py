"""Where embeddings are stored: every kind gives the same rows, columns and figures, and damage is one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner

from embedkit import lancetable, stored
from embedkit.analysis.rows import Rows
from embedkit.commands import atlas, calibrate, cluster, duplicates, leaks, lint
from embedkit.embeddings import Embeddings, Passport, Run, schema_of, write_npy, write_rows
from embedkit.errors import ConfigError, OutputError, SpaceMismatchError
from embedkit.stored import is_stored, open_stored

PASSPORT = Passport(
    entry="linear-tiny.noise", manifest_sha256="a" * 64, fingerprint="b" * 64, dim=8, normalized=True
)
KINDS = ("e.parquet", "e.npy", "shards", "lance")


def table(start: int = 0, stop: int = 1200, passport: Passport = PASSPORT) -> pa.Table:
    """Rows of a set of 1,200, three pictures to an identity; one in 7 is the second part of the one before it."""
    rng = np.random.default_rng(0)
    vectors = (np.repeat(rng.normal(0, 1, (400, 8)), 3, 0) + rng.normal(0, 0.4, (1200, 8))).astype(np.float32)
    vectors[700] = vectors[20]
    columns = {
        "id": [f"n{row // 3}/{row - (row % 7 == 6)}.jpg" for row in range(1200)],
        "part": [int(row % 7 == 6) for row in range(1200)],
        "embedding": list(vectors),
        "size": [1] * 1200,
        "mtime_ns": [1] * 1200,
        "who": [f"n{row // 3}" for row in range(1200)],
        "age": list(range(1200)),
    }
    schema = schema_of(passport, {"who": "string", "age": "int32"}, sha256=False)
    return pa.table(columns, schema=schema).slice(start, stop - start)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Name of a kind -> the same 1,200 rows as that kind; without `lance` where pylance is missing."""
    folder = tmp_path_factory.mktemp("stores")
    whole = table()
    write_rows([whole], folder / "e.parquet", whole.schema)
    write_npy([whole], folder / "e.npy", PASSPORT, 1200)
    (folder / "shards").mkdir()
    for number, (start, stop) in enumerate(((0, 700), (700, 701), (701, 1200))):
        piece = table(start, stop)
        write_rows([piece], folder / "shards" / f"part-00001-of-00001-{number:06d}.parquet", piece.schema)
    (folder / "shards" / "_done-00001-of-00001.json").write_text(json.dumps({"rows": 1200}))
    found = {name: str(folder / name) for name in KINDS[:3]}
    try:
        import lance  # noqa: F401
    except ImportError:
        return found
    (folder / "db").mkdir()
    found["lance"] = f"lance://{folder}/db/e"
    lancetable.write([whole], lancetable.table_path(found["lance"]), whole.schema)
    return found


def of_kind(stores, kind):
    if kind not in stores:
        pytest.skip("pip install 'embedkit[lance]'")
    return stores[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_rows(stores, kind, monkeypatch):
    source = of_kind(stores, kind)
    whole = table().to_pydict()
    expected = np.array(whole["embedding"], np.float32)
    monkeypatch.setattr(stored, "BLOCK", 256)  # not a multiple of a row group's 512
    found = open_stored(source)
    assert (len(found), found.where, found.passport) == (1200, source, PASSPORT)
    assert sorted(found.labels) == ["age", "who"] and is_stored(source)
    for start, stop in ((0, 1200), (0, 0), (3, 4), (500, 1030), (699, 702), (1199, 1200), (5, 5)):
        assert np.array_equal(found.vectors(start, stop), expected[start:stop])
        for name in ("id", "who", "age"):
            assert found.column(name, start, stop) == whole[name][start:stop]
        ids, parts = found.keys(start, stop)
        assert ids == whole["id"][start:stop] and parts.tolist() == whole["part"][start:stop]
        assert parts.dtype == np.int32
    assert found.vectors().dtype == np.float32 and np.array_equal(found.vectors(), expected)
    rows = Embeddings.read(source)
    assert rows.ids == whole["id"] and np.array_equal(rows.vectors, expected) and rows.passport == PASSPORT
    assert rows.labels == {name: whole[name] for name in ("who", "age")}
    assert np.array_equal(Rows(source).unit(0, 1200), Rows(expected).unit(0, 1200))
    assert Rows(source).names() == Rows("".join(source)).names() == Rows(found).names()
    for act in (lambda: found.label("sex"), lambda: rows.label("sex", source)):
        with pytest.raises(ConfigError, match="has no column 'sex'; it has age, who"):
            act()


@pytest.mark.parametrize("kind", KINDS)
def test_every_command_takes_every_kind(stores, kind, tmp_path):
    pytest.importorskip("scipy", reason="pip install 'embedkit[analysis]'")
    pytest.importorskip("faiss", reason="pip install 'embedkit[analysis]'")
    source, other = of_kind(stores, kind), stores["e.parquet"]
    app = typer.Typer()
    for command in (cluster, duplicates, leaks, lint, calibrate):
        app.command()(command)

    def run(*arguments):
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert done.exit_code == 0, (done.output, done.exception)
        return done.stdout

    for arguments in (
        ("cluster", "{}", "-k", 3, "--labels", "who", "--json"),
        ("duplicates", "{}", "--threshold", 0.9999, "--json"),
        ("leaks", "{}", other, "--threshold", 0.9999, "--json"),
        ("leaks", other, "{}", "--threshold", 0.9999, "--json"),
        ("lint", "{}", "--json"),
        (
            "calibrate",
            "{}",
            "--identity",
            "who",
            "--target-fmr",
            0.01,
            "--replicates",
            10,
            "--json",
            "-o",
            tmp_path / "c",
        ),
    ):
        mine, expected = (
            json.loads(run(*[place if word == "{}" else word for word in arguments]))
            for place in (source, other)
        )
        assert mine == expected, arguments


@pytest.mark.parametrize("kind", KINDS)
def test_an_atlas_of_every_kind(stores, kind, tmp_path):
    """Which pictures are gone is found out last: before, rows and labels were read."""
    app = typer.Typer()
    app.command()(atlas)
    arguments = [of_kind(stores, kind), "-o", str(tmp_path / "a.html"), "--map", "pca", "--label", "who"]
    error = CliRunner().invoke(app, arguments).exception
    assert "none of the 1200 pictures can be read" in str(error)


def test_shards_of_several_runs_and_columns(tmp_path):
    runs = [
        Run(provider="CPU", precision="fp32", decode="auto", threads=n, batch_size=4, versions={})
        for n in (1, 2)
    ]
    for number, run in enumerate(runs):
        piece = table(10 * number, 10 * number + 10, PASSPORT.with_run(run))
        if number:
            piece = piece.drop_columns(["who"])
        write_rows([piece], tmp_path / f"part-00001-of-00001-{number:06d}.parquet", piece.schema)
    assert is_stored(tmp_path)
    with pytest.raises(OutputError, match="part 1 of 1 is missing or not finished"):
        open_stored(tmp_path)
    (tmp_path / "_done-00001-of-00001.json").write_text("{}")
    found = open_stored(tmp_path)
    assert found.passport.runs == tuple(runs)
    assert found.column("who", 8, 12) == ["n2", "n3", None, None]
    other = table(20, 30, Passport(**{**vars(PASSPORT), "fingerprint": "c" * 64}))
    write_rows([other], tmp_path / "part-00001-of-00001-000002.parquet", other.schema)
    with pytest.raises(SpaceMismatchError, match="space bbbbbbbbbbbb.*cccccccccccc"):
        open_stored(tmp_path)


def test_a_folder_of_pictures_is_no_store(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    assert not is_stored(tmp_path) and is_stored(tmp_path / "a.jpg") and is_stored("lance://x/y")
    with pytest.raises(OutputError, match="holds no embeddings"):
        open_stored(tmp_path)
    with pytest.raises(OutputError, match="does not exist"):
        open_stored(tmp_path / "none.parquet")


def test_no_rows(tmp_path):
    write_rows([], tmp_path / "e.parquet", table().schema)
    found = open_stored(tmp_path / "e.parquet")
    assert len(found) == 0 and found.vectors().shape == (0, 8) and found.keys()[0] == []
    assert len(Embeddings.read(tmp_path / "e.parquet")) == 0


def test_damaged_files_are_one_sentence(stores, tmp_path):
    data = bytearray(Path(stores["e.parquet"]).read_bytes())
    data[200:20_000] = bytes(19_800)  # the footer is whole
    (tmp_path / "d.parquet").write_bytes(data)
    with pytest.raises(OutputError, match=r"d\.parquet is damaged \(.*embed the pictures again") as caught:
        open_stored(tmp_path / "d.parquet").keys()
    assert "\n" not in str(caught.value)
    for changed, column in (
        (table().drop_columns(["part"]), "part"),
        (
            table().set_column(2, "embedding", pa.array([[1.0]] * 1200, pa.list_(pa.float32(), 1))),
            "embedding",
        ),
        (table().set_column(0, "id", pa.array(range(1200), pa.int64())), "id"),
    ):
        pq.write_table(changed, tmp_path / "x.parquet")
        with pytest.raises(OutputError, match=f"the column '{column}' should be"):
            open_stored(tmp_path / "x.parquet")


@pytest.mark.parametrize("line", ['{"id": "x"}', '["x"]', "3", "{"])
def test_damaged_ids_of_an_array(tmp_path, line):
    write_npy([table(0, 1)], tmp_path / "e.npy", PASSPORT, 1)
    (tmp_path / "e.ids.jsonl").write_text(line + "\n")
    with pytest.raises(OutputError, match="cannot be read"):
        open_stored(tmp_path / "e.npy")
