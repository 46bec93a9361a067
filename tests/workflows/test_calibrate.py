"""A calibration by images equals one by their embeddings, and images that cannot be used are named."""

from __future__ import annotations

import itertools
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
from embedkit.analysis.matching.calibrate import calibrate_pairs
from embedkit.analysis.matching.calibration import Calibration
from embedkit.analysis.matching.pairs import sample_pairs
from embedkit.cli.calibrate import calibrate as command
from embedkit.embeddings.table import Embeddings
from embedkit.errors import ConfigError, OutputError, SourceError
from embedkit.workflows import embedding
from embedkit.workflows.calibrate import calibrate_images, image_pairs, labeled_images
from embedkit.workflows.verify import verify

PEOPLE, SHOTS = 14, 3


@pytest.fixture(scope="module")
def entry(by_hand, tmp_path_factory):
    return by_hand.TinyEntry(dim=24).write(tmp_path_factory.mktemp("zoo") / "linear-tiny.noise")


@pytest.fixture
def people(tmp_path):
    """Fourteen noisy patterns, three images of each, in a folder of their own."""
    rng = np.random.default_rng(0)
    for person in range(PEOPLE):
        pattern = rng.integers(0, 256, (8, 8, 3))
        (tmp_path / "people" / f"p{person:02d}").mkdir(parents=True)
        for shot in range(SHOTS):
            pixels = np.clip(pattern + rng.normal(0, 60, (8, 8, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "people" / f"p{person:02d}" / f"{shot}.png")
    return tmp_path / "people"


def names():
    return [f"p{person:02d}/{shot}.png" for person in range(PEOPLE) for shot in range(SHOTS)]


def write_pairs(path, spell=lambda name: name):
    lines = ["a,b,same"]
    every = names()
    for i, a in enumerate(every):
        lines += [f"{spell(a)},{spell(b)},{int(a[:3] == b[:3])}" for b in every[:i]]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def run(monkeypatch):
    app = typer.Typer()
    app.command()(command)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def by_embeddings(people, entry, tmp_path, target):
    embed(people, tmp_path / "e.parquet", encoder=entry, root=people, threads=1)
    rows = Embeddings.load(tmp_path / "e.parquet")
    pairs = sample_pairs([name[:3] for name in rows.ids])
    return rows, calibrate_pairs(rows, pairs, target, replicates=20)


def test_a_folder_gives_what_its_embeddings_give(people, entry, tmp_path, run):
    pytest.importorskip("scipy", reason="pip install '.[analysis]'")
    _, expected = by_embeddings(people, entry, tmp_path, 0.05)
    out = tmp_path / "c.json"
    common = ["--target-fmr", 0.05, "--replicates", 20, "-o", out]
    done = run(people, "--encoder", entry, "--threads", 1, *common)
    assert done.exit_code == 0, done.output
    assert "42 genuine and 819 impostor pairs of 14 identities" in done.stderr
    found = Calibration.load(out)
    assert found.to_json() == expected.to_json()  # the space's fingerprint, too
    assert (found.entry, found.fingerprint) == ("linear-tiny.noise", load_encoder(entry).fingerprint)
    # It decides about images of the encoder that made it, and about no others.
    ann = [people / "p00" / f"{shot}.png" for shot in (0, 1)]
    assert verify(load_encoder(entry), *ann, calibration=found).threshold == expected.threshold
    assert run(tmp_path / "e.parquet", "--label-from-folder", *common).exit_code == 0
    assert Calibration.load(out).threshold == pytest.approx(found.threshold, abs=1e-6)


def test_a_list_of_pairs_gives_what_their_embeddings_give(people, entry, tmp_path, run):
    pytest.importorskip("scipy", reason="pip install '.[analysis]'")
    _, expected = by_embeddings(people, entry, tmp_path, 0.05)
    common = [
        "--encoder",
        entry,
        "--target-fmr",
        0.05,
        "--replicates",
        20,
        "-o",
        tmp_path / "c.json",
        "--json",
    ]
    for spell in (
        lambda name: f"people/{name}",  # relative to the CSV, not to the working folder
        lambda name: str(people / name),
        lambda name: f"people/{name}" if name.endswith("1.png") else f"./people/../people/{name}",
    ):
        done = run(write_pairs(tmp_path / "pairs.csv", spell), *common)
        assert done.exit_code == 0, done.output
        told = json.loads(done.stdout)
        for figure in (
            "threshold",
            "fmr",
            "fnmr",
            "auc",
            "identities",
            "genuine",
            "impostors",
            "fingerprint",
        ):
            assert told[figure] == getattr(expected, figure), figure
        assert told["left_out"] == []


def test_every_image_is_embedded_once(people, entry, tmp_path, monkeypatch):
    read = []
    original = embedding.embed_images

    def watched(encoder, images, progress=None):
        read.extend(
            os.path.basename(os.path.dirname(one.name)) + "/" + os.path.basename(one.name) for one in images
        )
        return original(encoder, images, progress)

    monkeypatch.setattr(embedding, "embed_images", watched)
    spellings = {}

    def spell(name):  # another one each time
        spellings[name] = spellings.get(name, 0) + 1
        return "./" * (spellings[name] % 3) + f"people/{name}"

    calibrate_images(write_pairs(tmp_path / "p.csv", spell), 0.05, encoder=entry, replicates=10)
    assert sorted(read) == names()


def test_what_cannot_be_embedded_is_left_out_and_named(people, entry, tmp_path, run):
    pytest.importorskip("scipy", reason="pip install '.[analysis]'")
    _, whole = by_embeddings(people, entry, tmp_path, 0.06)
    (people / "p03" / "1.png").write_bytes(b"no image")
    for image in ("p05/0.png", "p05/1.png", "p05/2.png"):
        (people / image).write_bytes(b"")
    embed(people, tmp_path / "rest.parquet", encoder=entry, root=people)
    rows = Embeddings.load(tmp_path / "rest.parquet")
    assert len(rows) == 38
    expected = calibrate_pairs(rows, sample_pairs([name[:3] for name in rows.ids]), 0.06, replicates=20)
    assert expected.threshold != whole.threshold
    for source in (people, write_pairs(tmp_path / "p.csv", lambda name: f"people/{name}")):
        done = run(
            source,
            "--encoder",
            entry,
            "--target-fmr",
            0.06,
            "--replicates",
            20,
            "-o",
            tmp_path / "c",
            "--json",
        )
        assert done.exit_code == 0, (done.output, done.exception)
        told = json.loads(done.stdout)
        assert (told["threshold"], told["identities"], told["fmr"]) == (expected.threshold, 13, expected.fmr)
        assert "warning: 4 images of " in done.stderr and len(told["left_out"]) == 4
        assert "p03/1.png: not an image" in told["left_out"][0] and "p05/2.png: " in told["left_out"][3]


def test_refused_before_a_image_is_opened(people, entry, tmp_path, monkeypatch, run):
    monkeypatch.setattr(embedding, "embed_images", None)
    monkeypatch.setattr(embedding, "load_encoder", None)
    pairs = tmp_path / "p.csv"
    (tmp_path / "empty").mkdir()
    (tmp_path / "one").mkdir()
    os.link(people / "p00" / "0.png", tmp_path / "one" / "0.png")
    (tmp_path / "two" / "x").mkdir(parents=True)
    os.link(people / "p00" / "0.png", tmp_path / "two" / "x" / "0.png")
    cases = [
        (people, {}, ConfigError, "819 impostor pairs cannot support .* at least 30000 are needed"),
        (people, {"target_fmr": 0}, ConfigError, "target_fmr: expected a rate"),
        (tmp_path / "empty", {}, SourceError, "no images in .*empty"),
        (tmp_path / "one", {}, ConfigError, "one: '0.png' is not in a folder"),
        (tmp_path / "two", {}, ConfigError, "two: expected at least 2 identities"),
        (tmp_path / "none.csv", {}, ConfigError, "cannot be read as a CSV file"),
    ]
    for source, options, kind, words in cases:
        with pytest.raises(kind, match=words) as caught:
            calibrate_images(source, **options)
        assert "\n" not in str(caught.value)
    for text, words in (
        ("people/p00/0.png,people/p00/1.png,1", "found 1 of one and 0 of two"),
        ("people/p00/0.png,people/p01/1.png,0", "found 0 of one and 1 of two"),
        (
            "people/p00/0.png,people/p00/9.png,1\nx.png,y.png,0",
            "'people/p00/9.png', and no such .* 2 more are missing",
        ),
        ("people/p00/0.png,./people/p00/0.png,1\npeople/p00/0.png,people/p01/0.png,0", "paired with itself"),
        ("people/p00/0.png,people/p00/1.png,perhaps", "line 2: same: expected 1 or 0"),
    ):
        pairs.write_text(f"a,b,same\n{text}\n")
        with pytest.raises(ConfigError, match=words):
            calibrate_images(pairs)
        assert isinstance(run(pairs, "-o", tmp_path / "c.json").exception, ConfigError)
    assert not (tmp_path / "c.json").exists()


def test_a_image_is_one_however_it_is_spelled(people, tmp_path):
    first, other = people / "p00" / "0.png", people / "p01" / "0.png"
    (tmp_path / "link.png").symlink_to(first)
    (tmp_path / "folder").symlink_to(people)
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        archive.add(first, "x.png")
    spellings = ["people/p00/0.png", str(first), "link.png", "folder/p00/0.png", "file:people/p00/0%2epng"]
    (tmp_path / "link.tar").symlink_to(tmp_path / "t.tar")
    inside = ["t.tar::x.png", "link.tar::x.png"]
    for one in (spellings, inside):
        for a, b in itertools.permutations(one, 2):
            (tmp_path / "p.csv").write_text(f"a,b,same\n{a},{b},1\n{a},{other},0\n")
            with pytest.raises(ConfigError, match="paired with itself; leave this line out"):
                image_pairs(tmp_path / "p.csv")
    lines = [f"{name},people/p00/1.png,1" for name in spellings]
    (tmp_path / "p.csv").write_text("\n".join(["a,b,same", *lines, f"link.png,{other},0"]))
    images, pairs = image_pairs(tmp_path / "p.csv")
    assert len(images) == 3 and pairs.a.tolist() == [pairs.a[0]] * 6
    assert [one.read() for one in images] == [
        path.read_bytes() for path in (first, people / "p00" / "1.png", other)
    ]


def test_too_few_pairs_are_left(people, entry, tmp_path):
    """What is to be fixed is the images, not how many there are."""
    for name in names()[4:]:
        (people / name).write_bytes(b"no image")
    with pytest.raises(ConfigError) as caught:
        calibrate_images(people, 0.05, encoder=entry)
    told = str(caught.value)
    assert told.startswith("3 impostor pairs cannot support a false-match rate of 0.05") and "\n" not in told
    assert "(38 of 42 images could not be embedded; the first: " in told and "p01/1.png: not an image" in told


def test_a_seed_below_zero(people, run):
    done = run(people, "--seed", "-1")
    assert done.exit_code == 2 and isinstance(done.exception, SystemExit)


def test_pairs_of_one_kind_that_are_left(people, entry, tmp_path):
    (people / "p00" / "1.png").write_bytes(b"")
    lines = [f"people/p00/0.png,people/{name},0" for name in names()[SHOTS:]] * 20
    (tmp_path / "p.csv").write_text("\n".join(["a,b,same", "people/p00/0.png,people/p00/1.png,1", *lines]))
    with pytest.raises(ConfigError, match="found 0 of one and 780 of two .1 of 41 images .*p00/1.png: "):
        calibrate_images(tmp_path / "p.csv", 0.05, encoder=entry)
    for file in people.rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(SourceError, match="none of the 42 images can be embedded; the first: .*p00/0.png: "):
        calibrate_images(people, 0.05, encoder=entry)


def test_options_that_do_not_go_together(people, entry, tmp_path, run):
    embed(people, stored := tmp_path / "e.parquet", encoder=entry)
    for arguments in (
        (people, "--label", "who"),
        (people, "--pairs", "p.csv"),
        (people, "--group", "who"),
        ("p.csv", "--label-from-folder"),
        (stored, "--label", "who", "--faces"),
        (stored, "--label", "who", "--encoder", entry),
        (stored, "--label", "who", "--label-from-folder"),
        (stored,),
    ):
        assert run(*arguments).exit_code == 2, arguments
    for options in ((), ("--label", "who"), ("--faces",)):
        error = run(tmp_path / "gone", *options).exception
        assert isinstance(error, OutputError) and "gone does not exist" in str(error)


def test_members_of_an_archive_are_images(people, tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        archive.add(people / "p00", "p00")
    (tmp_path / "p.csv").write_text(
        "a,b,same\nt.tar::p00/0.png,t.tar::p00/1.png,1\npeople/p01/0.png,t.tar::p00/1.png,0\n"
    )
    images, pairs = image_pairs(tmp_path / "p.csv")
    assert len(images) == 3 and pairs.same.tolist() == [True, False]
    assert images[0].read() == (people / "p00" / "0.png").read_bytes()


def test_a_folder_is_listed_by_identity(people):
    (people / "p00" / "deep").mkdir()
    os.link(people / "p00" / "0.png", people / "p00" / "deep" / "x.png")
    known = labeled_images(people)
    assert len(known.ids) == 43 and dict(zip(known.ids, known.identities, strict=True))["p01/2.png"] == "p01"
    assert known.identities[known.ids.index("p00/deep/x.png")] == "p00/deep"
    assert known.images[0].name == str(people / "p00" / "0.png")
