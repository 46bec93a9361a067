"""Kills at any moment, and several writers at one output: the same command gives what an undisturbed run gives.

`EMBEDKIT_TEST_KILLS` is the number of rounds of the random tests: a few by default, 60 take some minutes.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import embedkit
from embedkit.embeddings.table import Embeddings
from embedkit.pipeline import batches

ROUNDS = int(os.environ.get("EMBEDKIT_TEST_KILLS", "3"))
COUNT = 48
#: Commits after every batch of four.
MAIN = "import embedkit.pipeline.batches as b; b.SHARD_ROWS = 1; from embedkit.cli import main; main()"


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).save(folder / f"{number:02d}.png")
    return folder


def start(*words: object, prefix: tuple[str, ...] = ()) -> subprocess.Popen:
    arguments = [*prefix, sys.executable, "-c", MAIN, "embed", *map(str, words), "--batch-size", "4"]
    return subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> tuple[int, str]:
    text = process.communicate(timeout=120)[1]
    assert "Traceback" not in text, text
    return process.returncode, text


def is_right(output: Path, encoder, count: int) -> None:
    """Every row is its image's, each image has one."""
    found = Embeddings.load(output)
    assert len(set(found.ids)) == len(found) == count
    assert np.abs(found.vectors - encoder.encode(found.ids)).max() < 1e-5


class _Kill(BaseException):
    pass


@pytest.mark.parametrize("renames", range(4))
def test_a_kill_between_the_renames_of_an_array(images, tmp_path, tiny, monkeypatch, renames):
    source, output = tmp_path / "images", tmp_path / "out.npy"
    shutil.copytree(images, source)
    embedkit.embed(source, output, encoder=tiny)
    (source / "02.png").unlink()  # one goes and one comes: as many rows as before
    shutil.copy(images / "05.png", source / "zz.png")
    targets = {"out.npy", "out.ids.jsonl", "out.metadata.json"}
    plain, done = os.replace, []

    def replace(old, new, **options):
        if len(done) == renames and Path(new).name in targets:
            raise _Kill
        plain(old, new, **options)
        done.extend([new] if Path(new).name in targets else [])

    monkeypatch.setattr(os, "replace", replace)
    if renames < 3:
        with pytest.raises(_Kill):
            embedkit.embed(source, output, encoder=tiny, prune=True)
        with pytest.raises(embedkit.OutputError, match="do not belong together.*same `embedkit embed`"):
            Embeddings.load(output)
    else:
        embedkit.embed(source, output, encoder=tiny, prune=True)
    monkeypatch.undo()
    report = embedkit.embed(source, output, encoder=tiny, prune=True)
    assert (report.images, report.kept) == (0, COUNT), "the commit is finished, and no row is computed again"
    is_right(output, tiny, COUNT)
    assert {path.name for path in tmp_path.iterdir()} == {"images", *targets}


def test_random_kills_of_an_array(images, tmp_path, tiny, tiny_entry):
    source, output = tmp_path / "images", tmp_path / "out.npy"
    shutil.copytree(images, source)
    words = (source, "-o", output, "--encoder", tiny_entry, "--prune")
    begin = time.monotonic()
    assert finish(start(*words))[0] == 0
    seconds = time.monotonic() - begin
    rng = random.Random(0)
    for number in range(ROUNDS):
        (source / f"{number % COUNT:02d}.png").unlink(missing_ok=True)
        for new in range(rng.randint(1, 3)):
            name = rng.choice(sorted(images.iterdir()))
            shutil.copy(name, source / f"new{number}-{new}.png")
        work = tmp_path / "out.npy.partial"
        work.mkdir()
        (work / "notes.txt").write_text("of the user")
        process = start(*words)
        time.sleep(seconds * (0.5 + 0.6 * rng.random()))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        status, text = finish(start(*words))
        assert status == 0, text
        is_right(output, tiny, len(list(source.iterdir())))
        assert [path.name for path in work.iterdir()] == ["notes.txt"]
        shutil.rmtree(work)
        expected = {"images", "out.npy", "out.ids.jsonl", "out.metadata.json"}
        assert {path.name for path in tmp_path.iterdir()} == expected


def test_random_kills_of_two_workers(images, tmp_path, tiny, tiny_entry):
    folder = tmp_path / "shards"
    whole = tmp_path / "whole.parquet"
    embedkit.embed(images, whole, encoder=tiny, batch_size=4)
    rows = dict(zip(*[getattr(Embeddings.load(whole), name) for name in ("ids", "vectors")], strict=True))
    rng = random.Random(1)
    seconds = 1.0
    for _ in range(ROUNDS):
        shutil.rmtree(folder, ignore_errors=True)
        words = (images, "-o", f"{folder}/", "--encoder", tiny_entry)
        begin = time.monotonic()
        workers = [start(*words, "--worker", f"{part}/2") for part in (1, 2)]
        time.sleep(seconds * (0.4 + 0.8 * rng.random()))
        before = {path.name for path in folder.glob("part-00002-*")}
        workers[0].send_signal(signal.SIGKILL)
        workers[0].communicate()
        assert finish(workers[1])[0] == 0
        seconds = time.monotonic() - begin
        assert before <= {path.name for path in folder.glob("part-00002-*")}
        assert (folder / "_done-00002-of-00002.json").exists()
        status, text = finish(start(*words, "--worker", "1/2"))
        assert status == 0, text
        found = Embeddings.load(folder)
        assert len(found) == COUNT and set(found.ids) == set(rows)
        for name, vector in zip(found.ids, found.vectors, strict=True):
            assert np.abs(vector - rows[name]).max() < 1e-6
        names = [path.name for path in folder.iterdir()]
        assert all(name.startswith(("part-", "_done-")) for name in names), names


def check_writers(results: list[tuple[int, str]], output: Path, encoder) -> None:
    assert 0 in [status for status, _ in results]
    for status, text in results:
        assert status == 0 or "another process is writing" in text, text
    is_right(output, encoder, COUNT)


@pytest.mark.parametrize("name", ["out.parquet", "out.npy", "out"])
def test_processes_at_one_output(images, tmp_path, tiny, tiny_entry, name):
    (tmp_path / "out").mkdir()
    words = (images, "-o", tmp_path / name, "--encoder", tiny_entry)
    processes = [start(*words) for _ in range(3)]
    check_writers([finish(process) for process in processes], tmp_path / name, tiny)
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("name", ["out.parquet", "out.npy"])
def test_threads_at_one_output(images, tmp_path, tiny, monkeypatch, name):
    monkeypatch.setattr(batches, "SHARD_ROWS", 1)
    results: list[tuple[int, str]] = []

    def embed() -> None:
        try:
            embedkit.embed(images, tmp_path / name, encoder=tiny, batch_size=4)
            results.append((0, ""))
        except embedkit.OutputError as error:
            results.append((1, str(error)))

    threads = [threading.Thread(target=embed) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    check_writers(results, tmp_path / name, tiny)


NAMESPACE = ("unshare", "--pid", "--fork", "--mount-proc")


def has_namespaces() -> bool:
    try:
        return subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not has_namespaces(), reason="unshare is not there, or not allowed")
def test_containers_that_share_a_folder(images, tmp_path, tiny, tiny_entry):
    """Both are process 1 of their own namespace."""
    words = (images, "-o", tmp_path / "out.parquet", "--encoder", tiny_entry)
    processes = [start(*words, prefix=NAMESPACE) for _ in range(2)]
    check_writers([finish(process) for process in processes], tmp_path / "out.parquet", tiny)
    folder = tmp_path / "shards"
    words = (images, "-o", f"{folder}/", "--encoder", tiny_entry)
    processes = [start(*words, "--worker", f"{part}/2", prefix=NAMESPACE) for part in (1, 2)]
    assert [finish(process)[0] for process in processes] == [0, 0]
    is_right(folder, tiny, COUNT)
