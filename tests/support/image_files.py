"""Image files by hand: what Pillow does not write."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image

from embedkit.model.preprocess import Preprocess

#: sRGB's own primaries adapted to D50 (the colorants of every sRGB profile), and ones of a wide gamut.
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))
WIDE = ((0.6098, 0.3111, 0.0195), (0.2053, 0.6257, 0.0609), (0.1492, 0.0632, 0.7446))


def identity(height: int, width: int, **changes) -> Preprocess:
    """A contract that changes no pixel of an image of this size."""
    channels = 1 if changes.get("color", "rgb") != "rgb" else 3
    base = {"mean": (0.0,) * channels, "std": (1.0,) * channels, "resize": "squash", "resize_size": 0}
    return Preprocess(size=(height, width), **{**base, **changes})


def saved(image: Image.Image, format: str, **options) -> bytes:
    """The bytes of a file of this format."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    """A PNG chunk with its checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(samples: np.ndarray, color: int, depth: int, before: bytes = b"", behind: bytes = b"") -> bytes:
    """A PNG of samples (H, W) or (H, W, C) of the given color type and bits, with chunks around its pixels."""
    height, width = samples.shape[:2]
    if depth == 16:
        rows = [row.astype(">u2").tobytes() for row in samples]
    elif depth == 8:
        rows = [row.astype(np.uint8).tobytes() for row in samples]
    else:
        bits = (samples[..., None] >> np.arange(depth)[::-1]) & 1
        rows = [np.packbits(row.ravel()).tobytes() for row in bits]
    head = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = (chunk(b"IHDR", head), before, chunk(b"IDAT", data), behind, chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(samples: np.ndarray, bits: int, photometric: int = 1, kind: int | None = None) -> bytes:
    """A TIFF of one strip of samples (H, W), little-endian, packed where they are no whole bytes."""
    height, width = samples.shape
    if bits % 8:
        rows = ["".join(format_bits(value, bits) for value in row) for row in samples]
        rows = [row + "0" * (-len(row) % 8) for row in rows]
        strip = b"".join(int(row, 2).to_bytes(len(row) // 8, "big") for row in rows)
    else:
        strip = samples.astype(samples.dtype.newbyteorder("<")).tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 277: 1, 278: height}
    if kind is not None:
        tags[339] = kind
    entries = {tag: (3, value) for tag, value in tags.items()} | {279: (4, len(strip))}
    entries[273] = (4, 8 + 2 + 12 * (len(entries) + 1) + 4)
    body = b"".join(
        struct.pack("<HHI", tag, code, 1) + struct.pack("<H" if code == 3 else "<I", value).ljust(4, b"\0")
        for tag, (code, value) in sorted(entries.items())
    )
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + body + bytes(4) + strip


def format_bits(value: int, bits: int) -> str:
    """A number as so many binary digits."""
    return format(int(value), f"0{bits}b")


def profile(
    name: str, *, gamma: float | None = None, primaries=SRGB, curve: bytes = b"", space: str = "RGB"
) -> bytes:
    """An ICC version 2 display profile with one curve: `curve`, a gamma, or (None) linear light."""

    def fixed(*values: float) -> bytes:
        return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))

    text = name.encode() + b"\0"
    if not curve:
        curve = b"curv\0\0\0\0" + (bytes(4) if gamma is None else struct.pack(">IH", 1, round(gamma * 256)))
    white = (0.9642, 1.0, 0.8249)
    parts = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(78),
        b"cprt": b"text\0\0\0\0none\0",
        b"wtpt": b"XYZ \0\0\0\0" + fixed(*white),
    }
    if space == "GRAY":
        parts[b"kTRC"] = curve
    else:
        for letter, xyz in zip("rgb", primaries, strict=True):
            parts[f"{letter}XYZ".encode()] = b"XYZ \0\0\0\0" + fixed(*xyz)
            parts[f"{letter}TRC".encode()] = curve
    start, table, body = 128 + 4 + 12 * len(parts), b"", b""
    for tag, data in parts.items():
        data += bytes(-len(data) % 4)
        table += tag + struct.pack(">II", start + len(body), len(data))
        body += data
    head = (
        struct.pack(">I", start + len(body))
        + bytes(4)
        + b"\x02\x10\0\0mntr"
        + space.ljust(4).encode()
        + b"XYZ "
    )
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + fixed(*white)
    return head.ljust(128, b"\0") + struct.pack(">I", len(parts)) + table + body


def srgb_curve() -> bytes:
    """The curve of sRGB as a table of 1024 values, as in the profile that most cameras embed."""
    x = np.linspace(0, 1, 1024)
    linear = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    return b"curv\0\0\0\0" + struct.pack(">I", 1024) + (linear * 65535).round().astype(">u2").tobytes()
