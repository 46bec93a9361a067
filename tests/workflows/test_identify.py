"""Identification against galleries of images and of embeddings, by a naive loop; faces on real photographs.

The photographs are those of `test_faces.py`: Eileen Collins (NASA) and Grace Hopper (United States Navy).
"""

from __future__ import annotations

import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image, ImageOps
from typer.testing import CliRunner

pytest.importorskip("onnxruntime")

from embedkit import embed, load_encoder
from embedkit.cli.identify import identify as command
from embedkit.cli.verify import verify
from embedkit.embeddings.parquet import write_rows
from embedkit.embeddings.schema import schema_of
from embedkit.embeddings.table import Embeddings
from embedkit.errors import (
    ConfigError,
    EmbedkitError,
    EntryNotFoundError,
    ImageError,
    OutputError,
    SourceError,
    SpaceMismatchError,
)
from embedkit.workflows import identify as module
from embedkit.workflows.calibrate import calibrate_images
from embedkit.workflows.faces.encoder import ENCODER, FaceEncoder
from embedkit.workflows.identify import identify_images

ROOT = Path(__file__).parents[2]
ASTRONAUT, COFFEE = ROOT / "samples" / "astronaut.jpg", ROOT / "samples" / "coffee.jpg"
PEOPLE, SHOTS = 12, 3


def save(pixels, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path)
    return str(path)


@pytest.fixture(scope="module")
def zoo(by_hand, tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoo")
    by_hand.TinyEntry(dim=24).write(folder / "linear-tiny.noise")
    by_hand.TinyEntry(dim=24, seed=1).write(folder / "linear-far.noise")
    by_hand.write_index(folder)
    return folder


@pytest.fixture(autouse=True)
def _in_that_zoo(zoo, monkeypatch):
    monkeypatch.setenv("EMBEDKIT_ZOO", f"{zoo},{ROOT / 'zoo'}")


@pytest.fixture(scope="module")
def patterns():
    return np.random.default_rng(0).integers(0, 256, (PEOPLE + 2, 8, 8, 3))


@pytest.fixture(scope="module")
def gallery(patterns, tmp_path_factory):
    """A folder for each of twelve patterns."""
    folder, rng = tmp_path_factory.mktemp("data") / "gallery", np.random.default_rng(1)
    for person in range(PEOPLE):
        for shot in range(SHOTS):
            save(patterns[person] + rng.normal(0, 40, (8, 8, 3)), folder / f"p{person:02d}" / f"{shot}.png")
    return folder


@pytest.fixture(scope="module")
def calibration(gallery, zoo):
    found = calibrate_images(gallery, 0.06, encoder=zoo / "linear-tiny.noise", replicates=10).calibration
    found.save(gallery.parent / "c.json")
    return found


@pytest.fixture
def stored(gallery, zoo, tmp_path):
    """The gallery's embeddings, with ids relative to it and who they show."""
    embed(gallery, tmp_path / "plain.parquet", encoder=zoo / "linear-tiny.noise", root=gallery)
    rows = Embeddings.load(tmp_path / "plain.parquet")
    import pyarrow as pa

    schema = schema_of(rows.metadata, {"who": "string"}, sha256=False)
    ones, who = [1] * len(rows), [f"n{int(name[1:3])}" for name in rows.ids]
    columns = {
        "id": rows.ids,
        "part": rows.parts,
        "embedding": list(rows.vectors),
        "size": ones,
        "mtime_ns": ones,
    }
    write_rows([pa.table({**columns, "who": who}, schema=schema)], tmp_path / "g.parquet", schema)
    return tmp_path / "g.parquet"


@pytest.fixture
def queries(patterns, tmp_path):
    """Two new images of people of the gallery, and one of somebody else."""
    rng = np.random.default_rng(2)
    return [
        save(patterns[person] + rng.normal(0, 20, (8, 8, 3)), tmp_path / f"q{person}.png")
        for person in (3, 7, PEOPLE)
    ]


def run(*arguments):
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, [*map(str, arguments), "--threads", "1"])


def naive(queries, gallery, encoder, threshold):
    """One cosine at a time: (identity or None, nearest, score) of each query."""
    found = []
    for query in queries:
        best = (-2.0, None, None)
        for file in sorted(gallery.rglob("*.png")):
            a, b = (encoder.encode(str(path))[0].astype(float) for path in (query, file))
            cosine = sum(x * y for x, y in zip(a, b, strict=True)) / (sum(a * a) * sum(b * b)) ** 0.5
            best = max(best, (cosine, f"{file.parent.name}/{file.name}", file.parent.name))
        found.append((best[2] if best[0] >= threshold else None, best[1], best[0]))
    return found


# --- whole images ---------------------------------------------------------------------------------------


def test_a_folder_against_a_naive_loop(gallery, zoo, queries, calibration):
    encoder = load_encoder("linear-tiny", threads=1)
    expected = naive(queries, gallery, encoder, calibration.threshold)
    assert [row[0] for row in expected] == ["p03", "p07", None]  # else this would test little
    done = identify_images(queries, gallery, calibration=calibration, encoder="linear-tiny")
    assert (done.images, done.identities, done.left_out) == (36, 12, [])
    assert done.encoder == "linear-tiny.noise" and [one.query for one in done.found] == queries
    for one, (identity, nearest, score) in zip(done.found, expected, strict=True):
        assert (one.identity, one.nearest) == (identity, nearest) and one.score == pytest.approx(
            score, abs=1e-5
        )
        # A union bound over the gallery's images, of the rate of one comparison.
        assert one.expected_fpir == pytest.approx(min(1, 36 * calibration.fmr))
        assert one.threshold == calibration.threshold
    # A stricter threshold knows nobody, and errs less.
    strict = identify_images(
        queries, gallery, calibration=calibration, threshold=0.99999, encoder="linear-tiny"
    )
    assert [one.identity for one in strict.found] == [None] * 3
    assert strict.found[0].expected_fpir <= done.found[0].expected_fpir


def test_embeddings_answer_as_their_images(gallery, zoo, queries, calibration, stored):
    expected = identify_images(queries, gallery, calibration=calibration, encoder="linear-tiny").found
    by_column = identify_images(queries, stored, identity="who", calibration=calibration)
    assert by_column.encoder == "linear-tiny.noise"  # as the file's metadata says, not the default encoder
    by_folder = identify_images(queries, stored, identity_from_folder=True, calibration=calibration)
    assert [one.identity for one in by_column.found] == ["n3", "n7", None]
    for found in (by_column.found, by_folder.found):
        assert [one.nearest for one in found] == [one.nearest for one in expected]
        assert [one.score for one in found] == pytest.approx([one.score for one in expected], abs=1e-6)
    assert [one.identity for one in by_folder.found] == [one.identity for one in expected]


def test_members_of_archives_and_the_same_query_twice(gallery, queries, tmp_path, calibration):
    with tarfile.open(tmp_path / "q.tar", "w") as archive:
        archive.add(queries[1], "deep/seven.png")
    asked = [queries[0], f"{tmp_path}/q.tar::deep/seven.png", queries[0]]
    done = identify_images(asked, gallery, calibration=calibration, encoder="linear-tiny")
    assert [one.query for one in done.found] == asked
    assert [one.identity for one in done.found] == ["p03", "p07", "p03"]


def test_one_identity_is_a_verification(gallery, queries, calibration, tmp_path):
    shutil.copytree(gallery / "p03", tmp_path / "one" / "p03")
    done = run(
        *queries,
        "--gallery",
        tmp_path / "one",
        "--encoder",
        "linear-tiny",
        "--calibration",
        gallery.parent / "c.json",
    )
    assert done.exit_code == 0, done.output
    assert [line.split("\t")[1] for line in done.stdout.splitlines()[1:]] == ["p03", "no match", "no match"]
    assert "with one identity in the gallery this is a verification" in done.stderr


# --- the command ------------------------------------------------------------------------------------------


def test_the_command(gallery, queries, calibration, stored):
    saved = gallery.parent / "c.json"
    done = run(*queries, "--gallery", gallery, "--encoder", "linear-tiny", "--calibration", saved)
    assert done.exit_code == 0, (done.output, done.exception)
    head, *lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert head == ["query", "identity", "nearest", "score", "expected FPIR"]
    assert [line[:2] for line in lines] == [
        [queries[0], "p03"],
        [queries[1], "p07"],
        [queries[2], "no match"],
    ]
    assert all(float(line[3]) <= 1 and float(line[4]) == 1 for line in lines)  # 36 times 0.06
    assert "12 identities in 36 images" in done.stderr and "uncalibrated" not in done.stderr
    done = run(*queries, "--gallery", stored, "--label", "who", "--threshold", 0.5, "--json")
    told = json.loads(done.stdout)
    assert [one["query"] for one in told["found"]] == queries and told["found"][0]["identity"] == "n3"
    assert told["found"][0]["expected_fpir"] is None and told["identities"] == 12 and told["left_out"] == []
    assert "uncalibrated" in done.stderr
    strict = ("--gallery", gallery, "--encoder", "linear-tiny", "--threshold", 0.9999, "--exit-status")
    assert (run(queries[0], *strict).exit_code, run(gallery / "p03" / "0.png", *strict).exit_code) == (3, 0)
    bare = run(queries[0], "--gallery", gallery, "--encoder", "linear-tiny", "--threshold", 0.5)
    assert bare.stdout.splitlines()[1].endswith("\t")


def test_a_bad_query_does_not_silence_the_others(gallery, queries, tmp_path):
    (tmp_path / "text.jpg").write_bytes(b"no image")
    asked = [queries[0], tmp_path / "text.jpg", queries[1]]
    options = ("--gallery", gallery, "--encoder", "linear-tiny", "--threshold", 0.5)
    alone = run(queries[0], queries[1], *options).stdout
    done = run(*asked, *options)
    assert (done.stdout, done.exit_code) == (alone, 1)
    assert "text.jpg: not an image" in done.stderr
    told = json.loads(run(*asked, *options, "--json").stdout)
    assert len(told["found"]) == 2 and len(told["failed"]) == 1


def test_bad_images_of_the_gallery_are_left_out_and_named(gallery, queries, tmp_path):
    shutil.copytree(gallery, tmp_path / "g")
    (tmp_path / "g" / "p03" / "1.png").write_bytes(b"no image")
    done = run(*queries, "--gallery", tmp_path / "g", "--encoder", "linear-tiny", "--threshold", 0.9)
    assert done.exit_code == 0, done.output
    assert "warning: 1 image of the gallery is left out; the first: " in done.stderr
    assert "g/p03/1.png: not an image" in done.stderr and "in 35 images" in done.stderr
    for shot in (0, 2):
        (tmp_path / "g" / "p03" / f"{shot}.png").unlink()
    error = run(
        *queries, "--gallery", tmp_path / "g", "--encoder", "linear-tiny", "--threshold", 0.9
    ).exception
    assert isinstance(error, SourceError)
    assert "has no image of 'p03' that can be used" in str(error) and "p03/1.png: not an image" in str(error)


def test_what_is_refused(gallery, zoo, queries, stored, calibration, tmp_path, monkeypatch):
    (tmp_path / "text.jpg").write_bytes(b"no image")
    (tmp_path / "empty").mkdir()
    folder = {"gallery": gallery, "threshold": 0.9, "encoder": "linear-tiny"}
    rows = {"gallery": stored, "threshold": 0.9, "identity": "who"}
    monkeypatch.setattr(module, "embed_readable", None)  # the gallery is embedded after all of these
    for asked, arguments, error, words in (
        ([], folder, ConfigError, "expected at least one query"),
        (["gone.png"], folder, ConfigError, "'gone.png' is not an existing image"),
        ([str(tmp_path)], folder, ConfigError, r"is a folder; give images"),
        ([str(tmp_path / "text.jpg")] * 2, folder, ImageError, r"text\.jpg: not an image"),
        (queries, {**folder, "identity": "who"}, ConfigError, "whose sub-folders are the identities"),
        (queries, {**folder, "threshold": None}, ConfigError, "linear-tiny.noise has none of its own"),
        (queries, {**folder, "gallery": tmp_path / "empty"}, SourceError, "no images in .*empty"),
        (queries, {**folder, "gallery": gallery / "p03"}, ConfigError, "p03: '0.png' is not in a folder"),
        (queries, {**folder, "gallery": tmp_path / "gone"}, OutputError, "gone does not exist"),
        (queries, {**folder, "encoder": "linear-far", "calibration": calibration}, SpaceMismatchError, "linear-far"),
        (queries, {**rows, "identity": None}, ConfigError, "one of --label COLUMN and --label-from-folder"),
        (queries, {**rows, "identity_from_folder": True}, ConfigError, "one of --label COLUMN"),
        (queries, {**rows, "identity": "name"}, ConfigError, "has no column 'name'; it has who"),
        (queries, {**rows, "encoder": "linear-far"}, SpaceMismatchError, r"linear-tiny\.noise .* linear-far\.noise"),
    ):  # fmt: skip
        with pytest.raises(error, match=words) as caught:
            identify_images(asked, **arguments)
        assert "\n" not in str(caught.value)
    monkeypatch.setenv("EMBEDKIT_ZOO", str(tmp_path / "empty"))
    with pytest.raises(EntryNotFoundError, match=r"g\.parquet was made with linear-tiny\.noise.*--encoder"):
        identify_images(queries, **rows)


def test_the_encoder_that_was_calibrated_is_taken(gallery, queries, calibration):
    app = typer.Typer()
    app.command()(verify)
    plain = [*queries[:2], "--calibration", str(gallery.parent / "c.json"), "--json"]
    done = CliRunner().invoke(app, plain)
    assert done.exit_code == 0, done.exception
    named = CliRunner().invoke(app, [*plain, "--encoder", "linear-tiny"])
    assert json.loads(done.stdout) == json.loads(named.stdout)
    assert json.loads(done.stdout)["encoder"] == "linear-tiny.noise"  # not the default encoder
    found = identify_images(queries, gallery, calibration=calibration)
    assert found.encoder == "linear-tiny.noise"
    error = CliRunner().invoke(app, [*plain, "--encoder", "linear-far"]).exception
    assert isinstance(error, SpaceMismatchError) and "--encoder" in str(error)


def test_a_calibration_of_faces_decides_about_faces_alone(gallery, queries, calibration):
    of_faces = replace(calibration, entry=ENCODER)
    with pytest.raises(ConfigError, match=r"of face-r29\.dlib, which embeds aligned faces: add --faces"):
        identify_images(queries, gallery, calibration=of_faces)
    with pytest.raises(
        ConfigError, match=r"of linear-tiny\.noise, which embeds whole images: leave out --faces"
    ):
        identify_images(queries, gallery, calibration=calibration, faces=True)


@pytest.mark.parametrize("threshold", ["nan", "inf", "2", "-2"])
def test_a_threshold_is_a_cosine(gallery, queries, threshold, monkeypatch):
    monkeypatch.setattr(module, "find_image", None)  # refused before anything is looked at
    app = typer.Typer()
    app.command()(verify)
    option = f"--threshold={threshold}"
    for error in (
        run(*queries, "--gallery", gallery, option).exception,
        CliRunner().invoke(app, [*queries[:2], option]).exception,
    ):
        assert isinstance(error, ConfigError) and "expected a cosine in [-1, 1]" in str(error)


# --- faces ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def portraits():
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    from matplotlib import get_data_path

    hopper = Image.open(Path(get_data_path()) / "sample_data" / "grace_hopper.jpg").convert("RGB")
    return Image.open(ASTRONAUT).convert("RGB"), hopper


@pytest.fixture(scope="module")
def faces(portraits, tmp_path_factory):
    """A gallery of two people, and queries: a changed portrait, both people, and nobody."""
    folder = tmp_path_factory.mktemp("faces")
    for name, portrait in zip(("collins", "hopper"), portraits, strict=True):
        (folder / "gallery" / name).mkdir(parents=True)
        portrait.save(folder / "gallery" / name / "1.png")
    both = Image.new("RGB", (sum(one.width for one in portraits), max(one.height for one in portraits)))
    both.paste(portraits[0], (0, 0))
    both.paste(portraits[1], (portraits[0].width, 0))
    both.save(folder / "both.png")
    ImageOps.mirror(portraits[0]).save(folder / "mirrored.png")
    return folder


def test_whole_photographs_for_an_encoder_of_faces_are_remarked(faces, tmp_path):
    report = embed(faces / "mirrored.png", tmp_path / "o.parquet", encoder=ENCODER)
    (note,) = report.notes
    assert note.startswith("face-r29.dlib takes aligned faces") and "--faces" in note


def test_faces_of_a_folder(faces):
    done = run(faces / "mirrored.png", "--gallery", faces / "gallery", "--faces", "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    told = json.loads(done.stdout)
    (one,) = told["found"]
    assert one["identity"] == "collins" and one["nearest"] == "collins/1.png" and one["score"] > 0.95
    assert told["encoder"] == ENCODER and one["threshold"] == pytest.approx(0.916)  # the entry's own
    # A gallery without her: nobody.
    lonely = faces / "lonely"
    if not lonely.exists():
        shutil.copytree(faces / "gallery" / "hopper", lonely / "hopper")
    done = run(faces / "mirrored.png", "--gallery", lonely, "--faces")
    assert done.stdout.splitlines()[1].split("\t")[1] == "no match"


def test_a_query_needs_a_face(faces):
    error = run(COFFEE, "--gallery", faces / "gallery", "--faces").exception
    assert isinstance(error, ImageError) and "coffee.jpg: no face was found" in str(error)


def test_each_face_of_a_group_has_a_row(faces, portraits, tmp_path):
    group = Image.new("RGB", (1500, 620), "gray")
    for left, one in zip((0, 500), (portraits[0], portraits[1]), strict=True):
        group.paste(one, (left, 10))
    group.paste(ImageOps.mirror(portraits[0]).resize((400, 400)), (1050, 200))  # she again, smaller
    group.save(tmp_path / "group.png")
    name = str(tmp_path / "group.png")
    told = run(name, "--gallery", faces / "gallery", "--faces")
    heading, *rows = [line.split("\t") for line in told.stdout.splitlines()]
    assert [row[:2] for row in rows] == [
        [name, "hopper"],  # the largest face
        [f"{name}#1", "collins"],
        [f"{name}#2", "collins"],
    ]
    lefts = [int(row[heading.index("box")].split()[0]) for row in rows]
    assert 500 < lefts[0] < 1000 and lefts[1] < 480 and lefts[2] > 1050
    data = json.loads(run(name, "--gallery", faces / "gallery", "--faces", "--json").stdout)
    assert [face["part"] for face in data["faces"]] == [0, 1, 2] and len(data["faces"][0]["box"]) == 4


def test_images_of_the_gallery_without_one_face(faces, tmp_path):
    shutil.copytree(faces / "gallery", tmp_path / "g")
    shutil.copy(COFFEE, tmp_path / "g" / "collins" / "2.jpg")
    shutil.copy(faces / "both.png", tmp_path / "g" / "hopper" / "3.png")
    done = run(faces / "mirrored.png", "--gallery", tmp_path / "g", "--faces")
    assert done.exit_code == 0 and done.stdout.splitlines()[1].split("\t")[1] == "collins"
    assert "warning: 2 images of the gallery are left out; the first: " in done.stderr
    assert "collins/2.jpg: no face was found" in done.stderr
    (tmp_path / "g" / "collins" / "1.png").unlink()
    error = run(faces / "mirrored.png", "--gallery", tmp_path / "g", "--faces").exception
    assert isinstance(error, SourceError) and "no image of 'collins'" in str(error)


def test_a_gallery_of_faces_that_were_embedded(faces, tmp_path):
    import pyarrow as pa

    people = FaceEncoder(threads=1)
    rows = people.embed([faces / "both.png"])  # the larger one is Grace Hopper
    schema = schema_of(rows.metadata, {"who": "string"}, sha256=False)
    table = {
        "id": rows.ids,
        "part": rows.parts,
        "embedding": list(rows.vectors),
        "size": [1, 1],
        "mtime_ns": [1, 1],
    }
    write_rows(
        [pa.table({**table, "who": ["hopper", "collins"]}, schema=schema)], tmp_path / "f.parquet", schema
    )
    (one,) = identify_images(
        [str(faces / "mirrored.png")], tmp_path / "f.parquet", identity="who", faces=True, threads=1
    ).found
    assert one.identity == "collins" and one.nearest == f"{faces / 'both.png'}#1"


def test_errors_are_of_one_tree(gallery, queries):
    for arguments in (("--gallery", gallery), ("--gallery", gallery, "--calibration", queries[0])):
        assert isinstance(run(queries[0], *arguments).exception, EmbedkitError)
    assert run(queries[0]).exit_code == 2
