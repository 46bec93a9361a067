"""Landmarks of a face that may be turned, and whether there is a face at all.

A landmark network gives 68 points for anything, a cat or a wall too. Those of a face stay where they are when the crop
is shifted, enlarged or mirrored; those of anything else move. So the network marks several crops of one box, and the
points count only if they agree. The crops are turned until they do, which is how a face on its side is put upright.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from embedkit.images.transform import read_pixels
from embedkit.model.engines.onnx import OnnxEngine
from embedkit.model.preprocess import Preprocess
from embedkit.workflows.faces.alignment import roll_of

__all__ = ["MAX_MIRRORED", "MAX_MOVED", "Landmarker", "Marked", "from_input"]

#: How far the points of a face move at most, in lengths of the face (root mean square over points): when its crop is
#: shifted and enlarged, and when it is mirrored. Of 100 small faces of LFW 99 stay below both, the median at 0.025 and
#: 0.036; of 450 images without a face none does (benchmarks/faces.py).
MAX_MOVED, MAX_MIRRORED = 0.075, 0.105
#: A face that is found turned must agree better, since many turns are tried.
TURNED = 0.8
#: The turns that are tried, in degrees counterclockwise. The network itself bears some 40 degrees to either side; more
#: turns would let more drawn faces pass.
TURNS = (0, 90, 180, 270)
#: How far from upright a face may be in the crop that was turned, in degrees.
_MAX_ROLL = 40.0
#: Crops of one box beside the box itself: shifted by shares of its sides, and enlarged.
_CROPS = ((0.06, 0.04, 1.1), (-0.06, -0.04, 1.2), (0.05, -0.05, 1.05), (-0.04, 0.06, 1.15))
#: Crops in one run of the network: 10 MB of pixels.
_BATCH = 64

#: The points that change places when a face is mirrored: jaw, brows, nostrils, eyes, mouth.
_PAIRS = [
    *zip(range(8), range(16, 8, -1), strict=True), *zip(range(17, 22), range(26, 21, -1), strict=True),
    (31, 35), (32, 34), (36, 45), (37, 44), (38, 43), (39, 42), (40, 47), (41, 46), (48, 54), (49, 53), (50, 52),
    (59, 55), (58, 56), (60, 64), (61, 63), (67, 65),
]  # fmt: skip
_MIRRORED = np.arange(68)
for _one, _other in _PAIRS:
    _MIRRORED[[_one, _other]] = _other, _one


@dataclass(frozen=True, eq=False)
class Marked:
    """The landmarks of one box.

    Attributes:
        points: float64 (68, 2), in the image's pixels.
        moved: How far they move when the crop changes, in lengths of the face.
        mirrored: How far they move when it is mirrored.
        turn: The turn of the crop that gave them, in degrees counterclockwise.
        roll: How far the face is turned from upright, in degrees counterclockwise.
    """

    points: np.ndarray
    moved: float
    mirrored: float
    turn: int
    roll: float

    @property
    def fault(self) -> float:
        """How far the points move, in (0, 1] for those of a face."""
        fault = max(self.moved / MAX_MOVED, self.mirrored / MAX_MIRRORED)
        if not self.turn:
            return fault
        # In the crop the face must be upright, or another turn is the right one.
        rest = (self.roll + self.turn + 180) % 360 - 180
        return fault / TURNED if abs(rest) <= _MAX_ROLL else math.inf

    @property
    def is_face(self) -> bool:
        """Whether the points agree."""
        return self.fault <= 1


class Landmarker:
    """Boxes of an image -> the landmarks of each. Thread-safe."""

    def __init__(self, engine: OnnxEngine, preprocess: Preprocess):
        """Take a network of 68 points and its contract."""
        self._engine, self._preprocess = engine, preprocess

    def mark(self, image: Image.Image, boxes: np.ndarray) -> list[Marked]:
        """Landmarks of boxes, float (N, 4): those of the first turn at which they agree, or else nearly do."""
        best = self._marked(image, boxes, TURNS[0])
        rest = [index for index, marked in enumerate(best) if not marked.is_face]
        for turn in TURNS[1:] if rest else ():
            for index, marked in zip(rest, self._marked(image, boxes[rest], turn), strict=True):
                best[index] = min(best[index], marked, key=lambda one: one.fault)
        return best

    def _marked(self, image: Image.Image, boxes: np.ndarray, turn: int) -> list[Marked]:
        crops: list[_Crop] = []
        for box in boxes:
            own = _crop(image, box, turn)
            crops += [own, _Crop(ImageOps.mirror(own.pixels), _mirror(own.pixels.width) @ own.matrix)]
            crops += [_crop(image, _moved(box, *change), turn) for change in _CROPS]
        points = self._points(crops)
        each = 2 + len(_CROPS)
        return [_judged(np.stack(points[at : at + each]), turn) for at in range(0, len(points), each)]

    def _points(self, crops: Sequence[_Crop]) -> list[np.ndarray]:
        """The points of crops, float64 (68, 2) each, in the image's pixels."""
        found: list[np.ndarray] = []
        for at in range(0, len(crops), _BATCH):
            several = crops[at : at + _BATCH]
            pixels = [read_pixels(crop.pixels, self._preprocess, decode="exact") for crop in several]
            shares = self._engine.run_all(np.stack(pixels))["points"].astype(np.float64)  # (N, 68, 2)
            for crop, share in zip(several, shares, strict=True):
                inside = from_input(share, crop.pixels.size, self._preprocess)
                back = np.linalg.inv(crop.matrix)
                found.append(inside @ back[:2, :2].T + back[:2, 2])
        return found


class _Crop(NamedTuple):
    """A part of an image, and the matrix (3, 3) from the image's pixels to the part's."""

    pixels: Image.Image
    matrix: np.ndarray


def _crop(image: Image.Image, box: np.ndarray, turn: int) -> _Crop:
    """A box, turned counterclockwise about its middle by quarters."""
    # The network wants whole pixels.
    left, top = (int(value) for value in np.floor(box[:2]))
    right, bottom = (int(value) for value in np.ceil(box[2:]))
    width, height = right - left, bottom - top
    if turn % 180:
        width, height = height, width
    cosine, sine = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    middle = np.array([(left + right) / 2, (top + bottom) / 2])
    spin = np.array([[cosine, sine], [-sine, cosine]])  # y points down
    matrix = np.eye(3)
    matrix[:2, :2], matrix[:2, 2] = spin, np.array([width, height]) / 2 - spin @ middle
    if not turn:
        return _Crop(image.crop((left, top, right, bottom)), matrix)
    back = np.linalg.inv(matrix)[:2]
    pixels = image.transform(
        (width, height), Image.Transform.AFFINE, tuple(back.ravel().tolist()), Image.Resampling.BILINEAR
    )
    return _Crop(pixels, matrix)


def _moved(box: np.ndarray, across: float, down: float, scale: float) -> np.ndarray:
    sides, middle = box[2:] - box[:2], (box[:2] + box[2:]) / 2
    middle = middle + sides * (across, down)
    result: np.ndarray = np.concatenate([middle - sides * scale / 2, middle + sides * scale / 2])
    return result


def _mirror(width: int) -> np.ndarray:
    return np.array([[-1.0, 0, width], [0, 1, 0], [0, 0, 1]])


def _judged(points: np.ndarray, turn: int) -> Marked:
    """What points of the crops of one box, (6, 68, 2), amount to: the box itself, its mirror image, the others."""
    own = points[0]
    left, right, mouth = own[36:42].mean(axis=0), own[42:48].mean(axis=0), own[48:].mean(axis=0)
    length = math.dist(left, right) + math.dist((left + right) / 2, mouth)
    if not length > 0:
        return Marked(own, math.inf, math.inf, turn, 0.0)

    def far(others: np.ndarray) -> float:
        return float(np.sqrt(((others - own) ** 2).sum(axis=-1).mean())) / length

    return Marked(own, far(points[2:]), far(points[1][_MIRRORED]), turn, roll_of(own))


def from_input(shares: np.ndarray, size: tuple[int, int], preprocess: Preprocess) -> np.ndarray:
    """Places as shares of the network's input, (..., 2), in pixels of the image of this (width, height)."""
    height, width = preprocess.size
    kept_w, kept_h = width, height
    if preprocess.resize == "longest":
        side, (short, long) = preprocess.resize_size, sorted(size)
        other = max(1, round(side * short / long))
        kept_w, kept_h = (other, side) if size[0] <= size[1] else (side, other)
    margin = np.array([(width - kept_w) // 2, (height - kept_h) // 2])
    result: np.ndarray = (shares * (width, height) - margin) * np.array([size[0] / kept_w, size[1] / kept_h])
    return result
