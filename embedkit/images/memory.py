"""Memory of the decoding workers of one process: a budget for large images, and Pillow's memory blocks."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import threading
from collections.abc import Callable, Iterator

from PIL import Image

from embedkit.errors import ImageError

#: Greatest number of pixels of an ordinary image: converted in one piece, and decoded without waiting for others.
ORDINARY = 32_000_000
#: Pixels of one strip when a larger image is converted.
STRIP = 4_000_000


def check_size(size: tuple[int, int], max_pixels: int | None) -> None:
    """Refuse an image that has too many pixels, before they are decoded.

    Args:
        size: Width and height in pixels, by the header.
        max_pixels: Greatest number of pixels; as for Pillow, twice `Image.MAX_IMAGE_PIXELS`, when None.

    Raises:
        ImageError: It has more.
    """
    limit = _limit(max_pixels)
    if limit is not None and size[0] * size[1] > limit:
        raise ImageError(
            f"{size[0]}x{size[1]} pixels are more than {limit / 1e6:.0f} megapixels: refused as a decompression bomb; "
            f"if the image is genuine, use `embedkit embed --max-pixels {size[0] * size[1]}` (max_pixels in Python)"
        )


def _limit(max_pixels: int | None) -> int | None:
    if max_pixels is not None:
        return max_pixels
    return None if Image.MAX_IMAGE_PIXELS is None else 2 * Image.MAX_IMAGE_PIXELS


class PixelBudget:
    """Bounds the pixels of large images that are decoded at once; a further large image waits until there is room.

    Ordinary images never wait. An image larger than the whole budget waits until no other one is decoded.
    """

    def __init__(self, pixels: int):
        """Set the budget in pixels."""
        self._pixels, self._taken = pixels, 0
        self._room = threading.Condition()

    @contextlib.contextmanager
    def room(self) -> Iterator[Callable[[int], None]]:
        """Reserve room for one image.

        Yields:
            A function that waits for room for a number of pixels; call it before decoding them. The room is released at
            the end of the block; free the pixels before.
        """
        taken = 0

        def take(pixels: int) -> None:
            nonlocal taken
            if pixels <= ORDINARY:
                return
            with self._room:
                self._room.wait_for(lambda: not self._taken or self._taken + pixels <= self._pixels)
                self._taken += pixels
            taken = pixels

        try:
            yield take
        finally:
            if taken:
                _trim()
                with self._room:
                    self._taken -= taken
                    self._room.notify_all()

    def reset(self) -> None:
        """Reset the budget in a forked child, where no thread holds anything."""
        self._taken, self._room = 0, threading.Condition()


def _trim() -> None:
    """Return freed memory to the system: glibc would reserve it for the thread that freed it."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], object] | None:
    try:
        trim: Callable[[int], object] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library
        return None
    return trim


#: The budget of the process: the largest image that Pillow does not call a decompression bomb.
BUDGET = PixelBudget(180_000_000)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=BUDGET.reset)


class ReusedBlocks:
    """While one is active, Pillow reuses the memory of finished images for the next ones.

    Returning it to the system and faulting it in again takes a quarter of the time to decode an image of 500x375.
    Pillow holds at most a few blocks of up to 16 MB for each worker. A process that sets `PILLOW_BLOCKS_MAX` is not
    changed.
    """

    #: Images at a time: decoded, cropped, and resized in two passes.
    BLOCKS = 4
    _lock = threading.Lock()
    _held = 0

    def __init__(self, workers: int):
        """Reserve blocks for this number of decoding threads."""
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
            ReusedBlocks._held += blocks
            Image.core.set_blocks_max(ReusedBlocks._held)  # type: ignore[attr-defined]  # no public name
