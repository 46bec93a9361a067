"""Files of vectors that `embedkit adopt` must refuse: in one sentence, with the row, and in bounded memory."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedkit.errors import EmbedkitError
from embedkit.workflows.adopt import adopt

GOOD = np.eye(4, dtype=np.float32)
IDS = ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]


def lists(rows, kind: pa.DataType | None = None) -> pa.Array:
    return pa.array(rows, kind or pa.list_(pa.float32()))


def with_number(value: float) -> pa.Array:
    rows = GOOD.tolist()
    rows[2][1] = value
    return lists(rows)


@pytest.fixture
def refused(tmp_path, monkeypatch, tiny):
    """`refused(**columns)` -> the sentence with which a Parquet file of these columns is refused."""
    monkeypatch.chdir(tmp_path)

    def refused(**columns) -> str:
        pq.write_table(pa.table({"id": IDS, "embedding": lists(GOOD.tolist()), **columns}), "f.parquet")
        return sentence(lambda: adopt("f.parquet", tiny))

    return refused


def sentence(act) -> str:
    with pytest.raises(EmbedkitError) as caught:
        act()
    assert "\n" not in str(caught.value) and str(caught.value).isprintable()
    assert not [name for name in os.listdir() if "adopted" in name]
    return str(caught.value)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"embedding": with_number(float("nan"))}, "row 2 ('c.jpg') holds NaN or infinity"),
        ({"embedding": with_number(float("inf"))}, "row 2 ('c.jpg') holds NaN or infinity"),
        ({"embedding": lists([*GOOD[:3].tolist(), [0] * 4])}, "row 3 ('d.jpg') is all zeros"),
        ({"embedding": lists([[1e300] * 4] * 4, pa.list_(pa.float64()))}, "row 0 ('a.jpg') holds NaN or infinity"),
        ({"embedding": lists([*GOOD[:3].tolist(), [1, 0, 0]])}, "row 3 ('d.jpg') has a vector of 3 numbers"),
        ({"embedding": lists([[1, 0]] * 4, pa.list_(pa.float32(), 2))}, "row 0 ('a.jpg') has a vector of 2 numbers"),
        ({"embedding": lists([[], [], [], []])}, "row 0 ('a.jpg') has a vector of 0 numbers"),
        ({"embedding": lists([*GOOD[:3].tolist(), None])}, "row 3 ('d.jpg') has no vector"),
        ({"embedding": with_number(None)}, "row 2 ('c.jpg') has a vector with a number missing"),
        ({"embedding": lists([[1, 2, 3, 4]] * 4, pa.list_(pa.int64()))}, "vectors (lists of floating-point numbers)"),
        ({"embedding": pa.array(["[1, 0, 0, 0]"] * 4)}, "vectors (lists of floating-point numbers), and is string"),
        ({"embedding": lists([[[1.0]]] * 4, pa.list_(pa.list_(pa.float32())))}, "and is list<"),
        ({"embedding": pa.nulls(4)}, "row 0 ('a.jpg') has no vector"),
        ({"id": pa.array(["a.jpg", None, "c.jpg", "d.jpg"])}, "row 1 has no id"),
        ({"id": pa.array(range(4))}, "the column 'id' should hold ids (texts), and is int64"),
        ({"id": pa.array(["a.jpg", "b.jpg", "b.jpg", "d.jpg"])}, "the id 'b.jpg' with part 0 occurs 2 times"),
        ({"part": pa.array([0, None, 0, 0])}, "row 1 has no part"),
        ({"part": pa.array([0, 1 << 40, 0, 0])}, "the column 'part' cannot be read as int32"),
        ({"embedding": lists([[2.0, 0, 0, 0], *GOOD[1:].tolist()])}, "row 0 has length 2, and 3 of 4 rows have"),
    ],
)  # fmt: skip
def test_rows_that_are_no_embeddings(refused, columns, message):
    assert message in refused(**columns)


def test_columns_that_cannot_be_told_apart(refused, tiny):
    assert "the column 'size' would become 'source_size', which is there" in refused(
        size=["x"] * 4, source_size=["y"] * 4
    )
    table = pa.table([pa.array(IDS), pa.array(IDS), lists(GOOD.tolist())], ["id", "id", "embedding"])
    pq.write_table(table, "f.parquet")
    assert "two columns 'id'" in sentence(lambda: adopt("f.parquet", tiny))


def test_files_that_hold_nothing(refused, tiny):
    Path("empty.parquet").touch()
    Path("text.parquet").write_text("id,embedding\n")
    pq.write_table(pa.table({"id": pa.array([], pa.string()), "embedding": lists([])}), "none.parquet")
    assert "cannot be read as Parquet" in sentence(lambda: adopt("empty.parquet", tiny))
    assert "cannot be read as Parquet" in sentence(lambda: adopt("text.parquet", tiny))
    assert "none.parquet has no row" in sentence(lambda: adopt("none.parquet", tiny))
    assert "cannot be read" in sentence(lambda: adopt("missing.parquet", tiny))
    assert "cannot be read" in sentence(lambda: adopt(".", tiny))
    os.mkfifo("fifo.parquet")
    assert "is not a regular file" in sentence(lambda: adopt("fifo.parquet", tiny))


def test_damage_within_the_file(refused, tiny):
    rows = np.random.default_rng(0).normal(0, 1, (4000, 4)).astype(np.float32)
    table = pa.table({"id": [f"{row}.jpg" for row in range(4000)], "embedding": lists(rows.tolist())})
    pq.write_table(table, "f.parquet")
    data = bytearray(Path("f.parquet").read_bytes())
    for start in (4, len(data) // 2):
        hurt = bytearray(data)
        hurt[start : start + 2000] = b"\xff" * 2000
        Path("g.parquet").write_bytes(hurt)
        assert sentence(lambda: adopt("g.parquet", tiny)).startswith("g.parquet")


def test_gigabytes_that_a_small_file_claims(tmp_path, tiny_entry):
    """Refused within 256 MB of memory beyond what the program takes: by the schema, and by the count of numbers."""
    schema = pa.schema([("id", pa.string()), ("embedding", pa.list_(pa.float32(), (1 << 31) - 1))])
    table = pa.table({"id": IDS[:2], "embedding": lists(GOOD[:2].tolist())})
    with pq.ParquetWriter(tmp_path / "schema.parquet", table.schema, store_schema=False) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({b"ARROW:schema": base64.b64encode(schema.serialize().to_pybytes())})

    zeros = pa.array(np.zeros(50_000_000, np.float32))
    one = pa.ListArray.from_arrays(pa.array([0, len(zeros)], pa.int32()), zeros)
    pq.write_table(pa.table({"id": ["a"], "embedding": one}), tmp_path / "row.parquet", compression="none")

    code = f"""
import resource, sys
import embedkit
from embedkit.workflows.adopt import adopt
encoder = embedkit.load_encoder({os.fspath(tiny_entry)!r}, threads=1)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in ("schema", "row"):
    try:
        adopt(f"{{name}}.parquet", encoder)
    except embedkit.EmbedkitError as error:
        print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *lines, growth = done.stdout.splitlines()
    assert [line.partition(": the column 'embedding' takes ")[0] for line in lines] == [
        f"{name}.parquet" for name in ("schema", "row")
    ], lines
    assert "takes 17180 MB in memory" in lines[0] and "takes 200 MB" in lines[1] and int(growth) < 256


@pytest.mark.parametrize(
    ("array", "ids", "message"),
    [
        (GOOD, None, "has no ids beside it; write them to f.ids.txt"),
        (GOOD, b"a\nb\nc\n", "f.npy has 4 rows, and f.ids.txt 3 ids"),
        (GOOD, b"a\nb\nb\nd\n", "the id 'b' with part 0 occurs 2 times"),
        (GOOD, b"a\n\xff\nb\nd\n", "f.ids.txt cannot be read"),
        (GOOD.astype(np.int8), b"a\nb\nc\nd\n", "holds int8, not floating-point numbers"),
        (GOOD[0], b"a\nb\nc\nd\n", "found float32 of shape (4,)"),
        (GOOD[:, :3], b"a\nb\nc\nd\n", "row 0 ('a') has a vector of 3 numbers; expected 4"),
        (GOOD * np.nan, b"a\nb\nc\nd\n", "row 0 ('a') holds NaN or infinity"),
        (np.empty((0, 4), np.float32), b"", "has no row"),
        (np.array([["x"]], object), b"a\n", "f.npy cannot be read"),
    ],
)
def test_arrays(tmp_path, monkeypatch, tiny, array, ids, message):
    monkeypatch.chdir(tmp_path)
    np.save("f.npy", array)
    if ids is not None:
        Path("f.ids.txt").write_bytes(ids)
    assert message in sentence(lambda: adopt("f.npy", tiny))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"id": "a"}\n{"id": 1}\n{"id": "c"}\n{"id": "d"}\n', "the column 'id' holds several types"),
        ('{"id": "a"}\n{}\n{"id": "c"}\n{"id": "d"}\n', "row 1 has no id"),
        ('{"id": "a"}\n[]\n{"id": "c"}\n{"id": "d"}\n', "line 2 is no JSON object"),
        ("[" * 100_000, "nested too deep"),
        ('{"id": "a", "embedding": 1}\n' * 4, "the name 'embedding' is reserved"),
    ],
)
def test_lines_beside_an_array(tmp_path, monkeypatch, tiny, lines, message):
    monkeypatch.chdir(tmp_path)
    np.save("f.npy", GOOD)
    Path("f.ids.jsonl").write_text(lines)
    assert message in sentence(lambda: adopt("f.npy", tiny))


def test_an_array_that_is_larger_than_its_file(tmp_path, monkeypatch, tiny):
    monkeypatch.chdir(tmp_path)
    with open("f.npy", "wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (2_500_000_000, 1)}
        np.lib.format.write_array_header_1_0(file, header)
    Path("f.ids.txt").write_text("a\n")
    assert "f.npy cannot be read" in sentence(lambda: adopt("f.npy", tiny))
