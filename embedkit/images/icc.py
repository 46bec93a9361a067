"""Embedded color profiles: the transform to sRGB, if the profile is not sRGB itself.

A profile counts as sRGB if it renders colors like sRGB. Its name does not count: "sRGB, linear" is not sRGB, and many
sRGB profiles have other names.
"""

from __future__ import annotations

import functools
import io

import numpy as np
from PIL import Image, ImageCms

#: Rounding and the tables of old profiles move sRGB by up to 2 levels of 255; a plain gamma of 2.2 differs by more.
_SAME = 2
_SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}


@functools.lru_cache(maxsize=64)
def srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform from an embedded profile to sRGB; None if none is needed.

    A profile that cannot be read, or that belongs to another color model than the image's, is ignored, as browsers do.

    Args:
        profile: The ICC profile.
        mode: Pillow's mode of the image: `RGB`, `L` or `CMYK`.
    """
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if _SPACES[mode] != source.profile.xcolor_space.strip():
            return None
        if mode != "CMYK" and _renders_as_srgb(source, mode):
            return None
        return ImageCms.buildTransform(source, _srgb(), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


def _renders_as_srgb(profile: ImageCms.ImageCmsProfile, mode: str) -> bool:
    transform = ImageCms.buildTransform(
        profile, _srgb(), mode, "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.HIGHRESPRECALC
    )
    probe = _probe(mode)
    rendered = ImageCms.applyTransform(probe, transform)
    assert rendered is not None
    wanted = np.asarray(probe.convert("RGB")).astype(int)
    return bool(np.abs(np.asarray(rendered).astype(int) - wanted).max() <= _SAME)


@functools.cache
def _probe(mode: str) -> Image.Image:
    """Every gray level, and for RGB a grid of 9 levels a channel too."""
    gray = np.arange(256, dtype=np.uint8)
    if mode == "L":
        return Image.fromarray(gray[None])
    grid = np.stack(np.meshgrid(*[np.linspace(0, 255, 9).round()] * 3), axis=-1).reshape(-1, 3)
    colors = np.concatenate([np.repeat(gray[:, None], 3, axis=1), grid.astype(np.uint8)])
    return Image.fromarray(np.ascontiguousarray(colors[None]))


@functools.cache
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
