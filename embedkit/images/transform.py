"""From a path, bytes, a Pillow image or an array to the uint8 pixels that a graph takes, by the preprocess contract.

The decoding policy is the same for all encoders: EXIF orientation is applied (and no other), alpha is composited on
white, palette, 16-bit and CMYK images are converted, an embedded ICC profile is converted to sRGB (after the resize,
when the image is small), and an animation gives its first frame. The graph subtracts the mean and divides by the
standard deviation.

Large images are converted in strips, and all large images of the process share one budget of pixels.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator
from typing import BinaryIO, TypeAlias

import numpy as np
from PIL import Image, ImageCms

from embedkit.errors import ConfigError, ImageError
from embedkit.images.decode import UPRIGHT, cost, is_jpeg, orientation, plain, samples_of, with_opened
from embedkit.images.files import MAX_BYTES, read_file
from embedkit.images.icc import srgb_transform
from embedkit.images.memory import ORDINARY, STRIP, ReusedBlocks
from embedkit.images.samples import Samples
from embedkit.model.preprocess import Preprocess

__all__ = ["DECODE_MODES", "ImageLike", "ReusedBlocks", "read_pixels", "upright"]

ImageLike: TypeAlias = "str | os.PathLike[str] | bytes | BinaryIO | Image.Image | np.ndarray"

DECODE_MODES = ("auto", "exact")

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
#: How far a filter reaches, in pixels of the smaller scale.
_SUPPORT = {"nearest": 0.5, "box": 0.5, "bilinear": 1.0, "hamming": 1.0, "bicubic": 2.0, "lanczos": 3.0}
#: The color conversion of `upright`.
_SRGB = Preprocess(size=(1, 1), resize="squash", mean=(0.0,) * 3, std=(1.0,) * 3)


def read_pixels(
    image: ImageLike,
    preprocess: Preprocess,
    *,
    decode: str = "auto",
    max_pixels: int | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Decode one image and transform it by the contract.

    Args:
        image: A path, the bytes of an image file, a file opened for reading bytes, a Pillow image, or a uint8 array
            (H, W, 3), (H, W, 4), (H, W, 1) or (H, W).
        preprocess: The entry's contract.
        decode: `auto` lets a JPEG be decoded at 1/2, 1/4 or 1/8 where the contract allows it and at least
            twice the needed pixels remain; `exact` always decodes all pixels.
        max_pixels: Greatest number of pixels of a file, by its header; 179 million when None (twice
            `PIL.Image.MAX_IMAGE_PIXELS`).
        out: A uint8 array (C, H, W) to write into; a new one otherwise.

    Returns:
        uint8 (C, H, W) in RGB order, 0..255.

    Raises:
        ImageError: The image cannot be read; the message is one sentence without the image's name.
        ConfigError: `decode` is not one of the modes, or `image` is of another type.
        OSError: A path that cannot be opened, or is no regular file.
    """
    if decode not in DECODE_MODES:
        raise ConfigError(f"decode: expected one of {', '.join(DECODE_MODES)}, found {decode!r}")
    # Decoded pixels cannot be decoded at another scale.
    reduced = decode == "auto" and not isinstance(image, (Image.Image, np.ndarray))
    return with_opened(
        _in_memory(image),
        functools.partial(_convert, preprocess=preprocess, reduced=reduced, out=out),
        max_pixels,
    )


def upright(image: ImageLike, *, longest: int | None = None, max_pixels: int | None = None) -> Image.Image:
    """A whole image for display: upright, RGB, on white, in sRGB.

    Args:
        image: As for `read_pixels`.
        longest: The longer side is reduced to this many pixels, if it has more; a JPEG is then decoded at a reduced
            scale.
        max_pixels: As for `read_pixels`.

    Raises:
        ImageError: The image cannot be read; the message is one sentence without the image's name.
        ConfigError: `image` is of another type.
        OSError: A path that cannot be opened, or is no regular file.
    """
    return with_opened(_in_memory(image), functools.partial(_upright, longest=longest), max_pixels)


def _upright(image: Image.Image, take: Callable[[int], None], longest: int | None) -> Image.Image:
    profile, pixels = image.info.get("icc_profile"), image.width * image.height
    if longest is not None and is_jpeg(image):
        twice = 2 * longest / max(image.size)
        image.draft(None, (math.ceil(twice * image.width), math.ceil(twice * image.height)))
        pixels = cost(image, pixels)
    take(pixels)
    image.load()
    turn, samples = orientation(image), samples_of(image)
    if turn != 1:
        image = image.transpose(UPRIGHT[turn])
    image = _in_strips(image, functools.partial(plain, samples=samples))
    if longest is not None and max(image.size) > longest:
        scale = longest / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.BICUBIC)
    return Image.fromarray(np.asarray(_to_color(image, _SRGB, profile)))


def _in_memory(image: ImageLike) -> bytes | Image.Image | np.ndarray:
    """The image, a file's bytes for a path or an open file."""
    if isinstance(image, (str, os.PathLike)):
        return read_file(image)
    if isinstance(image, (bytearray, memoryview)):
        return bytes(image)
    if isinstance(image, (bytes, Image.Image, np.ndarray)):
        return image
    read = getattr(image, "read", None)
    if not callable(read):
        raise ConfigError(
            "an image must be a path, bytes, an open file, a Pillow image or a uint8 array, found "
            f"{type(image).__name__}"
        )
    data = read(MAX_BYTES + 1)
    if not isinstance(data, bytes):
        raise ConfigError(
            f"an open file must give bytes; open it with mode 'rb', found {type(data).__name__}"
        )
    if len(data) > MAX_BYTES:
        raise ImageError(f"the open file gives more than {MAX_BYTES} bytes")
    return data


def _convert(
    image: Image.Image,
    take: Callable[[int], None],
    preprocess: Preprocess,
    reduced: bool,
    out: np.ndarray | None,
) -> np.ndarray:
    profile, pixels = image.info.get("icc_profile"), image.width * image.height
    turn, size = 1, image.size
    extent: tuple[float, float, float, float] | None = None
    if is_jpeg(image):
        turn = orientation(image)
        size = image.size if turn < 5 else image.size[::-1]
        if reduced and preprocess.reduced_decoding:
            need = _resized(*size, preprocess)
            need = (2 * need[0], 2 * need[1])
            drafted = image.draft(None, need if turn < 5 else need[::-1])
            # The last column and row of a reduced image may be covered partly; its true extent is fractional.
            if drafted is not None:
                extent = _upright_extent(image.size, drafted[1][2:], turn)
                pixels = cost(image, pixels)
    take(pixels)
    image.load()
    if not is_jpeg(image):  # loading rotates a TIFF, and the EXIF of a PNG may follow its pixels
        turn = orientation(image)
        size = image.size if turn < 5 else image.size[::-1]
    as_plain = functools.partial(_plain, color=preprocess.color, profile=profile, samples=samples_of(image))
    if turn != 1:
        image = image.transpose(UPRIGHT[turn])
    image = _resize_crop(image, size, extent or (0, 0, *image.size), preprocess, as_plain)
    image = _to_color(image, preprocess, profile)
    return _to_array(image, preprocess, out)


def _plain(image: Image.Image, color: str, profile: bytes | None, samples: Samples) -> Image.Image:
    """A whole image or a strip of it as `L`, `RGB` or `CMYK`."""
    image = plain(image, samples)
    if color == "gray" and image.mode == "RGB" and not (profile and srgb_transform(profile, "RGB")):
        image = image.convert("L")  # before the resize, as in torchvision's pipelines: a third of the work
    return image


def _in_strips(image: Image.Image, as_plain: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Apply `as_plain` to an image, strip by strip if it is large, so that no intermediate copy is large."""
    if image.width * image.height <= ORDINARY:
        return as_plain(image)
    whole: Image.Image | None = None
    for top, strip in _strips(image, 0, image.height):
        part = as_plain(strip)
        if whole is None:
            if part.mode == image.mode and "transparency" not in image.info:
                return image
            whole = Image.new(part.mode, image.size)
        whole.paste(part, (0, top))
    assert whole is not None
    return whole


def _strips(image: Image.Image, first: int, last: int) -> Iterator[tuple[int, Image.Image]]:
    """The rows `first` to `last` of an image in strips, each with its top row."""
    rows = max(1, STRIP // image.width)
    for top in range(first, last, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, last)))


def _upright_extent(
    size: tuple[int, int], covered: tuple[float, float], orientation: int
) -> tuple[float, float, float, float]:
    """The covered part of the stored columns and rows after the rotation: left, top, right and bottom."""
    (width, height), (right, bottom) = size, covered
    left, top = 0.0, 0.0
    if orientation in (5, 6, 7, 8):
        width, height, right, bottom = height, width, bottom, right
    if orientation in (2, 3, 6, 7):
        left, right = width - right, float(width)
    if orientation in (3, 4, 7, 8):
        top, bottom = height - bottom, float(height)
    return left, top, right, bottom


def _resized(width: int, height: int, preprocess: Preprocess) -> tuple[int, int]:
    """Width and height, in pixels, of the whole image after the resize and before the crop."""
    if preprocess.resize == "squash":
        return preprocess.size[1], preprocess.size[0]
    side = preprocess.resize_size
    short, long = sorted((width, height))
    if preprocess.resize == "shortest":
        other = max(1, int(side * long / short))
        return (side, other) if width <= height else (other, side)
    other = max(1, round(side * short / long))
    return (other, side) if width <= height else (side, other)


def _resize_crop(
    image: Image.Image,
    size: tuple[int, int],
    extent: tuple[float, float, float, float],
    preprocess: Preprocess,
    as_plain: Callable[[Image.Image], Image.Image],
) -> Image.Image:
    """Resize and center-crop in one step: only the crop is computed.

    Args:
        image: The decoded image, perhaps at a reduced scale.
        size: Width and height of the image at full scale.
        extent: Left, top, right and bottom of the covered part of `image`.
        preprocess: The contract.
        as_plain: Brings the image, or a strip of it, to the mode that is resized.
    """
    new_w, new_h = _resized(*size, preprocess)
    out_h, out_w = preprocess.size
    keep_w, keep_h = (min(out_w, new_w), min(out_h, new_h)) if preprocess.crop == "center" else (new_w, new_h)
    left, top = round((new_w - keep_w) / 2), round((new_h - keep_h) / 2)
    per_x, per_y = (extent[2] - extent[0]) / new_w, (extent[3] - extent[1]) / new_h
    if keep_w > out_w or keep_h > out_h:
        raise ImageError(f"the contract leaves {keep_w}x{keep_h} pixels where {out_w}x{out_h} are needed")
    box = (
        extent[0] + left * per_x,
        extent[1] + top * per_y,
        min(extent[0] + (left + keep_w) * per_x, float(image.width)),
        min(extent[1] + (top + keep_h) * per_y, float(image.height)),
    )
    if (keep_w, keep_h) == image.size and box == (0, 0, *image.size):
        return _in_strips(image, as_plain)
    return _resample(image, (keep_w, keep_h), box, preprocess.interpolation, as_plain)


def _resample(
    image: Image.Image,
    size: tuple[int, int],
    box: tuple[float, float, float, float],
    interpolation: str,
    as_plain: Callable[[Image.Image], Image.Image],
) -> Image.Image:
    """`box` of an image at `size`, its rows first and then its columns.

    Each of the two passes rounds to 8 bits. Pillow chooses their order by the box, so a crop could differ from the same
    part of the whole image. Two calls fix the order, and take no longer than one. The first pass treats every row
    separately, so a large image can go through it in strips with the same result.
    """
    left, top, right, bottom = box
    method, support = _FILTERS[interpolation], _SUPPORT[interpolation]
    margin = math.ceil(support * max(1.0, (bottom - top) / size[1])) + 1
    first, last = max(0, int(top) - margin), min(image.height, math.ceil(bottom) + margin)
    if image.width * image.height > ORDINARY:
        narrow: Image.Image | None = None
        for start, strip in _strips(image, first, last):
            part = as_plain(strip)
            part = part.resize((size[0], part.height), method, box=(left, 0, right, part.height))
            if narrow is None:
                narrow = Image.new(part.mode, (size[0], last - first))
            narrow.paste(part, (0, start - first))
        assert narrow is not None
        image = narrow
    else:
        image = as_plain(image)
        if (first, last) != (0, image.height):
            image = image.crop((0, first, image.width, last))
        image = image.resize((size[0], image.height), method, box=(left, 0, right, image.height))
    return image.resize(size, method, box=(0, top - first, size[0], min(bottom - first, image.height)))


def _to_color(image: Image.Image, preprocess: Preprocess, profile: bytes | None) -> Image.Image:
    transform = srgb_transform(profile, image.mode) if profile else None
    if transform is not None:
        image = ImageCms.applyTransform(image, transform) or image
    if preprocess.color == "gray":
        return image if image.mode == "L" else image.convert("RGB").convert("L")
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_array(image: Image.Image, preprocess: Preprocess, out: np.ndarray | None) -> np.ndarray:
    (height, width), (out_h, out_w) = (image.height, image.width), preprocess.size
    if out is None:
        out = np.empty((preprocess.channels, out_h, out_w), np.uint8)
    if (height, width) != (out_h, out_w):
        out[:] = preprocess.pad  # in the graph's color space
    top, left = (out_h - height) // 2, (out_w - width) // 2
    inner = out[:, top : top + height, left : left + width]  # (C, height, width)
    if preprocess.color == "lab_l":
        inner[0] = _lightness(np.asarray(image))
        return out
    for channel, band in enumerate(image.getbands()):
        # One band at a time: packing a plane is several times faster than transposing (H, W, 3) in numpy.
        inner[channel] = np.frombuffer(image.tobytes("raw", band), np.uint8).reshape(height, width)
    return out


def _lightness(rgb: np.ndarray) -> np.ndarray:
    """CIE L* (D65) of sRGB, scaled from 0..100 to 0..255: uint8 (H, W, 3) -> uint8 (H, W)."""
    value = rgb.astype(np.float64) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    luminance = linear @ np.array([0.212639, 0.715169, 0.072192])
    cube = np.where(luminance > (6 / 29) ** 3, np.cbrt(luminance), luminance * (29 / 6) ** 2 / 3 + 4 / 29)
    result: np.ndarray = np.round((116 * cube - 16) * 2.55).astype(np.uint8)
    return result
