"""Where embeddings are stored: every kind gives the same rows, columns and figures, and damage is one sentence."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner

import embedkit
from embedkit.analysis.vectors import Rows
from embedkit.cli import atlas, calibrate, cluster, duplicates, leaks, lint
from embedkit.embeddings import base
from embedkit.embeddings.formats import is_embeddings, open_rows, output_format
from embedkit.embeddings.lance import LanceFormat
from embedkit.embeddings.metadata import Metadata, Run
from embedkit.embeddings.npy_write import write_npy
from embedkit.embeddings.parquet import write_rows
from embedkit.embeddings.schema import schema_of
from embedkit.embeddings.table import Embeddings
from embedkit.errors import ConfigError, OutputError, SpaceMismatchError

METADATA = Metadata(
    entry="linear-tiny.noise", manifest_sha256="a" * 64, fingerprint="b" * 64, dim=8, normalized=True
)
KINDS = ("e.parquet", "e.npy", "shards", "lance")


def table(start: int = 0, stop: int = 1200, metadata: Metadata = METADATA) -> pa.Table:
    """Rows of a set of 1,200, three images to an identity; one in 7 is the second part of the one before it."""
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
    schema = schema_of(metadata, {"who": "string", "age": "int32"}, sha256=False)
    return pa.table(columns, schema=schema).slice(start, stop - start)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Name of a kind -> the same 1,200 rows as that kind; without `lance` where pylance is missing."""
    folder = tmp_path_factory.mktemp("stores")
    whole = table()
    write_rows([whole], folder / "e.parquet", whole.schema)
    write_npy([whole], folder / "e.npy", METADATA, 1200)
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
    LanceFormat().write(lambda: [whole], LanceFormat().locate(found["lance"]), whole.schema)
    return found


def of_kind(stores, kind):
    if kind not in stores:
        pytest.skip("pip install '.[lance]'")
    return stores[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_rows(stores, kind, monkeypatch):
    source = of_kind(stores, kind)
    whole = table().to_pydict()
    expected = np.array(whole["embedding"], np.float32)
    monkeypatch.setattr(base, "BLOCK", 256)  # not a multiple of a row group's 512
    found = open_rows(source)
    assert (len(found), found.where, found.metadata) == (1200, source, METADATA)
    assert sorted(found.labels) == ["age", "who"] and is_embeddings(source)
    for start, stop in ((0, 1200), (0, 0), (3, 4), (500, 1030), (699, 702), (1199, 1200), (5, 5)):
        assert np.array_equal(found.vectors(start, stop), expected[start:stop])
        for name in ("id", "who", "age"):
            assert found.column(name, start, stop) == whole[name][start:stop]
        ids, parts = found.keys(start, stop)
        assert ids == whole["id"][start:stop] and parts.tolist() == whole["part"][start:stop]
        assert parts.dtype == np.int32
    assert found.vectors().dtype == np.float32 and np.array_equal(found.vectors(), expected)
    rows = Embeddings.load(source)
    assert rows.ids == whole["id"] and np.array_equal(rows.vectors, expected) and rows.metadata == METADATA
    assert rows.labels == {name: whole[name] for name in ("who", "age")}
    assert np.array_equal(Rows(source).unit(0, 1200), Rows(expected).unit(0, 1200))
    assert Rows(source).names() == Rows("".join(source)).names() == Rows(found).names()
    for act in (lambda: found.label("sex"), lambda: rows.label("sex")):
        with pytest.raises(ConfigError, match="has no column 'sex'; it has age, who"):
            act()


@pytest.mark.parametrize("kind", KINDS)
def test_every_command_takes_every_kind(stores, kind, tmp_path):
    pytest.importorskip("scipy", reason="pip install '.[analysis]'")
    pytest.importorskip("faiss", reason="pip install '.[analysis]'")
    source, other = of_kind(stores, kind), stores["e.parquet"]
    app = typer.Typer()
    for command in (cluster, duplicates, leaks, lint, calibrate):
        app.command()(command)

    def run(*arguments):
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert done.exit_code == 0, (done.output, done.exception)
        return done.stdout

    for arguments in (
        ("cluster", "{}", "-n", 3, "--label", "who", "--json"),
        ("duplicates", "{}", "--threshold", 0.9999, "--json"),
        ("leaks", "{}", other, "--threshold", 0.9999, "--json"),
        ("leaks", other, "{}", "--threshold", 0.9999, "--json"),
        ("lint", "{}", "--json"),
        (
            "calibrate",
            "{}",
            "--label",
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
            json.loads(run(*[store if word == "{}" else word for word in arguments]))
            for store in (source, other)
        )
        assert mine == expected, arguments


@pytest.mark.parametrize("kind", KINDS)
def test_an_atlas_of_every_kind(stores, kind, tmp_path):
    """Which images are gone is found out last: before, rows and labels were read."""
    app = typer.Typer()
    app.command()(atlas)
    arguments = [of_kind(stores, kind), "-o", str(tmp_path / "a.html"), "--map", "pca", "--label", "who"]
    error = CliRunner().invoke(app, arguments).exception
    assert "none of the 1200 images can be read" in str(error)


def test_shards_of_several_runs_and_columns(tmp_path):
    runs = [
        Run(provider="CPU", precision="fp32", decode="auto", threads=n, batch_size=4, versions={})
        for n in (1, 2)
    ]
    for number, run in enumerate(runs):
        piece = table(10 * number, 10 * number + 10, METADATA.with_run(run))
        if number:
            piece = piece.drop_columns(["who"])
        write_rows([piece], tmp_path / f"part-00001-of-00001-{number:06d}.parquet", piece.schema)
    assert is_embeddings(tmp_path)
    with pytest.raises(OutputError, match="is not finished"):
        open_rows(tmp_path)
    (tmp_path / "_done-00001-of-00001.json").write_text("{}")
    found = open_rows(tmp_path)
    assert found.metadata.runs == tuple(runs)
    assert found.column("who", 8, 12) == ["n2", "n3", None, None]
    other = table(20, 30, Metadata(**{**vars(METADATA), "fingerprint": "c" * 64}))
    write_rows([other], tmp_path / "part-00001-of-00001-000002.parquet", other.schema)
    with pytest.raises(SpaceMismatchError, match="space bbbbbbbbbbbb.*cccccccccccc"):
        open_rows(tmp_path)


def test_a_folder_of_images_is_no_store(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    assert not is_embeddings(tmp_path) and is_embeddings(tmp_path / "a.jpg") and is_embeddings("lance://x/y")
    with pytest.raises(OutputError, match="is a folder without embeddings"):
        open_rows(tmp_path)
    with pytest.raises(OutputError, match="does not exist"):
        open_rows(tmp_path / "none.parquet")


def test_no_rows(tmp_path):
    write_rows([], tmp_path / "e.parquet", table().schema)
    found = open_rows(tmp_path / "e.parquet")
    assert len(found) == 0 and found.vectors().shape == (0, 8) and found.keys()[0] == []
    assert len(Embeddings.load(tmp_path / "e.parquet")) == 0


def test_damaged_files_are_one_sentence(stores, tmp_path):
    data = bytearray(Path(stores["e.parquet"]).read_bytes())
    data[200:20_000] = bytes(19_800)  # the footer is whole
    (tmp_path / "d.parquet").write_bytes(data)
    with pytest.raises(OutputError, match=r"d\.parquet is damaged \(.*embed the images again") as caught:
        open_rows(tmp_path / "d.parquet").keys()
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
            open_rows(tmp_path / "x.parquet")


def with_vectors(embedding: pa.Array) -> pa.Table:
    return table(0, len(embedding)).set_column(2, "embedding", embedding)


def write_as(kind: str, changed: pa.Table, folder: Path) -> str:
    if kind == "lance":
        pytest.importorskip("lance", reason="pip install '.[lance]'")
        LanceFormat().write(lambda: [changed], folder / "x.lance", changed.schema)
        return f"lance://{folder}/x"
    pq.write_table(changed, folder / "x.parquet")
    return str(folder / "x.parquet")


@pytest.mark.parametrize("kind", ["e.parquet", "lance"])
def test_a_missing_vector_is_damage(tmp_path, kind):
    """Of two rows one is left, which numpy would take for both."""
    (tmp_path / "rows").mkdir()
    rows = [[1.0] * 8, None]
    source = write_as(kind, with_vectors(pa.array(rows, pa.list_(pa.float32(), 8))), tmp_path / "rows")
    with pytest.raises(OutputError, match=r"is damaged \(an embedding, or a number of one, is missing"):
        open_rows(source).vectors()
    # Of a slice whose own rows are whole, the null elsewhere is no matter.
    assert open_rows(source).vectors(0, 1).tolist() == [[1.0] * 8]
    rows[1] = [1.0] * 7 + [None]
    (tmp_path / "numbers").mkdir()
    source = write_as(kind, with_vectors(pa.array(rows, pa.list_(pa.float32(), 8))), tmp_path / "numbers")
    with pytest.raises(OutputError, match="is missing"):
        Embeddings.load(source)


@pytest.mark.parametrize("column", ["id", "part"])
def test_a_row_without_a_key_is_damage(tmp_path, column):
    rows = table(0, 2)
    at = rows.schema.get_field_index(column)
    values = pa.array([rows[column][0].as_py(), None], rows.schema.field(column).type)
    pq.write_table(rows.set_column(at, column, values), tmp_path / "x.parquet")
    with pytest.raises(OutputError, match=f"a row has no {column}"):
        open_rows(tmp_path / "x.parquet").keys()


def test_text_that_is_no_unicode_is_damage(tmp_path):
    pq.write_table(table(0, 2), tmp_path / "x.parquet", compression="none", use_dictionary=False)
    data = (tmp_path / "x.parquet").read_bytes()
    (tmp_path / "x.parquet").write_bytes(data.replace(b"n0/0.jpg", b"n0\xff0.jpg"))
    with pytest.raises(OutputError, match=r"is damaged \(.*utf-8") as caught:
        open_rows(tmp_path / "x.parquet").keys()
    assert "\n" not in str(caught.value)


def test_a_column_of_two_types_over_shards(tmp_path):
    for number, kind in enumerate(("int32", "string")):
        rows = table(0, 3).drop_columns(["age"])
        rows = rows.append_column("age", pa.array([1, 2, 3], "int32").cast(kind))
        pq.write_table(rows, tmp_path / f"part-00001-of-00001-{number:06d}.parquet")
    (tmp_path / "_done-00001-of-00001.json").write_text("{}")
    (tmp_path / "_done-x-of-y.json").write_text("{}")  # of somebody else
    found = open_rows(tmp_path)
    assert found.column("who") == ["n0"] * 6
    with pytest.raises(OutputError, match="the column 'age' is int32 in one shard and string in another"):
        found.column("age")


def test_a_mark_of_no_number_is_none(tmp_path):
    (tmp_path / "_done-x-of-y.json").write_text("{}")
    with pytest.raises(OutputError, match="is a folder without embeddings"):
        open_rows(tmp_path)


def test_ids_with_the_separators_of_unicode(tmp_path):
    names = ["a\u2028b", "c\u2029", "\x85\x0b\x0c\x1c\x1e", "\r\n"]
    write_npy([table(0, 4).set_column(0, "id", pa.array(names))], tmp_path / "e.npy", METADATA, 4)
    assert open_rows(tmp_path / "e.npy").keys()[0] == names
    assert Embeddings.load(tmp_path / "e.npy").ids == names


def header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04" + bytes(60),
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (1, 8"),
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999, 8), }"),
        header("(" * 5000),
        header("{'descr': 3, 'fortran_order': False, 'shape': (1, 8), }"),
        header("{'descr': '<i4', 'fortran_order': False, 'shape': (1, 8), }") + bytes(32),
        header("{'descr': '|O', 'fortran_order': False, 'shape': (1, 8), }") + bytes(64),
    ],
)
def test_damaged_arrays_are_one_sentence(tmp_path, content):
    write_npy([table(0, 1)], tmp_path / "e.npy", METADATA, 1)
    (tmp_path / "e.npy").write_bytes(content)
    with pytest.raises(OutputError, match=r"e\.npy and its ids and metadata cannot be read") as caught:
        open_rows(tmp_path / "e.npy")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"dim": 0},
        {"dim": -8},
        {"dim": True},
        {"dim": 8.0},
        {"dim": "8"},
        {"dim": (1 << 20) + 1},
        {"entry": None},
        {"fingerprint": 7},
        {"fingerprint": "b"},
        {"manifest_sha256": ["a"]},
        {"normalized": "yes"},
        {"version": True},
        {"version": [1]},
        {"runs": [{"provider": 1}]},
        {
            "runs": [
                {"provider": 1, "precision": "", "decode": "", "threads": 1, "batch_size": 1, "versions": {}}
            ]
        },
        {"runs": 3},
        {"more": 1},
    ],
)
def test_damaged_metadata_is_one_sentence(change):
    data = json.loads(METADATA.to_json())
    assert Metadata.from_json(json.dumps(data), "x") == METADATA
    key = next(iter(change))
    with pytest.raises(OutputError, match=f"^x: .?{key}.*: expected .*; was it written by another program"):
        Metadata.from_json(json.dumps({**data, **change}), "x")


def test_metadata_that_is_nested_too_deep_or_of_another_version():
    with pytest.raises(
        OutputError, match="^x is not JSON .it is nested deeper than 64 levels.; was it written"
    ):
        Metadata.from_json("[" * 100_000, "x")
    with pytest.raises(OutputError, match="^x: version: expected version 1, found 2; upgrade"):
        Metadata.from_json(json.dumps({"version": 2, "else": 1}), "x")


@pytest.mark.parametrize(
    "line",
    [
        '{"id": "x"}',
        '["x"]',
        "3",
        "{",
        "",
        '{"id": 3, "part": 0}',
        '{"id": "x", "part": "0"}',
        '{"id": "x", "part": 0.5}',
        '{"id": "x", "part": true}',
        '{"id": "x", "part": 2147483648}',
        '{"id": "x", "part": 0, "a": ' + "[" * 100_000,
    ],
)
def test_damaged_ids_of_an_array(tmp_path, line):
    write_npy([table(0, 1)], tmp_path / "e.npy", METADATA, 1)
    (tmp_path / "e.ids.jsonl").write_text(line + "\n")
    with pytest.raises(OutputError, match="cannot be read|nested too deep"):
        open_rows(tmp_path / "e.npy")


def test_no_other_module_knows_one_format():
    """A job's shards are Parquet files, and so are tables of clusters; all else goes through the registry."""
    package = Path(embedkit.__file__).parent
    found = {
        f"{path.relative_to(package)}: {name}"
        for path in package.rglob("*.py")
        if path.parent.name != "embeddings"
        for name in re.findall(r"embeddings\.(lance|npy\w*|shards|parquet\w*)\b", path.read_text())
    }
    assert {line for line in found if not line.endswith(": parquet")} == {
        "pipeline/checkpoint.py: parquet_file",
        "pipeline/checkpoint.py: shards",
    }
    assert {line for line in found if line.endswith(": parquet")} == {
        "analysis/clustering/cluster.py: parquet",
        "pipeline/checkpoint.py: parquet",
    }


@pytest.mark.parametrize(
    "name", ["s3://bucket/out/", "hf://org/x/", "gs://bucket/x.parquet", "https://host/x.npy"]
)
def test_a_url_is_no_output(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="is a URL, which cannot be written to"):
        output_format(name)
    assert list(tmp_path.iterdir()) == []
