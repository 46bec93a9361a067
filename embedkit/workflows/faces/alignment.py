"""Alignment of a face by its landmarks: the upright chip that a face encoder takes.

The least-squares similarity that maps the landmarks to dlib's mean face gives the chip that dlib's encoder was trained
on.

Sources: alignment, Umeyama, Least-Squares Estimation of Transformation Parameters Between Two Point Patterns (TPAMI
1991, equations 34-43); the mean face and the points that are used, dlib's `get_face_chip_details`.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from embedkit.errors import ImageError

__all__ = ["CHIP", "PADDING", "chip_of", "roll_of", "sharpness_of", "similarity_transform"]

#: Side of a chip in pixels, and its margin around the mean face as a share of the face.
CHIP, PADDING = 150, 0.25

#: The points that align a face (nose, eyes, upper lip; brows and lower lip move too much), and where they lie in dlib's
#: mean face, as shares of its width and height.
_POINTS = [*range(27, 55), *range(60, 65)]
_MEAN_FACE = np.array(
    [
        # nose
        (0.490127, 0.203352), (0.490127, 0.307009), (0.490127, 0.409805), (0.490127, 0.515625), (0.366880, 0.587326),
        (0.426036, 0.609345), (0.490127, 0.628106), (0.554217, 0.609345), (0.613373, 0.587326),
        # left and right eye of the image
        (0.121737, 0.216423), (0.187122, 0.178758), (0.265825, 0.179852), (0.334606, 0.231733), (0.260918, 0.245099),
        (0.182743, 0.244077), (0.645647, 0.231733), (0.714428, 0.179852), (0.793132, 0.178758), (0.858516, 0.216423),
        (0.797510, 0.244077), (0.719335, 0.245099),
        # upper lip, its outer and inner edge
        (0.254149, 0.780233), (0.340985, 0.745405), (0.428858, 0.727388), (0.490127, 0.742578), (0.551395, 0.727388),
        (0.639268, 0.745405), (0.726104, 0.780233), (0.290379, 0.784792), (0.428096, 0.778746), (0.490127, 0.785343),
        (0.552157, 0.778746), (0.689874, 0.784792),
    ]
)  # fmt: skip


def similarity_transform(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The rotation, scale and shift (no reflection) that takes `source` nearest to `target` in least squares.

    Args:
        source: float (P, 2).
        target: float (P, 2).

    Returns:
        float64 (2, 3), A: target ~ source @ A[:, :2].T + A[:, 2].

    Raises:
        ImageError: All points of the source are one.
    """
    source, target = np.asarray(source, np.float64), np.asarray(target, np.float64)
    source_mean, target_mean = source.mean(axis=0), target.mean(axis=0)
    x, y = source - source_mean, target - target_mean
    spread = np.mean(np.sum(x * x, axis=1))  # equation 36
    if not spread > 0:
        raise ImageError("the landmarks of a face lie all in one place, so it cannot be aligned")
    u, d, vt = np.linalg.svd(y.T @ x / len(x))  # equation 38
    sign = np.array([1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt))])  # equations 39 and 43
    rotation = u @ np.diag(sign) @ vt  # equation 40
    scale = float(d @ sign) / spread  # equation 42
    return np.column_stack([scale * rotation, target_mean - scale * rotation @ source_mean])  # equation 41


def chip_of(image: Image.Image, points: np.ndarray, size: int = CHIP, padding: float = PADDING) -> np.ndarray:
    """Cut a face out, upright, of one size and in the middle, as dlib's encoder was trained on.

    Args:
        image: RGB.
        points: float (68, 2), in pixels.
        size: Side of the chip, in pixels.
        padding: Margin on each side, as a share of the mean face.

    Returns:
        uint8 (size, size, 3); black beyond the image's edge.

    Raises:
        ImageError: The points lie all in one place.
    """
    places = (_MEAN_FACE + padding) / (1 + 2 * padding) * size  # (33, 2), in the chip's pixels
    # From the image to the chip, as dlib fits it the other way: errors count in the image's pixels there.
    matrix = similarity_transform(places, np.asarray(points)[_POINTS])
    # Pillow takes single samples: a large face is drawn larger first, and then averaged.
    factor = min(8, max(1, math.ceil(math.hypot(matrix[0, 0], matrix[1, 0]))))
    matrix = matrix / np.array([factor, factor, 1])
    drawn = image.transform(
        (size * factor, size * factor),
        Image.Transform.AFFINE,
        tuple(matrix.ravel().tolist()),
        Image.Resampling.BILINEAR,
    )
    return np.asarray(drawn.reduce(factor) if factor > 1 else drawn)


def roll_of(points: np.ndarray) -> float:
    """How far a face is turned from upright, in degrees counterclockwise, in [-180, 180].

    Args:
        points: float (68, 2), in pixels.

    Raises:
        ImageError: The points lie all in one place.
    """
    matrix = similarity_transform(np.asarray(points)[_POINTS], _MEAN_FACE)
    return math.degrees(math.atan2(matrix[1, 0], matrix[0, 0]))


def sharpness_of(chip: np.ndarray) -> float:
    """How sharp a chip is: the variance of its Laplacian, in squared gray values; a blurred or small face has little.

    Source: Pech-Pacheco et al., Diatom Autofocusing in Brightfield Microscopy (ICPR 2000).

    Args:
        chip: uint8 (H, W, 3).
    """
    gray = np.asarray(Image.fromarray(chip).convert("L"), np.float64)
    inner = gray[1:-1, 1:-1]
    laplacian = gray[:-2, 1:-1] + gray[2:, 1:-1] + gray[1:-1, :-2] + gray[1:-1, 2:] - 4 * inner
    return float(laplacian.var())
