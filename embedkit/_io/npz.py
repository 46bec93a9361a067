"""Read arrays of an untrusted `.npz` file, with bounds that are checked before anything is decompressed."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.lib import format as npy

from embedkit._io.text import one_line

__all__ = ["read_npz"]

#: Bytes of an array's header, at most: numpy's own bound.
_HEADER = 10_000


def read_npz(data: bytes, names: Iterable[str], *, limit: int) -> dict[str, np.ndarray]:
    """Read arrays of numbers that together take at most `limit` bytes.

    Each array's header is read and its size computed before memory is allocated; bytes beyond that size are never
    decompressed.

    Args:
        data: The file's bytes.
        names: The arrays to read; others are ignored.
        limit: Greatest sum of their sizes in bytes.

    Raises:
        ValueError: Not a `.npz` file, or an array that is missing, of Python objects, too large, or truncated.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            found: dict[str, np.ndarray] = {}
            for name in names:
                found[name] = array = _read(archive, name, limit)
                limit -= array.nbytes
            return found
    except ValueError:
        raise
    except Exception as error:  # zipfile, zlib and the parser of numpy's header each have errors of their own
        raise ValueError(one_line(error)) from None


def _read(archive: zipfile.ZipFile, name: str, limit: int) -> np.ndarray:
    try:
        member = archive.open(f"{name}.npy")
    except KeyError:
        raise ValueError(f"it has no array {name!r}") from None
    if archive.getinfo(member.name).compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name}: it is compressed in another way than numpy does")  # and without a bound
    with member:
        version = npy.read_magic(member)
        readers: Mapping[tuple[int, int], Any] = {
            (1, 0): npy.read_array_header_1_0,
            (2, 0): npy.read_array_header_2_0,
        }
        if version not in readers:
            raise ValueError(f"{name}: an array of format {version[0]}.{version[1]} is not known")
        shape, fortran, dtype = readers[version](member, max_header_size=_HEADER)
        size = math.prod(shape) * dtype.itemsize
        if dtype.hasobject or dtype.kind not in "biuf":
            raise ValueError(f"{name}: expected numbers, found {dtype}")
        if not 0 <= size <= limit or any(length < 0 for length in shape):
            raise ValueError(f"{name}: expected at most {limit} bytes, found {dtype} of shape {shape}")
        content = member.read(size + 1)
    if len(content) != size:
        raise ValueError(f"{name}: its bytes are not those of {dtype} of shape {shape}")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")
