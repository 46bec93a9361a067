"""Embeddings in memory: what is written to any format is read back, and only what embedkit wrote is replaced."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from embedkit.embeddings.formats import files_of, open_rows, output_format
from embedkit.embeddings.metadata import Metadata
from embedkit.embeddings.table import Embeddings
from embedkit.errors import ConfigError, OutputError

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
        ({"labels": {"who": [1, "x", 2, 3]}}, "label column 'who': expected texts"),
        ({"labels": {"who": [[1], [2], [3], [4]]}}, "label column 'who': expected texts"),
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
