"""The meaning of a TIFF's samples, by its tags BitsPerSample, SampleFormat and PhotometricInterpretation.

Pillow reads 12, 16 and 32 bits, signed and unsigned, with 0 as black or white, into two modes, and does not interpret
the numbers.
"""

from __future__ import annotations

import io

from PIL import Image, TiffImagePlugin

from embedkit.errors import ImageError
from embedkit.images.samples import SIXTEEN, Samples

_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_BITS, _PHOTOMETRIC, _FORMAT = 258, 262, 339
_SIGNED, _FLOAT = 2, 3
_COLORS = {0: "gray, 0 is white", 1: "gray", 2: "RGB", 3: "palette", 5: "CMYK", 6: "YCbCr", 8: "CIELAB"}


def is_tiff(data: bytes) -> bool:
    """Whether these bytes begin as a TIFF or a BigTIFF."""
    return data[:4] in _MAGIC


def samples_of(image: Image.Image) -> Samples:
    """The meaning of the samples of an opened TIFF.

    Raises:
        ImageError: Signed or floating-point samples, which have no agreed range.
    """
    assert isinstance(image, TiffImagePlugin.TiffImageFile)
    bits, formats, photometric = _layout(image.tag_v2)
    _check_range(bits, formats)
    if image.mode[0] != "I":
        return SIXTEEN
    return Samples(maximum=2 ** bits[0] - 1, inverted=photometric == 0)


def refusal(data: bytes) -> ImageError:
    """The reason why a TIFF that Pillow does not open cannot be read."""
    file = io.BytesIO(data)
    head = file.read(8)
    if head[2:3] == b"+" or head[3:4] == b"+":
        head += file.read(8)
    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(head)
        file.seek(tags.next)
        tags.load(file)
        bits, formats, photometric = _layout(tags)
        _check_range(bits, formats)
    except ImageError as error:
        return error
    except Exception:  # a damaged directory can raise anything
        return ImageError("damaged image (a TIFF whose tags cannot be read)")
    if _PHOTOMETRIC not in tags:
        return ImageError("damaged image (a TIFF without the tag PhotometricInterpretation)")
    color = _COLORS.get(photometric, f"photometric interpretation {photometric}")
    each = " + ".join(map(str, bits))
    return ImageError(
        f"a TIFF with unsupported samples ({color}, {each} bits): save it with 8 or 16 bits a sample"
    )


def _layout(tags: TiffImagePlugin.ImageFileDirectory_v2) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Bits and format of each sample, and the photometric interpretation, all by the defaults of TIFF 6."""
    bits, formats = tags.get(_BITS, (1,)), tags.get(_FORMAT, (1,))
    return tuple(bits)[:8], tuple(formats)[:8], tags.get(_PHOTOMETRIC, -1)


def _check_range(bits: tuple[int, ...], formats: tuple[int, ...]) -> None:
    for code, what in ((_FLOAT, "float"), (_SIGNED, "signed integer")):
        if code in formats:
            raise ImageError(
                f"{max(bits)}-bit {what} samples have no agreed range: save the image with 8 or 16 unsigned bits"
            )
