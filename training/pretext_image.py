"""The image of a method's pretext task: what is given, what is predicted and what is true, on held-out images.

A run writes it as `pretext.png` at its end, and export puts it into the entry, whose card shows it. What stands in it
is the method's own (`Method.solved`); here it is laid out: a row under a title for each panel, a column for each image.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from embedkit._io.atomic import write_file
from embedkit.errors import ConfigError
from embedkit.model.layout import PRETEXT_IMAGE
from embedkit.training.data import ImageSet, load_images, split_validation
from embedkit.training.method import Method
from embedkit.training.run_folder import load_run

__all__ = ["MOST_BYTES", "draw_panels", "pretext_png", "write_pretext_image"]

#: Of the file: an entry's README shows it.
MOST_BYTES = 300_000
#: Columns, fewer where the file would be larger.
_COLUMNS = (8, 6, 4, 3, 2, 1)
#: Longest side of a panel, in pixels: smaller ones are enlarged by a whole number, larger ones are reduced.
_SIDE = 128
_GAP, _TITLE = 8, 20
#: Light gray, between panels and between tiles: images may have white borders, and black ones.
_BACKGROUND = 221


def write_pretext_image(run: str | os.PathLike[str]) -> Path | None:
    """Write `pretext.png` into a run's folder, from its last checkpoint and the data that it names.

    Args:
        run: The folder that `embedkit train` wrote.

    Returns:
        The file; None where the method has no such image, or the run held no images out.

    Raises:
        OutputError: No run there, or none with a checkpoint.

    Example:
        >>> write_pretext_image("runs/jigsaw")  # doctest: +SKIP
        PosixPath('runs/jigsaw/pretext.png')
    """
    config, method = load_run(run)
    held_out = split_validation(load_images(config.data), config.data.validation, config.seed)[1]
    png = pretext_png(method, held_out)
    if png is None:
        return None
    path = Path(run) / PRETEXT_IMAGE
    write_file(path, png)
    return path


def pretext_png(method: Method, images: ImageSet) -> bytes | None:
    """The image for up to 8 images, spread evenly over a set, as a PNG of at most `MOST_BYTES`.

    Args:
        method: Left in eval mode.
        images: Held-out ones.

    Returns:
        None where the method has no such image, or there is nothing to show.
    """
    if not len(images):
        return None
    rows = torch.linspace(0, len(images) - 1, min(_COLUMNS[0], len(images))).long()
    batch = images.batch(rows).to(method.device)
    method.eval()
    with torch.no_grad():
        panels = method.solved(batch, method.generator("validation"))
    if not panels:
        return None
    png = b""
    for columns in _COLUMNS:
        png = _encode(draw_panels({title: panel[:columns] for title, panel in panels.items()}))
        if len(png) <= MOST_BYTES:
            break
    return png


def draw_panels(panels: Mapping[str, Tensor]) -> Image.Image:
    """One row for each panel, its title above it, the first image of all panels in the first column.

    Args:
        panels: By title: images (N, C, H, W), C of 1 or 3, or tiles (N, T, C, h, w) of a square grid, all in [0, 1].

    Returns:
        An RGB image, each pixel of a panel a square of the same whole number of pixels where the panel is small.

    Raises:
        ConfigError: A panel of another shape, or panels of several numbers of images.
    """
    drawn = {title: _to_uint8(title, panel) for title, panel in panels.items()}
    count = {len(panel) for panel in drawn.values()}
    if len(count) != 1:
        raise ConfigError(f"solved: expected as many images in each panel, found {sorted(count)}")
    height, width = max((panel.shape[1:3] for panel in drawn.values()), key=math.prod)
    factor = max(1, _SIDE // max(height, width))
    shrink = min(1.0, _SIDE / max(height, width))
    size = max(1, round(factor * shrink * width)), max(1, round(factor * shrink * height))
    columns, step = count.pop(), _TITLE + size[1] + _GAP
    sheet = Image.new("RGB", (_GAP + columns * (size[0] + _GAP), len(drawn) * step), (_BACKGROUND,) * 3)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for row, (title, images) in enumerate(drawn.items()):
        draw.text((_GAP, row * step + 3), title, fill="black", font=font)
        for column, image in enumerate(images):
            kind = Image.Resampling.BOX if image.shape[1] > size[0] else Image.Resampling.NEAREST
            place = _GAP + column * (size[0] + _GAP), row * step + _TITLE
            sheet.paste(Image.fromarray(image).resize(size, kind), place)
    return sheet


def _to_uint8(title: str, panel: Tensor) -> np.ndarray:
    """A panel -> uint8 (N, H, W, 3); of tiles, with a line between them."""
    if panel.ndim == 5 and math.isqrt(panel.shape[1]) ** 2 == panel.shape[1]:
        side, (n, _, channels, height, width) = math.isqrt(panel.shape[1]), panel.shape
        framed = torch.nn.functional.pad(panel, (0, 1, 0, 1), value=_BACKGROUND / 255).unflatten(
            1, (side, side)
        )
        whole = framed.permute(0, 3, 1, 4, 2, 5)  # (N, C, rows, h + 1, columns, w + 1)
        panel = whole.reshape(n, channels, side * (height + 1), side * (width + 1))[:, :, :-1, :-1]
    if panel.ndim != 4 or panel.shape[1] not in (1, 3):
        raise ConfigError(f"solved: {title!r} has the shape {tuple(panel.shape)}, which is no image")
    pixels = panel.detach().float().nan_to_num().clamp(0, 1).mul(255).round().byte().cpu()
    return pixels.expand(-1, 3, -1, -1).movedim(1, 3).contiguous().numpy()


def _encode(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
