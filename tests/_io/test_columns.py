"""Parquet columns of a known type: honest ones come back; a small file never becomes gigabytes."""

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedkit._io.columns import read_columns

COLUMNS = {"id": pa.string(), "n": pa.int32()}


def read(path, columns=COLUMNS):
    with open(path, "rb") as file:
        return read_columns(file, columns)


@pytest.mark.parametrize("compression", ["none", "zstd", "snappy"])
@pytest.mark.parametrize("dictionary", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 70_000])
def test_honest_columns_come_back(tmp_path, compression, dictionary, rows):
    ids = [f"some/folder/that/is/the/same/everywhere/{n % 40_000}.jpg" for n in range(rows)]
    table = pa.table({"n": pa.array(range(rows), pa.int32()), "id": ids, "more": [1.5] * rows}, schema=pa.schema(
        {"n": pa.int32(), "id": pa.string(), "more": pa.float64()}, metadata={b"k": b"v"}))  # fmt: skip
    path = tmp_path / "x.parquet"
    pq.write_table(table, path, compression=compression, use_dictionary=dictionary, row_group_size=20_000)
    found = read(path)
    assert found.schema.names == ["id", "n"] and found.schema.types == [pa.string(), pa.int32()]
    assert found["id"].to_pylist() == ids and found.schema.metadata[b"k"] == b"v"
    assert np.array_equal(found["n"].to_numpy(), np.arange(rows))


@pytest.mark.parametrize(
    ("columns", "why"),
    [
        ({"id": pa.array(["a"])}, "the column 'n' should be int32, and is nothing"),
        ({"id": pa.array(["a"]), "n": pa.array([1], pa.int64())}, "should be int32, and is int64"),
        ({"id": pa.array([b"a"]), "n": pa.array([1], pa.int32())}, "should be string, and is binary"),
        ({"id": pa.array([["a"]]), "n": pa.array([1], pa.int32())}, "should be string, and is list"),
        ({"id": pa.array(["a", None]), "n": pa.array([1, 2], pa.int32())}, "'id' has a row without a value"),
        ({"id": pa.array(["a", "b"]), "n": pa.array([1, None], pa.int32())}, "'n' has a row without"),
    ],
)
def test_other_columns_are_refused(tmp_path, columns, why):
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=why):
        read(tmp_path / "x.parquet")


def test_what_is_no_parquet(tmp_path):
    pq.write_table(
        pa.table({"id": ["a"] * 50, "n": pa.array(range(50), pa.int32())}), tmp_path / "good.parquet"
    )
    good = (tmp_path / "good.parquet").read_bytes()
    path = tmp_path / "x.parquet"
    rng = np.random.default_rng(0)
    for content in (b"", b"PAR1", b"PAR1" + bytes(30) + b"PAR1", good[:-20], good[20:]):
        path.write_bytes(content)
        with pytest.raises((OSError, ValueError, pa.ArrowException)):
            read(path)
    for _ in range(300):  # bytes changed at random: the columns, or an error of those
        noise = bytearray(good)
        for at in rng.integers(0, len(good), 3):
            noise[at] = rng.integers(256)
        path.write_bytes(noise)
        try:
            assert read(path).schema.names == ["id", "n"]
        except (OSError, ValueError, pa.ArrowException):
            pass


def bombs(folder):
    """Small files of much text, of many rows, and of a text that compresses well."""
    big = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), ["x" * 4_000_000])
    tables = {
        "text": ({"id": big, "n": pa.array([1] * 1000, pa.int32())}, True),
        "rows": ({"id": pa.array([""] * 10_000_000), "n": pa.array(np.zeros(10_000_000, np.int32))}, True),
        "plain": ({"id": pa.array(["x" * 1_000_000] * 300), "n": pa.array(np.zeros(300, np.int32))}, False),
    }
    layout = {"compression": "zstd", "store_schema": False, "dictionary_pagesize_limit": 1 << 30}
    for name, (columns, dictionary) in tables.items():
        pq.write_table(
            pa.table(columns), folder / name, use_dictionary=dictionary, row_group_size=1 << 30, **layout
        )
        assert (folder / name).stat().st_size < 200_000
    return list(tables)


def test_bombs_are_refused_before_they_take_memory(tmp_path):
    names = bombs(tmp_path)
    code = (
        "import sys, resource\n"
        "import pyarrow as pa, pyarrow.parquet, pyarrow.compute\n"
        "from embedkit._io.columns import read_columns\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for name in sys.argv[1:]:\n"
        "    try: read_columns(open(name, 'rb'), {'id': pa.string(), 'n': pa.int32()})\n"
        "    except ValueError as error: print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    files = [str(tmp_path / name) for name in names]
    done = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, check=True)
    *messages, grown = done.stdout.splitlines()
    assert len(messages) == 3 and all("for its size" in message for message in messages)
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(grown) * unit < 300 << 20  # of 4 GB
