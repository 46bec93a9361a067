"""Images to measure with: JPEGs of two kinds, cut from photographs that the user has."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
from PIL import Image


def cut_images(photos: Path, folder: Path, count: int, large: bool) -> list[str]:
    """Cut JPEGs (4:2:0) from photographs; image i is the same whatever the count, so folders are reused.

    Small ones are 500x375 crops of varied scale at quality 75-92, large ones 4000x3000 at quality 90. Desktop
    photographs are smoother than a camera's, and most have to be scaled up for 12 megapixels: a crop below
    30 kB, or 3 MB, is drawn again with more grain, since a JPEG's bytes are what decoding it costs.

    Returns:
        The paths of images 0 to `count` - 1.
    """
    sources = sorted(p for p in photos.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))
    if not sources:
        raise SystemExit(f"{photos}: no photographs (.jpg, .jpeg, .png, .webp)")
    folder.mkdir(parents=True, exist_ok=True)
    size, enough = ((4000, 3000), 3_000_000) if large else ((500, 375), 30_000)
    for number, source in enumerate(sources):
        wanted = [(i, folder / f"{i:05d}.jpg") for i in range(number, count, len(sources))]
        missing = [(i, path) for i, path in wanted if not path.exists()]
        photo = Image.open(source).convert("RGB") if missing else Image.new("RGB", (4, 3))
        widest = min(photo.width, photo.height * 4 / 3)
        for i, path in missing:
            rng, draft = np.random.default_rng([2026, large, i]), path.with_suffix(".part")
            for attempt in range(8):
                width = widest * math.exp(rng.uniform(math.log(0.7 if large else 0.4), 0))
                left, top = rng.uniform(0, photo.width - width), rng.uniform(0, photo.height - 0.75 * width)
                box = (left, top, left + width, top + 0.75 * width)
                image = photo.resize(size, Image.Resampling.LANCZOS, box=box).convert("YCbCr")
                luma, *chroma = image.split()
                sigma = 1.5 * attempt + 2 * (width < size[0])
                noisy = np.asarray(luma) + rng.standard_normal(size[::-1], np.float32) * sigma
                luma = Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))
                image = Image.merge("YCbCr", [luma, *chroma])
                quality = 90 if large else int(rng.integers(75, 93))
                image.save(draft, "JPEG", quality=quality, subsampling="4:2:0")
                if draft.stat().st_size >= enough:
                    break
            draft.rename(path)
    return [str(folder / f"{i:05d}.jpg") for i in range(count)]


def linked(files: list[str], folder: Path, count: int) -> Path:
    """A folder of exactly `count` images: hard links to `files` under new names, as often as it takes."""
    folder.mkdir(exist_ok=True)
    for i in range(len(list(folder.iterdir())), count):
        os.link(files[i % len(files)], folder / f"{i:05d}.jpg")
    return folder
