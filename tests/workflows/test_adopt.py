"""Files that pandas, Polars and DuckDB wrote come back: by the command, by Python, and only as their encoder's."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

import embedkit
from embedkit import ConfigError, Embeddings, OutputError, SpaceMismatchError
from embedkit.workflows.adopt import adopt

SAMPLES = Path(__file__).parents[2] / "samples"
NAME = "supervised-efficientnet_lite0"
#: The rows that every program keeps, in its own order: images of more than so many bytes, the largest first.
LEAST = 30_000


@pytest.fixture(scope="module")
def embedded(tmp_path_factory, encoder):
    """A folder with `samples/`, and what `embedkit embed` wrote of it: normalized and raw rows."""
    folder = tmp_path_factory.mktemp("embedded")
    shutil.copytree(SAMPLES, folder / "samples")
    before = Path.cwd()
    os.chdir(folder)
    try:
        embedkit.embed("samples", "s.parquet", encoder=encoder)
        embedkit.embed("samples", "raw.parquet", encoder=encoder, normalize=False)
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def folder(embedded, tmp_path, monkeypatch):
    """A copy of `embedded`, which is the working folder."""
    copy = tmp_path / "work"
    shutil.copytree(embedded, copy)
    monkeypatch.chdir(copy)
    return copy


def by_pandas():
    pd = pytest.importorskip("pandas", reason="pip install pandas")
    frame = pd.read_parquet("s.parquet")
    frame[frame["size"] > LEAST].sort_values("size", ascending=False).to_parquet("f.parquet")


def by_pandas_with_ids_as_the_index():
    pd = pytest.importorskip("pandas", reason="pip install pandas")
    frame = pd.read_parquet("s.parquet").set_index("id")
    frame[frame["size"] > LEAST].sort_values("size", ascending=False).to_parquet("f.parquet")


def by_pandas_on_arrow():
    pd = pytest.importorskip("pandas", reason="pip install pandas")
    frame = pd.read_parquet("s.parquet", dtype_backend="pyarrow")
    frame[frame["size"] > LEAST].sort_values("size", ascending=False).to_parquet("f.parquet")


def by_polars():
    pl = pytest.importorskip("polars", reason="pip install polars")
    frame = pl.read_parquet("s.parquet").filter(pl.col("size") > LEAST)
    frame.sort("size", descending=True).write_parquet("f.parquet")


def by_polars_as_float64():
    pl = pytest.importorskip("polars", reason="pip install polars")
    frame = pl.scan_parquet("s.parquet").filter(pl.col("size") > LEAST).sort("size", descending=True)
    frame = frame.with_columns(
        pl.col("id").cast(pl.Categorical), pl.col("embedding").cast(pl.List(pl.Float64))
    )
    frame.sink_parquet("f.parquet")


def by_duckdb():
    duckdb = pytest.importorskip("duckdb", reason="pip install duckdb")
    duckdb.sql(f"copy (from 's.parquet' where size > {LEAST} order by size desc) to 'f.parquet'")


WRITERS = [
    by_pandas,
    by_pandas_with_ids_as_the_index,
    by_pandas_on_arrow,
    by_polars,
    by_polars_as_float64,
    by_duckdb,
]


def expected_rows() -> Embeddings:
    stored, whole = pq.read_table("s.parquet"), Embeddings.load("s.parquet")
    order = np.argsort(stored["size"].to_numpy())[::-1]
    kept = whole[order[stored["size"].to_numpy()[order] > LEAST]]
    assert 3 < len(kept) < 10 and kept.ids != sorted(kept.ids)
    return kept


@pytest.mark.parametrize("write", WRITERS)
def test_what_another_program_filtered_comes_back(write, folder, run):
    write()
    before, expected = Path("f.parquet").read_bytes(), expected_rows()
    status, _, err = run("search", "samples/cat.jpg", "f.parquet")
    assert status == 1 and "`embedkit adopt f.parquet --encoder NAME`" in err and err.count("\n") == 1

    status, out, err = run("adopt", "f.parquet", "--encoder", NAME, "-o", "back.parquet")
    assert (status, out) == (0, "") and Path("f.parquet").read_bytes() == before
    assert f"back.parquet: {len(expected)} rows of {NAME}.in1k; {len(expected)} embedded again" in err
    found = Embeddings.load("back.parquet")
    assert found.ids == expected.ids and np.array_equal(found.vectors, expected.vectors)
    assert found.metadata.fingerprint == expected.metadata.fingerprint and found.labels == {}

    status, out, err = run("search", expected.ids[0], "samples/cat.jpg", "back.parquet", "-k", 2)
    assert status == 0 and len(out.splitlines()) == 1 + 4, err
    status, out, err = run("cluster", "back.parquet", "-n", 2, "--json")
    assert status == 0 and sum(one["size"] for one in json.loads(out)["clusters"]) == len(expected), err


@pytest.mark.parametrize("write", [by_pandas, by_polars, by_duckdb])
def test_and_by_python(write, folder):
    write()
    expected, metadata = expected_rows(), Embeddings.load("s.parquet").metadata
    found = Embeddings.from_arrow(pq.read_table("f.parquet"), metadata)
    assert found.ids == expected.ids and np.array_equal(found.vectors, expected.vectors)
    found.save("back.parquet")
    assert Embeddings.load("back.parquet").metadata == metadata


def test_a_job_extends_what_was_adopted(folder, encoder):
    """Sizes and times of the images are still there, so only images that were filtered out are embedded."""
    by_duckdb()
    kept = adopt("f.parquet", encoder, "back.parquet").rows
    report = embedkit.embed("samples", "back.parquet", encoder=encoder)
    assert (report.images, report.kept) == (10 - kept, kept)
    assert sorted(Embeddings.load("back.parquet").ids) == sorted(Embeddings.load("s.parquet").ids)


def bare(name: str = "s.parquet") -> pa.Table:
    return pq.read_table(name).replace_schema_metadata(None)


def test_a_wrong_encoder_is_refused_by_the_images(folder, run, by_hand):
    other = by_hand.TinyEntry(dim=1280).write(folder / "zoo" / "linear-wide.noise")
    pq.write_table(bare(), "f.parquet")
    status, _, err = run("adopt", "f.parquet", "--encoder", other, "-o", "back.parquet")
    assert status == 1 and err.count("\n") == 1 and "f.parquet was not made by linear-wide.noise" in err
    assert abs(float(err.partition("the median cosine is ")[2].split()[0])) < 0.3
    assert not Path("back.parquet").exists()
    pq.write_table(pq.read_table("s.parquet"), "f.parquet")  # with metadata, whose encoder is another one
    shutil.rmtree("samples")
    with pytest.raises(SpaceMismatchError, match=rf"{NAME}.* are different spaces .*name the encoder"):
        adopt("f.parquet", other)


def test_ids_of_other_rows_are_refused(folder, encoder):
    table = bare()
    ids = table["id"].to_pylist()
    pq.write_table(table.set_column(0, "id", pa.array(ids[1:] + ids[:1])), "moved.parquet")
    with pytest.raises(
        SpaceMismatchError, match=r"or its ids belong to other rows: .*median cosine is 0\.\d+"
    ):
        adopt("moved.parquet", encoder)
    ids[0], ids[7] = ids[7], ids[0]
    table = table.set_column(0, "id", pa.array(ids)).drop_columns(["size"])
    pq.write_table(table, "swapped.parquet")
    with pytest.raises(ConfigError, match=r"row of 'samples/\w+\.jpg' does not belong .*\(cosine 0\.\d+"):
        adopt("swapped.parquet", encoder)
    assert not list(Path().glob("*.adopted.parquet"))


def test_without_images_it_says_so(folder, run, encoder):
    pq.write_table(bare(), "f.parquet")
    os.rename("samples", "elsewhere")
    status, out, err = run("adopt", "f.parquet", "--encoder", NAME, "--json")
    assert status == 0 and "10 rows" in err
    assert "not compared with images: no image of the rows can be read below the working folder" in err
    facts = json.loads(out)
    assert (facts["output"], facts["rows"], facts["compared"], facts["cosine"]) == (
        "f.adopted.parquet",
        10,
        0,
        None,
    )
    Path("root").mkdir()
    os.rename("elsewhere", "root/samples")
    done = adopt("f.parquet", encoder, images="root")
    assert (done.compared, done.unchecked) == (10, "") and done.cosine > 0.9999
    for image in Path("root/samples").glob("*.jpg"):  # other images of the same names are no evidence
        shutil.copy("root/samples/README.md", image)
    assert adopt("f.parquet", encoder, images="root").compared == 0


def test_raw_rows(folder, encoder):
    table = bare("raw.parquet")
    pq.write_table(table, "f.parquet")
    done = adopt("f.parquet", encoder)
    expected = Embeddings.load("raw.parquet").metadata
    assert done.compared == 10 and not done.metadata.normalized
    assert done.metadata.fingerprint == expected.fingerprint != encoder.fingerprint

    vectors = np.array(table["embedding"].to_pylist(), np.float32)
    normalized = Embeddings.load("s.parquet").vectors

    def write(rows):
        column = pa.FixedSizeListArray.from_arrays(pa.array(rows.astype(np.float32).reshape(-1)), 1280)
        pq.write_table(table.set_column(2, "embedding", column), "f.parquet")

    write(vectors * 3)
    with pytest.raises(ConfigError, match="raw rows are 3 times as long"):
        adopt("f.parquet", encoder)
    write(np.where(np.arange(10)[:, None] == 4, vectors, normalized))
    with pytest.raises(ConfigError, match=r"row 4 has length \d+\.\d+, and 9 of 10 rows have length 1"):
        adopt("f.parquet", encoder)
    write(normalized.astype(np.float16))
    assert adopt("f.parquet", encoder).metadata.normalized


def test_the_encoder_of_other_embeddings(folder, run):
    pq.write_table(bare(), "f.parquet")
    status, _, err = run("adopt", "f.parquet")
    assert status == 2 and "`embedkit zoo list` prints the names" in err and "--like EMB" in err
    assert run("adopt", "f.parquet", "--like", "s.parquet", "--encoder", NAME)[0] == 2
    status, _, err = run("adopt", "f.parquet", "--like", "s.parquet", "-o", "back.parquet")
    assert status == 0 and f"of {NAME}" in err
    assert (
        Embeddings.load("back.parquet").metadata.fingerprint
        == Embeddings.load("s.parquet").metadata.fingerprint
    )


def test_renamed_columns(folder, run, encoder):
    table = bare().rename_columns(["path", "part", "vec", "size", "mtime_ns"])
    table = table.append_column("__index_level_0__", pa.array(range(10)))
    table = table.append_column("when", pa.array([1] * 10, pa.timestamp("us")))
    table = table.set_column(3, "size", pa.array(["S"] * 10))  # not ours: a label that has the name
    pq.write_table(table, "f.parquet")
    status, _, err = run("adopt", "f.parquet", "--encoder", NAME)
    expected = "--id: f.parquet has no column 'id' of ids (texts); name the right one of 'path', 'size'"
    assert (status, err) == (2, f"embedkit: {expected}\n")
    status, _, err = run("adopt", "f.parquet", "--encoder", NAME, "--id", "path")
    assert (
        status == 2
        and "--embedding: f.parquet has no column 'embedding' of vectors" in err
        and "name the right one of 'vec'" in err
    )
    adopt("f.parquet", encoder, "back.parquet", id="path", embedding="vec")
    found = Embeddings.load("back.parquet")
    assert found.ids == table["path"].to_pylist() and list(found.labels) == ["source_size", "when"]
    assert found.to_arrow()["when"].type == pa.timestamp("us")


def test_the_file_is_not_replaced(folder, run, encoder):
    pq.write_table(bare(), "f.parquet")
    before = Path("f.parquet").read_bytes()
    os.symlink("f.parquet", "link.parquet")
    os.link("f.parquet", "hard.parquet")
    for output in ("f.parquet", "./samples/../f.parquet", "link.parquet", "hard.parquet"):
        with pytest.raises(OutputError, match="is also the input"):
            adopt("f.parquet", encoder, output)
    Path("f.adopted.parquet").write_bytes(b"of the user")
    with pytest.raises(OutputError, match="was not written by embedkit"):
        adopt("f.parquet", encoder)
    assert (
        Path("f.parquet").read_bytes() == before and Path("f.adopted.parquet").read_bytes() == b"of the user"
    )


def test_ids_that_lead_out_of_the_folder_are_not_opened(folder, encoder):
    """Each names a real image outside, whose embedding is not the row: opening one would be an error."""
    os.makedirs("outside/in")
    shutil.copy("samples/cat.jpg", "outside/cat.jpg")
    with open("outside/x.tar", "wb"):
        pass
    os.rename("samples", "outside/in/samples")
    out = Path("outside").resolve()
    ids = [
        "../cat.jpg",
        "samples/../../cat.jpg",
        str(out / "cat.jpg"),
        f"{out}/in/samples/../../cat.jpg",
        f"file:{out}/cat.jpg",
        "file:%2e%2e/cat.jpg",
        "../x.tar::cat.jpg",
        "http://127.0.0.1:9/cat.jpg",
        "a\0b",
        "",
    ]
    table = bare().drop_columns(["size", "mtime_ns"])
    pq.write_table(table.set_column(0, "id", pa.array(ids)), "f.parquet")
    assert adopt("f.parquet", encoder, images="outside/in").compared == 0
    # The same row is refused where the folder holds the image.
    with pytest.raises((SpaceMismatchError, ConfigError), match="cosine"):
        adopt("f.parquet", encoder, images="outside")


def test_arrays(folder, encoder):
    table = Embeddings.load("s.parquet")
    for dtype in ("<f4", ">f4", "<f8", "<f2"):
        np.save("f.npy", table.vectors.astype(dtype))
        Path("f.ids.txt").write_text("\r\n".join(table.ids) + "\r\n")
        done = adopt("f.npy", encoder, "back.parquet")
        found = Embeddings.load("back.parquet")
        assert done.compared == 10 and found.ids == table.ids
        assert np.array_equal(found.vectors, table.vectors.astype(dtype).astype(np.float32))
    os.remove("f.ids.txt")
    lines = [json.dumps({"id": name, "part": 0, "n": row}) + "\n" for row, name in enumerate(table.ids)]
    Path("f.ids.jsonl").write_text("".join(lines))
    assert adopt("f.npy", encoder).output == "f.adopted.npy"
    assert Embeddings.load("f.adopted.npy").label("n") == list(range(10))


@pytest.mark.parametrize(
    ("suffix", "ids", "message"),
    [
        (".txt", b"a\nb\nc\nd\n", "it has more lines than the array has rows, 3"),
        (".txt", b"a\nb\n", "f.npy has 3 rows, and f.ids.txt 2 ids"),
        (
            ".jsonl",
            b"".join(
                json.dumps({"id": str(i), **{f"{i}/{k}": k for k in range(600)}}).encode() + b"\n"
                for i in range(3)
            ),
            "its lines name more than 1000 columns",
        ),
    ],
)
def test_ids_that_do_not_fit_an_array(tmp_path, encoder, suffix, ids, message):
    np.save(tmp_path / "f.npy", np.eye(3, 1280, dtype=np.float32))
    (tmp_path / f"f.ids{suffix}").write_bytes(ids)
    with pytest.raises((ConfigError, OutputError), match=message):
        adopt(tmp_path / "f.npy", encoder)


def test_an_array_without_numbers_and_a_column_without_a_name(tmp_path, encoder):
    (tmp_path / "f.ids.jsonl").write_text('{"id": "a", "\\ud800": 1}\n')
    np.save(tmp_path / "f.npy", np.empty((1, 0), np.float32))
    with pytest.raises(
        ConfigError, match=r"expected float16, float32 or float64 \(N, D\), found .* \(1, 0\)"
    ):
        adopt(tmp_path / "f.npy", encoder)
    np.save(tmp_path / "f.npy", np.eye(1, 1280, dtype=np.float32))
    with pytest.raises(ConfigError, match="holds several types"):
        adopt(tmp_path / "f.npy", encoder)


def test_a_mark_at_the_beginning_of_ids_is_no_part_of_the_first(tmp_path, encoder):
    np.save(tmp_path / "f.npy", np.eye(3, 1280, dtype=np.float32))
    (tmp_path / "f.ids.txt").write_bytes(b"\xef\xbb\xbfa\r\nb\r\nc\r\n")  # as some editors write UTF-8
    assert Embeddings.load(adopt(tmp_path / "f.npy", encoder).output).ids == ["a", "b", "c"]


def test_a_size_that_is_out_of_range(tmp_path, encoder):
    rows = pa.FixedSizeListArray.from_arrays(pa.array(np.eye(1, 1280, dtype=np.float32).ravel()), 1280)
    table = pa.table({"id": ["a"], "embedding": rows, "size": pa.array([1 << 63], pa.uint64())})
    pq.write_table(table, tmp_path / "f.parquet")
    with pytest.raises(ConfigError, match="the column 'size' cannot be read as int64"):
        adopt(tmp_path / "f.parquet", encoder)


def test_rows_of_several_parts_are_not_compared(folder, encoder):
    """A face, a crop or a frame is not the image that its id names."""
    table = bare().drop_columns(["size"])
    table = table.set_column(0, "id", pa.array(["samples/cat.jpg"] * 10))
    table = table.set_column(1, "part", pc.cast(pa.array(range(10)), pa.int32()))
    pq.write_table(table, "f.parquet")
    assert adopt("f.parquet", encoder).compared == 0
    assert Embeddings.load("f.adopted.parquet").parts.tolist() == list(range(10))
