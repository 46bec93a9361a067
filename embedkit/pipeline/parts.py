"""Parts of images that get a row each, such as faces: what the job asks of the one who finds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np

__all__ = ["Part", "PartFinder"]


class Part(NamedTuple):
    """One part of an image.

    Attributes:
        pixels: uint8 (H, W, 3), what the encoder embeds.
        labels: The values of the finder's columns.
    """

    pixels: np.ndarray
    labels: Mapping[str, object]


class PartFinder(Protocol):
    """Finds the parts of images; used in one thread.

    Attributes:
        name: What the parts are, for messages: `face`.
        columns: Its columns, name -> Arrow type name.
    """

    @property
    def name(self) -> str:
        """What the parts are, for messages."""

    @property
    def columns(self) -> Mapping[str, str]:
        """Name -> Arrow type name."""

    def find(self, data: bytes) -> list[Part]:
        """The parts of the image in these bytes, numbered from 0 in this order; they may be none.

        Raises:
            ImageError: It cannot be read.
        """
