"""What is left when a writer is killed at any moment: nothing that the same call does not clear, and no half output.

Folders of copies, contact sheets, atlases and calibrations. `EMBEDKIT_TEST_KILLS` raises the number of kills.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")

COUNT = 24
#: Writes one output again and again; `old` leaves what is there, so that it is replaced.
WRITER = """
import sys
from pathlib import Path
import numpy as np
from embedkit import Clustering, Embeddings, Metadata, calibrate
from embedkit.images.originals import Originals
from embedkit.workflows import cluster_folders, write_atlas, write_contact_sheet
from embedkit.workflows.visual.contact_sheet import Section, Tile

ids = [f"p/{n:02d}.png" for n in range(COUNT)]
rng = np.random.default_rng(0)
labels, zeros = np.arange(COUNT) % 3, np.zeros(COUNT, np.int32)
metadata = Metadata(entry="linear-tiny.noise", manifest_sha256="a" * 64, fingerprint="b" * 64, dim=8, normalized=True)
vectors = (np.eye(8)[labels] + rng.normal(0, 0.1, (COUNT, 8))).astype(np.float32)
rows = Embeddings(ids, zeros, vectors, metadata)
groups = Clustering(ids, zeros, labels, np.ones(COUNT), np.bincount(labels), [[], [], []], "kmeans")
sections = [Section("all", [Tile(name=name) for name in ids])]

def copies():
    cluster_folders(groups, "out")

def html():
    write_contact_sheet("out.html", "t", sections, Originals())

def png():
    write_contact_sheet("out.png", "t", sections, Originals())

def atlas():
    write_atlas(rows, "out.html", method="pca")

calibrated = calibrate(rng.normal(size=4000), np.arange(4000) % 2 == 0, target_fmr=0.1, replicates=10)

def calibration():
    calibrated.save("out.json")
"""


def code(what: str, forever: bool) -> str:
    writer = WRITER.replace("COUNT", str(COUNT))
    if not forever:
        return f"{writer}\n{what}()\n"
    again = "shutil.rmtree('out', ignore_errors=True)" if what == "copies" else "None"
    return f"{writer}\nimport shutil\nprint('ready', flush=True)\nwhile True:\n    {what}()\n    {again}\n"


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def album(tmp_path) -> Path:
    folder = tmp_path / "album"
    (folder / "p").mkdir(parents=True)
    for number in range(COUNT):
        Image.effect_noise((64, 64), 50 + number).save(folder / f"p/{number:02d}.png")
    return folder


@pytest.mark.parametrize("what", ["copies", "html", "png", "atlas", "calibration"])
def test_killed_at_any_moment(album, what):
    whole = album.parent / "whole"
    shutil.copytree(album, whole)
    subprocess.run([sys.executable, "-c", code(what, False)], cwd=whole, check=True)
    wanted = snapshot(whole)
    outputs = {name for name in wanted if name.startswith("out")}
    rng = random.Random(what)
    for _ in range(int(os.environ.get("EMBEDKIT_TEST_KILLS", "1"))):
        with subprocess.Popen(
            [sys.executable, "-c", code(what, True)], cwd=album, stdout=subprocess.PIPE, text=True
        ) as child:
            assert child.stdout is not None and child.stdout.readline() == "ready\n"
            time.sleep(rng.random() * 0.2)
            child.send_signal(signal.SIGKILL)
        # What bears the output's name is whole, at every moment.
        found = {name: data for name, data in snapshot(album).items() if name.split(os.sep)[0] in outputs}
        assert all(data == wanted[name] for name, data in found.items())
        # The same call works, and leaves what an undisturbed one leaves.
        if what == "copies":
            shutil.rmtree(album / "out", ignore_errors=True)
        subprocess.run([sys.executable, "-c", code(what, False)], cwd=album, check=True)
        assert snapshot(album) == wanted
        assert not [name for name in os.listdir(album) if name.startswith(".")]
