"""A LanceDB table as the output of a job and as what is searched, against a Parquet file of the same images."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

pytest.importorskip("onnxruntime")

from embedkit import embed, load_encoder
from embedkit.cli.search import search as command
from embedkit.embeddings.lance import LanceFormat
from embedkit.embeddings.parquet import read_metadata
from embedkit.errors import (
    ConfigError,
    EmbedkitError,
    MissingDependencyError,
    OutputError,
    SpaceMismatchError,
)
from embedkit.workflows.search import cached_index, open_index, search


@pytest.fixture(scope="module")
def tiny(by_hand, tmp_path_factory):
    return load_encoder(
        by_hand.TinyEntry().write(tmp_path_factory.mktemp("zoo") / "linear-tiny.noise"),
        device="cpu",
        threads=1,
    )


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for number in range(30):
        pixels = rng.integers(0, 256, (10, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "in" / f"it's {number:02d}.png")
    return tmp_path


def test_names_of_tables(tmp_path):
    table_path = LanceFormat().locate
    assert (
        str(table_path("lance://db/photos"))
        == str(table_path("lance://db/photos.lance"))
        == "db/photos.lance"
    )
    assert str(table_path("lance:///data/db/photos")) == "/data/db/photos.lance"
    for name in ("lance://", "lance://db/", "lance://..", "db/photos"):
        with pytest.raises(ConfigError, match="lance://FOLDER/TABLE"):
            table_path(name)


def test_without_the_library(folder, tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "lance", None)
    for action in (
        lambda: embed(folder / "in", f"lance://{folder}/db/t", encoder=tiny),
        lambda: open_index(f"lance://{folder}/db/t"),
    ):
        with pytest.raises(MissingDependencyError, match=r"pip install '\.\[lance\]'"):
            action()


def test_a_table_is_written_extended_and_searched(folder, tiny):
    lance = pytest.importorskip("lance")
    uri, file = f"lance://{folder}/db/photos", folder / "e.parquet"
    for output in (uri, file):
        assert embed(folder / "in", output, encoder=tiny, root=folder / "in").images == 30
    table = lance.dataset(str(folder / "db" / "photos.lance"))
    assert table.count_rows() == 30 and sorted(path.name for path in (folder / "db").iterdir()) == [
        "photos.lance"
    ]
    assert table.schema.metadata[b"embedkit"].decode() == read_metadata(file).to_json()

    queries = ["it's 03.png", str(folder / "in" / "it's 04.png"), "it's 29.png"]
    exact, found = (search(open_index(source), queries, 7, encoder=tiny) for source in (file, uri))
    assert [[hit.name for hit in one.found] for one in found] == [
        [hit.name for hit in one.found] for one in exact
    ]
    for one, other in zip(found, exact, strict=True):
        np.testing.assert_allclose(
            [hit.cosine for hit in one.found], [hit.cosine for hit in other.found], atol=1e-5
        )

    # The same command goes on: what is there is kept, what is new is added, what is gone is dropped when asked.
    assert embed(folder / "in", uri, encoder=tiny, root=folder / "in").kept == 30
    Image.new("RGB", (9, 9), "red").save(folder / "in" / "new.png")
    (folder / "in" / "it's 00.png").unlink()
    report = embed(folder / "in", uri, encoder=tiny, root=folder / "in", prune=True)
    assert (report.images, report.kept, report.removed) == (1, 29, 1)
    names = open_index(uri).names
    assert len(names) == 30 and "new.png" in names and "it's 00.png" not in names


def test_what_is_refused(folder, tiny, by_hand):
    lance = pytest.importorskip("lance")
    import pyarrow as pa

    uri = f"lance://{folder}/db/photos"
    embed(folder / "in", uri, encoder=tiny, root=folder / "in")
    other = load_encoder(
        by_hand.TinyEntry(seed=1).write(folder / "linear-far.noise"), device="cpu", threads=1
    )
    with pytest.raises(SpaceMismatchError, match=r"\(linear-tiny\.noise, .*\(linear-far\.noise, "):
        embed(folder / "in", uri, encoder=other, root=folder / "in")
    with pytest.raises(ConfigError, match="k: expected 1 to 29"):
        search(open_index(uri), ["it's 03.png"], 30)
    with pytest.raises(ConfigError, match="leave --cache-index out"):
        cached_index(uri, folder / "i")
    with pytest.raises(ConfigError, match="several workers write into a folder"):
        embed(folder / "in", uri, encoder=tiny, worker=(1, 2))
    with pytest.raises(OutputError, match="is no table; write one with"):
        open_index(f"lance://{folder}/db/none")
    with pytest.raises(OutputError, match="does not exist"):
        embed(folder / "in", f"lance://{folder}/a/b/c/t", encoder=tiny)
    lance.write_dataset(pa.table({"x": [1]}), str(folder / "db" / "foreign.lance"))
    with pytest.raises(OutputError, match="without metadata"):
        open_index(f"lance://{folder}/db/foreign")
    with pytest.raises(EmbedkitError):
        embed(folder / "in", f"lance://{folder}/db/foreign", encoder=tiny)
    assert lance.dataset(str(folder / "db" / "foreign.lance")).to_table().to_pydict() == {"x": [1]}


def test_a_first_version_that_was_killed_is_no_table(folder, tiny):
    pytest.importorskip("lance")
    (folder / "db" / "photos.lance" / "data").mkdir(parents=True)  # what a kill before the commit leaves
    (folder / "db" / "photos.lance" / "data" / "x.lance").write_bytes(b"half")
    uri = f"lance://{folder}/db/photos"
    assert embed(folder / "in", uri, encoder=tiny, root=folder / "in").images == 30
    assert len(open_index(uri)) == 30


def test_the_command_searches_a_table(folder, tiny):
    pytest.importorskip("lance")
    uri = f"lance://{folder}/db/photos"
    embed(folder / "in", uri, encoder=tiny, root=folder / "in")
    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, ["it's 03.png", uri, "-k", "2"])
    assert result.exit_code == 0 and len(result.stdout.splitlines()) == 1 + 2, result.output
