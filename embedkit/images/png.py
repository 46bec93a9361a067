"""The essential chunks of a PNG, for a second attempt after a decoder failed on another chunk."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

SIGNATURE = b"\x89PNG\r\n\x1a\n"
#: Ancillary chunks that change how the pixels look.
_LOOKS = (b"tRNS", b"eXIf")
#: Greatest size of an unpacked color profile in bytes; the tables of a printing press take a few megabytes.
_PROFILE_BYTES = 16 << 20


def essential(data: bytes) -> tuple[bytes, bytes | None]:
    """A PNG without comments and other chunks that no pixel needs, and its color profile.

    Pillow fails on a comment of over 1 MB, on comments of 64 MB in total, and on a wrong checksum of any chunk. Like
    libpng, this leaves such a chunk out.

    Args:
        data: The bytes of a PNG file.

    Returns:
        The file without them, and the ICC profile; None if there is no readable one.
    """
    parts, profile = [SIGNATURE], None
    for kind, body, whole, sound in _chunks(data):
        if not kind[0] & 0x20:  # critical: an upper-case first letter; the decoder checks its checksum
            parts.append(whole)
        elif kind == b"iCCP" and sound:
            profile = _profile(body)
        elif kind in _LOOKS and sound:
            parts.append(whole)
    return b"".join(parts), profile


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes, bytes, bool]]:
    """Kind, content, the whole chunk, and whether its checksum is right; the last one may be truncated."""
    at = len(SIGNATURE)
    while at + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        whole = data[at : at + 12 + size]
        sound = len(whole) == 12 + size and zlib.crc32(whole[4:-4]) == int.from_bytes(whole[-4:], "big")
        yield kind, whole[8 : 8 + size], whole, sound
        at += 12 + size


def _profile(body: bytes) -> bytes | None:
    """The ICC profile of an iCCP chunk: a name, a zero, the method 0, and the deflated profile."""
    _, zero, packed = body.partition(b"\0")
    unpack = zlib.decompressobj()
    try:
        profile = unpack.decompress(packed[1:], _PROFILE_BYTES)
    except zlib.error:
        return None
    return profile if zero and unpack.eof else None
