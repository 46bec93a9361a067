"""Contact sheets: what stands on them, that no name can inject anything, and what happens when images are gone."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from embedkit.analysis.clustering.cluster import Clustering
from embedkit.analysis.duplicates import find_duplicates
from embedkit.embeddings.metadata import Metadata
from embedkit.embeddings.parquet import write_rows
from embedkit.embeddings.schema import schema_of
from embedkit.errors import ConfigError, OutputError, SourceError
from embedkit.images.originals import Originals
from embedkit.workflows.search import Match, Matches
from embedkit.workflows.visual import contact_sheet as sheets
from embedkit.workflows.visual.contact_sheet import (
    Section,
    Tile,
    common_folder,
    sheet_of_clusters,
    sheet_of_duplicates,
    sheet_of_matches,
    visible,
    write_contact_sheet,
)

HOSTILE = [
    "<script>alert(1)<|script>.png",
    '"><img src=x onerror=alert(1)>.png',
    "' onmouseover='alert(1).png",
    "&lt;b&gt;.png",
    "]]>-->{title}{{data}}.png",
    "new\nline\u202egpj.png",
    "ünïcödé 图.png",
]
METADATA = Metadata(
    entry="linear-tiny.noise", manifest_sha256="a" * 64, fingerprint="b" * 64, dim=4, normalized=True
)


class Page(HTMLParser):
    """Elements, attributes and text of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture
def folder(tmp_path):
    for number in range(12):
        Image.new("RGB", (30, 20), (20 * number, 255 - 20 * number, 0)).save(tmp_path / f"{number}.png")
    return tmp_path


def write(folder, vectors, ids):
    import pyarrow as pa

    schema = schema_of(METADATA, {}, sha256=False)
    ones = [1] * len(ids)
    rows = {"id": ids, "part": [0] * len(ids), "embedding": list(vectors), "size": ones, "mtime_ns": ones}
    write_rows([pa.table(rows, schema=schema)], folder / "emb.parquet", schema)
    return folder / "emb.parquet"


def run(command, *arguments):
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, [*map(str, arguments)])


def test_html_holds_its_images_and_its_words(folder):
    tiles = [Tile(name="0.png", badge="query"), Tile(name="1.png", title="one", note="cosine 0.5")]
    done = write_contact_sheet(
        folder / "s.html", "A <sheet>", [Section("first", tiles, "2 of 3")], Originals(folder)
    )
    assert done.images == 2 and not done.missing and not done.left_out
    text = (folder / "s.html").read_text("utf-8")
    page = Page(text)
    assert {"query", "one", "cosine 0.5", "first", "2 of 3", "A <sheet>"} <= set(map(str.strip, page.words))
    images = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    for number, source in enumerate(images):
        image = Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/webp;base64,"))))
        assert image.size == (30, 20)
        seen = np.asarray(image.convert("RGB"), float)
        assert np.abs(seen.mean((0, 1)) - (20 * number, 255 - 20 * number, 0)).max() < 6
    policy = next(attrs for tag, attrs in page.tags if attrs.get("http-equiv"))["content"]
    assert "default-src 'none'" in policy and "script-src" not in policy
    assert "http://" not in text and "https://" not in text


def test_no_name_injects_anything(tmp_path):
    for name in HOSTILE:
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    tiles = [Tile(name=name, note=name, badge=name) for name in HOSTILE]
    sections = [Section(name, tiles, name) for name in HOSTILE]
    write_contact_sheet(tmp_path / "s.html", HOSTILE[0], sections, Originals(tmp_path), note=HOSTILE[1])
    text = (tmp_path / "s.html").read_text("utf-8")
    page = Page(text)
    plain = set(
        "html meta title style main h1 h2 p section div figure img b figcaption bdi i small wbr".split()
    )
    assert {tag for tag, _ in page.tags} <= plain
    assert not [key for _, attrs in page.tags for key in attrs if key.startswith("on")]
    assert all(attrs["src"].startswith("data:") for tag, attrs in page.tags if tag == "img")
    written = "".join(page.words)
    for name in HOSTILE:
        assert visible(name) in written
    assert "\u202e" not in text and "new\nline" not in text and "ünïcödé 图.png" in written
    write_contact_sheet(tmp_path / "s.png", HOSTILE[0], sections, Originals(tmp_path), note=HOSTILE[1])
    with Image.open(tmp_path / "s.png") as image:
        assert image.format == "PNG"


def test_png_shows_the_images_where_they_belong(folder):
    tiles = [Tile(name=f"{number}.png", badge="keep" * (number == 0)) for number in range(10)]
    write_contact_sheet(
        folder / "s.png", "title", [Section("a", tiles[:9]), Section("b", tiles[9:])], Originals(folder)
    )
    with Image.open(folder / "s.png") as image:
        assert image.width == 2 * 24 + 8 * 172 + 7 * 12
        seen = np.asarray(image.convert("RGB")).reshape(-1, 3)
    for number in range(10):  # each fills about 160 x 107 pixels
        close = (np.abs(seen.astype(int) - (20 * number, 255 - 20 * number, 0)) <= 2).all(1).sum()
        assert 14_000 < close < 18_500, number


def test_some_or_all_images_are_gone(folder):
    tiles = [Tile(name="0.png"), Tile(name="gone.png", note="cosine 1")]
    done = write_contact_sheet(folder / "s.html", "t", [Section("a", tiles)], Originals(folder))
    assert done.missing == ["gone.png"]
    assert "the image no longer exists" in (folder / "s.html").read_text("utf-8")
    before = sorted(folder.iterdir())
    with pytest.raises(SourceError, match=r"the image 'x\.png' cannot be read \(.*\); run .*--root"):
        write_contact_sheet(folder / "one.html", "t", [Section("a", [Tile(name="x.png")])], Originals(folder))
    for path in ("all.html", "all.png"):
        with pytest.raises(SourceError, match=r"none of the 2 images .*'x\.png'.*--root") as error:
            write_contact_sheet(
                folder / path,
                "t",
                [Section("a", [Tile(name="x.png"), Tile(name="y.png")])],
                Originals(folder),
            )
        assert "\n" not in str(error.value)
    assert sorted(folder.iterdir()) == before  # nothing half written


def test_outputs_that_cannot_be(folder):
    sections = [Section("a", [Tile(name="0.png")])]
    for path, error, words in (
        ("s.pdf", ConfigError, "html or .png"),
        ("nowhere/s.html", OutputError, "does not exist"),
        ("0.png/s.html", OutputError, "does not exist"),
    ):
        with pytest.raises(error, match=words):
            write_contact_sheet(folder / path, "t", sections, Originals(folder))
    (folder / "d.html").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        write_contact_sheet(folder / "d.html", "t", sections, Originals(folder))
    with pytest.raises(ConfigError, match="no image"):
        write_contact_sheet(folder / "s.html", "t", [], Originals(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sheets, "_write_html", full_disk)
        with pytest.raises(OutputError, match="the disk is full"):
            write_contact_sheet(folder / "s.html", "t", sections, Originals(folder))
    assert not list(folder.glob(".*"))


def full_disk(*_):
    raise OSError(28, "No space left on device")


def test_what_finds_no_room_is_said(folder, monkeypatch):
    monkeypatch.setattr(sheets, "MOST", {".html": 5, ".png": 16})
    sections = [Section(f"s{n}", [Tile(name="0.png"), Tile(name="1.png")]) for n in range(4)]
    done = write_contact_sheet(folder / "s.html", "t", sections, Originals(folder))
    assert (done.images, done.left_out) == (4, 2)
    assert "2 more did not fit" in (folder / "s.html").read_text("utf-8")
    done = write_contact_sheet(folder / "s.png", "t", sections, Originals(folder))
    assert (done.images, done.left_out) == (4, 2)  # a section takes a whole row of eight


def test_common_folder_and_visible():
    assert common_folder(["a/b/c.png", "a/b/d.png"]) == "a/b/"
    assert common_folder(["a/x.tar::c.png", "a/x.tar::d.png"]) == "a/x.tar::"
    assert common_folder(["ab.png", "ac.png"]) == common_folder(["a/b.png"]) == common_folder([]) == ""
    assert visible("a\x1b[31m\u202eb é图") == "a\\x1b[31m\\u202eb é图"


def test_sections_of_matches_duplicates_and_clusters():
    (one,) = sheet_of_matches([Matches("q.png", False, [Match("a.png", 0.75)])])
    assert one.tiles[0].badge == "query" and one.tiles[0].name.endswith("/q.png")
    assert [(tile.name, tile.note) for tile in one.tiles[1:]] == [("a.png", "cosine 0.7500")]

    vectors = np.eye(4, dtype=np.float32)[[0, 1, 0, 2, *[3] * 20]]
    groups = sheet_of_duplicates(find_duplicates(vectors, 0.99))
    assert [len(group.tiles) for group in groups] == [12, 2]
    assert groups[0].note == "20 images, 1 to keep; 8 are not shown"
    assert [(tile.name, tile.badge, tile.note) for tile in groups[1].tiles] == [
        ("0", "keep", ""),
        ("2", "", "cosine 1.0000"),
    ]

    labels = np.array([0] * 30 + [1] * 2 + [-1])
    found = Clustering(
        [f"p{row}" for row in range(33)],
        np.array([0] * 31 + [1, 0], np.int32),
        labels,
        np.linspace(0, 1, 33),
        np.array([30, 2]),
        [[5, 6, 7], [31]],
        "kmeans",
    )
    clusters = sheet_of_clusters(found)
    assert [section.title for section in clusters] == ["Cluster 0", "Cluster 1", "In no cluster"]
    assert [tile.name for tile in clusters[0].tiles if tile.badge] == ["p5", "p6", "p7"]
    members = [tile.name for tile in clusters[0].tiles]
    assert len(set(members)) == 12 and {int(name[1:]) for name in members} <= set(range(30))
    assert [tile.name for tile in clusters[1].tiles] == ["p31#1", "p30"]
    assert clusters[2].tiles == [Tile(name="p32")] and clusters[1].note == "2 images, 6.1%"
    assert clusters[1].tiles[1].note == "probability 0.94"  # 30 / 32
    certain = dataclasses.replace(found, probabilities=np.ones(33))
    assert {tile.note for section in sheet_of_clusters(certain) for tile in section.tiles} == {""}


def test_duplicates_with_a_sheet(folder):
    from embedkit.cli.duplicates import duplicates

    vectors = np.eye(4, dtype=np.float32)[[0, 1, 0, 2]]
    source = write(folder, vectors, [f"{number}.png" for number in range(4)])
    result = run(duplicates, source, "--threshold", 0.9, "--draw-sheet", folder / "d.html", "--root", folder)
    assert result.exit_code == 0, result.output
    assert "shows 2 images" in result.stderr and "warning" not in result.stderr
    assert "Group 1" in (folder / "d.html").read_text("utf-8")
    result = run(duplicates, write(folder, np.eye(4, dtype=np.float32), list("abcd")), "--threshold", 1.0,
                 "--draw-sheet", folder / "none.png")  # fmt: skip
    assert "there are no duplicates" in result.stderr and not (folder / "none.png").exists()
    result = run(duplicates, source, "--threshold", 0.9, "--draw-sheet", folder / "d.gif")
    assert isinstance(result.exception, ConfigError)


def test_cluster_with_a_sheet(folder):
    pytest.importorskip("faiss")
    from embedkit.cli.cluster import cluster

    rng = np.random.default_rng(0)
    vectors = np.eye(4)[[0] * 6 + [1] * 6] + rng.normal(0, 0.05, (12, 4))
    source = write(folder, vectors.astype(np.float32), [f"{number}.png" for number in range(12)])
    (folder / "3.png").unlink()
    result = run(cluster, source, "-n", 2, "--draw-sheet", folder / "c.html", "--root", folder)
    assert result.exit_code == 0, result.output
    assert "shows 12 images" in result.stderr
    assert "probability" not in (folder / "c.html").read_text("utf-8")  # those of k-means are all 1
    assert re.search(r"warning: 1 of these images cannot be read \(the first is 3\.png\)", result.stderr)
