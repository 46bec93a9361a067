"""The preprocess contract, held against implementations written here from its definition."""

from __future__ import annotations

import io
import os
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageCms

from embedkit.errors import ConfigError, ImageError
from embedkit.images import transform as reading
from embedkit.images.transform import read_pixels
from embedkit.model.preprocess import Preprocess

TRANSPOSED = {
    # How an image is stored so that this orientation turns it upright: the inverse of what a viewer does.
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


def contract(**changes) -> Preprocess:
    channels = 1 if changes.get("color", "rgb") != "rgb" else 3
    base = {"size": (32, 32), "resize_size": 36, "mean": (0.0,) * channels, "std": (1.0,) * channels}
    return Preprocess(**{**base, **changes})


def identity(height: int, width: int, **changes) -> Preprocess:
    """A contract that changes no pixel of an image of this size."""
    return contract(size=(height, width), resize="squash", resize_size=0, **changes)


def saved(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def noise(height: int, width: int, bands: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, bands), dtype=np.uint8)


def levels(a: np.ndarray, b: np.ndarray) -> int:
    """The largest difference of two images, in levels of 0..255."""
    assert a.shape == b.shape
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def assert_same_image(found: np.ndarray, expected: np.ndarray) -> None:
    """At most one level apart: the box of a part is rounded to float32 once more than the whole image's.

    Where that rounding falls on a tie, Pillow's window takes or leaves its outermost tap (a weight below 2 %),
    so one pixel in some hundred may be a few levels off.
    """
    assert found.shape == expected.shape
    difference = np.abs(found.astype(int) - expected.astype(int))
    assert np.mean(difference > 1) < 0.01
    assert difference.max() <= 6


def rgb(pixels: np.ndarray) -> np.ndarray:
    return pixels.transpose(1, 2, 0)


# --- golden pixels ----------------------------------------------------------------------------------------


def naive(image: Image.Image, preprocess: Preprocess) -> np.ndarray:
    """Resize the whole image with Pillow, then crop or pad: torchvision's Resize and CenterCrop.

    `Resize(s)` of an int brings the shorter side to s and the longer one to int(s * long / short);
    `CenterCrop` cuts at int(round((side - crop) / 2)) and puts what is missing at (crop - side) // 2 first.
    """
    width, height = image.size
    filters = {name.lower(): value for name, value in Image.Resampling.__members__.items()}
    if preprocess.resize == "squash":
        new = (preprocess.size[1], preprocess.size[0])
    elif preprocess.resize == "shortest":
        scaled = int(preprocess.resize_size * max(width, height) / min(width, height))
        new = (preprocess.resize_size, scaled) if width <= height else (scaled, preprocess.resize_size)
    else:
        scaled = max(1, round(preprocess.resize_size * min(width, height) / max(width, height)))
        new = (scaled, preprocess.resize_size) if width <= height else (preprocess.resize_size, scaled)
    image = image.resize(new, filters[preprocess.interpolation])
    array = np.asarray(image).reshape(new[1], new[0], -1)
    for axis, side in enumerate(preprocess.size):
        have = array.shape[axis]
        if have > side:
            start = int(round((have - side) / 2))
            array = array[start : start + side] if axis == 0 else array[:, start : start + side]
        elif have < side:
            before = (side - have) // 2
            margins = [(0, 0)] * 3
            margins[axis] = (before, side - have - before)
            array = np.pad(array, margins, constant_values=preprocess.pad)
    return array.transpose(2, 0, 1)


@pytest.mark.parametrize("interpolation", ["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"])
def test_every_filter_equals_resize_then_crop(photograph, interpolation):
    image = photograph(1, 151, 97)
    wanted = contract(interpolation=interpolation)
    assert_same_image(read_pixels(image, wanted), naive(image, wanted))


@pytest.mark.parametrize("size", [(151, 97), (97, 151), (36, 36), (37, 36), (33, 300), (20, 25), (500, 375)])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"resize_size": 32},
        {"resize_size": 33},
        {"resize_size": 20, "pad": 77},
        {"resize": "longest", "resize_size": 32},
        {"resize": "longest", "resize_size": 31, "pad": 255},
        {"resize": "longest", "resize_size": 40, "pad": 9},
        {"resize": "squash"},
        {"size": (24, 40), "resize_size": 40},
        {"size": (40, 24), "resize": "squash"},
        {"size": (17, 23), "resize": "longest", "resize_size": 20, "pad": 128},
    ],
)
def test_resize_crop_and_pad_equal_the_definition(photograph, size, changes):
    image = photograph(2, *size)
    wanted = contract(**changes)
    assert_same_image(read_pixels(image, wanted), naive(image, wanted))


def test_nothing_is_resampled_when_nothing_has_to_be():
    array = noise(32, 32)
    assert levels(rgb(read_pixels(array, contract(resize_size=32))), array) == 0


def test_gray_is_601_luma():
    array = noise(16, 16)
    found = read_pixels(array, identity(16, 16, color="gray"))
    expected = array @ np.array([0.299, 0.587, 0.114])
    assert np.abs(found[0] - expected).max() <= 1
    luma = [(255, 0, 0, 76), (0, 255, 0, 150), (0, 0, 255, 29), (255, 255, 255, 255), (0, 0, 0, 0)]
    for *color, level in luma:
        one = np.full((1, 1, 3), color, np.uint8)
        assert read_pixels(one, identity(1, 1, color="gray"))[0, 0, 0] == level


def test_gray_and_lab_l_are_taken_from_the_resized_colors(photograph):
    image = photograph(3, 151, 97)
    small = naive(image, contract())
    found = read_pixels(image, contract(color="gray"))
    assert_same_image(found, np.asarray(Image.fromarray(rgb(small)).convert("L"))[None])
    found = read_pixels(image, contract(color="lab_l"))
    expected = [[round(lightness(*map(int, color)) * 2.55) for color in row] for row in rgb(small)]
    assert_same_image(found, np.array([expected]))


def lightness(red: int, green: int, blue: int) -> float:
    """CIE L* (0..100) of one sRGB color: IEC 61966-2-1 decoding, Y of BT.709 primaries, CIE 15 L*."""

    def linear(level: int) -> float:
        v = level / 255
        return v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4

    y = 0.2126390 * linear(red) + 0.7151687 * linear(green) + 0.0721923 * linear(blue)
    return 116 * y ** (1 / 3) - 16 if y > 216 / 24389 else y * 24389 / 27


def test_lab_l_equals_a_scalar_loop_and_known_values():
    array = noise(12, 12)
    array[0, :6] = [[0, 0, 0], [255, 255, 255], [119, 119, 119], [5, 5, 5], [255, 0, 0], [0, 0, 255]]
    found = read_pixels(array, identity(12, 12, color="lab_l"))[0]
    for y in range(12):
        for x in range(12):
            assert abs(found[y, x] - lightness(*map(int, array[y, x])) * 2.55) <= 0.51
    assert found[0, 0] == 0 and found[0, 1] == 255
    # sRGB 119 is the gray of L* = 50; red and blue are 53.24 and 32.30 in every table of CIELAB.
    assert list(found[0, [2, 4, 5]]) == [round(v * 2.55) for v in (50.03, 53.24, 32.30)]


@pytest.mark.parametrize("color", ["rgb", "gray", "lab_l"])
def test_pad_has_its_value_in_the_graphs_pixels_whatever_the_image_is(color):
    wanted = contract(color=color, resize="longest", resize_size=16, pad=40)
    cmyk = Image.new("CMYK", (64, 64), (0, 255, 255, 0))
    for image in (Image.new("RGB", (64, 64), "red"), Image.new("L", (64, 64), 200), cmyk):
        pixels = read_pixels(image, wanted)
        assert (pixels[:, :8] == 40).all() and (pixels[:, :, 24:] == 40).all()
        assert (pixels[:, 8:24, 8:24] != 40).any()


def test_a_contract_that_leaves_too_much_is_an_error():
    with pytest.raises(ImageError, match=r"leaves 72x36 pixels where 32x32 are needed"):
        read_pixels(Image.new("RGB", (200, 100)), contract(crop="none"))
    assert read_pixels(Image.new("RGB", (99, 99)), contract(crop="none", resize_size=32)).shape == (3, 32, 32)


# --- what images are made of ----------------------------------------------------------------------------


def exif(orientation: int) -> Image.Exif:
    data = Image.Exif()
    data[0x0112] = orientation
    return data


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("format", "options", "allowed"),
    [
        ("PNG", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("TIFF", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("JPEG", {"quality": 100, "subsampling": 0}, 2),
    ],
)
def test_every_exif_orientation_gives_the_upright_image(format, options, allowed, orientation):
    blocks = np.kron(noise(3, 5), np.ones((8, 8, 1), np.uint8))  # (24, 40, 3)
    stored = Image.fromarray(np.ascontiguousarray(TRANSPOSED[orientation](blocks)))
    data = saved(stored, format, exif=exif(orientation), **options)
    same = identity(24, 40)
    assert levels(rgb(read_pixels(data, same)), blocks) <= allowed
    # An image that is handed over opened but not decoded goes the same way.
    with Image.open(io.BytesIO(data)) as image:
        assert levels(rgb(read_pixels(image, same)), blocks) <= allowed


@pytest.mark.parametrize("where", ["front", "back"])
def test_exif_of_a_png_counts_before_and_behind_its_pixels(where):
    blocks = noise(6, 9)
    data = saved(Image.fromarray(np.ascontiguousarray(TRANSPOSED[6](blocks))), "PNG")
    # TIFF header, one directory of one entry: tag 0x0112, type SHORT, count 1, value 6.
    payload = b"MM\0\x2a\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    chunk = struct.pack(">I", len(payload)) + b"eXIf" + payload
    chunk += struct.pack(">I", zlib.crc32(b"eXIf" + payload))
    at = data.index(b"IDAT" if where == "front" else b"IEND") - 4
    assert levels(rgb(read_pixels(data[:at] + chunk + data[at:], identity(6, 9))), blocks) == 0


# Pillow says this while it opens the file.
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
def test_damaged_exif_does_not_make_a_image_unreadable():
    blocks = noise(8, 8)
    for payload in (
        b"Exif\0\0",
        b"Exif\0\0MM\0\x2a\xff\xff\xff\xff",
        b"Exif\0\0II\x2a\0\x08\0\0\0\xff\xff\x12",
    ):
        data = saved(Image.fromarray(blocks), "JPEG", quality=100, subsampling=0, exif=payload)
        assert levels(rgb(read_pixels(data, identity(8, 8))), blocks) <= 3
    data = saved(Image.fromarray(blocks), "PNG", exif=exif(99))
    assert levels(rgb(read_pixels(data, identity(8, 8))), blocks) == 0


def over_white(color: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    a = alpha[..., None] / 255
    return np.round(color * a + 255 * (1 - a))


def test_alpha_is_composited_on_white():
    color, alpha = noise(16, 16), noise(16, 16, 1, seed=5)[:, :, 0]
    expected = over_white(color, alpha)
    rgba = Image.fromarray(np.dstack([color, alpha]))
    same = identity(16, 16)
    for image in (rgba, np.dstack([color, alpha]), saved(rgba, "PNG"), saved(rgba, "TIFF")):
        assert levels(rgb(read_pixels(image, same)), expected) <= 1
    gray = over_white(color[:, :, :1].repeat(3, 2), alpha)
    la = Image.merge("LA", [Image.fromarray(color[:, :, 0]), Image.fromarray(alpha)])
    assert levels(rgb(read_pixels(saved(la, "PNG"), same)), gray) <= 1


def test_palettes_with_and_without_transparency():
    indices = np.arange(64, dtype=np.uint8).reshape(8, 8) % 4
    colors = np.array([[10, 20, 30], [200, 0, 0], [0, 180, 0], [0, 0, 160]], np.uint8)
    image = Image.fromarray(indices, "L")
    image.putpalette(colors.tobytes())
    same = identity(8, 8)
    assert image.mode == "P"
    assert levels(rgb(read_pixels(saved(image, "PNG"), same)), colors[indices]) == 0
    one = colors[indices].copy()
    one[indices == 2] = 255
    assert levels(rgb(read_pixels(saved(image, "PNG", transparency=2), same)), one) == 0
    assert levels(rgb(read_pixels(saved(image, "GIF", transparency=2), same)), one) == 0
    table = np.array([255, 128, 0, 64], np.uint8)  # a tRNS of one alpha per palette entry
    soft = over_white(colors[indices], table[indices])
    assert levels(rgb(read_pixels(saved(image, "PNG", transparency=table.tobytes()), same)), soft) <= 1
    # tRNS of gray and of RGB name one color that is transparent.
    keyed = Image.fromarray(indices * 60)
    white = np.where(indices == 1, 255, indices * 60)[..., None].repeat(3, 2)
    assert levels(rgb(read_pixels(saved(keyed, "PNG", transparency=60), same)), white) == 0
    keyed = Image.fromarray(colors[indices])
    white = np.where((indices == 3)[..., None], 255, colors[indices])
    assert levels(rgb(read_pixels(saved(keyed, "PNG", transparency=(0, 0, 160)), same)), white) == 0


def test_sixteen_bits_become_eight_rounded():
    wide = np.array([[0, 128, 129, 257], [32896, 65535, 65407, 65406]], np.uint16)
    eight = np.array([[0, 0, 1, 1], [128, 255, 255, 254]])  # v / 257, rounded
    for format in ("PNG", "TIFF"):
        pixels = read_pixels(saved(Image.fromarray(wide), format), identity(2, 4))
        assert levels(pixels, np.stack([eight] * 3)) == 0
    assert levels(read_pixels(Image.fromarray(wide), identity(2, 4))[0], eight) == 0  # mode I;16
    big_endian = saved(Image.fromarray(wide), "PPM")  # a 16-bit PGM
    assert levels(read_pixels(big_endian, identity(2, 4))[0], eight) == 0


def test_one_bit_images():
    bits = np.random.default_rng(0).integers(0, 2, (9, 13)).astype(bool)
    for format in ("PNG", "BMP", "PPM", "TIFF"):
        pixels = read_pixels(saved(Image.fromarray(bits), format), identity(9, 13))
        assert levels(pixels, np.stack([bits * 255] * 3)) == 0


def test_cmyk_images():
    inks = np.kron(noise(2, 3, 4), np.ones((8, 8, 1), np.uint8))
    same = identity(16, 24)
    expected = (255 - inks[:, :, :3].astype(int)) * (255 - inks[:, :, 3:].astype(int)) / 255
    image = Image.fromarray(inks, "CMYK")
    assert levels(rgb(read_pixels(saved(image, "TIFF"), same)), expected.round()) <= 1
    data = saved(image, "JPEG", quality=100)
    with Image.open(io.BytesIO(data)) as stored:
        assert stored.mode == "CMYK" and stored.info["adobe"] is not None  # stored inverted, as Adobe does
    assert levels(rgb(read_pixels(data, same)), expected.round()) <= 4


def test_an_animation_gives_its_first_frame():
    frames = [Image.fromarray(noise(8, 8, seed=seed)) for seed in range(3)]
    same = identity(8, 8)
    for format, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        data = saved(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert levels(rgb(read_pixels(data, same)), np.asarray(frames[0])) == 0
    colors = [np.full((8, 8, 3), color, np.uint8) for color in ((250, 0, 0), (0, 250, 0))]
    data = saved(Image.fromarray(colors[0]), "GIF", save_all=True, append_images=[Image.fromarray(colors[1])])
    assert levels(rgb(read_pixels(data, same)), colors[0]) <= 8  # a GIF's palette


def test_avif_is_read_under_its_own_and_under_the_containers_brand():
    flat = np.full((16, 16, 3), (200, 100, 50), np.uint8)
    data = saved(Image.fromarray(flat), "AVIF", quality=100)
    assert data[4:12] == b"ftypavif"
    assert levels(rgb(read_pixels(data, identity(16, 16))), flat) <= 4
    container = data[:8] + b"mif1" + data[12:]
    assert b"avif" in container[16:64]
    assert levels(rgb(read_pixels(container, identity(16, 16))), flat) <= 4


@pytest.mark.parametrize("size", [(1, 1), (5000, 2), (2, 5000), (1, 4000), (3, 1)])
def test_tiny_and_extreme_images(size):
    image = Image.new("RGB", size, (9, 99, 199))
    for changes in ({}, {"resize": "longest", "resize_size": 32}, {"resize": "squash"}):
        wanted = contract(pad=7, **changes)
        for source in (image, saved(image, "JPEG", quality=100), saved(image, "PNG")):
            for decode in ("auto", "exact"):
                pixels = read_pixels(source, wanted, decode=decode)
                assert pixels.shape == (3, 32, 32) and pixels.dtype == np.uint8
                drawn = np.abs(pixels.astype(int) - np.array([9, 99, 199])[:, None, None]).max(axis=0) <= 3
                assert drawn[15:17, 15:17].any()


def test_arrays_of_every_shape_and_layout():
    color, gray = noise(10, 12), noise(10, 12, 1)
    same = identity(10, 12)
    assert levels(rgb(read_pixels(color, same)), color) == 0
    assert levels(rgb(read_pixels(gray, same)), gray.repeat(3, 2)) == 0
    assert levels(rgb(read_pixels(gray[:, :, 0], same)), gray.repeat(3, 2)) == 0
    opaque = np.dstack([color, np.full((10, 12), 255, np.uint8)])
    assert levels(rgb(read_pixels(opaque, same)), color) == 0
    backwards = color[::-1, ::-1]
    assert not backwards.flags.c_contiguous
    assert levels(rgb(read_pixels(backwards, same)), backwards) == 0
    fortran = np.asfortranarray(color)
    fortran.flags.writeable = False
    assert levels(rgb(read_pixels(fortran, same)), color) == 0


def test_sources_of_the_same_bytes_give_the_same_pixels(photograph, tmp_path):
    data = saved(photograph(4), "JPEG")
    (tmp_path / "a b.jpg").write_bytes(data)
    wanted = contract()
    first = read_pixels(data, wanted, decode="exact")
    for same in (tmp_path / "a b.jpg", os.fspath(tmp_path / "a b.jpg"), bytearray(data), memoryview(data)):
        assert levels(read_pixels(same, wanted, decode="exact"), first) == 0
    with Image.open(tmp_path / "a b.jpg") as image:
        assert levels(read_pixels(image, wanted), first) == 0
    out = np.full((3, 32, 32), 1, np.uint8)
    assert read_pixels(data, wanted, decode="exact", out=out) is out
    assert levels(out, first) == 0


def test_what_is_no_image_by_its_type():
    for wrong in (5, None, object(), np.uint8(5), [1, 2]):
        with pytest.raises(ConfigError, match="an image must be a path, bytes"):
            read_pixels(wrong, contract())
    with pytest.raises(ConfigError, match="decode: expected one of auto, exact, found 'fast'"):
        read_pixels(noise(4, 4), contract(), decode="fast")
    with pytest.raises(FileNotFoundError):
        read_pixels("/no/such/image.jpg", contract())


# --- color profiles --------------------------------------------------------------------------------------


def rgb_profile(*, red, green, blue, gamma: float = 2.2, description: str = "by hand") -> bytes:
    """An ICC version 2 display profile of these primaries (XYZ, D50-adapted) and one gamma."""

    def xyz(values) -> bytes:
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(v * 65536) for v in values))

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    name = description.encode() + b"\0"
    desc = b"desc\0\0\0\0" + struct.pack(">I", len(name)) + name + b"\0" * 78
    text = b"text\0\0\0\0none\0"
    white = (0.9642, 1.0, 0.8249)
    parts = {
        "desc": desc,
        "cprt": text,
        "wtpt": xyz(white),
        "rXYZ": xyz(red),
        "gXYZ": xyz(green),
        "bXYZ": xyz(blue),
    }
    parts |= {"rTRC": curve, "gTRC": curve, "bTRC": curve}
    table, body = struct.pack(">I", len(parts)), b""
    start = 128 + 4 + 12 * len(parts)
    for tag, data in parts.items():
        data += b"\0" * (-len(data) % 4)
        table += tag.encode() + struct.pack(">II", start + len(body), len(data))
        body += data
    head = struct.pack(">I", start + len(body)) + b"\0\0\0\0\x02\x40\0\0mntrRGB XYZ "
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + b"\0" * 28
    head += struct.pack(">3i", *(round(v * 65536) for v in white))
    return head + b"\0" * (128 - len(head)) + table + body


# sRGB's own primaries adapted to D50 (the colorants of every sRGB profile).
SRGB_PRIMARIES = {
    "red": (0.4361, 0.2225, 0.0139),
    "green": (0.3851, 0.7169, 0.0971),
    "blue": (0.1431, 0.0606, 0.7139),
}
SWAPPED = {"red": SRGB_PRIMARIES["blue"], "green": SRGB_PRIMARIES["red"], "blue": SRGB_PRIMARIES["green"]}


def test_an_embedded_profile_is_converted_to_srgb():
    """A profile whose red is sRGB's blue, and so on, must give an image with its channels moved."""
    blocks = np.kron(noise(3, 4), np.ones((8, 8, 1), np.uint8))
    same = identity(24, 32)
    profile = rgb_profile(**SWAPPED)
    expected = blocks[:, :, [1, 2, 0]]
    # Gamma 2.2 is not quite sRGB's curve: it differs by less than 10 levels, and only in the dark.
    for format, options in (("PNG", {}), ("TIFF", {}), ("JPEG", {"quality": 100, "subsampling": 0})):
        data = saved(Image.fromarray(blocks), format, icc_profile=profile, **options)
        found = rgb(read_pixels(data, same))
        assert levels(found, expected) <= 14
        assert np.abs(found.astype(int) - expected)[expected > 60].max() <= 4


def test_a_wide_gamut_profile_moves_colors_outwards():
    wide = rgb_profile(
        red=(0.6098, 0.3111, 0.0195), green=(0.2053, 0.6257, 0.0609), blue=(0.1492, 0.0632, 0.7446)
    )
    muted = np.full((8, 8, 3), (180, 110, 100), np.uint8)
    data = saved(Image.fromarray(muted), "PNG", icc_profile=wide)
    red, green, blue = rgb(read_pixels(data, identity(8, 8)))[4, 4].astype(int)
    assert red > 190 and green < 112 and blue < 102  # more saturated in sRGB's smaller gamut
    neutral = np.full((8, 8, 3), 128, np.uint8)
    found = read_pixels(saved(Image.fromarray(neutral), "PNG", icc_profile=wide), identity(8, 8))
    assert levels(found, np.full_like(found, 128)) <= 2


def test_srgb_and_damaged_profiles_change_nothing():
    array = noise(8, 8)
    same = identity(8, 8)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    good = rgb_profile(**SWAPPED)
    gray = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for profile in (srgb, b"", b"x", b"\0" * 128, good[:100], good[:-40], b"\xff" * 500, gray):
        data = saved(Image.fromarray(array), "PNG", icc_profile=profile)
        assert levels(rgb(read_pixels(data, same)), array) == 0
    # A profile of another color model than the image's is skipped.
    flat = saved(Image.fromarray(array[:, :, 0]), "PNG", icc_profile=good)
    assert levels(rgb(read_pixels(flat, same)), array[:, :, :1].repeat(3, 2)) == 0


def test_an_exif_rotated_image_keeps_its_profile():
    blocks = np.kron(noise(3, 4), np.ones((8, 8, 1), np.uint8))
    stored = Image.fromarray(np.ascontiguousarray(TRANSPOSED[8](blocks)))
    data = saved(stored, "PNG", exif=exif(8), icc_profile=rgb_profile(**SWAPPED))
    assert levels(rgb(read_pixels(data, identity(24, 32))), blocks[:, :, [1, 2, 0]]) <= 14


# --- decoding at a reduced scale --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(photograph) -> Image.Image:
    """A smooth 4000 x 3000 photograph with noise at the scale of its pixels."""
    image = photograph(11, 1000, 750).resize((4000, 3000), Image.Resampling.BICUBIC)
    array = np.asarray(image).astype(np.int16)
    array += np.random.default_rng(0).integers(-4, 5, (3000, 4000, 1), dtype=np.int16)
    return Image.fromarray(np.clip(array, 0, 255).astype(np.uint8))


def test_reduced_decoding_is_close_to_exact(large):
    data = saved(large, "JPEG", quality=90)
    wanted = contract(size=(224, 224), resize_size=256)
    auto, exact = (read_pixels(data, wanted, decode=decode).astype(float) for decode in ("auto", "exact"))
    difference = np.abs(auto - exact)
    assert 0 < difference.max() <= 12  # it is another computation, and the same image
    assert difference.mean() < 1
    assert abs((auto - exact).mean()) < 0.05  # no level is lost


def test_a_contract_may_forbid_reduced_decoding(large):
    data = saved(large, "JPEG", quality=90)
    wanted = contract(size=(224, 224), resize_size=256, reduced_decoding=False)
    assert levels(read_pixels(data, wanted, decode="auto"), read_pixels(data, wanted, decode="exact")) == 0


def test_small_images_are_not_reduced(jpeg_maker):
    """At least twice the needed pixels remain: 2 x 64 = 128 pixels, which 1/2 leaves of 256 but not of 255."""
    wanted = contract(size=(64, 64), resize_size=64)
    for side, reduced in ((255, False), (256, True)):
        data = jpeg_maker(3, side, side)
        auto, exact = (read_pixels(data, wanted, decode=decode) for decode in ("auto", "exact"))
        assert (levels(auto, exact) > 0) == reduced


def edge_of(profile: np.ndarray) -> float:
    """Where a dark-to-bright row crosses the middle, in pixels from its start, between pixels by a line."""
    row = profile.astype(float)
    at = int(np.argmax(row >= 127.5))
    assert at > 0
    return at - 0.5 + (127.5 - row[at - 1]) / (row[at] - row[at - 1])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(520, 520), (513, 513), (519, 513), (577, 1030), (515, 611)])
def test_an_edge_stays_where_it_is_at_a_reduced_scale(size, orientation):
    """A part-covered last column or row must not squeeze the image, on whichever side it lies after the turn.

    A sharp step at 90 % of the upright image's width and height stands after the resize at 90 % of the new
    side; at 1/8 of 513 pixels, counting 65 columns for 64.1 would move it by 0.4 of 32 output pixels.
    """
    width, height = size
    wanted = contract(size=(32, 32), resize="squash", resize_size=0)
    for axis, side in ((1, width), (0, height)):
        for fraction in (0.1, 0.9):
            step = round(side * fraction)
            index = np.arange(side) >= step
            bright = np.broadcast_to(index[None, :] if axis == 1 else index[:, None], (height, width))
            upright = np.stack([bright * np.uint8(255)] * 3, axis=2)
            stored = Image.fromarray(np.ascontiguousarray(TRANSPOSED[orientation](upright)))
            data = saved(stored, "JPEG", quality=95, subsampling=0, exif=exif(orientation))
            pixels = read_pixels(data, wanted)
            profile = pixels[0].mean(axis=1 - axis)
            assert abs(edge_of(profile) - step * 32 / side) < 0.15


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_orientation_is_honoured_at_a_reduced_scale(large, orientation):
    wanted = contract(size=(224, 224), resize_size=256)
    upright = read_pixels(large, wanted).astype(float)
    stored = Image.fromarray(np.ascontiguousarray(TRANSPOSED[orientation](np.asarray(large))))
    data = saved(stored, "JPEG", quality=90, exif=exif(orientation))
    assert np.abs(read_pixels(data, wanted) - upright).mean() < 2


def test_a_turned_panorama_is_reduced_as_far_as_a_lying_one(jpeg_maker):
    """What is needed is asked of the stored image: its sides are exchanged with the upright one's."""
    wanted = contract(size=(32, 32), resize_size=36)
    for orientation in (1, 6):
        data = jpeg_maker(5, 1200, 300, exif=exif(orientation))
        assert levels(read_pixels(data, wanted), read_pixels(data, wanted, decode="exact")) > 0


# --- threads ----------------------------------------------------------------------------------------------


def test_eight_threads_read_what_one_does(photograph):
    wanted = contract(size=(64, 64), resize_size=72)
    profile = rgb_profile(**SWAPPED)
    images: list = [
        saved(photograph(seed, 300, 200), format, **options)
        for seed in range(4)
        for format, options in (
            ("JPEG", {"icc_profile": profile}),
            ("PNG", {"icc_profile": profile}),
            ("WEBP", {}),
            ("TIFF", {"exif": exif(6)}),
        )
    ]
    shared = np.asarray(photograph(9, 300, 200))
    images += [shared] * 4
    alone = [read_pixels(image, wanted) for image in images]
    barrier = threading.Barrier(8)

    def all_of_them(shift: int) -> list[np.ndarray]:
        barrier.wait()
        order = [(index + shift) % len(images) for index in range(len(images))]
        found = {index: read_pixels(images[index], wanted) for index in order}
        return [found[index] for index in range(len(images))]

    with ThreadPoolExecutor(8) as pool:
        for rows in pool.map(all_of_them, range(8)):
            for found, expected in zip(rows, alone, strict=True):
                np.testing.assert_array_equal(found, expected)


def test_a_whole_image_as_it_is_looked_at(tmp_path):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8))
    image = noise.resize((1200, 800), Image.Resampling.BICUBIC)
    image.save(tmp_path / "a.jpg", quality=95, exif=exif(6))  # to be turned a quarter clockwise
    whole = reading.upright(tmp_path / "a.jpg")
    assert whole.size == (800, 1200) and whole.mode == "RGB" and not whole.getexif()
    turned = np.asarray(image.transpose(Image.Transpose.ROTATE_270)).astype(int)
    assert np.abs(np.asarray(whole).astype(int) - turned).mean() < 3
    small = reading.upright((tmp_path / "a.jpg").read_bytes(), longest=150)
    assert small.size == (100, 150)
    exact = np.asarray(whole.resize((100, 150), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(np.asarray(small).astype(int) - exact).mean() < 2
    assert reading.upright(np.zeros((3, 5), np.uint8), longest=150).size == (5, 3)  # never enlarged
    with pytest.raises(ImageError, match="not an image"):
        reading.upright(b"nothing of the kind")
