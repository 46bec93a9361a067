"""The atlas: what is in the file, that no name gets out of its text, and how it behaves in a real browser."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import io
import json
import math
import re
import shutil
import sys
import types
from html.parser import HTMLParser

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from embedkit.analysis.clustering.cluster import Clustering
from embedkit.analysis.vectors import Rows
from embedkit.cli.atlas import atlas as command
from embedkit.embeddings.metadata import Metadata
from embedkit.embeddings.npy_write import write_npy
from embedkit.embeddings.parquet import write_rows
from embedkit.embeddings.schema import schema_of
from embedkit.embeddings.table import Embeddings
from embedkit.errors import ConfigError, MissingDependencyError, OutputError, SourceError, SpaceMismatchError
from embedkit.images.originals import Originals
from embedkit.workflows.visual import atlas as module
from embedkit.workflows.visual.atlas import project, write_atlas
from embedkit.workflows.visual.groups import groups_of_clusters, groups_of_labels

METADATA = Metadata(
    entry="linear-tiny.noise", manifest_sha256="a" * 64, fingerprint="b" * 64, dim=8, normalized=True
)
HOSTILE = [
    "</script><script>alert(1)</script>",
    "{{data}}{{script}}",
    '"><img src=x onerror=alert(1)>',
    "<!--",
]
SHAPES = ("round", "square", "long")


class Page(HTMLParser):
    """Elements and what stands in scripts."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside.append("")

    def handle_data(self, data):
        if self.inside:
            self.inside[-1] += data

    def of(self, tag):
        return [
            (attrs, text) for (name, attrs), text in zip(self.tags, self.inside, strict=True) if name == tag
        ]


def table_of(vectors, ids, labels=None, metadata=METADATA):
    import pyarrow as pa

    schema = schema_of(metadata, dict.fromkeys(labels or {}, "string"), sha256=False)
    ones = [1] * len(ids)
    columns = {"id": ids, "part": [0] * len(ids), "embedding": list(vectors), "size": ones, "mtime_ns": ones}
    return pa.table({**columns, **(labels or {})}, schema=schema)


def write(path, vectors, ids, labels=None, metadata=METADATA):
    table = table_of(vectors, ids, labels, metadata)
    write_rows([table], path, table.schema)
    return path


def make(folder, count=60, width=8):
    """Images of three colors in three tight groups of vectors, and their file of embeddings."""
    rng = np.random.default_rng(0)
    kinds = np.arange(count) % 3
    vectors = np.eye(width)[kinds] + rng.normal(0, 0.1, (count, width))
    ids = [f"p{row:03d}-{SHAPES[kind]}.png" for row, kind in enumerate(kinds)]
    for row, kind in enumerate(kinds):
        color = [(200, 30, 30), (30, 160, 30), (30, 30, 200)][kind]
        Image.new("RGB", (40, 30), color).save(folder / ids[row])
    shapes = [SHAPES[kind] if row else None for row, kind in enumerate(kinds)]
    return write(folder / "emb.parquet", vectors.astype(np.float32), ids, {"shape": shapes})


@pytest.fixture
def source(tmp_path):
    return make(tmp_path)


def read(path):
    page = Page(path.read_text("utf-8"))
    ((_, text),) = [(attrs, text) for attrs, text in page.of("script") if attrs.get("id") == "data"]
    data = json.loads(text)
    kinds = {"x": "<u2", "y": "<u2", "sizes": "u1", "group": "<u2", "neighbors": "<u4", "cosines": "<i2"}
    for key, kind in kinds.items():
        data[key] = np.frombuffer(base64.b64decode(data[key]), kind)
    return page, data


def test_what_is_in_the_file(source, tmp_path):
    done = write_atlas(source, tmp_path / "a.html", originals=Originals(tmp_path), method="pca")
    assert (done.images, done.rows, done.map, done.missing) == (60, 60, "pca", [])
    assert done.size == (tmp_path / "a.html").stat().st_size
    page, data = read(tmp_path / "a.html")
    rows = Embeddings.load(source)
    assert data["names"] == rows.ids and data["groups"] == [] and not data["group"].any()
    assert data["sizes"].reshape(-1, 2).tolist() == [[40, 30]] * 60
    # Neighbors by the naive loop.
    unit = rows.vectors.astype(float) / np.linalg.norm(rows.vectors.astype(float), axis=1, keepdims=True)
    near, cosines = data["neighbors"].reshape(60, 12), data["cosines"].reshape(60, 12) / 10_000
    for row in range(60):
        order = [other for other in np.argsort(-(unit @ unit[row]), kind="stable") if other != row][:12]
        assert near[row].tolist() == order
        np.testing.assert_allclose(cosines[row], unit[order] @ unit[row], atol=6e-5)
    # Positions are the first two principal components, up to sign, at one scale.
    centered = unit - unit.mean(0)
    exact = centered @ np.linalg.svd(centered)[2][:2].T
    placed = np.column_stack([data["x"], data["y"]]).astype(float)
    for axis in range(2):
        assert abs(np.corrcoef(placed[:, axis], exact[:, axis])[0, 1]) > 0.99999
    np.testing.assert_allclose(np.ptp(placed, 0) / np.ptp(placed, 0).max(), np.ptp(exact, 0) / np.ptp(exact, 0).max(),
                               atol=1e-4)  # fmt: skip
    assert placed.min() == 0 and placed.max() == 65_535
    (image,) = page.of("img")
    assert image[0]["src"].startswith("data:image/webp;base64,")


def test_sheets_hold_each_thumbnail_in_its_cell(source, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ACROSS", 4)
    write_atlas(source, tmp_path / "a.html", originals=Originals(tmp_path), method="pca")
    page, data = read(tmp_path / "a.html")
    images = page.of("img")
    assert len(images) == math.ceil(60 / 16)
    for row in (0, 1, 17, 59):
        raw = base64.b64decode(images[row // 16][0]["src"].partition(",")[2])
        with Image.open(io.BytesIO(raw)) as sheet:
            cell = row % 16
            at = (cell % 4 * data["edge"] + 20, cell // 4 * data["edge"] + 15)
            color = sheet.convert("RGB").getpixel(at)
        wanted = [(200, 30, 30), (30, 160, 30), (30, 30, 200)][row % 3]
        assert max(abs(a - b) for a, b in zip(color, wanted, strict=True)) < 12


def test_no_name_gets_out_of_its_text(tmp_path):
    names = [f"{number} {text.replace('/', '|')}.png" for number, text in enumerate(HOSTILE)]
    for name in names:
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    vectors = np.random.default_rng(0).normal(0, 1, (4, 8)).astype(np.float32)
    source = write(tmp_path / "e.parquet", vectors, names, {"kind": HOSTILE})
    groups = groups_of_labels(source, "kind")
    write_atlas(
        source,
        tmp_path / "a.html",
        originals=Originals(tmp_path),
        groups=groups,
        title=HOSTILE[0] + HOSTILE[1],
    )
    page, data = read(tmp_path / "a.html")
    assert data["names"] == names and {group["name"] for group in data["groups"]} == set(HOSTILE)
    scripts = page.of("script")
    assert len(scripts) == 3 and len(page.of("img")) == 1
    assert not [key for _, attrs in page.tags for key in attrs if key.startswith("on")]
    assert page.of("title")[0][1].strip() == HOSTILE[0] + HOSTILE[1]


def test_the_policy_allows_these_scripts_alone(source, tmp_path):
    write_atlas(source, tmp_path / "a.html", originals=Originals(tmp_path), method="pca")
    text = (tmp_path / "a.html").read_text("utf-8")
    page = Page(text)
    policy = next(attrs for attrs, _ in page.of("meta") if attrs.get("http-equiv"))["content"]
    assert policy.startswith("default-src 'none'; img-src data:;") and "unsafe" not in policy
    hashes = set(re.findall(r"'sha256-([^']+)'", policy))
    bodies = re.findall(r"<(?:script|style)>(.*?)</(?:script|style)>", text, re.DOTALL)
    assert hashes == {base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() for body in bodies}
    assert not page.of("link") and not [attrs for attrs, _ in page.of("script") if "src" in attrs]


def test_the_library_is_as_it_was_published():
    assets = importlib.resources.files("embedkit.workflows.visual") / "assets"
    digest = hashlib.sha256((assets / "d3.min.js").read_bytes()).hexdigest()
    assert digest == "912111098ea99503a6f4967361d2bbdc9dbf58cf9c678c8e27e5b02d1a07f0c1"
    assert "Permission to use, copy, modify" in (assets / "d3.LICENSE.txt").read_text("utf-8")
    for file in ("d3.min.js", "atlas.js"):
        assert "</script" not in (assets / file).read_text("utf-8")


def test_an_even_sample_of_many(source, tmp_path):
    done = write_atlas(
        source, tmp_path / "a.html", originals=Originals(tmp_path), limit=10, method="pca", seed=3
    )
    assert (done.images, done.rows) == (10, 60)
    _, data = read(tmp_path / "a.html")
    chosen = np.sort(np.random.default_rng(3).choice(60, 10, replace=False))
    ids = Embeddings.load(source).ids
    assert data["names"] == [ids[row] for row in chosen] and "10 of 60 images" in data["facts"]
    assert data["depth"] == 9 and data["neighbors"].max() < 10


def test_groups_by_label_and_by_cluster(source, tmp_path):
    groups = groups_of_labels(source, "shape")
    write_atlas(source, tmp_path / "a.html", originals=Originals(tmp_path), groups=groups, method="pca")
    _, data = read(tmp_path / "a.html")
    assert data["grouping"] == "shape"
    assert [(one["name"], one["size"], one["plain"]) for one in data["groups"]] == [
        ("long", 20, False), ("square", 20, False), ("round", 19, False), ("none", 1, True),
    ]  # fmt: skip
    assert data["group"].tolist()[:4] == [3, 1, 0, 2]

    rows = Embeddings.load(source)
    labels = np.where(np.arange(60) < 40, 0, np.where(np.arange(60) < 59, 1, -1))
    found = Clustering(
        rows.ids,
        rows.parts,
        labels,
        np.ones(60),
        np.array([40, 19]),
        [[0], [40]],
        "hdbscan",
        metadata=METADATA,
    )
    found.save(tmp_path / "c.parquet")
    groups = groups_of_clusters(source, tmp_path / "c.parquet")
    write_atlas(source, tmp_path / "b.html", originals=Originals(tmp_path), groups=groups, method="pca")
    _, data = read(tmp_path / "b.html")
    assert [one["name"] for one in data["groups"]] == ["Cluster 0", "Cluster 1", "In no cluster"]
    assert data["group"].tolist() == [0] * 40 + [1] * 19 + [2]


def test_labels_of_an_npy_file(source, tmp_path):
    table = table_of(np.eye(8, dtype=np.float32)[:4], list("abcd"), {"shape": ["x", "", None, "y"]})
    write_npy([table], tmp_path / "e.npy", METADATA, 4)
    assert groups_of_labels(tmp_path / "e.npy", "shape").of == {"a": "x", "d": "y"}


def test_groups_that_cannot_be(source, tmp_path):
    with pytest.raises(ConfigError, match="no column 'color'; it has shape"):
        groups_of_labels(source, "color")
    rows = Embeddings.load(source)
    facts = (np.zeros(60, np.int64), np.ones(60), np.array([60]), [[0]], "kmeans")
    other = Metadata(**{**vars(METADATA), "fingerprint": "c" * 64})
    Clustering(rows.ids, rows.parts, *facts, metadata=other).save(tmp_path / "c.parquet")
    with pytest.raises(SpaceMismatchError, match="different spaces"):
        groups_of_clusters(source, tmp_path / "c.parquet")
    Clustering([f"x{row}" for row in range(60)], rows.parts, *facts).save(tmp_path / "c.parquet")
    with pytest.raises(ConfigError, match="none of the ids"):
        groups_of_clusters(source, tmp_path / "c.parquet")
    many = write(tmp_path / "many.parquet", np.random.default_rng(0).normal(0, 1, (1100, 8)).astype(np.float32),
                 [f"{row}" for row in range(1100)], {"shape": [f"{row}" for row in range(1100)]})  # fmt: skip
    with pytest.raises(ConfigError, match="1,100 different values"):
        write_atlas(many, tmp_path / "a.html", groups=groups_of_labels(many, "shape"), method="pca")


def test_few_rows_and_equal_rows(tmp_path):
    for number in range(4):
        Image.new("RGB", (9, 9), "red").save(tmp_path / f"{number}.png")
    for vectors in (np.eye(8)[:1], np.eye(8)[:2], np.ones((4, 8)), np.eye(8)[:3]):
        names = [f"{number}.png" for number in range(len(vectors))]
        source = write(tmp_path / "e.parquet", vectors.astype(np.float32), names)
        done = write_atlas(source, tmp_path / "a.html", originals=Originals(tmp_path))
        _, data = read(tmp_path / "a.html")
        assert done.images == len(vectors) and data["depth"] == len(vectors) - 1
        assert len(set(zip(data["x"].tolist(), data["y"].tolist(), strict=True))) == len(vectors)


def test_umap_gets_unit_vectors_and_its_answer_is_spread(monkeypatch):
    """With a stand-in for the library: what goes in, and what is made of what comes out."""
    seen = {}

    class UMAP:
        def __init__(self, **options):
            seen.update(options)

        def fit_transform(self, points):
            seen["points"] = points
            placed = np.column_stack([np.arange(len(points)) ** 3, -np.arange(len(points))]).astype(float)
            placed[7] = np.nan  # what umap-learn gives for a row that nothing is connected to
            return placed

    monkeypatch.setitem(sys.modules, "umap", types.SimpleNamespace(UMAP=UMAP))
    vectors = Rows(np.random.default_rng(0).normal(0, 1, (100, 80)).astype(np.float32)).unit(0, 100)
    placed, used = project(vectors, seed=5)
    assert used == "umap" and seen["random_state"] == 5 and seen["points"].shape == (100, 50)
    gram = seen["points"] @ seen["points"].T  # 50 of 80 components keep most of the geometry
    centered = vectors - vectors.mean(0)
    assert np.corrcoef(gram.ravel(), (centered @ centered.T).ravel())[0, 1] > 0.9
    assert np.isfinite(placed).all() and placed.min() >= 0 and placed.max() <= 1
    order = [row for row in range(100) if row != 7]
    assert (np.diff(placed[order, 0]) > 0).all() and (np.diff(placed[order, 1]) < 0).all()
    assert 0.2 < placed[50, 0] < 0.4  # 0.125 of the range and 0.5 of the ranks: half way
    assert project(vectors[:10])[1] == "pca"
    monkeypatch.setitem(sys.modules, "umap", None)
    assert project(vectors)[1] == "pca"
    with pytest.raises(MissingDependencyError, match="pip install umap-learn"):
        project(vectors, "umap")
    with pytest.raises(ConfigError, match="map: expected one of auto, umap, pca"):
        project(vectors, "tsne")


def test_umap_itself_keeps_groups_together():
    pytest.importorskip("umap")
    rng = np.random.default_rng(0)
    kinds = np.arange(90) % 3
    vectors = Rows((np.eye(64)[kinds] + rng.normal(0, 0.05, (90, 64))).astype(np.float32)).unit(0, 90)
    placed, used = project(vectors, "umap", seed=1)
    again, _ = project(vectors, "umap", seed=1)
    assert used == "umap" and np.array_equal(placed, again)
    distance = np.linalg.norm(placed[:, None] - placed[None], axis=2) + np.eye(90) * 9
    assert (kinds[distance.argmin(1)] == kinds).all()


def test_some_or_all_images_are_gone(source, tmp_path):
    (tmp_path / "p007-square.png").unlink()
    (tmp_path / "p008-long.png").write_bytes(b"damaged")
    done = write_atlas(source, tmp_path / "a.html", originals=Originals(tmp_path), method="pca")
    assert done.missing == ["p007-square.png", "p008-long.png"]
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SourceError, match=r"none of the 60 images .*'p000-round\.png'.*--root"):
        write_atlas(source, tmp_path / "b.html", method="pca")
    assert sorted(tmp_path.iterdir()) == before


def test_outputs_and_inputs_that_cannot_be(source, tmp_path):
    for path, error, words in (
        ("a.png", ConfigError, "ends in .html"),
        ("none/a.html", OutputError, "does not exist"),
        (".html/", ConfigError, "ends in .html"),
    ):
        with pytest.raises(error, match=words):
            write_atlas(source, tmp_path / path)
    (tmp_path / "d.html").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        write_atlas(source, tmp_path / "d.html")
    with pytest.raises(ConfigError, match="limit: expected 1 to 50,000"):
        write_atlas(source, tmp_path / "a.html", limit=0)
    empty = tmp_path / "empty.parquet"
    write_rows([], empty, schema_of(METADATA, {}, sha256=False))
    with pytest.raises(ConfigError, match="found no row"):
        write_atlas(empty, tmp_path / "a.html")


def test_the_command(source, tmp_path):
    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(
        app,
        [
            str(source),
            "-o",
            str(tmp_path / "a.html"),
            "--label",
            "shape",
            "--root",
            str(tmp_path),
            "--map",
            "pca",
        ],
    )
    assert result.exit_code == 0, result.output
    assert "shows 60 images, placed by PCA" in result.stderr and result.stdout == ""
    result = CliRunner().invoke(app, [str(source), "--label", "shape", "--clusters", "c.parquet"])
    assert result.exit_code == 2


# --- in a browser -----------------------------------------------------------------------------------------

HOW_TO = "the atlas is tested in a browser: apt-get install chromium, and pip install playwright"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason=HOW_TO)
    if CHROMIUM is None:
        pytest.skip(HOW_TO)
    with sync_api.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("atlas")
    source = make(folder)
    groups = groups_of_labels(source, "shape")
    write_atlas(source, folder / "a.html", originals=Originals(folder), groups=groups, method="pca")
    return folder / "a.html"


@pytest.fixture
def page(browser, written):
    """The atlas, open; at the end nothing may have been asked for, and nothing may have been complained of."""
    context = browser.new_context(viewport={"width": 1200, "height": 800}, reduced_motion="reduce")
    opened = context.new_page()
    asked, words = [], []
    opened.on("request", lambda request: asked.append(request.url))
    opened.on("console", lambda message: words.append(message.text))
    opened.on("pageerror", lambda error: words.append(str(error)))
    opened.goto(written.as_uri())
    opened.wait_for_selector("html[data-ready]", timeout=30_000)
    yield opened
    settle(opened)
    context.close()
    assert [url for url in asked if not url.startswith(("data:", "blob:"))] == [written.as_uri()]
    assert words == []


def settle(page):
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def view(page):
    settle(page)
    return [float(value) for value in page.get_attribute("#map", "data-view").split()]


def test_it_shows_images_and_words(page):
    assert page.inner_text("h1") == "emb.parquet" and "60 images" in page.inner_text("#facts")
    assert int(page.get_attribute("#map", "data-images")) >= 3
    # The images' own colors are on the canvas.
    found = page.evaluate(
        """() => {
            const map = document.querySelector("#map"), pen = map.getContext("2d");
            const data = pen.getImageData(0, 0, map.width, map.height).data, seen = [0, 0, 0];
            const colors = [[200, 30, 30], [30, 160, 30], [30, 30, 200]];
            for (let at = 0; at < data.length; at += 4) {
                colors.forEach((color, n) => {
                    if (color.every((value, band) => Math.abs(value - data[at + band]) < 16)) seen[n]++;
                });
            }
            return seen;
        }"""
    )
    assert min(found) > 300, found


def test_wheel_drag_buttons_and_keys_change_the_view(page):
    before = view(page)
    assert before == [1, 0, 0]
    page.mouse.move(400, 300)
    page.mouse.wheel(0, -400)
    zoomed = view(page)
    assert zoomed[0] > 1.3
    page.mouse.move(500, 400)
    page.mouse.down()
    page.mouse.move(440, 360, steps=4)
    page.mouse.up()
    dragged = view(page)
    assert dragged[0] == zoomed[0]
    assert dragged[1] - zoomed[1] == pytest.approx(-60) and dragged[2] - zoomed[2] == pytest.approx(-40)
    assert page.is_hidden("#selection")  # a drag is no click
    page.click("#reset")
    assert view(page) == [1, 0, 0]
    page.focus("#map")
    page.keyboard.press("+")
    assert view(page)[0] == pytest.approx(1.5)
    left = view(page)[1]
    page.keyboard.press("ArrowLeft")
    assert view(page)[1] == pytest.approx(left + 80)
    page.keyboard.press("-")
    page.keyboard.press("0")
    assert view(page) == [1, 0, 0]
    page.keyboard.press("Enter")
    assert page.is_visible("#selection")
    page.keyboard.press("Escape")
    assert page.is_hidden("#selection")


def test_a_click_shows_the_neighbors(page, written):
    _, data = read(written)
    x, y = page.evaluate("atlas.screen(5)")
    page.mouse.click(x, y)
    name = page.inner_text("#name")
    row = data["names"].index(name)
    near = data["neighbors"].reshape(60, 12)[row]
    buttons = page.query_selector_all("#neighbors button")
    cosines = data["cosines"].reshape(60, 12)[row] / 10_000
    assert [button.get_attribute("aria-label") for button in buttons] == [
        f"{data['names'][other]}, cosine {cosine:.2f}" for other, cosine in zip(near, cosines, strict=True)
    ]
    assert SHAPES[row % 3] in name and page.inner_text("#about") == f"shape: {SHAPES[row % 3]}"
    buttons[0].click()
    assert page.inner_text("#name") == data["names"][near[0]]


def test_search_finds_a_name_and_selects_it(page):
    page.keyboard.press("/")
    page.keyboard.type("P017-")
    assert page.inner_text("#found") == "1 image"
    page.keyboard.press("Enter")
    assert page.inner_text("#name") == "p017-long.png"
    page.fill("#query", "square")
    assert page.inner_text("#found") == "20 images"
    assert page.locator("#results button").count() == 20
    page.fill("#query", "nothing like it")
    assert page.inner_text("#found") == "0 images"


def test_the_legend_lights_one_group(page):
    entries = page.locator("#legend button")
    assert [text.split() for text in entries.all_inner_texts()][0] == ["long", "20"]
    before = int(page.get_attribute("#map", "data-images"))
    entries.first.press("Enter")
    settle(page)
    assert entries.first.get_attribute("aria-pressed") == "true"
    assert 0 < int(page.get_attribute("#map", "data-images")) < before


def test_a_resize_keeps_the_middle_and_the_dark_scheme_is_followed(page):
    page.set_viewport_size({"width": 700, "height": 900})
    settle(page)
    assert view(page)[0] == 1
    colors = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        settle(page)
        with Image.open(
            io.BytesIO(page.screenshot(clip={"x": 300, "y": 3, "width": 1, "height": 1}))
        ) as corner:
            colors.append(corner.convert("L").getpixel((0, 0)))
    assert colors[0] > 200 and colors[1] < 60


def test_hostile_names_stay_text_in_a_browser(browser, tmp_path):
    names = [f"{number} {text.replace('/', '|')}.png" for number, text in enumerate(HOSTILE * 2)]
    for name in names:
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    vectors = np.random.default_rng(0).normal(0, 1, (8, 8)).astype(np.float32)
    source = write(tmp_path / "e.parquet", vectors, names, {"kind": HOSTILE * 2})
    groups = groups_of_labels(source, "kind")
    write_atlas(
        source, tmp_path / "a.html", originals=Originals(tmp_path), groups=groups, title="".join(HOSTILE)
    )
    context = browser.new_context()
    opened, events = context.new_page(), []
    opened.on("dialog", lambda dialog: events.append(dialog.message) or dialog.dismiss())
    opened.on("console", lambda message: events.append(message.text))
    opened.on("pageerror", lambda error: events.append(str(error)))
    opened.goto((tmp_path / "a.html").as_uri())
    opened.wait_for_selector("html[data-ready]", timeout=30_000)
    opened.evaluate("atlas.select(2)")
    opened.fill("#query", "img")
    assert opened.inner_text("#name") == names[2] and opened.title() == "".join(HOSTILE)
    assert (
        opened.locator("img, script:not([id])").count() == 2
    )  # the two scripts of ours; sheets are taken down
    context.close()
    assert events == []
