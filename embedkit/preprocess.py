"""From a path, bytes, a Pillow image or an array to the uint8 pixels that a graph takes, by the contract.

The decoding policy is one for all encoders: EXIF orientation is applied, alpha is composited on white,
palette, 16-bit and CMYK pictures are converted, an embedded ICC profile is converted to sRGB (after the
resize, which then works on a small picture), and an animation gives its first frame. The graph subtracts the
mean and divides by the standard deviation itself.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
import struct
import threading
from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageCms

# Imported for their side effect, so that Image.open need not load all of Pillow's forty plugins.
from PIL import (  # noqa: F401, isort: skip
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    JpegImagePlugin,
    MpoImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from embedkit.entry import Preprocess
from embedkit.errors import ConfigError, ImageError

ImageLike: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | np.ndarray"

DECODE_MODES = ("auto", "exact")

#: No EPS (it would start Ghostscript), no formats that nobody keeps photographs in.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO", "PPM", "AVIF", "HEIF")
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
#: EXIF orientation (2..8) -> the transposition that makes the picture upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION_TAG = 0x0112
#: Colour alone: what `upright` converts to.
_SRGB = Preprocess(size=(1, 1), resize="squash", mean=(0.0,) * 3, std=(1.0,) * 3)
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")


def read_pixels(
    image: ImageLike, preprocess: Preprocess, *, decode: str = "auto", out: np.ndarray | None = None
) -> np.ndarray:
    """Decode one picture and bring it to the contract.

    Args:
        image: A path, the bytes of a picture file, a Pillow image, or a uint8 array (H, W, 3), (H, W, 4),
            (H, W, 1) or (H, W).
        preprocess: The entry's contract.
        decode: `auto` lets a JPEG be decoded at 1/2, 1/4 or 1/8 where the contract allows it and at least
            twice the needed pixels remain; `exact` always decodes all pixels.
        out: A uint8 array (C, H, W) to write into; a new one otherwise.

    Returns:
        uint8 (C, H, W) in RGB order, 0..255.

    Raises:
        ImageError: The picture cannot be read; the message is one sentence without the picture's name.
        ConfigError: `decode` is not one of the modes, or `image` is of another type.
        OSError: A path that cannot be opened.
    """
    if decode not in DECODE_MODES:
        raise ConfigError(f"decode: expected one of {', '.join(DECODE_MODES)}, found {decode!r}")
    # Pixels that are there already cannot be decoded at another scale.
    reduced = decode == "auto" and not isinstance(image, (Image.Image, np.ndarray))
    image = _in_memory(image)
    with _faults_as_errors():
        return _convert(_opened(image), preprocess, reduced, out)


def upright(image: ImageLike, *, longest: int | None = None) -> Image.Image:
    """A whole picture as it is looked at: upright, RGB, on white, in sRGB.

    Args:
        image: As for `read_pixels`.
        longest: The longer side is brought down to so many pixels, if it has more; then a JPEG is decoded at a
            reduced scale.

    Raises:
        ImageError: The picture cannot be read; the message is one sentence without the picture's name.
        ConfigError: `image` is of another type.
        OSError: A path that cannot be opened.
    """
    image = _in_memory(image)
    with _faults_as_errors():
        opened = _opened(image)
        profile = opened.info.get("icc_profile")
        if longest is not None and opened.format in ("JPEG", "MPO"):
            twice = 2 * longest / max(opened.size)
            opened.draft(None, (math.ceil(twice * opened.width), math.ceil(twice * opened.height)))
        opened.load()
        orientation = _orientation(opened)
        if orientation != 1:
            opened = opened.transpose(_UPRIGHT[orientation])
        plain = _plain_mode(opened)
        if longest is not None and max(plain.size) > longest:
            scale = longest / max(plain.size)
            plain = plain.resize(
                (max(1, round(plain.width * scale)), max(1, round(plain.height * scale))),
                Image.Resampling.BICUBIC,
            )
        return Image.fromarray(np.asarray(_to_color(plain, _SRGB, profile)))


class KeptMemory:
    """While one is held, Pillow keeps the memory of pictures that are done for the next ones.

    Given back to the system and faulted in anew for every picture, it costs a quarter of decoding one of 500x375.
    Pillow keeps at most a few blocks of up to 16 MB for each worker. A process that has set `PILLOW_BLOCKS_MAX` keeps
    its own choice.
    """

    #: A picture decoded, cut, and resized in two passes.
    BLOCKS = 4
    _lock = threading.Lock()
    _held = 0

    def __init__(self, workers: int):
        """Of so many threads that decode at once."""
        self._blocks = self.BLOCKS * workers

    def __enter__(self) -> None:
        if "PILLOW_BLOCKS_MAX" not in os.environ:
            self._change(self._blocks)

    def __exit__(self, *_: object) -> None:
        if "PILLOW_BLOCKS_MAX" not in os.environ:
            self._change(-self._blocks)

    @classmethod
    def _change(cls, blocks: int) -> None:
        with cls._lock:
            KeptMemory._held += blocks
            Image.core.set_blocks_max(KeptMemory._held)


def _in_memory(image: ImageLike) -> bytes | Image.Image | np.ndarray:
    """The picture, a file's bytes for a path."""
    if isinstance(image, (str, os.PathLike)):
        with open(image, "rb") as file:
            return file.read()
    if isinstance(image, (bytearray, memoryview)):
        return bytes(image)
    if not isinstance(image, (bytes, Image.Image, np.ndarray)):
        raise ConfigError(
            f"a picture must be a path, bytes, a Pillow image or a uint8 array, found {type(image).__name__}"
        )
    return image


@contextlib.contextmanager
def _faults_as_errors() -> Iterator[None]:
    """Turn whatever a decoder throws at a damaged picture into one `ImageError`."""
    try:
        yield
    except ImageError:
        raise
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        raise ImageError(f"more than {limit:.0f} megapixels: refused as a decompression bomb") from None
    except MemoryError:
        raise ImageError("not enough memory to decode the picture") from None
    except Exception as fault:  # decoders raise OSError, SyntaxError, ValueError, struct.error...
        text = " ".join(str(fault).split()) or type(fault).__name__
        raise ImageError(f"damaged picture ({text[:200]})") from None


def _opened(image: bytes | Image.Image | np.ndarray) -> Image.Image:
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if isinstance(image, Image.Image):
        return image
    if not image:
        raise ImageError("the file is empty")
    return _open(image)


def _open(data: bytes) -> Image.Image:
    if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS:
        # `mif1` and `msf1` are the container alone: an AVIF names itself among the compatible brands.
        brands = data[16 : min(int.from_bytes(data[:4], "big"), 256)]
        if not any(brands[at : at + 4] in (b"avif", b"avis") for at in range(0, len(brands), 4)):
            _register_heif()
    try:
        return Image.open(io.BytesIO(data), formats=[name for name in _FORMATS if name in Image.OPEN])
    except Image.UnidentifiedImageError:
        if data[4:12] in (b"ftypavif", b"ftypavis"):
            raise ImageError("an AVIF picture that this Pillow cannot read: pip install -U pillow") from None
        raise ImageError("not a picture, or not in a format that is read (JPEG, PNG, WebP, GIF, BMP, TIFF, "
                         "PNM, AVIF, HEIC)") from None  # fmt: skip


@functools.cache
def _register_heif() -> None:
    try:
        from pillow_heif import register_heif_opener  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise ImageError("a HEIC picture: reading it needs `pip install pillow-heif`") from None
    register_heif_opener()


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8:
        raise ImageError(f"an array must be uint8 with values 0..255, found {array.dtype}")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if 0 in array.shape or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise ImageError(f"an array must be (H, W, 3), (H, W, 4), (H, W, 1) or (H, W), found {array.shape}")
    return Image.fromarray(np.ascontiguousarray(array))


def _convert(image: Image.Image, preprocess: Preprocess, reduced: bool, out: np.ndarray | None) -> np.ndarray:
    profile = image.info.get("icc_profile")
    if image.format not in ("JPEG", "MPO"):
        image.load()  # this alone turns a TIFF upright, and a PNG's EXIF may stand behind its pixels
    orientation = _orientation(image)
    width, height = image.size if orientation < 5 else image.size[::-1]
    extent: tuple[float, float, float, float] | None = None
    if reduced and preprocess.reduced_decoding and image.format in ("JPEG", "MPO"):
        need = _resized(width, height, preprocess)
        need = (2 * need[0], 2 * need[1])
        drafted = image.draft(None, need if orientation < 5 else need[::-1])
        # A reduced picture may end in a partly covered column and row; its true extent is fractional.
        if drafted is not None:
            extent = _upright_extent(image.size, drafted[1][2:], orientation)
    image.load()
    if orientation != 1:
        image = image.transpose(_UPRIGHT[orientation])
    image = _plain_mode(image)
    if (
        preprocess.color == "gray"
        and image.mode == "RGB"
        and not (profile and _srgb_transform(profile, "RGB"))
    ):
        image = image.convert(
            "L"
        )  # before the resize, as torchvision's pipelines have it, and a third of the work
    image = _resize_crop(image, (width, height), extent or (0, 0, *image.size), preprocess)
    image = _to_color(image, preprocess, profile)
    return _to_array(image, preprocess, out)


def _orientation(image: Image.Image) -> int:
    if image.format in ("JPEG", "MPO") and "exif" not in image.info:
        return 1  # getexif would look for an XMP packet
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except (OSError, SyntaxError, ValueError, TypeError, struct.error):
        return 1  # damaged EXIF does not make the picture unreadable
    return value if value in _UPRIGHT else 1


def _upright_extent(
    size: tuple[int, int], covered: tuple[float, float], orientation: int
) -> tuple[float, float, float, float]:
    """Left, top, right and bottom, after the turn, of what a picture covers of its stored columns and rows."""
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
    """Width and height, in pixels, of the whole picture after the resize and before the crop."""
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
) -> Image.Image:
    """Resize and centre-crop in one step: only what the crop keeps is computed.

    Args:
        image: The decoded picture, perhaps at a reduced scale.
        size: Width and height of the picture at full scale.
        extent: Left, top, right and bottom of what the picture really covers of `image`.
        preprocess: The contract.
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
    if (keep_w, keep_h) != image.size or box != (0, 0, *image.size):
        image = _resample(image, (keep_w, keep_h), box, preprocess.interpolation)
    return image


def _resample(
    image: Image.Image, size: tuple[int, int], box: tuple[float, float, float, float], interpolation: str
) -> Image.Image:
    """`box` of a picture at `size`, its rows first and then its columns.

    Each of the two passes rounds to 8 bits. Pillow picks their order by the box, so that a part would not be equal
    to the same part of the whole picture; two calls fix it, and cost no more than one.
    """
    left, top, right, bottom = box
    method, support = _FILTERS[interpolation], _SUPPORT[interpolation]
    margin = math.ceil(support * max(1.0, (bottom - top) / size[1])) + 1
    first, last = max(0, int(top) - margin), min(image.height, math.ceil(bottom) + margin)
    if (first, last) != (0, image.height):
        image = image.crop((0, first, image.width, last))
    image = image.resize((size[0], image.height), method, box=(left, 0, right, image.height))
    return image.resize(size, method, box=(0, top - first, size[0], min(bottom - first, image.height)))


def _plain_mode(image: Image.Image) -> Image.Image:
    """Bring any Pillow mode to `L`, `RGB` or `CMYK`; alpha is composited on white."""
    mode = image.mode
    if mode in ("L", "RGB", "CMYK") and "transparency" not in image.info:
        return image
    if mode in ("I", "I;16", "I;16L", "I;16B", "I;16N"):
        # 16-bit samples to 8 bits, rounded: 65535 -> 255.
        wide = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8))
    if mode == "F":
        raise ImageError("32-bit float samples have no agreed range: save the picture with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, (255, 255, 255))
        canvas.paste(image, mask=image.getchannel("A"))
        return canvas
    return image.convert("L" if mode == "1" else "RGB")


def _to_color(image: Image.Image, preprocess: Preprocess, profile: bytes | None) -> Image.Image:
    transform = _srgb_transform(profile, image.mode) if profile else None
    if transform is not None:
        image = ImageCms.applyTransform(image, transform) or image
    if preprocess.color == "gray":
        return image if image.mode == "L" else image.convert("RGB").convert("L")
    return image if image.mode == "RGB" else image.convert("RGB")


@functools.lru_cache(maxsize=64)
def _srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform from an embedded profile to sRGB; None where there is nothing to do.

    A profile that cannot be read, or that belongs to another colour model than the picture's, is passed over,
    as browsers do.
    """
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}[mode] != source.profile.xcolor_space.strip():
            return None
        if "srgb" in ImageCms.getProfileDescription(source).lower():
            return None
        return ImageCms.buildTransform(source, _srgb(), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


@functools.cache
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def _to_array(image: Image.Image, preprocess: Preprocess, out: np.ndarray | None) -> np.ndarray:
    (height, width), (out_h, out_w) = (image.height, image.width), preprocess.size
    if out is None:
        out = np.empty((preprocess.channels, out_h, out_w), np.uint8)
    if (height, width) != (out_h, out_w):
        out[:] = preprocess.pad  # in the graph's own colour, whatever the picture's is
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
    return np.round((116 * cube - 16) * 2.55).astype(np.uint8)
