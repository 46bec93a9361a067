"""Large images: converted in strips, one budget for the process, and a limit that can be raised."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import threading
import zlib

import numpy as np
import pytest
from PIL import Image

import embedkit
from embedkit.errors import ConfigError, ImageError
from embedkit.images import memory
from embedkit.images import transform as preprocess
from embedkit.images.memory import PixelBudget
from embedkit.images.transform import read_pixels, upright
from embedkit.model.preprocess import Preprocess
from tests.support.image_files import chunk, png, saved, tiff

CONTRACT = Preprocess(size=(32, 32), resize_size=36, mean=(0.0,) * 3, std=(1.0,) * 3)


def test_large_images_wait_for_each_other_and_ordinary_ones_do_not():
    budget, big = PixelBudget(100_000_000), 60_000_000
    log: list[str] = []

    def second() -> None:
        with budget.room() as take:
            take(big)
            log.append("second")

    with budget.room() as take:
        take(big)
        thread = threading.Thread(target=second)
        thread.start()
        with budget.room() as ordinary, budget.room() as fits:
            ordinary(memory.ORDINARY)
            fits(memory.ORDINARY + 1)
            log.append("others")
        thread.join(0.2)
        assert log == ["others"] and thread.is_alive()
    thread.join(10)
    assert log == ["others", "second"]
    with budget.room() as take:
        take(10**9)  # larger than the whole budget: alone


def test_a_failure_gives_its_room_back():
    budget = PixelBudget(50_000_000)
    for _ in range(3):
        with pytest.raises(ValueError), budget.room() as take:
            take(40_000_000)
            raise ValueError


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_does_not_wait_for_threads_that_it_has_not():
    code = (
        "import os, sys; from embedkit.images.memory import BUDGET\n"
        "with BUDGET.room() as take:\n"
        "    take(170_000_000); child = os.fork()\n"
        "    if not child:\n"
        "        with BUDGET.room() as take: take(170_000_000); os._exit(7)\n"
        "    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 7


@pytest.mark.parametrize("color", ["rgb", "gray"])
@pytest.mark.parametrize("kind", ["rgb", "rgba", "la", "gray16", "palette", "tiff16", "turned"])
def test_strips_change_no_pixel(kind, color, monkeypatch):
    rng = np.random.default_rng(0)
    channels = 1 if color == "gray" else 3
    contract = Preprocess(
        size=(32, 32), resize_size=36, mean=(0.0,) * channels, std=(1.0,) * channels, color=color
    )
    colors, wide = rng.integers(0, 256, (90, 70, 4), np.uint8), rng.integers(0, 65536, (90, 70), np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 6
    data = {
        "rgb": saved(Image.fromarray(colors[..., :3]), "PNG"),
        "rgba": saved(Image.fromarray(colors), "PNG"),
        "la": saved(Image.fromarray(colors[..., :2].copy(), "LA"), "PNG"),
        "gray16": png(wide, 0, 16, chunk(b"tRNS", struct.pack(">H", wide[3, 3]))),
        "palette": saved(Image.fromarray(colors[..., :3]).quantize(16), "PNG", transparency=3),
        "tiff16": tiff(wide, 16, 0),
        "turned": saved(Image.fromarray(colors[..., :3]), "JPEG", exif=exif),
    }[kind]
    pixels, whole = read_pixels(data, contract), upright(data)
    small = upright(data, longest=40)
    for module in (memory, preprocess):
        monkeypatch.setattr(module, "ORDINARY", 1000)
    monkeypatch.setattr(preprocess, "STRIP", 500)
    assert (read_pixels(data, contract) == pixels).all()
    assert (np.asarray(upright(data)) == np.asarray(whole)).all()
    assert (np.asarray(upright(data, longest=40)) == np.asarray(small)).all()


def test_the_limit_can_be_raised_and_lowered(monkeypatch):
    data = saved(Image.new("RGB", (80, 50), (9, 99, 199)), "PNG")
    assert read_pixels(data, CONTRACT, max_pixels=4000).shape == (3, 32, 32)
    for call in (
        lambda: read_pixels(data, CONTRACT, max_pixels=3999),
        lambda: upright(data, max_pixels=3999),
    ):
        with pytest.raises(ImageError, match="80x50 pixels are more than 0 megapixels.*--max-pixels 4000"):
            call()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow's own limit counts where none is given
    with pytest.raises(ImageError, match="decompression bomb"):
        read_pixels(data, CONTRACT)
    assert read_pixels(data, CONTRACT, max_pixels=4000).shape == (3, 32, 32)


def test_the_folder_job_takes_the_limit(tiny, tiny_entry, tmp_path, run):
    (tmp_path / "in").mkdir()
    for name, size in (("large.png", (80, 50)), ("small.png", (40, 50))):
        (tmp_path / "in" / name).write_bytes(saved(Image.new("RGB", size), "PNG"))
    report = embedkit.embed(tmp_path / "in", tmp_path / "a.parquet", encoder=tiny, max_pixels=3999)
    assert (report.images, report.failed) == (1, 1)
    report = embedkit.embed(tmp_path / "in", tmp_path / "a.parquet", encoder=tiny)
    assert (report.images, report.kept, report.failed) == (1, 1, 0)
    status, _, printed = run(
        "embed", tmp_path / "in", "-o", tmp_path / "b.parquet", "--encoder", tiny_entry, "--max-pixels", 3999
    )
    assert status == 0 and "1 embedded, 1 failed" in printed
    with pytest.raises(ConfigError, match="max_pixels"):
        embedkit.embed(tmp_path / "in", tmp_path / "c.parquet", encoder=tiny, max_pixels=0)


def gray16(side: int) -> bytes:
    """A black PNG of 16-bit gray: the deflated bytes of 100 rows, over and over."""
    packer, strip = zlib.compressobj(9, wbits=-15), 100 * (1 + 2 * side)
    block = packer.compress(bytes(strip)) + packer.flush(zlib.Z_FULL_FLUSH)
    adler = (side // 100 * strip % 65521) << 16 | 1
    data = b"\x78\xda" + block * (side // 100) + b"\x03\0" + struct.pack(">I", adler)
    head = struct.pack(">IIBBBBB", side, side, 16, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_many_workers_hold_one_large_image_at_a_time():
    """Four threads, 100 megapixels of 16 bits each: 0.2 GB decoded, and 0.8 GB if all four were at once."""
    code = (
        "import sys, resource; from concurrent.futures import ThreadPoolExecutor\n"
        "from embedkit.model.config import Preprocess; from embedkit.images.transform import read_pixels\n"
        f"c = Preprocess(**{dict(size=(32, 32), resize_size=36, mean=(0.0,) * 3, std=(1.0,) * 3)!r})\n"
        "data = sys.stdin.buffer.read()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "with ThreadPoolExecutor(4) as pool: found = list(pool.map(lambda _: read_pixels(data, c).sum(), range(4)))\n"
        "print(found, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], input=gray16(10_000), capture_output=True, check=True)
    sums, grown = done.stdout.decode().rsplit(maxsplit=1)
    assert sums.count("0") == 4
    assert int(grown) < 450_000  # kB
