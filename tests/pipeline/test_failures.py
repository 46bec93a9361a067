"""A job that may fail only so often: it stops, keeps what it did, and goes on when the images are back."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import embedkit
from embedkit.embeddings.table import Embeddings
from embedkit.pipeline import batches
from embedkit.pipeline.options import EmbedOptions
from embedkit.pipeline.report import Progress


@pytest.fixture
def folder(tmp_path) -> Path:
    """Twelve images, of which `04` to `07` are none."""
    path = tmp_path / "images"
    path.mkdir()
    for index in range(12):
        if 4 <= index < 8:
            (path / f"{index:02d}.png").write_bytes(b"no image")
        else:
            repair(path, index)
    return path


def repair(folder: Path, index: int) -> None:
    pixels = np.random.default_rng(index).integers(0, 256, (9, 12, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(folder / f"{index:02d}.png")


@pytest.fixture(autouse=True)
def a_shard_a_batch(monkeypatch):
    monkeypatch.setattr(batches, "SHARD_ROWS", 1)


@pytest.mark.parametrize(
    ("given", "images", "allowed"),
    [
        (None, 10, None),
        (0, 10, 0),
        ("0", 10, 0),
        (12, 10, 12),
        (" 3 ", 10, 3),
        ("1%", 99, 0),
        ("1%", 100, 1),
        ("0.57%", 10_000, 57),  # 0.57 * 10000 / 100 is 56.99... in floating point
        ("0%", 10**6, 0),
        ("100%", 7, 7),
    ],
)
def test_a_number_or_a_share(given, images, allowed):
    assert EmbedOptions(max_failures=given).failures_allowed(images) == allowed


@pytest.mark.parametrize(
    "given",
    ["nan", "nan%", "inf", "-1", -1, "1.5", 0.01, float("nan"), "101%", "%", "", "1 %", True, "\u0663", [1]],
)
def test_what_is_neither(given):
    with pytest.raises(
        embedkit.ConfigError, match="max_failures: expected a number of images or a share .* found"
    ):
        EmbedOptions(max_failures=given)


@pytest.mark.parametrize("output", ["o.parquet", "o.npy", "shards/"])
def test_a_job_stops_keeps_its_rows_and_goes_on_when_the_images_are_back(folder, tiny, tmp_path, output):
    target = f"{tmp_path}/{output}"
    options = {"encoder": tiny, "batch_size": 2, "max_failures": 1}
    with pytest.raises(embedkit.TooManyFailuresError) as stopped:
        embedkit.embed(folder, target, **options)
    error = stopped.value
    assert (error.failed, error.allowed) == (2, 1)
    first = f"the first: {folder}/04.png: "
    assert str(error).startswith("2 images failed, and 1 may; ") and first in str(error)
    assert [Path(row["id"]).name for row in pq.read_table(error.errors).to_pylist()] == ["04.png", "05.png"]
    assert pickle.loads(pickle.dumps(error)).failed == 2
    with pytest.raises(embedkit.OutputError):  # nothing that looks finished
        Embeddings.load(target)

    with pytest.raises(embedkit.TooManyFailuresError):  # the same as before, and no image is embedded twice
        embedkit.embed(folder, target, **options)
    for index in range(4, 8):
        repair(folder, index)
    report = embedkit.embed(folder, target, **options)
    assert (report.images, report.kept, report.failed, report.errors) == (8, 4, 0, None)
    assert not Path(error.errors).exists()
    found = Embeddings.load(target)
    assert sorted(Path(name).name for name in found.ids) == [f"{index:02d}.png" for index in range(12)]
    assert np.abs(found.vectors - tiny.encode(found.ids)).max() < 1e-6


class Unmount(Progress):
    """Moves the folder of the images away after the first batches, as a mount that vanishes."""

    def __init__(self, folder: Path):
        self.folder, self.seen = folder, 0

    def advance(self, images: int, failed: int) -> None:
        self.seen += images + failed
        if self.folder.exists() and self.seen >= 20:
            self.folder.rename(self.folder.with_name("away"))


def test_a_mount_that_vanishes_ends_the_job_early_and_nothing_is_lost(tiny, tmp_path):
    folder, output = tmp_path / "mount", tmp_path / "o.parquet"
    folder.mkdir()
    for index in range(400):
        repair(folder, index)
    away = Unmount(folder)
    with pytest.raises(embedkit.TooManyFailuresError, match="No such file or directory"):
        embedkit.embed(folder, output, encoder=tiny, batch_size=2, max_failures="1%", progress=away)
    assert 20 <= away.seen < 200, "it went on after more than 1% had failed"
    with pytest.raises(embedkit.SourceError, match="does not exist"):
        embedkit.embed(folder, output, encoder=tiny, max_failures="1%")
    (tmp_path / "away").rename(folder)
    report = embedkit.embed(folder, output, encoder=tiny, max_failures="1%")
    assert report.failed == 0 and report.kept >= 20 and report.kept + report.images == 400
    found = Embeddings.load(output)
    assert len(found) == 400 and np.abs(found.vectors - tiny.encode(found.ids)).max() < 1e-6


def test_more_is_allowed_the_second_time(folder, tiny, tmp_path):
    output = tmp_path / "o.parquet"
    for allowed in (0, "25%"):  # 25% of 12 are 3, and 4 fail
        with pytest.raises(embedkit.TooManyFailuresError):
            embedkit.embed(folder, output, encoder=tiny, batch_size=2, max_failures=allowed)
    report = embedkit.embed(folder, output, encoder=tiny, batch_size=2, max_failures="34%")
    assert (report.kept + report.images, report.failed) == (8, 4)
    assert embedkit.embed(folder, output, encoder=tiny, max_failures=4).failed == 4
    with pytest.raises(embedkit.TooManyFailuresError):  # of a finished output, which stays
        embedkit.embed(folder, output, encoder=tiny, max_failures=3)
    assert len(Embeddings.load(output)) == 8


def test_images_that_cannot_be_listed_count_and_none_allowed_is_none(folder, tiny, tmp_path):
    from embedkit.images.sources import PathList

    good = [str(folder / f"{index:02d}.png") for index in range(4)]
    missing = PathList([*good, str(folder / "gone.png")])
    with pytest.raises(embedkit.TooManyFailuresError, match="1 image failed, and 0 may"):
        embedkit.embed(missing, tmp_path / "o.parquet", encoder=tiny, max_failures=0)
    assert embedkit.embed(missing, tmp_path / "o.parquet", encoder=tiny, max_failures=1).failed == 1
    report = embedkit.embed(PathList(good), tmp_path / "p.parquet", encoder=tiny, max_failures=0)
    assert (report.images, report.failed) == (4, 0)


def test_the_command_exits_with_three(run, folder, tiny_entry, tmp_path):
    words = ["embed", folder, "-o", tmp_path / "o.parquet", "--encoder", tiny_entry]
    status, out, err = run(*words, "--max-failures", "1%")
    assert (status, out) == (3, "") and err.count("\n") == 1
    assert f"4 images failed, and 0 may; {tmp_path}/o.errors.parquet lists the reasons" in err
    status, _, err = run(*words, "--max-failures", "nan")
    assert status == 2 and "--max-failures: expected" in err and err.count("\n") == 1
    assert run(*words, "--max-failures", "4")[0] == 0
