"""Synthetic images: to test an entry without a data set, and for its golden vectors."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Mapping

import numpy as np

from embedkit.errors import ConfigError
from embedkit.images.sources import list_sources
from embedkit.images.transform import ImageLike, read_pixels
from embedkit.model.preprocess import Preprocess

#: Largest absolute difference of L2-normalized rows. Rows at cosine c differ by sqrt(2 - 2c) in length, so no
#: single number differs by more: 0.015 is cosine 0.9999 (float16 arithmetic), 0.15 is cosine 0.99 (int8).
TOLERANCES = {"tolerance_fp32": 1e-4, "tolerance_fp16": 0.015, "tolerance_int8": 0.15}


def synthetic_images(count: int, *, seed: int = 0, height: int = 48, width: int = 64) -> np.ndarray:
    """Images with structure at several scales: a color field, striped ellipses, grain.

    Args:
        count: How many, N.
        seed: Equal seeds give equal images; the first of N are the first of more.
        height: H, in pixels.
        width: W, in pixels.

    Returns:
        uint8 (N, H, W, 3).
    """
    images = np.empty((count, height, width, 3), np.uint8)
    y, x = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    for index in range(count):
        rng = np.random.default_rng((seed, index))
        waves = rng.uniform(-9, 9, (2, 3, 1, 1))
        field = np.cos(waves[0] * x + waves[1] * y + rng.uniform(0, 6, (3, 1, 1)))  # (3, H, W)
        image = 128 + rng.uniform(20, 90, (3, 1, 1)) * field
        for _ in range(rng.integers(2, 6)):
            angle, across, along = rng.uniform(0, np.pi), *rng.uniform(0.08, 0.4, 2)
            dx, dy = x - rng.uniform(0.1, 0.9), y - rng.uniform(0.1, 0.9)
            u, v = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
            inside = (u / across) ** 2 + (v / along) ** 2 < 1
            stripes = 1 + 0.5 * np.sin(rng.uniform(0, 120) * u)
            image = np.where(inside, rng.uniform(0, 255, (3, 1, 1)) * stripes, image)
        image += rng.normal(0, 6, image.shape)
        images[index] = np.clip(np.round(image), 0, 255).astype(np.uint8).transpose(1, 2, 0)
    return images


def sample_pixels(
    preprocess: Preprocess, source: str | os.PathLike[str] | None = None, count: int = 64
) -> np.ndarray:
    """Pixels to test an encoder on, taken evenly from a source of images.

    Args:
        preprocess: The contract.
        source: Whatever `embedkit embed` takes (a folder, a Parquet file with an image column, a tar); None
            takes synthetic images.
        count: How many, N.

    Returns:
        uint8 (N, C, H, W).

    Raises:
        SourceError: The source cannot be listed or read.
        ConfigError: It holds fewer than `count` images.
        ImageError: One of them cannot be decoded.
    """
    if source is None:
        images: list[ImageLike] = list(synthetic_images(count, seed=1, height=144, width=160))
    else:
        items = list_sources(source).items
        if len(items) < count:
            raise ConfigError(f"{source}: expected at least {count} images, found {len(items)}")
        images = [items[index * len(items) // count].read() for index in range(count)]
    return np.stack([read_pixels(image, preprocess, decode="exact") for image in images])


def npz_bytes(arrays: Mapping[str, np.ndarray]) -> bytes:
    """`arrays` as an uncompressed .npz: equal arrays give equal bytes, independent of clock and system."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in sorted(arrays.items()):
            member = io.BytesIO()
            np.save(member, array, allow_pickle=False)
            info = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            info.create_system = 3
            archive.writestr(info, member.getvalue())
    return buffer.getvalue()
