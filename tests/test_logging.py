"""What embedkit logs: nothing by default, INFO for what ran, WARNING for what a user should look at."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import embedkit


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "images"
    path.mkdir()
    for index in range(6):
        pixels = np.random.default_rng(index).integers(0, 256, (9, 12, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(path / f"{index}.png")
    (path / "9.png").write_bytes(b"no image")
    (path / "notes.txt").write_text("mine")
    return path


def lines(caplog, level: int) -> list[tuple[str, str]]:
    return [(record.name, record.getMessage()) for record in caplog.records if record.levelno == level]


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_importing_prints_nothing_and_leaves_logging_alone():
    done = python("""
import logging, embedkit
for name in embedkit.__all__: getattr(embedkit, name)
assert logging.getLogger().handlers == [] and logging.getLogger().level == logging.WARNING
(handler,) = logging.getLogger("embedkit").handlers
assert type(handler) is logging.NullHandler and logging.getLogger("embedkit").level == logging.NOTSET
""")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


JOB = """
import sys, logging, embedkit
if sys.argv[1] == "yes": logging.basicConfig(level="INFO", format="%(levelname)s %(name)s")
embedkit.embed(sys.argv[2], sys.argv[3], encoder=sys.argv[4])
"""


def test_a_job_is_silent_until_the_application_configures_logging(folder, tiny_entry, tmp_path):
    done = python(JOB, "no", folder, tmp_path / "a.parquet", tiny_entry)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = python(JOB, "yes", folder, tmp_path / "b.parquet", tiny_entry)
    assert done.stderr.splitlines() == [
        "INFO embedkit.encoder",
        "INFO embedkit.pipeline.job",
        "WARNING embedkit.pipeline.job",
        "INFO embedkit.pipeline.job",
    ]


def test_what_ran(folder, tiny_entry, tmp_path, caplog):
    caplog.set_level(logging.INFO, "embedkit")
    encoder = embedkit.load_encoder(tiny_entry, threads=1)
    loaded = f"loaded {encoder.name}@{encoder.revision[:12]} from {tiny_entry}, on CPUExecutionProvider"
    assert lines(caplog, logging.INFO) == [("embedkit.encoder", loaded)]
    caplog.clear()

    output = tmp_path / "o.parquet"
    with pytest.raises(embedkit.ImageError):
        embedkit.embed(folder, output, encoder=encoder, batch_size=2, on_error="stop")
    caplog.clear()
    report = embedkit.embed(folder, output, encoder=encoder, batch_size=2)
    job = "embedkit.pipeline.job"
    assert lines(caplog, logging.INFO) == [
        (job, f"continuing the unfinished job of {output}: 6 images were done"),
        (job, f"embedding 1 of 7 images into {output}"),
        (job, str(report)),
    ]
    assert f"0 embedded, 6 kept, 1 failed ({tmp_path}/o.errors.parquet); dim 4" in str(report)
    assert lines(caplog, logging.WARNING) == [
        (job, "skipped 1 file without an image's suffix (.txt); name a file to include it")
    ]


def test_a_gpu_that_is_not_used_is_a_warning(tiny_entry, caplog, monkeypatch):
    from embedkit.model.engines.onnx import OnnxEngine

    note = "CUDA cannot run here, so the CPU runs instead"
    monkeypatch.setattr(OnnxEngine, "note", note)
    embedkit.load_encoder(tiny_entry)
    assert lines(caplog, logging.WARNING) == [("embedkit.encoder", note)]


def test_the_command_says_each_thing_once(folder, tiny_entry, tmp_path):
    code = "from embedkit.cli import main; main()"
    done = python(code, "embed", folder, "-o", tmp_path / "o.parquet", "--encoder", tiny_entry)
    note, report = done.stderr.splitlines()
    assert note == "embedkit: skipped 1 file without an image's suffix (.txt); name a file to include it"
    assert report.startswith(f"embedkit: warning: {tmp_path}/o.parquet: 6 embedded, 1 failed (")


def test_the_command_shows_the_library_s_warnings_once(tiny_entry):
    code = """
import logging
from embedkit.cli.output import show_warnings
show_warnings(); show_warnings()
log = logging.getLogger("embedkit.hub.cached")
log.warning("a zoo is %s", "down"); log.info("no"); logging.getLogger("embedkit.pipeline.job").warning("no")
"""
    done = python(code)
    assert (done.stdout, done.stderr) == ("", "embedkit: warning: a zoo is down\n")
