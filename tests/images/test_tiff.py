"""TIFFs: samples mean what BitsPerSample, SampleFormat and PhotometricInterpretation say."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from embedkit.errors import ImageError
from embedkit.images.transform import read_pixels
from tests.support.image_files import identity, saved, tiff

RAMP = np.tile(np.linspace(0, 1, 37), (5, 1))  # an odd width: packed rows end inside a byte
EIGHT = (RAMP * 255).round()


def wide(bits: int, kind: str) -> np.ndarray:
    return (RAMP * (2**bits - 1)).round().astype(kind)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (tiff(wide(12, "u2"), 12), EIGHT),
        (tiff(wide(16, "u2"), 16), EIGHT),
        (tiff(wide(16, "u2"), 16, 0), 255 - EIGHT),
        (tiff(wide(8, "u1"), 8, 0), 255 - EIGHT),
        (tiff(wide(32, "u4"), 32), EIGHT),
    ],
)
def test_gray_of_any_depth_is_the_same_ramp(data, expected):
    for image in (data, Image.open(io.BytesIO(data))):
        pixels = read_pixels(image, identity(5, 37))
        assert np.abs(pixels - expected).max() <= 1


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (tiff(wide(16, "i4").astype("i2"), 16, kind=2), "16-bit signed integer samples have no agreed range"),
        (tiff(wide(31, "i8").astype("i4"), 32, kind=2), "32-bit signed integer samples"),
        (tiff(wide(7, "i1"), 8, kind=2), "8-bit signed integer samples"),
        (tiff(RAMP, 64, kind=3), "64-bit float samples"),
        (tiff(RAMP.astype("f4"), 32, kind=3), "32-bit float samples"),
        (tiff(wide(10, "u2"), 10), r"a TIFF with unsupported samples \(gray, 10 bits\)"),
        (tiff(wide(14, "u2"), 14, 0), r"a TIFF with unsupported samples \(gray, 0 is white, 14 bits\)"),
        (tiff(wide(8, "u1"), 8)[:60], "damaged image"),
    ],
)
def test_samples_without_a_range_or_unknown_are_refused_with_the_reason(data, reason):
    with pytest.raises(ImageError, match=reason):
        read_pixels(data, identity(5, 37))


def test_integers_without_a_file_have_no_range():
    with pytest.raises(ImageError, match="mode I"):
        read_pixels(Image.fromarray(np.full((4, 4), 200, np.int32)), identity(4, 4))


def test_orientation_is_of_the_tag_alone():
    array = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    packet = b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="3"/>'
    options = {"tiffinfo": {700: packet}}
    data = saved(Image.fromarray(array), "TIFF", **options)
    assert (read_pixels(data, identity(4, 6)) == array.transpose(2, 0, 1)).all()
