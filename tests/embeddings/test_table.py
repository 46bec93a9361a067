"""Embeddings in memory: what is written to any format is read back, and only what embedkit wrote is replaced."""

from __future__ import annotations

import datetime
import decimal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedkit.embeddings.formats import files_of, open_rows, output_format
from embedkit.embeddings.metadata import Metadata, Run
from embedkit.embeddings.table import Embeddings
from embedkit.errors import ConfigError, OutputError, SpaceMismatchError

METADATA = Metadata(
    entry="linear-tiny.noise", manifest_sha256="a" * 64, fingerprint="b" * 64, dim=3, normalized=False
)
NAMES = ("{}/e.parquet", "{}/e.npy", "{}/shards/", "lance://{}/db/e")


def rows(count: int = 700) -> Embeddings:
    vectors = np.random.default_rng(0).normal(0, 1, (count, 3)).astype(np.float32)
    ids = [f"{row - row % 2}.jpg" for row in range(count)]
    labels = {
        "who": [None if row % 5 == 0 else f"n{row % 7}" for row in range(count)],
        "age": list(range(count)),
        "fit": [row / 2 for row in range(count)],
    }
    return Embeddings(ids, np.arange(count, dtype=np.int32) % 2, vectors, METADATA, labels)


def named(name: str, folder) -> str:
    if name.startswith("lance"):
        pytest.importorskip("lance", reason="pip install '.[lance]'")
    return name.format(folder)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_read(tmp_path, name):
    output, expected = named(name, tmp_path), rows()
    expected.save(output)
    found = Embeddings.load(output)
    assert found.ids == expected.ids and found.parts.tolist() == expected.parts.tolist()
    assert found.vectors.dtype == np.float32 and np.array_equal(found.vectors, expected.vectors)
    assert found.metadata == METADATA and found.labels == expected.labels
    again = replace(found, ids=[f"x{name}" for name in found.ids])
    if output.endswith("/"):
        with pytest.raises(OutputError, match="holds embeddings already"):
            again.save(output)
    else:
        again.save(output)
        assert Embeddings.load(output).ids == again.ids


@pytest.mark.parametrize("name", NAMES[:2])
def test_files_of_others_are_not_replaced(tmp_path, name):
    output = tmp_path / name.removeprefix("{}/")
    output.write_bytes(b"of the user")
    with pytest.raises(OutputError, match="was not written by embedkit"):
        rows().save(output)
    assert output.read_bytes() == b"of the user" and [path.name for path in tmp_path.iterdir()] == [
        output.name
    ]


@pytest.mark.parametrize("name", NAMES[:2])
def test_an_output_of_a_job_that_is_not_finished_is_not_replaced(tmp_path, name):
    output = name.format(tmp_path)
    rows(2).save(output)
    job = Path(f"{output}.partial")
    job.mkdir()
    (job / "_new.npy").touch()
    (job / "_lock-00001-of-00001").touch()
    before = Path(output).read_bytes()
    with pytest.raises(OutputError, match="a job is writing it, or was stopped"):
        rows(3).save(output)
    assert Path(output).read_bytes() == before and (job / "_new.npy").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": ["a"]}, "expected 1 parts"),
        ({"parts": np.zeros(3, np.int32)}, "expected 4 parts"),
        ({"vectors": np.zeros((4, 2), np.float32)}, r"vectors \(4, 2\)"),
        ({"labels": {"who": [1, 2, 3]}}, r"found \[3, 4\]"),
        ({"labels": {"who": [1, "x", 2, 3]}}, "label column 'who': expected values of one type"),
        ({"labels": {"who": [[1], ["x"], [3], [4]]}}, "label column 'who': expected values of one type"),
        ({"labels": {"size": [1, 2, 3, 4]}}, "label column 'size': the name is reserved"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        replace(rows(4), **change).save(tmp_path / "e.parquet")
    assert not list(tmp_path.iterdir())


def test_messages_name_the_file_that_was_read(tmp_path):
    rows(2).save(tmp_path / "e.parquet")
    with pytest.raises(ConfigError, match=r"e\.parquet has no column 'sex'; it has age, fit, who"):
        Embeddings.load(tmp_path / "e.parquet").label("sex")


def test_a_name_belongs_to_one_format(tmp_path):
    (tmp_path / "folder.parquet").mkdir()
    for name, example in (
        ("x.parquet", "X.parquet"),
        (f"{tmp_path}/folder.parquet", "a folder ending in '/'"),
        ("x.npy/", "a folder ending in '/'"),
        ("x.npy", "X.npy"),
        ("lance://x/y.npy", "lance://FOLDER/TABLE"),
    ):
        assert output_format(name).example == example
    with pytest.raises(ConfigError, match=r"expected X\.parquet, X\.npy, a folder .* or lance://.*'x\.csv'"):
        output_format("x.csv")


@pytest.mark.parametrize("name", NAMES)
def test_no_file_of_embeddings_may_be_an_output(tmp_path, name):
    output = named(name, tmp_path)
    rows(2).save(output)
    written = {path for path in tmp_path.rglob("*") if path.is_file() and ".lance/" not in str(path)}
    assert {path for path in written if not path.name.startswith("_done")} <= set(files_of(output))
    assert all(path.exists() for path in open_rows(output).files)


# --- made from arrays -------------------------------------------------------------------------------------


def test_made_from_arrays():
    made = Embeddings.from_arrays(
        np.array([[3, 4, 0], [0, 0, 0.5]], np.float64),
        np.array(["a.jpg", "a.jpg"]),
        METADATA,
        parts=[0, 1],
        labels={"who": ["x", None]},
    )
    assert made.ids == ["a.jpg", "a.jpg"] and type(made.ids[0]) is str and made.metadata == METADATA
    assert made.vectors.dtype == np.float32 and made.vectors.tolist() == [[3, 4, 0], [0, 0, 0.5]]
    assert made.parts.dtype == np.int32 and made.parts.tolist() == [0, 1] and made.label("who") == ["x", None]
    assert Embeddings.from_arrays(np.eye(3, dtype=np.float16), ["a", "b", "c"], METADATA).parts.tolist() == [
        0,
        0,
        0,
    ]
    assert len(Embeddings.from_arrays(np.empty((0, 3)), [], METADATA)) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vectors": np.eye(3, dtype=np.int8)}, "expected floating-point numbers .* found int8 of shape"),
        ({"vectors": [[1.0, 2.0], [3.0]]}, "expected floating-point numbers"),
        ({"vectors": np.ones(3)}, r"found float64 of shape \(3,\)"),
        ({"vectors": np.eye(4)[:3]}, r"3 vectors of 3 numbers; found .* vectors \(3, 4\)"),
        ({"vectors": np.eye(3) * [1, np.nan, 1]}, r"row 0 \('a'\) holds NaN or infinity"),
        ({"vectors": np.eye(3) * [1, 1e300, 1]}, r"row 1 \('b'\) holds NaN or infinity"),
        ({"vectors": np.diag([1.0, 1.0, 0.0])}, r"row 2 \('c'\) is all zeros"),
        ({"ids": ["a", "b"]}, "found {'id': 2"),
        ({"ids": ["a", None, "c"]}, "row 1 has no id"),
        ({"ids": ["a", 7, "c"]}, "column 'id': expected string"),
        ({"ids": ["a", "\udc80", "c"]}, "column 'id': expected string"),
        ({"ids": ["a", "b", "a"]}, "the id 'a' with part 0 occurs 2 times"),
        ({"parts": [0, 1 << 31, 0]}, "column 'part': expected int32"),
        ({"ids": "abc"}, "column 'id': expected a list of values, one a row; found str"),
        ({"ids": None}, "column 'id': expected a list of values, one a row; found NoneType"),
        ({"parts": 0}, "column 'part': expected a list of values, one a row; found int"),
        ({"parts": [0.5, 0, 0]}, "column 'part': expected whole numbers, found 0.5"),
        ({"parts": [[0], [0, 1], [0]]}, r"column 'part': expected whole numbers, found \[0\]"),
        ({"labels": {"n": 3}}, "column 'n': expected a list of values, one a row; found int"),
        ({"labels": {7: [1, 2, 3]}}, "label column 7: expected a text as its name"),
        ({"labels": {"\udc80": [1, 2, 3]}}, "expected a text as its name"),
        ({"metadata": None}, "the arrays has no metadata"),
        ({"metadata": "linear-tiny"}, r"encoder.metadata\(\), .* found str"),
        ({"labels": {"sha256": ["", "", ""]}}, "label column 'sha256': the name is reserved"),
        (
            {"metadata": replace(METADATA, normalized=True), "vectors": np.eye(3) * 2},
            r"row 0 \('a'\) has length 2,",
        ),
    ],
)
def test_arrays_that_are_no_embeddings(change, message):
    arguments = {"vectors": np.eye(3), "ids": ["a", "b", "c"], "metadata": METADATA, **change}
    with pytest.raises(ConfigError, match=message):
        Embeddings.from_arrays(
            arguments.pop("vectors"), arguments.pop("ids"), arguments.pop("metadata"), **arguments
        )


# --- some of the rows, and several sets -------------------------------------------------------------------


def test_some_of_the_rows():
    table = rows(6)
    mask = np.array([True, False, False, True, False, True])
    for index in (mask, mask.tolist(), [0, 3, 5], np.array([0, -3, 5], np.int8), pa.array(mask)):
        some = table[index]
        assert some.ids == ["0.jpg", "2.jpg", "4.jpg"] and some.parts.tolist() == [0, 1, 1]
        assert np.array_equal(some.vectors, table.vectors[mask]) and some.metadata == METADATA
        assert some.labels == {"who": [None, "n3", None], "age": [0, 3, 5], "fit": [0.0, 1.5, 2.5]}
    assert table[[5, 0]].label("age") == [5, 0] and table[::-2].label("age") == [5, 3, 1]
    assert len(table[[]]) == len(table[6:]) == len(table[np.zeros(6, bool)]) == 0
    assert table[[]].vectors.shape == (0, 3)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([True, False], "a mask of 6 rows, found one of 2"),
        ([0, 6], "from -6 to 5, found 0 to 6"),
        ([-7], "from -6 to 5"),
        ([1, -5], "a row is named twice"),
        (3, r"for one row write table\[\[3\]\]"),
        ([0.5], "found float64"),
        ([True, None, False, True, True, True], "found object"),
        ("who", r"for one row write"),
        ([[1], [1, 2]], r"for one row write"),
        (slice("a", "b"), "a slice of whole numbers"),
    ],
)
def test_what_names_no_rows(index, message):
    with pytest.raises(ConfigError, match=message):
        rows(6)[index]


def test_iterators_are_read_once():
    made = Embeddings.from_arrays(np.eye(3), (name for name in "abc"), METADATA, labels={"n": iter(range(3))})
    assert made.ids == ["a", "b", "c"] and made.label("n") == [0, 1, 2]
    assert Embeddings.concat(part for part in (made[:1], made[1:])).ids == made.ids


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (("id", pa.string()), "the column 'id' cannot be read as string"),
        (("who", pa.string()), "the column 'who' holds a value that cannot be read .*leave the column out"),
        (("day", pa.timestamp("s")), "the column 'day' holds a value that cannot be read"),
    ],
)
def test_values_that_python_cannot_hold(column, message):
    name, kind = column
    if pa.types.is_string(kind):  # bytes that are not UTF-8
        values = pa.array([b"\xff", b"\xfe", b"\xfd"]).view(kind)
    else:
        values = pa.array([1 << 60] * 3, kind)  # some billion years from now
    table = Embeddings.from_arrays(np.eye(3), list("abc"), METADATA).to_arrow()
    table = table.drop_columns([name]) if name in table.column_names else table
    with pytest.raises(ConfigError, match=message):
        Embeddings.from_arrow(table.append_column(name, values))


@pytest.mark.parametrize("value", [["a"], {"a": 1}])
def test_a_label_of_lists_names_no_class(tmp_path, value):
    table = Embeddings.from_arrays(np.eye(3), list("abc"), METADATA, labels={"tags": [None, value, value]})
    table.save(tmp_path / "e.parquet")
    assert Embeddings.load(tmp_path / "e.parquet").label("tags") == [None, value, value]
    with pytest.raises(ConfigError, match="the column 'tags' holds lists or structures"):
        open_rows(tmp_path / "e.parquet").label("tags")


def test_what_is_no_arrow_stream():
    class Broken:
        def __arrow_c_stream__(self, requested_schema=None):
            return 5

    with pytest.raises(ConfigError, match="the table cannot be read as Arrow's"):
        Embeddings.from_arrow(Broken(), METADATA)


def test_sets_of_one_space_are_concatenated():
    runs = [
        Run(provider=name, precision="fp32", decode="auto", threads=1, batch_size=4, versions={})
        for name in ("CPU", "GPU")
    ]
    table = rows(6)
    first = replace(table[:2], metadata=METADATA.with_run(runs[0]))
    second = replace(
        table[2:], metadata=METADATA.with_run(runs[1]), labels={"age": [2.5, 3, 4, 5], "sex": list("mfmf")}
    )
    whole = Embeddings.concat([first, second])
    assert whole.ids == table.ids and np.array_equal(whole.vectors, table.vectors)
    assert whole.parts.tolist() == table.parts.tolist() and whole.metadata.runs == tuple(runs)
    assert whole.labels == {
        "who": [None, "n1", None, None, None, None],
        "age": [0, 1, 2.5, 3, 4, 5],
        "fit": [0.0, 0.5, None, None, None, None],
        "sex": [None, None, "m", "f", "m", "f"],
    }
    for tables, error, message in (
        ([], ConfigError, "at least one set"),
        ([first, table], ConfigError, "the id '0.jpg' with part 0 occurs 2 times"),
        (
            [first, replace(second, labels={"age": list("abcd")})],
            ConfigError,
            "two types that do not go together",
        ),
        (
            [first, replace(second, metadata=replace(METADATA, fingerprint="c" * 64))],
            SpaceMismatchError,
            "space bbbbbbbbbbbb, not normalized.* space cccccccccccc",
        ),
    ):
        with pytest.raises(error, match=message):
            Embeddings.concat(tables)


# --- Arrow, pandas and files ------------------------------------------------------------------------------

#: One column of each kind of type, each with a missing value.
KINDS = {
    "int8": pa.array([1, None], pa.int8()),
    "uint64": pa.array([(1 << 64) - 1, None], pa.uint64()),
    "float16": pa.array([0.5, None], pa.float16()),
    "bool": pa.array([True, None]),
    "date": pa.array([datetime.date(2024, 2, 29), None]),
    "time": pa.array([datetime.time(1, 2, 3), None]),
    "when": pa.array([1234567890123456, None], pa.timestamp("us", "Europe/Berlin")),
    "money": pa.array([decimal.Decimal("1.50"), None], pa.decimal128(10, 4)),
    "box": pa.array([[1.0, 2.0], None], pa.list_(pa.float32(), 2)),
    "tags": pa.array([["a", None], None], pa.list_(pa.string())),
    "camera": pa.array([{"iso": 100}, None], pa.struct({"iso": pa.int16()})),
    "kind": pa.array(["cat", None]).dictionary_encode(),
    "thumb": pa.array([b"\xff\x00", None]),
    "nothing": pa.nulls(2),
}


def with_every_kind() -> pa.Table:
    table = rows(2).to_arrow()
    for name, column in KINDS.items():
        table = table.append_column(name, column)
    return table


def test_labels_of_any_type_survive_arrow_and_parquet(tmp_path):
    expected = with_every_kind()
    made = Embeddings.from_arrow(expected)
    made.save(tmp_path / "e.parquet")
    for found in (made, Embeddings.load(tmp_path / "e.parquet"), Embeddings.concat([made[:1], made[1:]])):
        assert found.to_arrow().equals(expected) and found.metadata == METADATA
    assert Embeddings.load(tmp_path / "e.parquet")[[1, 0]].label("tags") == [None, ["a", None]]


def test_labels_of_any_type_survive_pandas(tmp_path):
    pytest.importorskip("pandas", reason="pip install pandas")
    expected = with_every_kind()
    frame = Embeddings.from_arrow(expected).to_pandas()
    assert frame.embedding[0].dtype == np.float32 and frame.id.tolist() == ["0.jpg", "0.jpg"]
    assert Embeddings.from_pandas(frame).to_arrow().equals(expected, check_metadata=True)
    frame.to_parquet(tmp_path / "p.parquet")
    import pandas as pd

    found = Embeddings.from_pandas(pd.read_parquet(tmp_path / "p.parquet", dtype_backend="pyarrow"))
    assert found.metadata == METADATA and found.ids == ["0.jpg", "0.jpg"]
    assert found.label("when") == expected["when"].to_pylist()


def test_an_array_has_no_place_for_every_type(tmp_path):
    made = Embeddings.from_arrow(with_every_kind())
    names = [name for name in KINDS if name not in ("int8", "uint64", "float16", "bool", "nothing")]
    for name in names:
        with pytest.raises(ConfigError, match=f"the label column '{name}' is .*; write X.parquet"):
            replace(made, labels={name: made.labels[name]}).save(tmp_path / "e.npy")
    assert not list(tmp_path.iterdir())
    for name in names:
        del made.labels[name]
    made.save(tmp_path / "e.npy")
    assert Embeddings.load(tmp_path / "e.npy").to_arrow().equals(made.to_arrow(), check_metadata=True)


def test_a_missing_id_in_a_dictionary():
    ids = pa.DictionaryArray.from_arrays(pa.array([1, 0]), pa.array([None, "a.jpg"]))
    with pytest.raises(ConfigError, match="row 1 has no id"):
        Embeddings.from_arrow(rows(2).to_arrow().set_column(0, "id", ids))


def test_what_has_no_metadata_needs_it():
    table = rows(2).to_arrow()
    bare = table.replace_schema_metadata(None)
    with pytest.raises(
        ConfigError, match=r"the table has no metadata; give .*metadata=encoder\.metadata\(\)"
    ):
        Embeddings.from_arrow(bare)
    assert Embeddings.from_arrow(bare, METADATA).metadata == METADATA
    other = replace(METADATA, fingerprint="c" * 64)
    with pytest.raises(SpaceMismatchError, match=r"the table .*the given metadata .*leave one of them out"):
        Embeddings.from_arrow(table, other)
    with pytest.raises(ConfigError, match="expected an Arrow table, found list"):
        Embeddings.from_arrow([], METADATA)
    pd = pytest.importorskip("pandas", reason="pip install pandas")
    with pytest.raises(ConfigError, match="the data frame has no metadata"):
        Embeddings.from_pandas(pd.DataFrame({"id": ["a"]}))
    with pytest.raises(ConfigError, match="the data frame: a column holds several types"):
        Embeddings.from_pandas(pd.DataFrame({"id": ["a", 1]}, dtype=object), METADATA)


def test_other_programs_filter_in_memory():
    table = rows(6)
    expected = table[[1, 4]]

    def check(found):
        assert found.ids == expected.ids and np.array_equal(found.vectors, expected.vectors)
        assert (
            found.parts.tolist() == [1, 0] and found.labels == expected.labels and found.metadata == METADATA
        )

    mask = pa.array([False, True, False, False, True, False])
    check(Embeddings.from_arrow(table.to_arrow().filter(mask)))
    pl = pytest.importorskip("polars", reason="pip install polars")
    check(Embeddings.from_arrow(pl.from_arrow(table.to_arrow()).filter(pl.col("age") % 3 == 1), METADATA))
    duckdb = pytest.importorskip("duckdb", reason="pip install duckdb")
    stored = table.to_arrow()  # noqa: F841  # duckdb finds it by its name
    check(Embeddings.from_arrow(duckdb.sql("from stored where age % 3 = 1 order by age"), METADATA))
    pytest.importorskip("pandas", reason="pip install pandas")
    frame = table.to_pandas()
    check(Embeddings.from_pandas(frame[frame.age % 3 == 1]))
    check(Embeddings.from_pandas(frame[frame.age % 3 == 1].set_index("id")))
    check(Embeddings.from_pandas(frame[frame.age % 3 == 1].reset_index(drop=True)))
    assert len(Embeddings.from_pandas(frame[frame.age > 9])) == 0


def test_a_file_of_ours_that_another_program_changed_names_the_way_back(tmp_path):
    rows(2).save(tmp_path / "e.parquet")
    table = pq.read_table(tmp_path / "e.parquet")
    pq.write_table(table.replace_schema_metadata(None), tmp_path / "bare.parquet")
    wide = table.set_column(0, "id", table["id"].cast(pa.large_string()))
    pq.write_table(wide, tmp_path / "wide.parquet")
    np.save(tmp_path / "bare.npy", np.eye(3, dtype=np.float32))
    for name in ("bare.parquet", "wide.parquet", "bare.npy"):
        with pytest.raises(OutputError, match=rf"`embedkit adopt .*{name} --encoder NAME`"):
            open_rows(tmp_path / name)
