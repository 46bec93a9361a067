"""What is no pixel never costs the pixels, and orientation is EXIF's in every format."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from embedkit.errors import ImageError
from embedkit.images.transform import read_pixels, upright
from tests.support.image_files import chunk, identity, png, profile, saved

COLORS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
SAME = identity(6, 8)
WRONG = chunk(b"tEXt", b"a\0b")[:-4] + bytes(4)


def packed(kind: bytes, head: bytes, size: int) -> bytes:
    return chunk(kind, head + zlib.compress(b"a b " * (size // 4)))


@pytest.mark.parametrize(
    "extra",
    [
        packed(b"zTXt", b"Comment\0\0", 80 << 20),
        packed(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0", 3 << 20),
        packed(b"zTXt", b"Comment\0\0", 900_000) * 80,
        WRONG,
        chunk(b"iCCP", b"p\0\0" + b"no deflated data"),
        chunk(b"gAMA", b"\0"),
    ],
    ids=["80 MB", "XMP", "80 chunks", "checksum", "profile", "short"],
)
@pytest.mark.parametrize("where", ["before", "behind"])
def test_ancillary_chunks_of_a_png_never_cost_the_pixels(extra, where):
    data = png(COLORS, 2, 8, **{where: extra})
    assert (read_pixels(data, SAME) == COLORS.transpose(2, 0, 1)).all()


def test_what_changes_the_look_stays_when_a_comment_goes():
    big = bytearray(profile("linear") + bytes(2_000_000))
    big[:4] = struct.pack(">I", len(big))
    small = png(COLORS, 2, 8, chunk(b"iCCP", b"p\0\0" + zlib.compress(profile("linear"))))
    large = png(COLORS, 2, 8, chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(big))))
    assert (read_pixels(large, SAME) == read_pixels(small, SAME)).all()
    assert (read_pixels(small, SAME) != COLORS.transpose(2, 0, 1)).any()
    clear = chunk(b"tRNS", struct.pack(">3H", *COLORS[2, 3]))
    turned = chunk(b"eXIf", b"MM\0\x2a\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x03\0\0\0\0\0\0")
    expected = COLORS.copy()
    expected[2, 3] = 255
    found = read_pixels(png(COLORS, 2, 8, WRONG + clear + turned), SAME)
    assert (found == expected[::-1, ::-1].transpose(2, 0, 1)).all()


def test_a_wrong_checksum_of_the_pixels_is_damage():
    data = bytearray(png(COLORS, 2, 8))
    data[data.index(b"IHDR") + 20] ^= 1
    with pytest.raises(ImageError, match=r"damaged image \(the header of a PNG\)"):
        read_pixels(bytes(data), SAME)


@pytest.mark.parametrize(("depth", "maximum"), [(1, 1), (2, 3), (4, 15), (8, 255), (16, 65535)])
def test_the_clear_gray_of_a_png_is_white_at_every_depth(depth, maximum):
    levels = np.tile(np.array([0, 1, maximum - 1, maximum] * 2), (6, 1))
    for clear in {0, 1}:
        found = read_pixels(png(levels, 0, depth, chunk(b"tRNS", struct.pack(">H", clear))), SAME)
        expected = np.where(levels == clear, 255, (levels * (255 / maximum)).round())
        assert np.abs(found - expected).max() <= 1


def test_the_clear_color_of_a_png_of_16_bits_is_white():
    wide = COLORS.astype(np.uint16) * 257
    clear = chunk(b"tRNS", struct.pack(">3H", *wide[1, 1]))
    found = read_pixels(png(wide, 2, 16, clear), SAME).transpose(1, 2, 0)
    assert (found[1, 1] == 255).all() and (found[0] == COLORS[0]).all()


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="3"/></x:xmpmeta>'


def with_xmp(data: bytes) -> bytes:
    """A JPEG with an XMP packet."""
    body = b"http://ns.adobe.com/xap/1.0/\0" + XMP
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + data[2:]


def test_an_xmp_packet_turns_no_image():
    image, make = Image.fromarray(COLORS), Image.Exif()
    make[0x010F] = "Make"
    jpeg, with_exif = (
        saved(image, "JPEG", quality=100, subsampling=0, **more) for more in ({}, {"exif": make})
    )
    text = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)
    for data in (
        with_xmp(jpeg), with_xmp(with_exif), saved(image, "WEBP", lossless=True, xmp=XMP), png(COLORS, 2, 8, text)
    ):  # fmt: skip
        assert np.abs(read_pixels(data, SAME) - COLORS.transpose(2, 0, 1).astype(int)).max() <= 3
        assert np.abs(np.asarray(upright(data)).astype(int) - COLORS).max() <= 3


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"restart_marker_blocks": 2}, {"subsampling": 0}]
)
def test_a_jpeg_that_lacks_only_its_end_mark_is_whole(photograph, options):
    data = saved(photograph(3, 90, 70), "JPEG", **options)
    assert data.endswith(b"\xff\xd9")
    contract = identity(70, 90, reduced_decoding=False)
    whole = read_pixels(data, contract, decode="exact")
    for cut in (data[:-1], data[:-2], data[:-2] + bytes(300)):
        assert (read_pixels(cut, contract, decode="exact") == whole).all()
    for missing in (4, 6, 20, len(data) // 3):
        with pytest.raises(ImageError, match="truncated"):
            read_pixels(data[:-missing], contract)


def test_a_progressive_jpeg_without_its_last_scan_is_cut_short(photograph):
    data = saved(photograph(3, 90, 70), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    tables = data.rindex(b"\xff\xc4", 0, last)
    with pytest.raises(ImageError, match="truncated"):
        read_pixels(data[:tables], identity(70, 90))
