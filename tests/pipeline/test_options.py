"""The options of a job: one definition, and the list that the command reads from standard input."""

from __future__ import annotations

import dataclasses
import inspect
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import embedkit
from embedkit.cli.embed import embed as command
from embedkit.embeddings.table import Embeddings
from embedkit.images.sources import PathList
from embedkit.pipeline.options import EmbedOptions

OPTIONS = {field.name: field.default for field in dataclasses.fields(EmbedOptions)}


def test_the_library_and_the_command_have_the_same_options():
    function = {name: found.default for name, found in inspect.signature(embedkit.embed).parameters.items()}
    assert {name: function[name] for name in OPTIONS} == OPTIONS
    assert function.keys() - OPTIONS.keys() == {"source", "output", "progress"}
    options = {name: found.default for name, found in inspect.signature(command).parameters.items()}
    of_command = {name: default for name, default in OPTIONS.items() if name != "parts"}
    assert {name: options[name] for name in of_command} == of_command
    assert options.keys() - of_command.keys() == {
        *("source", "output", "null", "zoo", "token", "as_json", "quiet"),
        *("faces", "min_score", "min_size"),  # which make `parts`
    }
    assert function["output"] == options["output"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_pixels": 0}, "max_pixels: expected at least 1, found 0"),
        ({"on_error": "go"}, "on_error: expected skip or stop, found 'go'"),
        ({"worker": (3, 2)}, "worker: expected I/N with I from 1 to N, found 3/2"),
        ({"worker": (0, 2)}, "found 0/2"),
    ],
)
def test_options_out_of_range(options, message, tmp_path):
    with pytest.raises(embedkit.ConfigError, match=message):
        embedkit.embed(tmp_path, tmp_path / "o.parquet", **options)


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in ("a.png", "two\nlines.png", "b*.png"):
        pixels = np.random.default_rng(len(name)).integers(0, 256, (9, 12, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("null", [False, True])
def test_the_command_reads_a_list_from_standard_input(folder, by_hand, tmp_path_factory, null):
    entry = by_hand.TinyEntry().write(tmp_path_factory.mktemp("zoo") / "linear-tiny.noise")
    names = ["b*.png", "two\nlines.png" if null else "a.png", "missing.png"]
    code = [
        sys.executable,
        "-c",
        "from embedkit.cli import main; main()",
        "embed",
        "-",
        "--encoder",
        str(entry),
    ]
    done = subprocess.run(
        [*code, *["--null"] * null, "-o", "o.parquet"],
        input=("\0" if null else "\n").join(names).encode(),
        capture_output=True,
        cwd=folder,
        timeout=120,
    )
    assert done.returncode == 0 and b"2 embedded, 1 failed" in done.stderr, done.stderr
    assert Embeddings.load(folder / "o.parquet").ids == names[:2]


def test_the_library_takes_paths_and_no_standard_input(folder, tiny, monkeypatch):
    monkeypatch.chdir(folder)
    report = embedkit.embed(PathList(["a.png", "missing.png"]), "o.parquet", encoder=tiny)
    assert (report.images, report.failed) == (1, 1)
    with pytest.raises(embedkit.SourceError, match="'-' does not exist"):
        embedkit.embed("-", "p.parquet", encoder=tiny)
    with pytest.raises(embedkit.SourceError, match="no images in a list of 0 paths"):
        embedkit.embed(PathList(), "p.parquet", encoder=tiny)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected a whole number"),
        ({"threads": "two"}, "threads: expected a whole number"),
        ({"metadata": 3}, "metadata: expected text"),
        ({"decode": None}, "decode: expected text"),
        ("{", "is not JSON"),
    ],
)
def test_a_damaged_record_of_an_unfinished_job_is_refused(folder, tiny, change, message):
    (folder / "zzz.png").write_bytes(b"no image")
    options = {"encoder": tiny, "batch_size": 1}
    with pytest.raises(embedkit.ImageError):
        embedkit.embed(folder, folder / "o.parquet", **options, on_error="stop")
    [record] = folder.glob("o.parquet.partial/_job-*.json")
    found = json.loads(record.read_text())
    assert found["batch_size"] == 1
    record.write_text(change if isinstance(change, str) else json.dumps({**found, **change}))
    with pytest.raises(embedkit.ConfigError, match=f"{message}.*start again with --overwrite"):
        embedkit.embed(folder, folder / "o.parquet", **options)
    assert embedkit.embed(folder, folder / "o.parquet", **options, overwrite=True).images == 3
