"""Decoding: from the bytes of an image to a Pillow image, with its orientation, transparency and sample range.

In all formats only EXIF orientation counts, as in browsers; an orientation in an XMP packet is ignored. Alpha is
composited on white. Damage outside of the pixels (a comment, its checksum, an end mark) does not make an image
unreadable.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import os
import struct
from collections.abc import Callable, Iterator
from typing import BinaryIO, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

# Imported for their side effect, so that Image.open does not load all of Pillow's forty plugins.
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

from embedkit._io.reading import open_regular
from embedkit.errors import ImageError
from embedkit.images import jpeg, png, tiff
from embedkit.images.memory import BUDGET, check_size
from embedkit.images.samples import SIXTEEN, Samples

#: EXIF orientation (2..8) -> the transposition that turns the image upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
#: No EPS (it would start Ghostscript), and no formats without photographs. MPO comes with JPEG.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "HEIF")
_JPEG = ("JPEG", "MPO")
_ORIENTATION_TAG = 0x0112
_RAW_EXIF = "Raw profile type exif"  # ImageMagick's name for EXIF in a text chunk of a PNG
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")

T = TypeVar("T")


def with_opened(
    image: bytes | Image.Image | np.ndarray,
    use: Callable[[Image.Image, Callable[[int], None]], T],
    max_pixels: int | None,
) -> T:
    """Open an image and use it; on damage outside of the pixels, try once more without the damaged part.

    Args:
        image: The bytes of a file, a Pillow image, or a uint8 array (H, W, C) or (H, W).
        use: Decodes the opened image and returns a result that outlives it. Its second argument waits until the given
            number of pixels fits into the memory budget; `use` calls it before it decodes them.
        max_pixels: As for `check_size`; pixels that are already in memory do not count.

    Returns:
        What `use` returns.

    Raises:
        ImageError: It cannot be read; one sentence without the image's name.
    """
    with _faults_as_errors():
        if isinstance(image, (Image.Image, np.ndarray)):
            with BUDGET.room() as take:
                return use(_from_array(image) if isinstance(image, np.ndarray) else image, take)
        if not image:
            raise ImageError("the file is empty")
        opened = None
        try:
            opened = _opened(image, max_pixels)
            return _used(opened, use)
        except (ImageError, MemoryError, Image.DecompressionBombError):
            raise
        except Exception as fault:
            again = _repaired(image, opened, max_pixels)
            if again is None:
                raise (_unidentified(image) if isinstance(fault, UnidentifiedImageError) else fault) from None
        return _used(again, use)


def size_in_header(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Width and height of the image in a file by its header, as stored; no pixel is decoded.

    Raises:
        ImageError: The file has no header of an image.
        OSError: It cannot be opened, or is no regular file.
    """
    with open_regular(path) as file, _faults_as_errors():
        return _identified(file).size


def _used(opened: Image.Image, use: Callable[[Image.Image, Callable[[int], None]], T]) -> T:
    with BUDGET.room() as take, contextlib.closing(opened):  # free its pixels before their room
        return use(opened, take)


def is_jpeg(image: Image.Image) -> bool:
    """Whether the image comes from a JPEG, which can be decoded at a reduced scale."""
    return image.format in _JPEG


def cost(image: Image.Image, full: int) -> int:
    """Pixels of memory that decoding takes.

    Args:
        image: Opened, and perhaps drafted to a reduced scale.
        full: Pixels at full scale; a progressive JPEG holds the coefficients of all.
    """
    return full if image.info.get("progressive") else image.width * image.height


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of a loaded image, or of a JPEG at any time, 1 to 8; 1 if there is none.

    Pillow's `getexif` would read XMP packets too.
    """
    if image.format == "TIFF":
        return 1  # Pillow rotates it while loading
    raw = image.info.get("exif")
    try:
        if raw is None:
            if _RAW_EXIF not in image.info:
                return 1
            raw = bytes.fromhex("".join(image.info[_RAW_EXIF].split("\n")[3:]))
        exif = Image.Exif()
        exif.load(raw)
        value = exif.get(_ORIENTATION_TAG, 1)
    except (OSError, SyntaxError, ValueError, TypeError, struct.error):
        return 1  # damaged EXIF does not make the image unreadable
    return value if value in UPRIGHT else 1


def samples_of(image: Image.Image) -> Samples:
    """The range and meaning of the wide gray samples of a loaded image.

    Raises:
        ImageError: Samples without an agreed range.
    """
    if image.format == "TIFF" and isinstance(image, TiffImagePlugin.TiffImageFile):
        return tiff.samples_of(image)
    if image.mode == "I" and image.format not in ("PPM", "PNG"):
        raise ImageError(
            "32-bit integer samples (Pillow's mode I) have no agreed range: convert the image to mode L or I;16"
        )
    if image.mode.startswith("I;16") and "transparency" in image.info:
        return dataclasses.replace(SIXTEEN, clear=image.info["transparency"])
    return SIXTEEN


def plain(image: Image.Image, samples: Samples) -> Image.Image:
    """Bring any Pillow mode to `L`, `RGB` or `CMYK`; alpha is composited on white, and gray stays gray.

    Args:
        image: A whole image or a strip of it.
        samples: The meaning of wide samples of the whole image.

    Raises:
        ImageError: Floating-point samples.
    """
    mode = image.mode
    if mode in ("L", "RGB", "CMYK") and "transparency" not in image.info:
        return image
    if mode == "I" or mode.startswith("I;16"):
        return samples.to_gray(image)
    if mode == "F":
        raise ImageError("32-bit float samples have no agreed range: save the image with 8 or 16 bits")
    gray = mode in ("1", "L", "LA", "La")
    if image.has_transparency_data:
        image = image.convert("LA" if gray else "RGBA")
        canvas = Image.new("L" if gray else "RGB", image.size, "white")
        canvas.paste(image.getchannel("L") if gray else image, mask=image.getchannel("A"))
        return canvas
    return image.convert("L" if gray else "RGB")


@contextlib.contextmanager
def _faults_as_errors() -> Iterator[None]:
    """Turn any exception of a decoder into one `ImageError`."""
    try:
        yield
    except ImageError:
        raise
    except Image.DecompressionBombError:  # from a plugin, which has a limit of its own
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        raise ImageError(
            f"more than {limit:.0f} megapixels: refused as a decompression bomb; if the image is genuine, "
            "raise PIL.Image.MAX_IMAGE_PIXELS too"
        ) from None
    except MemoryError:
        raise ImageError("not enough memory to decode the image") from None
    except Exception as fault:  # decoders raise OSError, SyntaxError, ValueError, struct.error...
        text = " ".join(str(fault).split()) or type(fault).__name__
        raise ImageError(f"damaged image ({text[:200]})") from None


def _opened(data: bytes, max_pixels: int | None) -> Image.Image:
    image = _identified(io.BytesIO(data))
    check_size(image.size, max_pixels)
    if image.format == "TIFF":
        image.info.pop("xmp", None)  # else loading would rotate the image by it
    elif image.format == "PNG" and "transparency" in image.info and data[24:25] != b"\x08":
        _scale_clear_color(image, data[24])
    return image


def _identified(file: BinaryIO) -> Image.Image:
    """`Image.open` without its limit of pixels, which is a setting of the whole process."""
    head = file.read(256)
    if head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS:
        # `mif1` and `msf1` only name the container: an AVIF is listed among the compatible brands.
        brands = head[16 : min(int.from_bytes(head[:4], "big"), 256)]
        if not any(brands[at : at + 4] in (b"avif", b"avis") for at in range(0, len(brands), 4)):
            _register_heif()
    for name in _FORMATS:
        if name not in Image.OPEN:
            continue
        factory, accept = Image.OPEN[name]
        if accept is not None and accept(head[:16]) is not True:
            continue
        # The errors that `Image.open` treats as "not this format".
        with contextlib.suppress(SyntaxError, IndexError, TypeError, struct.error):
            file.seek(0)
            return factory(file, "")
    raise UnidentifiedImageError


def _scale_clear_color(image: Image.Image, depth: int) -> None:
    """Scale a tRNS chunk, which holds samples as stored, to the 8 bits that Pillow compares with."""
    clear = image.info["transparency"]
    if image.mode == "L" and isinstance(clear, int):
        image.info["transparency"] = clear * 255 // (2**depth - 1)
    elif image.mode == "RGB":
        image.info["transparency"] = tuple(value >> 8 for value in clear)


def _repaired(data: bytes, opened: Image.Image | None, max_pixels: int | None) -> Image.Image | None:
    """The image without the part that a decoder failed on, if that part holds no pixel; else None."""
    if data.startswith(png.SIGNATURE):
        rest, profile = png.essential(data)
        if rest == data:
            return None
        try:
            image = _opened(rest, max_pixels)
        except UnidentifiedImageError:
            raise _unidentified(data) from None
        if profile is not None:
            image.info["icc_profile"] = profile
        return image
    if opened is not None and is_jpeg(opened) and not data.endswith(jpeg.END):
        with BUDGET.room() as take:
            take(opened.width * opened.height)
            whole = jpeg.completed(data)
        return None if whole is None else _opened(whole, max_pixels)
    return None


def _unidentified(data: bytes) -> ImageError:
    if data[4:12] in (b"ftypavif", b"ftypavis"):
        return ImageError("an AVIF image that this Pillow cannot read: pip install -U pillow")
    if data.startswith(png.SIGNATURE):
        return ImageError("damaged image (the header of a PNG)")
    if tiff.is_tiff(data):
        return tiff.refusal(data)
    return ImageError(
        "not an image, or not in a supported format (JPEG, PNG, WebP, GIF, BMP, TIFF, PNM, AVIF, HEIC)"
    )


@functools.cache
def _register_heif() -> None:
    try:
        from pillow_heif import register_heif_opener  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise ImageError("a HEIC image: reading it needs `pip install pillow-heif`") from None
    register_heif_opener()


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8:
        raise ImageError(f"an array must be uint8 with values 0..255, found {array.dtype}")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if 0 in array.shape or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise ImageError(f"an array must be (H, W, 3), (H, W, 4), (H, W, 1) or (H, W), found {array.shape}")
    return Image.fromarray(np.ascontiguousarray(array))
