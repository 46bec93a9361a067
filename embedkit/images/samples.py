"""Gray samples of more than 8 bits: their greatest value, which end is white, which value is transparent."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Samples:
    """How wide gray samples become 8 bits.

    Attributes:
        maximum: The value of the bright end, 2**bits - 1.
        inverted: Whether 0 is white.
        clear: The value that means full transparency; None if there is none.
    """

    maximum: int
    inverted: bool = False
    clear: int | None = None

    def to_gray(self, image: Image.Image) -> Image.Image:
        """An image of one of Pillow's modes I and I;16 as `L`, rounded, transparent pixels as white."""
        values = np.asarray(image)
        if self.maximum > 0xFFFF:
            levels = (values.view(np.uint32).astype(np.uint64) * 510 + self.maximum) // (2 * self.maximum)
        elif self.maximum == 0xFFFF:
            levels = (np.clip(values, 0, 0xFFFF).astype(np.uint32) + 128) // 257
        else:
            wide = np.clip(values, 0, self.maximum).astype(np.uint32)
            levels = (wide * 510 + self.maximum) // (2 * self.maximum)
        gray = levels.astype(np.uint8)
        if self.inverted:
            gray = 255 - gray
        if self.clear is not None:
            gray[values == self.clear] = 255
        return Image.fromarray(gray)


#: 65535 is white, as in PNG and PGM, and nothing is transparent.
SIXTEEN = Samples(maximum=0xFFFF)
