"""What a long command says while it runs: a line every 30 seconds in a log file, a bar on a terminal."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from embedkit.cli import progress

#: Lines every 50 ms, and batches that take 100 ms.
SLOW = """
import time, embedkit.cli.progress as p, embedkit.encoder as e
p.INTERVAL = 0.05
real = e.Encoder._flow
def slow(self, *arguments, **options):
    for block in real(self, *arguments, **options):
        time.sleep(0.1)
        yield block
e.Encoder._flow = slow
from embedkit.cli import main; main()
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "images"
    path.mkdir()
    for index in range(10):
        pixels = np.random.default_rng(index).integers(0, 256, (9, 12, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(path / f"{index}.png")
    (path / "3.png").write_bytes(b"no image")
    return path


def words(folder: Path, entry: Path, code: str) -> list[str]:
    command = [sys.executable, "-c", code, "embed", folder, "-o", folder.parent / "o.parquet"]
    return [*map(str, command), "--encoder", str(entry), "--batch-size", "2"]


def test_a_line_again_and_again_off_a_terminal(folder, tiny_entry):
    done = subprocess.run(words(folder, tiny_entry, SLOW), capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "")
    *lines, report = done.stderr.splitlines()
    assert "9 embedded, 1 failed" in report
    states = [line for line in lines if " of 10 images, " in line]
    form = r"embedkit: embedding: (\d+) of 10 images, \d+\.\d images/s, (\d) failed, (\d+ s left|time left unknown)"
    found = [re.fullmatch(form, line) for line in states]
    assert found and all(found), states
    counts = [int(match[1]) for match in found if match]
    assert counts == sorted(counts) and all(count % 2 == 0 and count < 10 for count in counts)
    # each of the four batches before the last is followed by 100 ms, in which a line falls
    assert len(set(counts) - {0}) >= 2
    assert all((match[2] == "1") == (int(match[1]) >= 4) for match in found if match)


def test_a_short_job_says_nothing_in_between(folder, tiny_entry):
    code = "from embedkit.cli import main; main()"
    done = subprocess.run(words(folder, tiny_entry, code), capture_output=True, text=True, timeout=120)
    assert done.stderr.count("\n") == 1 and "9 embedded" in done.stderr


def test_a_terminal_gets_the_bar_and_no_lines(folder, tiny_entry):
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen(words(folder, tiny_entry, SLOW), stderr=follower, env=environment)
    os.close(follower)
    shown = b""
    while True:
        try:
            chunk = os.read(leader, 1 << 16)
        except OSError:  # Linux: the other end is closed
            break
        if not chunk:
            break
        shown += chunk
    os.close(leader)
    assert process.wait(timeout=60) == 0
    assert b"\x1b[" in shown and b"/10" in shown and b"of 10 images, " not in shown


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (89.4, "89 s"), (90, "2 min"), (3599, "1 h 0 min"), (7500, "2 h 5 min")]
)
def test_times(seconds, text):
    assert progress._duration(seconds) == text


def test_what_a_line_says_before_within_and_after(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.Bar("embedding", _interval=3600) as bar:
        now[0] += 40
        assert bar._line() == "embedding: preparing for 40 s (images are listed, the encoder is loaded)"
        bar.start(1000)
        now[0] += 10
        assert bar._line() == "embedding: 0 of 1000 images, 0.0 images/s, 0 failed, time left unknown"
        bar.advance(48, 2)
        now[0] += 10  # 50 images in 20 s: 2.5 images/s, so 950 take 380 s
        assert bar._line() == "embedding: 50 of 1000 images, 2.5 images/s, 2 failed, 6 min left"
        bar.advance(950, 0)
        assert bar._line() == "embedding: all 1000 images are done, the output is completed"
    assert capsys.readouterr().err == ""
    assert progress.INTERVAL == 30
