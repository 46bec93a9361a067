"""JPEGs without an end mark: which of them are nevertheless complete."""

from __future__ import annotations

import hashlib
import io
import random

from PIL import JpegImagePlugin

END = b"\xff\xd9"
#: Markers without a length.
_ALONE = {0x01, *range(0xD0, 0xD9)}
_FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, extended, progressive: what libjpeg-turbo decodes with Huffman codes


def completed(data: bytes) -> bytes | None:
    """A JPEG with its end mark, if only that was missing; None if anything else is missing too.

    The end mark holds no pixels, but a file without it is usually truncated. The file is complete if it holds every
    coefficient to its last bit (a progressive file may lack whole scans), and if bytes appended to it change no pixel:
    the missing part of a scan would be read from there.
    """
    cut = data[:-1] if data.endswith(b"\xff") else data
    if not _every_scan_began(cut):
        return None
    # A decoder takes zeros for bits that are missing before the end mark; the noise begins with ones.
    noise = b"\xfe" * 8 + bytes(random.Random(0).choices(range(1, 255), k=1 << 16))
    whole = cut + END
    try:
        return whole if _digest(whole) == _digest(cut + noise + END) else None
    except Exception:  # any error of a decoder: the file is not complete
        return None


def _every_scan_began(data: bytes) -> bool:
    """Whether the scans cover every coefficient of every component to its last bit, and the file ends in a scan."""
    at, missing, last = 2, None, 0
    while True:
        at = data.find(b"\xff", at)
        if at < 0 or at + 1 >= len(data):
            return last == 0xDA and missing is not None and not missing
        marker = data[at + 1]
        if marker in (0x00, 0xFF) or marker in _ALONE:
            at += 1 if marker == 0xFF else 2
            continue
        size = int.from_bytes(data[at + 2 : at + 4], "big")
        body = data[at + 4 : at + 2 + size]
        if size < 2 or len(body) != size - 2 or marker == 0xD9:
            return False
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if marker not in _FRAMES or len(body) < 6 + 3 * body[5]:
                return False
            # (component, coefficient) whose last bit has not been read yet
            missing = {(body[6 + 3 * one], k) for one in range(body[5]) for k in range(64)}
        elif marker == 0xDA:
            count = body[0] if body else 0
            if missing is None or len(body) < 4 + 2 * count:
                return False
            first, final, low = body[1 + 2 * count], body[2 + 2 * count], body[3 + 2 * count] & 15
            if not low:
                missing -= {(body[1 + 2 * one], k) for one in range(count) for k in range(first, final + 1)}
        at, last = at + 2 + size, marker


def _digest(data: bytes) -> bytes:
    """The sha256 of all pixels, strip by strip."""
    digest = hashlib.sha256()
    with JpegImagePlugin.JpegImageFile(io.BytesIO(data)) as image:
        image.load()
        rows = max(1, (1 << 22) // image.width)
        for top in range(0, image.height, rows):
            box = (0, top, image.width, min(top + rows, image.height))
            digest.update(image.crop(box).tobytes())
    return digest.digest()
