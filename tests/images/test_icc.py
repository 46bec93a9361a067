"""Color profiles: what counts is how they render, not what they are called."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageCms

from embedkit.images.icc import srgb_transform
from embedkit.images.transform import read_pixels
from tests.support.image_files import WIDE, identity, profile, saved, srgb_curve


def color(value: tuple[int, ...], icc: bytes, mode: str = "RGB") -> list[int]:
    data = saved(Image.new(mode, (8, 8), value), "PNG", icc_profile=icc)
    return read_pixels(data, identity(8, 8))[:, 4, 4].tolist()


def test_a_linear_profile_called_srgb_is_converted():
    # 55 of 255 in linear light is 0.2157, which sRGB encodes as 1.055 * 0.2157 ** (1 / 2.4) - 0.055 = 0.5016: 128.
    assert color((55, 55, 55), profile("sRGB IEC61966-2.1 linear")) == pytest.approx([128] * 3, abs=1)


def test_a_wide_profile_called_srgb_is_converted():
    # In linear light (0.586, 0.041, 0.041); red is 1.398 * 0.586 - 0.398 * 0.041 = 0.803 in sRGB's smaller gamut, 232.
    found = color((200, 60, 60), profile("sRGB wide", gamma=2.2, primaries=WIDE))
    assert found[:2] == pytest.approx([232, 57], abs=2)


def test_a_gamma_of_2_2_is_not_srgb():
    assert color((10, 10, 10), profile("sRGB", gamma=2.2))[0] < 8


@pytest.mark.parametrize("name", ["sRGB", "c2", "Camera RGB Profile"])
def test_srgb_by_any_name_changes_no_pixel(name):
    array = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for icc in (profile(name, curve=srgb_curve()), own):
        assert srgb_transform(icc, "RGB") is None
        data = saved(Image.fromarray(array), "PNG", icc_profile=icc)
        assert (read_pixels(data, identity(16, 16)) == array.transpose(2, 0, 1)).all()


@pytest.mark.parametrize(("mode", "value"), [("L", 55), ("LA", (55, 255))])
@pytest.mark.parametrize("contract", ["rgb", "gray"])
def test_a_gray_profile_counts_with_alpha_too(mode, value, contract):
    data = saved(Image.new(mode, (8, 8), value), "PNG", icc_profile=profile("g", space="GRAY"))
    pixels = read_pixels(data, identity(8, 8, color=contract))
    assert np.abs(pixels.astype(int) - 128).max() <= 1


def test_a_gray_profile_with_srgbs_curve_is_no_work():
    assert srgb_transform(profile("gray", curve=srgb_curve(), space="GRAY"), "L") is None
    assert srgb_transform(profile("gray", space="GRAY"), "RGB") is None  # of another color model
