"""What the detector is shown of an image, and how the boxes that it finds there become the image's.

The detector takes squares of one size, so a long image would be shown small. It is also shown as overlapping squares.
A face may be cut by a square's edge: such a box stays only where no other one covers it.

Source: non-maximum suppression, Felzenszwalb et al., Object Detection with Discriminatively Trained Part-Based Models
(TPAMI 2010, section 6).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

__all__ = ["MAX_OVERLAP", "View", "best_boxes", "merged_boxes", "page", "views_of"]

#: How much two boxes of one face may overlap (intersection over union), and how much of a box may lie inside another
#: one that was found in another view.
MAX_OVERLAP, MAX_INSIDE = 0.4, 0.7
#: An image is long if its longer side is this many times its shorter one.
LONG = 1.4
#: How far two neighboring squares of a long image overlap at least, as a share of their side.
SHARED = 0.5
#: Margin of a page around the image, as a share of its sides: a face that fills the image has its surroundings there.
MARGIN = 0.5
#: Squares along the longer side at most: those of an even longer image reach beyond its shorter side.
MOST = 11
#: A box is cut if it ends this near to the edge of a square, as a share of the square's side.
_EDGE = 0.02

_TURNS = {1: Image.Transpose.ROTATE_90, 2: Image.Transpose.ROTATE_180, 3: Image.Transpose.ROTATE_270}


class View(NamedTuple):
    """A part of an image, turned.

    Attributes:
        box: Left, top, right and bottom in the image's pixels; what lies beyond the image is black.
        turn: Quarter turns of the part, counterclockwise.
    """

    box: tuple[int, int, int, int]
    turn: int = 0

    def pixels(self, image: Image.Image) -> Image.Image:
        """The part of this image."""
        part = image if self.box == (0, 0, *image.size) else image.crop(self.box)
        return part.transpose(_TURNS[self.turn]) if self.turn else part

    def points(self, points: np.ndarray) -> np.ndarray:
        """Points of the part, float (..., 2), as points of the image."""
        left, top, right, bottom = self.box
        width, height = right - left, bottom - top
        x, y = points[..., 0], points[..., 1]
        x, y = ((x, y), (width - y, x), (width - x, height - y), (y, height - x))[self.turn]
        return np.stack([x + left, y + top], axis=-1)

    def boxes(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes of the part, float (N, 4), as boxes of the image."""
        corners = self.points(boxes.reshape(-1, 2, 2))
        return np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)


def views_of(size: tuple[int, int]) -> list[View]:
    """The whole image, and of a long one the overlapping squares along it.

    Args:
        size: Width and height in pixels.
    """
    whole = View((0, 0, *size))
    short, long = sorted(size)
    if long < LONG * short:
        return [whole]
    side = max(short, math.ceil(long / (1 + (MOST - 1) * (1 - SHARED))))
    count = 1 + math.ceil((long - side) / (side * (1 - SHARED)))
    starts = [round(start) for start in np.linspace(0, long - side, count).tolist()]
    if size[0] < size[1]:
        return [whole, *(View((0, start, side, start + side)) for start in starts)]
    return [whole, *(View((start, 0, start + side, side)) for start in starts)]


def page(size: tuple[int, int], turn: int = 0) -> View:
    """The image in the middle of a black page, turned; `size` is its width and height in pixels."""
    width, height = size
    across, down = math.ceil(MARGIN * width), math.ceil(MARGIN * height)
    return View((-across, -down, width + across, height + down), turn)


def best_boxes(boxes: np.ndarray, scores: np.ndarray, max_overlap: float = MAX_OVERLAP) -> list[int]:
    """Non-maximum suppression: the best box, without those that overlap it too much, and so on.

    Args:
        boxes: float (A, 4), left, top, right and bottom.
        scores: float (A,).
        max_overlap: The largest intersection over union of two boxes that both stay.

    Returns:
        Indices of the boxes that stay, the best first.
    """
    areas = _areas(boxes)
    left = np.argsort(-scores, kind="stable")
    kept: list[int] = []
    while len(left):
        best = int(left[0])
        kept.append(best)
        common = _common(boxes[best], boxes[left])
        overlap = common / (areas[left] + areas[best] - common)
        overlap[0] = math.inf  # itself, whatever its area
        left = left[overlap <= max_overlap]
    return kept


def merged_boxes(
    found: list[tuple[View, np.ndarray, np.ndarray]], size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """The boxes of several views as boxes of the image, each face once.

    Args:
        found: A view, its boxes, float (N, 4) in the view's pixels, and their scores (N,); suppressed already.
        size: Width and height of the image.

    Returns:
        Boxes float64 (F, 4) inside the image and scores (F,), the largest box first.
    """
    boxes = np.concatenate([view.boxes(several) for view, several, _ in found])
    scores = np.concatenate([several for _, _, several in found])
    views = np.concatenate([np.full(len(several), index) for index, (_, _, several) in enumerate(found)])
    cut = np.concatenate([_cut(view, view.boxes(several), size) for view, several, _ in found])
    boxes = np.clip(boxes, 0, np.tile(size, 2))
    sides = boxes[:, 2:] - boxes[:, :2]
    order = np.lexsort((-scores, cut))  # whole faces first, then by score
    kept: list[int] = []
    for index in order[(sides[order] >= 1).all(axis=1)].tolist():
        others = np.array(kept, int)
        common = _common(boxes[index], boxes[others])
        area, areas = _areas(boxes[index : index + 1]), _areas(boxes[others])
        same = common > MAX_OVERLAP * (area + areas - common)
        same |= (common > MAX_INSIDE * np.minimum(area, areas)) & (views[others] != views[index])
        if not same.any():
            kept.append(index)
    kept.sort(key=lambda index: -float(np.prod(sides[index])))
    return boxes[kept], scores[kept]


def _cut(view: View, boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Whether boxes end at an edge of the view inside the image, bool (N,)."""
    edges, ends = np.array(view.box), np.array([0, 0, *size])
    inner = np.concatenate([edges[:2] > ends[:2], edges[2:] < ends[2:]])
    near = np.abs(boxes - edges) <= _EDGE * (edges[2:] - edges[:2]).min()
    result: np.ndarray = (near & inner).any(axis=1)
    return result


def _areas(boxes: np.ndarray) -> np.ndarray:
    result: np.ndarray = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    return result


def _common(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """The area that a box shares with each of the boxes, (N,)."""
    first, last = np.maximum(boxes[:, :2], box[:2]), np.minimum(boxes[:, 2:], box[2:])
    result: np.ndarray = np.prod(np.clip(last - first, 0, None), axis=1)
    return result
