"""Faces as rows: `embedkit embed --faces` on a made album, and what reads it.

The people are those of `test_faces.py`, and two small faces of LFW that scikit-image holds.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image, ImageEnhance, ImageOps
from typer.testing import CliRunner

pytest.importorskip("onnxruntime")
pytest.importorskip("matplotlib", reason="pip install matplotlib")

from embedkit import cluster, embed
from embedkit.cli.embed import embed as command
from embedkit.embeddings.table import Embeddings
from embedkit.errors import OutputError
from embedkit.images.transform import upright
from embedkit.workflows.faces.encoder import ENCODER, FaceEncoder
from embedkit.workflows.faces.parts import FaceParts, originals_of
from embedkit.workflows.identify import identify_images

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _own_zoo(monkeypatch):
    monkeypatch.setenv("EMBEDKIT_ZOO", str(ROOT / "zoo"))


@pytest.fixture(scope="module")
def portraits():
    from matplotlib import get_data_path

    hopper = Image.open(Path(get_data_path()) / "sample_data" / "grace_hopper.jpg").convert("RGB")
    return {"collins": Image.open(ROOT / "samples" / "astronaut.jpg").convert("RGB"), "hopper": hopper}


@pytest.fixture(scope="module")
def album(portraits, tmp_path_factory):
    """Three photographs of each of two people, one of both, and two without a face."""
    folder = tmp_path_factory.mktemp("album")
    for name, portrait in portraits.items():
        portrait.save(folder / f"{name}-0.png")
        ImageOps.mirror(portrait).save(folder / f"{name}-1.png")
        ImageEnhance.Brightness(portrait).enhance(0.6).save(folder / f"{name}-2.png")
    both = Image.new("RGB", (1000, 600))
    both.paste(portraits["collins"], (0, 0))
    both.paste(portraits["hopper"], (485, 0))
    both.save(folder / "together.png")
    for name in ("cat.jpg", "rocket.jpg"):
        (folder / name).write_bytes((ROOT / "samples" / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def run():
    app = typer.Typer()
    app.command()(command)
    return lambda *arguments: CliRunner().invoke(
        app, [*map(str, arguments), "--device", "cpu", "--threads", "1"]
    )


@pytest.fixture(scope="module")
def people(album, run, tmp_path_factory):
    """The rows of the album, by the command."""
    output = tmp_path_factory.mktemp("rows") / "people.parquet"
    before = os.environ.get("EMBEDKIT_ZOO")
    os.environ["EMBEDKIT_ZOO"] = str(ROOT / "zoo")
    try:
        done = run(album, "--faces", "-o", output, "--root", album)
    finally:
        if before is None:
            del os.environ["EMBEDKIT_ZOO"]
        else:
            os.environ["EMBEDKIT_ZOO"] = before
    assert done.exit_code == 0, (done.output, done.exception)
    assert "2 images have no face" in done.stderr and "takes aligned faces" not in done.stderr
    return output


def test_a_row_for_each_face(people, album, portraits):
    rows = Embeddings.load(people)
    keys = list(zip(rows.ids, rows.parts.tolist(), strict=True))
    single = [(f"{name}-{shot}.png", 0) for name in portraits for shot in range(3)]
    assert keys == [*single, ("together.png", 0), ("together.png", 1)]
    # The rows are those of the library, and the columns what the finder gives.
    faces, vectors = FaceEncoder(threads=1).encode(album / "together.png")
    np.testing.assert_allclose(rows.vectors[-2:], vectors, atol=1e-5)
    assert rows.metadata.entry == ENCODER
    for row, face in zip((-2, -1), faces, strict=True):
        box = [rows.label(edge)[row] for edge in ("left", "top", "right", "bottom")]
        assert box == pytest.approx(face.box) and rows.label("score")[row] == pytest.approx(face.score)
        np.testing.assert_allclose(json.loads(rows.label("landmarks")[row]), face.points, atol=0.051)
        assert rows.label("sharpness")[row] == pytest.approx(face.sharpness)


def test_clusters_are_people(people):
    found = cluster(Embeddings.load(people), "kmeans", 2, seed=0)
    # Row by row: the larger face of the photograph of both is Hopper's.
    who = np.array([0, 0, 0, 1, 1, 1, 1, 0])
    labels = np.array(found.labels)
    assert ((labels == labels[0]) == (who == who[0])).all()


def test_crops_show_the_face_of_a_row(people, album, portraits):
    originals = originals_of(people, album)
    crops = [upright(originals.read(name)) for name in ("together.png", "together.png#1")]
    rows = Embeddings.load(people)
    for row, crop in zip((-2, -1), crops, strict=True):
        width = rows.label("right")[row] - rows.label("left")[row]
        assert crop.width == pytest.approx(1.5 * width, abs=2)
    # The crop of the smaller face is the same part of her own photograph.
    left, top = (
        round(rows.label(edge)[-1] - 0.25 * span)
        for edge, span in zip(
            ("left", "top"),
            (
                rows.label("right")[-1] - rows.label("left")[-1],
                rows.label("bottom")[-1] - rows.label("top")[-1],
            ),
            strict=True,
        )
    )
    part = portraits["collins"].crop((left, top, left + crops[1].width, top + crops[1].height))
    np.testing.assert_array_equal(np.asarray(crops[1]), np.asarray(part))
    whole = originals_of(album / "cat.jpg", album)
    assert upright(whole.read("cat.jpg")).size == upright(album / "cat.jpg").size


def test_only_what_is_new_is_embedded(people, album, run):
    before = people.read_bytes()
    done = run(album, "--faces", "-o", people, "--root", album, "--json")
    told = json.loads(done.stdout)
    assert told["images"] == 0 and told["kept"] == 7 and told["failed"] == 0
    assert Embeddings.load(people).to_arrow().num_rows == 8 and people.read_bytes() == before


def test_rows_of_faces_are_a_gallery(people, album, portraits, tmp_path):
    portraits["collins"].rotate(90, expand=True).save(tmp_path / "turned.png")
    rows = Embeddings.load(people)
    rows.labels["who"] = ["collins"] * 3 + ["hopper"] * 4 + ["collins"]
    rows.save(tmp_path / "named.parquet")
    (one,) = identify_images(
        [str(tmp_path / "turned.png")], tmp_path / "named.parquet", identity="who", faces=True, threads=1
    ).found
    assert one.identity == "collins" and one.score > 0.95


def test_rows_of_whole_images_and_of_faces_do_not_mix(album, tmp_path):
    output = tmp_path / "whole.parquet"
    embed(album / "collins-0.png", output, encoder=ENCODER, threads=1)
    with pytest.raises(OutputError, match="holds rows of whole images, not one for each face"):
        embed(album / "collins-1.png", output, encoder=ENCODER, threads=1, parts=FaceParts())


def test_the_page_about_albums_runs(album, portraits, tmp_path, monkeypatch):
    page = ROOT / "docs" / "album.md"
    if not page.exists():
        pytest.skip("this test reads a file of the checkout")
    from embedkit.cli import app as commands

    monkeypatch.chdir(tmp_path)
    (tmp_path / "album").symlink_to(album)
    ImageOps.mirror(portraits["hopper"]).rotate(-90, expand=True).save(tmp_path / "new.jpg")
    said = ""
    blocks = re.findall(r"```(sh|python)\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    assert [kind for kind, _ in blocks] == ["sh", "python", "sh"]
    for kind, text in blocks:
        if kind == "python":
            exec(compile(text, str(page), "exec"), {})
            continue
        for line in text.splitlines():
            done = CliRunner().invoke(commands, shlex.split(line)[1:])
            assert done.exit_code == 0, (line, done.output, done.exception)
            said = done.stdout
    (row,) = said.splitlines()[1:]
    assert row.split("\t")[1] in {"Eileen", "Grace"}
    # The clusters are people, so the name is that of Hopper's cluster.
    named = Embeddings.load("named.parquet")
    who = dict(zip(named.ids, named.label("who"), strict=True))
    assert row.split("\t")[1] == who["album/hopper-0.png"] != who["album/collins-0.png"]
    assert (tmp_path / "people.html").stat().st_size > 10_000 and (tmp_path / "map.html").exists()
