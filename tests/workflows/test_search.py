"""Search by image against a naive loop, the encoder that a file needs, kept indexes, and what is refused."""

from __future__ import annotations

import json
import os
import tarfile

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

pytest.importorskip("onnxruntime")

from embedkit import embed, load_encoder
from embedkit.analysis import neighbors as indexes
from embedkit.analysis.neighbors import SearchIndex
from embedkit.cli.search import search as command
from embedkit.embeddings.metadata import Metadata
from embedkit.embeddings.parquet import write_rows
from embedkit.embeddings.schema import schema_of
from embedkit.embeddings.table import Embeddings
from embedkit.errors import (
    ConfigError,
    EntryNotFoundError,
    ImageError,
    OutputError,
    SourceError,
    SpaceMismatchError,
)
from embedkit.workflows.search import cached_index, open_index, search


@pytest.fixture(scope="module")
def zoo(by_hand, tmp_path_factory):
    """A zoo of two encoders of one width."""
    folder = tmp_path_factory.mktemp("zoo")
    by_hand.TinyEntry().write(folder / "linear-tiny.noise")
    by_hand.TinyEntry(seed=1).write(folder / "linear-far.noise")
    by_hand.write_index(folder)
    return folder


@pytest.fixture(autouse=True)
def _in_that_zoo(zoo, monkeypatch):
    monkeypatch.setenv("EMBEDKIT_ZOO", str(zoo))


@pytest.fixture(scope="module")
def gallery(zoo, tmp_path_factory):
    """Twenty noisy images and their embeddings, ids relative to the folder."""
    folder = tmp_path_factory.mktemp("gallery")
    rng = np.random.default_rng(0)
    for number in range(20):
        pixels = rng.integers(0, 256, (10, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    encoder = load_encoder(zoo / "linear-tiny.noise", device="cpu", threads=1)
    embed(folder, folder / "emb.parquet", encoder=encoder, root=folder)
    return folder


def new_image(folder, seed=99):
    pixels = np.random.default_rng(seed).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "new.png")
    return str(folder / "new.png")


def run(*arguments):
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, [*map(str, arguments)])


def test_images_and_ids_against_a_naive_loop(gallery, zoo, tmp_path):
    rows = Embeddings.load(gallery / "emb.parquet")
    unit = rows.vectors.astype(float) / np.linalg.norm(rows.vectors.astype(float), axis=1, keepdims=True)
    query = new_image(tmp_path)
    asked = load_encoder(zoo / "linear-tiny.noise").encode(query)[0].astype(float)
    found = search(open_index(gallery / "emb.parquet"), ["03.png", query, str(gallery / "07.png")], 6)
    assert [one.query for one in found] == ["03.png", query, str(gallery / "07.png")]
    assert [one.is_row for one in found] == [True, False, False]
    for one, vector, own in zip(found, (unit[3], asked, unit[7]), (3, None, None), strict=True):
        cosines = {name: row @ vector for number, (name, row) in enumerate(zip(rows.ids, unit, strict=True))
                   if number != own}  # fmt: skip
        wanted = sorted(cosines, key=lambda name: -cosines[name])[:6]
        assert [hit.name for hit in one.found] == wanted
        np.testing.assert_allclose([hit.cosine for hit in one.found], [cosines[n] for n in wanted], atol=1e-5)
    # An image that has a row finds itself, the row does not.
    assert found[2].found[0].name == "07.png" and found[2].found[0].cosine > 0.99999
    assert "03.png" not in [hit.name for hit in found[0].found]


def test_a_member_of_an_archive_is_a_query(gallery, tmp_path):
    with tarfile.open(tmp_path / "q.tar", "w") as archive:
        archive.add(gallery / "05.png", "deep/five.png")
    (one,) = search(open_index(gallery / "emb.parquet"), [f"{tmp_path}/q.tar::deep/five.png"], 1)
    assert one.found[0].name == "05.png"


def test_the_default_k_is_10_or_what_there_is(gallery, tmp_path):
    base = open_index(gallery / "emb.parquet")
    assert len(search(base, ["00.png"])[0].found) == 10
    few = tmp_path / "few.parquet"
    embed([gallery / "00.png", gallery / "01.png"], few, encoder="linear-tiny", root=gallery)
    assert len(search(open_index(few), ["00.png"])[0].found) == 1
    with pytest.raises(ConfigError, match="k: expected 1 to 2"):
        search(open_index(few), [str(gallery / "00.png")], 3)


def test_only_the_encoder_of_the_space(gallery, zoo, by_hand, tmp_path):
    base, query = open_index(gallery / "emb.parquet"), new_image(tmp_path)
    with pytest.raises(SpaceMismatchError, match=r"linear-tiny\.noise .* linear-far\.noise"):
        search(base, [query], 1, encoder="linear-far")
    # The same name over other weights is another space too.
    by_hand.TinyEntry(seed=2).write(tmp_path / "linear-tiny.noise")
    with pytest.raises(SpaceMismatchError, match="same encoder"):
        search(base, [query], 1, encoder=tmp_path / "linear-tiny.noise")
    assert search(base, [query], 1, encoder=zoo / "linear-tiny.noise")


def test_an_encoder_that_no_place_has(gallery, tmp_path, monkeypatch):
    base, query = open_index(gallery / "emb.parquet"), new_image(tmp_path)
    monkeypatch.delenv("EMBEDKIT_ZOO")
    with pytest.raises(EntryNotFoundError, match=r"made with linear-tiny\.noise.*--encoder"):
        search(base, [query], 1)
    assert search(base, ["00.png"], 1)  # rows need no encoder


def test_queries_that_are_none(gallery, tmp_path):
    base = open_index(gallery / "emb.parquet")
    (tmp_path / "text.jpg").write_bytes(b"no image")
    for query, error, words in (
        ("0.png", ConfigError, r"neither an existing image .* did you mean '\d\d\.png'"),
        (str(tmp_path), ConfigError, "is a folder"),
        (str(tmp_path / "text.jpg"), ImageError, r"text\.jpg: not an image"),
    ):
        with pytest.raises(error, match=words) as caught:
            search(base, ["01.png", query], 1)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="expected at least one query"):
        search(base, [], 1)
    plain = SearchIndex.build(np.eye(4, dtype=np.float32))
    with pytest.raises(ConfigError, match="queries must be ids"):
        search(plain, [new_image(tmp_path)], 1)


def test_files_that_cannot_be_searched(tmp_path):
    metadata = Metadata(
        entry="linear-tiny.noise", manifest_sha256="a" * 64, fingerprint="b" * 64, dim=4, normalized=True
    )
    write_rows([], tmp_path / "empty.parquet", schema_of(metadata, {}, sha256=False))
    with pytest.raises(ConfigError, match="found no row"):
        open_index(tmp_path / "empty.parquet")
    (tmp_path / "text.parquet").write_text("no embeddings")
    with pytest.raises(OutputError, match="cannot be read as Parquet"):
        open_index(tmp_path / "text.parquet")


def test_a_saved_index_is_searched_as_its_embeddings(gallery, tmp_path):
    base = open_index(gallery / "emb.parquet")
    base.save(tmp_path / "e.index")
    queries = ["02.png", new_image(tmp_path)]
    assert search(open_index(tmp_path / "e.index"), queries, 5) == search(base, queries, 5)
    with pytest.raises(ConfigError, match="is an index already"):
        cached_index(tmp_path / "e.index", tmp_path / "f.index")


@pytest.fixture
def many(tmp_path):
    """1,500 rows in a file."""
    import pyarrow as pa

    metadata = Metadata(
        entry="linear-tiny.noise", manifest_sha256="a" * 64, fingerprint="b" * 64, dim=8, normalized=True
    )

    def write(path=tmp_path / "many.parquet", seed=0, fingerprint="b" * 64):
        card = Metadata(**{**vars(metadata), "fingerprint": fingerprint})
        schema = schema_of(card, {}, sha256=False)
        vectors = np.random.default_rng(seed).normal(0, 1, (1500, 8)).astype(np.float32)
        ids, ones = [f"{row}.png" for row in range(1500)], [1] * 1500
        columns = {"id": ids, "part": [0] * 1500, "embedding": list(vectors), "size": ones, "mtime_ns": ones}
        write_rows([pa.table(columns, schema=schema)], path, schema)
        return path

    return write


def test_an_index_is_kept_where_it_pays_and_while_it_is_current(many, tmp_path, monkeypatch):
    pytest.importorskip("faiss")
    source, kept = many(), tmp_path / "many.index"
    index, held = cached_index(source, kept)
    assert (index.kind, held) == ("flat", False) and not kept.exists()  # exact is fast

    monkeypatch.setattr(indexes, "EXACT", 100)
    index, held = cached_index(source, kept)
    assert (index.kind, held) == ("ivf", True) and index.recall >= 0.95
    first = kept.stat().st_mtime_ns
    assert cached_index(source, kept)[0].kind == "ivf" and kept.stat().st_mtime_ns == first

    many(seed=1)  # the same ids, other vectors
    os.utime(source, ns=(first + 10**9, first + 10**9))
    index, _ = cached_index(source, kept)
    assert kept.stat().st_mtime_ns != first
    exact = search(open_index(source), ["5.png"], 1)[0].found[0]
    assert search(index, ["5.png"], 1)[0].found[0].name == exact.name

    with pytest.raises(SpaceMismatchError, match=r"the index .*many\.index .*other\.parquet"):
        cached_index(many(tmp_path / "other.parquet", fingerprint="c" * 64), kept)
    kept.write_text("somebody's notes")
    with pytest.raises(OutputError, match="not an index"):
        cached_index(source, kept)
    assert kept.read_text() == "somebody's notes"


def test_the_command(gallery, tmp_path):
    query = new_image(tmp_path)
    result = run(
        query,
        "04.png",
        gallery / "emb.parquet",
        "-k",
        3,
        "--draw-sheet",
        tmp_path / "s.html",
        "--root",
        gallery,
    )
    assert result.exit_code == 0, result.output
    head, *lines = [line.split("\t") for line in result.stdout.splitlines()]
    assert head == ["query", "id", "cosine"]
    assert [line[0] for line in lines] == [query] * 3 + ["04.png"] * 3
    assert all((gallery / line[1]).exists() and -1 <= float(line[2]) <= 1 for line in lines)
    assert "shows 8 images" in result.stderr
    result = run("04.png", gallery / "emb.parquet", "--json", "--cache-index", tmp_path / "i")
    told = json.loads(result.stdout)
    assert told["kind"] == "flat" and told["recall"] == 1.0
    assert len(told["matches"][0]["found"]) == 10 and told["matches"][0]["is_row"] is True
    assert "is not written" in result.stderr and not (tmp_path / "i").exists()


def test_the_command_tells_the_recall_of_an_approximate_index(many, tmp_path, monkeypatch):
    pytest.importorskip("faiss")
    monkeypatch.setattr(indexes, "EXACT", 100)
    result = run("5.png", many(), "--cache-index", tmp_path / "many.index")
    assert "ivf index of 1500 rows" in result.stderr and "of the true 10 nearest" in result.stderr
    result = run("5.png", tmp_path / "many.index", "-k", 2)
    assert len(result.stdout.splitlines()) == 1 + 2 and "of the true 10 nearest" in result.stderr


def test_the_command_refuses_early(gallery, tmp_path):
    for arguments, error in (
        (("04.png", gallery / "emb.parquet", "--draw-sheet", tmp_path / "s.txt"), ConfigError),
        (("04.png", gallery / "emb.parquet", "--root", tmp_path / "none"), SourceError),
        (
            ("04.png", gallery / "emb.parquet", "--draw-sheet", tmp_path / "s.html"),
            SourceError,
        ),  # without --root
        (("04.png", tmp_path / "none.parquet"), OutputError),
    ):
        assert isinstance(run(*arguments).exception, error), arguments
    assert not (tmp_path / "s.html").exists()
