"""What commands tell a user who is one step away from what they want: the step, and what is not as they think."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from embedkit import cli
from embedkit.analysis.matching.calibrate import check_support
from embedkit.errors import ConfigError


@pytest.fixture
def here(tmp_path, monkeypatch, by_hand) -> Path:
    """Eight images in two folders, and a zoo of one entry, in the working folder."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for index in range(8):
        path = Path("photos") / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).save(path)
    by_hand.TinyEntry().write(tmp_path / "zoo" / "linear-tiny.noise")
    monkeypatch.setenv("EMBEDKIT_ZOO", "zoo")
    monkeypatch.setenv("EMBEDKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def run(here, monkeypatch, capfd):
    """`run("search", ...)` -> exit status, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["embedkit", *map(str, arguments)])
        with warnings.catch_warnings(), pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capfd.readouterr()
        return int(end.value.code or 0), out, " ".join(err.split())

    return call


@pytest.fixture
def embed(run):
    """Embed `photos` into `e.parquet`, with these options -> exit status and stderr."""

    def call(*options: object, output: str = "e.parquet") -> tuple[int, str]:
        status, _, err = run(
            "embed", "photos", "-o", output, "--encoder", "linear-tiny.noise", "--threads", 1, *options
        )
        return status, err

    return call


# --- embed ------------------------------------------------------------------------------------------------


def test_a_pattern_that_leaves_nothing_out(embed):
    assert "left out nothing" not in embed("--exclude", "b")[1]
    status, err = embed("--exclude", "photos/b", "--overwrite")
    assert status == 0 and "--exclude 'photos/b' left out nothing" in err and "starts below the source" in err
    status, err = embed("--exclude", "bb", "--exclude", "a", "--overwrite")
    assert "--exclude 'bb' left out nothing more; check its spelling" in err
    assert "e.parquet: 4 embedded" in err and "left out nothing" not in embed("--overwrite")[1]


def test_rows_of_images_that_are_left_out_later(embed):
    assert "left out now" not in embed()[1]
    status, err = embed("--exclude", "b")
    assert status == 0 and "4 of the kept rows are of images in the sources that are left out now" in err
    assert pq.read_metadata("e.parquet").num_rows == 8
    assert "left out now" not in embed("--exclude", "b", "--prune")[1]
    assert pq.read_metadata("e.parquet").num_rows == 4


def test_a_run_that_does_nothing_has_no_speed(embed):
    assert "images/s" in embed()[1]
    assert re.search(r"e\.parquet: 0 embedded, 8 kept, none failed; dim \d+$", embed()[1])


def test_a_job_that_stopped_early_is_not_finished_and_says_so(embed, run):
    for name in "037":
        next(Path("photos").glob(f"*/{name}.png")).write_bytes(b"no image")
    status, err = embed("--max-failures", 1, "--batch-size", 1)
    assert status == 3 and "the job stopped early, so there may be more" in err
    for source in ("e.parquet", "e.parquet.partial"):
        status, _, err = run("search", "photos/a/2.png", source)
        assert status == 1 and "is not finished" in err and "same `embedkit embed` command" in err
        assert "--worker" not in err and "write embeddings" not in err


# --- search and duplicates ----------------------------------------------------------------------------------


def test_more_neighbors_than_rows(embed, run):
    embed()
    for query, most in (("photos/a/0.png", 7), ("zoo-image.png", 8)):
        Image.new("RGB", (12, 9), "red").save("zoo-image.png")
        status, out, err = run("search", query, "e.parquet", "-k", 500)
        assert status == 0 and len(out.splitlines()) == 1 + most
        assert f"e.parquet has {most} rows to find, fewer than -k 500" in err
        assert "fewer" not in run("search", query, "e.parquet", "-k", most)[2]


def test_arguments_of_search_that_are_swapped(embed, run):
    embed()
    status, _, err = run("search", "e.parquet", "photos/a/0.png")
    assert status == 2 and "embeddings come last: embedkit search photos/a/0.png e.parquet" in err
    status, _, err = run("search", "photos/a/2.png", "photos/a/0.png")
    assert status == 1 and "cannot be read as Parquet" in err


def test_duplicates_of_a_folder_of_images(run):
    status, _, err = run("duplicates", "photos")
    assert status == 1 and "`embedkit embed photos -o photos.parquet`" in err and "--threshold" not in err


def test_duplicates_without_a_threshold_names_one(embed, run):
    embed()
    status, _, err = run("duplicates", "e.parquet")
    assert status == 2 and "0.95" in err
    words = " ".join(run("duplicates", "--help")[1].split())
    assert all(number in words for number in ("0.99 finds", "0.95 also", "0.85 nearly all"))


# --- calibrate ----------------------------------------------------------------------------------------------


def test_the_rate_that_is_suggested_is_accepted(run):
    """Five people with nine images each: 45 * 44 / 2 - 5 * 9 * 8 / 2 = 810 impostor pairs, and 30 / 810 = 0.03704."""
    from tests.analysis.test_duplicates import write

    vectors = np.eye(8, dtype=np.float32)[np.arange(45) % 5] + 0.01
    write(Path("p.parquet"), vectors, ids=[f"p/{row % 5}/{row}.png" for row in range(45)])
    command = ("calibrate", "p.parquet", "--label-from-folder", "-o", "c.json", "--target-fmr")
    status, _, err = run(*command, 1e-9)
    assert status == 1 and "choose 0.038 or more" in err
    assert "the rule of thirty" not in run(*command, 0.038)[2]
    assert "the rule of thirty" in run(*command, 0.037)[2]
    for impostors in (31, 99, 100, 3000, 6946, 7000, 30_000, 123_457):
        with pytest.raises(ConfigError) as refused:
            check_support(impostors, 1e-9)
        check_support(impostors, float(re.search(r"choose (\S+) or more", str(refused.value))[1]))


# --- zoo ------------------------------------------------------------------------------------------------------


def test_an_entry_of_a_folder_is_neither_copied_nor_evicted(run):
    status, out, err = run("zoo", "pull", "linear-tiny.noise")
    assert (
        status == 0 and "linear-tiny.noise: in a zoo on this machine" in err and "nothing was copied" in err
    )
    assert not Path("cache").exists() or not list(Path("cache").rglob("*.onnx"))
    status, _, err = run("zoo", "evict", "linear-tiny.noise")
    assert status == 1 and "is in the zoo" in err and "which evict leaves as it is" in err
    status, _, err = run("zoo", "evict", "linear-none.noise")
    assert status == 1 and "is not in the cache" in err and "leaves" not in err


# --- pipes ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="POSIX pipes")
@pytest.mark.parametrize(("options", "status"), [([], 0), (["--fail-over", "0"], 3)])
def test_a_reader_that_stops_early_changes_no_status(here, options, status):
    """More than a pipe holds (64 KiB) is printed, and its reader is gone before the first byte."""
    from tests.analysis.test_duplicates import write

    write(here / "d.parquet", np.ones((3000, 8), np.float32))
    read, end = os.pipe()
    os.close(read)
    command = [sys.executable, "-c", "from embedkit.cli import main; main()"]
    done = subprocess.run(
        [*command, "duplicates", "d.parquet", "--threshold", "1", *options],
        stdout=end, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(end)
    assert done.returncode == status and "Error" not in done.stderr, done.stderr
    assert "2999 of 3000 rows can be deleted" in done.stderr
