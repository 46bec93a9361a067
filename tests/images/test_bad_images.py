"""Images that cannot be read: each gives one typed error of one sentence, quickly and in bounded memory."""

from __future__ import annotations

import io
import os
import resource
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from embedkit.errors import ConfigError, EmbedkitError, ImageError
from embedkit.images.transform import read_pixels
from embedkit.model.preprocess import Preprocess

CONTRACT = Preprocess(size=(32, 32), resize_size=36, mean=(0.0,) * 3, std=(1.0,) * 3)


def saved(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def reason(image, kind: type[EmbedkitError] = ImageError) -> str:
    """The message of the one error that reading this gives, which has to be one sentence."""
    with pytest.raises(kind) as caught:
        read_pixels(image, CONTRACT)
    text = str(caught.value)
    assert text and "\n" not in text and len(text) < 300 and "Traceback" not in text
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    return text


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_bomb(side: int) -> bytes:
    """A black PNG of side x side RGB pixels: the deflated bytes of one strip of rows, over and over."""
    packer, strip = zlib.compressobj(9, wbits=-15), 100 * (1 + 3 * side)
    block = packer.compress(bytes(strip)) + packer.flush(zlib.Z_FULL_FLUSH)
    adler = (side // 100 * strip % 65521) << 16 | 1  # of that many zeros
    data = b"\x78\xda" + block * (side // 100) + b"\x03\0" + struct.pack(">I", adler)
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", head) + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    "data",
    [
        b"this is not an image, but a note of a few words that somebody kept",
        b"\0",
        b"\xff\xd8",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        b"RIFF\0\0\0\0WEBP",
        b"BM",
        b"II*\0",
        b"%PDF-1.7\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"PK\x03\x04" + bytes(200),
        b"\0\0\0\x20ftypavif" + bytes(24),
        bytes(10_000),
    ],
)
def test_what_is_no_image(data):
    assert reason(data)


def test_an_empty_file(tmp_path):
    (tmp_path / "empty.jpg").write_bytes(b"")
    assert reason(b"") == "the file is empty"
    assert reason(tmp_path / "empty.jpg") == "the file is empty"


def test_not_a_image_says_what_is_read():
    assert "JPEG, PNG, WebP" in reason(b"some text")


def truncated_everywhere(data: bytes, must_fail_below: float) -> None:
    """Cut at many places: an error, or where nearly all is there, an image, but never anything else."""
    for percent in range(0, 100, 4):
        cut = data[: len(data) * percent // 100]
        try:
            read_pixels(cut, CONTRACT)
        except ImageError as error:
            assert "\n" not in str(error)
        else:
            assert percent >= must_fail_below


@pytest.mark.parametrize(
    ("format", "options", "must_fail_below"),
    [
        ("JPEG", {}, 100),
        ("JPEG", {"progressive": True}, 100),
        ("PNG", {}, 99),
        ("WEBP", {}, 100),
        ("WEBP", {"lossless": True}, 100),
        ("GIF", {}, 99),
        ("TIFF", {}, 99),
        ("TIFF", {"compression": "tiff_lzw"}, 99),
        ("BMP", {}, 99),
        ("PPM", {}, 100),
        ("AVIF", {}, 100),
    ],
)
# Pillow says so when a TIFF's directory, at the end of the file, is gone.
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_truncated_images(photograph, format, options, must_fail_below):
    truncated_everywhere(saved(photograph(1, 90, 70), format, **options), must_fail_below)


def test_a_truncated_photograph_at_a_reduced_scale(jpeg_maker):
    data = jpeg_maker(2, 800, 600)
    assert "truncated" in reason(data[: len(data) // 2])


@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # of Pillow, about damaged headers
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_flipped_bytes_give_a_image_or_an_image_error(photograph, format):
    data = saved(photograph(5, 40, 30), format)
    rng = np.random.default_rng(7)
    for _ in range(60):
        hurt = bytearray(data)
        for at in rng.integers(0, min(len(hurt), 400), rng.integers(1, 6)):
            hurt[at] = rng.integers(0, 256)
        try:
            pixels = read_pixels(bytes(hurt), CONTRACT)
        except ImageError as error:
            assert "\n" not in str(error)
        else:
            assert pixels.shape == (3, 32, 32)


def test_a_png_bomb_is_refused_before_it_is_unpacked():
    bomb = png_bomb(20_000)
    assert len(bomb) < 2_000_000
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    text = reason(bomb)
    assert "20000x20000 pixels are more than 179 megapixels: refused as a decompression bomb" in text
    assert "--max-pixels 400000000" in text
    assert time.perf_counter() - began < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB, of 1.2 GB


def test_the_bomb_is_a_good_image_where_it_is_small():
    assert not read_pixels(png_bomb(200), CONTRACT).any()


def test_headers_that_promise_too_much_are_refused():
    head = struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", head) + png_chunk(b"IDAT", zlib.compress(b""))
    assert "decompression bomb" in reason(png + png_chunk(b"IEND", b""))
    gif = bytearray(saved(Image.new("P", (4, 4)), "GIF"))
    gif[6:10] = struct.pack("<HH", 65535, 65535)
    assert "decompression bomb" in reason(bytes(gif))
    bmp = bytearray(saved(Image.new("RGB", (4, 4)), "BMP"))
    bmp[18:26] = struct.pack("<ii", 2**30, 2**30)
    assert reason(bytes(bmp))


def test_postscript_under_a_jpegs_name_is_not_run(tmp_path):
    """Pillow would start Ghostscript for it."""
    path = tmp_path / "photo.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n")
    assert reason(path).startswith("not an image")


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)


def test_heic_without_its_plugin_names_the_pip_line():
    """In a process that cannot import the plugin, whether or not it is installed."""
    code = (
        "import sys; sys.modules['pillow_heif'] = None\n"
        "from embedkit.images.transform import read_pixels; from embedkit.model.config import Preprocess\n"
        "c = Preprocess(size=(8, 8), resize_size=8, mean=(0.,) * 3, std=(1.,) * 3)\n"
        f"for data in ({HEIC!r}, {HEIC.replace(b'ftypheic', b'ftypmif1')!r}):\n"
        "    try: read_pixels(data, c)\n"
        "    except Exception as e: print(type(e).__name__, e)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    line = "ImageError a HEIC image: reading it needs `pip install pillow-heif`"
    assert done.stdout.splitlines() == [line, line]


def test_float_samples_have_no_range():
    image = Image.fromarray(np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32))
    assert "32-bit float samples" in reason(saved(image, "TIFF"))
    assert "32-bit float samples" in reason(image)


@pytest.mark.parametrize("dtype", ["float32", "float64", "int32", "uint16", "bool", "int8", "object", "U1"])
def test_arrays_of_another_type(dtype):
    assert f"an array must be uint8 with values 0..255, found {np.dtype(dtype)}" == reason(
        np.zeros((8, 8, 3), dtype)
    )


@pytest.mark.parametrize(
    "shape", [(), (8,), (0, 8, 3), (8, 0), (8, 8, 2), (8, 8, 5), (8, 8, 0), (3, 8, 8), (1, 8, 8, 3), (2,) * 5]
)
def test_arrays_of_another_shape(shape):
    text = reason(np.zeros(shape, np.uint8))
    assert text.endswith(f"found {shape}") and "(H, W, 3)" in text


def test_pillow_images_that_are_closed_or_of_another_kind(tmp_path):
    image = Image.new("RGB", (8, 8))
    image.close()
    assert reason(image)
    (tmp_path / "a.png").write_bytes(saved(Image.new("RGB", (8, 8)), "PNG"))
    with Image.open(tmp_path / "a.png") as image:
        pass
    assert reason(image)
    assert reason(Image.new("RGB", (0, 5)))


def test_an_open_file_is_one_image(tiny, tmp_path, jpeg_maker):
    data = jpeg_maker(1, 60, 50)
    (tmp_path / "a.jpg").write_bytes(data)
    row = tiny.encode(data)
    with open(tmp_path / "a.jpg", "rb") as file:
        assert (tiny.encode(file) == row).all()
    assert (tiny.encode([io.BytesIO(data), io.BytesIO(data)]) == np.concatenate([row, row])).all()
    with open(tmp_path / "a.jpg", encoding="latin-1") as file:
        assert "open it with mode 'rb'" in reason(file, ConfigError)


def test_an_array_of_paths_is_so_many_images(tiny, tmp_path, jpeg_maker):
    (tmp_path / "a.jpg").write_bytes(jpeg_maker(1, 60, 50))
    path, row = str(tmp_path / "a.jpg"), tiny.encode(tmp_path / "a.jpg")
    for paths in (np.array([path, path]), np.array([path, path], object)):
        assert (tiny.encode(paths) == np.concatenate([row, row])).all()
    assert (tiny.encode(np.array(path)) == row).all()


def test_what_is_no_regular_file_is_not_waited_for(tiny, tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    with open(tmp_path / "sparse.jpg", "wb") as file:
        file.truncate(1 << 40)
    for name, words in (
        ("pipe", "not a regular file"),
        ("zero", "not a regular file"),
        ("sparse", "is larger than 1073741824 bytes"),
    ):
        with pytest.raises(OSError, match=words):
            read_pixels(tmp_path / f"{name}.jpg", CONTRACT)
        with pytest.raises(ImageError):
            tiny.encode(tmp_path / f"{name}.jpg")


def test_a_folder_is_no_image(tmp_path):
    with pytest.raises(IsADirectoryError):
        read_pixels(tmp_path, CONTRACT)


def test_encode_names_the_image(tiny, tmp_path, jpeg_maker):
    good = jpeg_maker(0, 40, 30)
    bad = tmp_path / "bad one.jpg"
    bad.write_bytes(good[:400])
    for images, name in (
        (bad, str(bad)),
        ([good, bad, good], str(bad)),
        ([good, b"xx"], "image 1"),
        ((data for data in [good] * 40 + [b""]), "image 40"),
        (tmp_path / "gone.jpg", str(tmp_path / "gone.jpg")),
        (io.BytesIO(b"two\nlines"), "image 0"),
        (np.array([str(bad)]), str(bad)),
        (np.zeros((8, 8), np.float32), "image 0"),
        (np.zeros((3, 4, 4, 7), np.uint8), "image 0"),
    ):
        with pytest.raises(ImageError) as caught:
            tiny.encode(images)
        assert str(caught.value).startswith(f"{name}: ") and "\n" not in str(caught.value)
    for wrong in (5, None, object(), 2.5):
        with pytest.raises(ConfigError, match="expected an image or an iterable of images, found"):
            tiny.encode(wrong)
        with pytest.raises(ConfigError, match="an image must be a path, bytes"):
            tiny.encode([good, wrong])
