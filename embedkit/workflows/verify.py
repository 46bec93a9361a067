"""Verification: whether two images, or the faces in them, show one identity."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from embedkit.analysis.matching.calibration import Calibration, Verification, verify_vectors
from embedkit.encoder import Encoder
from embedkit.errors import ConfigError
from embedkit.images.transform import ImageLike
from embedkit.workflows.faces.encoder import FaceEncoder
from embedkit.workflows.faces.finder import Face, choose_face

__all__ = ["FaceVerification", "Verification", "entry_threshold", "verify"]


@dataclass(frozen=True)
class FaceVerification(Verification):
    """Whether two images hold faces of one identity: the most similar pair of their faces.

    Attributes:
        part_a: The face of the first image, 0 the largest.
        part_b: The face of the second one.
        pairs: How many pairs of faces were compared. Each has its own chance of a false match, so `expected_fmr` is at
            most that of one pair times their number; `probability` is None for more than one.
    """

    part_a: int = 0
    part_b: int = 0
    pairs: int = 1


def verify(
    encoder: Encoder | FaceEncoder,
    image_a: ImageLike | Face | Sequence[Face],
    image_b: ImageLike | Face | Sequence[Face],
    threshold: float | None = None,
    calibration: Calibration | None = None,
    faces: bool = False,
) -> Verification:
    """Decide whether two images show one identity.

    Args:
        encoder: The encoder; a `FaceEncoder` to find the faces of photographs first.
        image_a: A path, the bytes of an image file, a Pillow image, a uint8 array, or a face or faces that were found.
        image_b: The other one.
        threshold: The least cosine of a match; overrides the calibration's.
        calibration: Of this encoder's space; gives the threshold and the expected error. Without it and without a
            threshold, the entry's own threshold decides, if it has one.
        faces: Compare the aligned faces of the images; else whole images.

    Returns:
        Score, threshold, decision, and with a calibration the expected false-match rate. Of faces a `FaceVerification`:
        where an image has several, that of the most similar pair.

    Raises:
        ImageError: An image cannot be read, or has no face; the message names it.
        ConfigError: Neither a calibration nor a threshold, nor one in the entry.
        SpaceMismatchError: The calibration is of another space.

    Examples:
        >>> encoder = embedkit.load_encoder()
        >>> embedkit.verify(encoder, "samples/cat.jpg", "samples/cat-closer.jpg", threshold=0.8).is_match
        True
        >>> calibration = embedkit.Calibration.load("calibration.json")
        >>> result = embedkit.verify(encoder, "samples/cat.jpg", "samples/rocket.jpg", calibration=calibration)
        >>> result.is_match, result.threshold == calibration.threshold
        (False, True)
    """
    if faces and not isinstance(encoder, FaceEncoder):
        encoder = FaceEncoder(encoder)
    embeds = encoder.encoder if isinstance(encoder, FaceEncoder) else encoder
    if calibration is not None:
        calibration._check_space(embeds.metadata(), "this encoder")
    elif threshold is None:
        threshold = entry_threshold(embeds)
    first, second = (
        embeds.encode(_pixels_of(encoder, image, name))
        for name, image in (("the first image", image_a), ("the second image", image_b))
    )
    part_a, part_b = (
        int(part) for part in np.unravel_index(np.argmax(first @ second.T), (len(first), len(second)))
    )
    found = verify_vectors(first[part_a], second[part_b], calibration=calibration, threshold=threshold)
    if not isinstance(encoder, FaceEncoder) and not (_given_faces(image_a) or _given_faces(image_b)):
        return found
    pairs = len(first) * len(second)
    rate = None if found.expected_fmr is None else min(1.0, found.expected_fmr * pairs)
    return FaceVerification(
        score=found.score,
        threshold=found.threshold,
        is_match=found.is_match,
        expected_fmr=rate,
        probability=found.probability if pairs == 1 else None,
        part_a=part_a,
        part_b=part_b,
        pairs=pairs,
    )


def _given_faces(image: ImageLike | Face | Sequence[Face]) -> list[Face]:
    """The faces that were given in place of an image; none for an image."""
    several = image if isinstance(image, (list, tuple)) else [image]
    return [face for face in several if isinstance(face, Face)]


def _pixels_of(
    encoder: Encoder | FaceEncoder, image: ImageLike | Face | Sequence[Face], name: str
) -> list[ImageLike]:
    """What is embedded of an image: the chips of its faces, of which there is at least one; or the image."""
    if given := _given_faces(image):
        return [face.chip for face in given]
    image = cast("ImageLike", image)
    if not isinstance(encoder, FaceEncoder):
        return [image]
    found = encoder.finder.examine(image)
    if not found.faces:
        where = os.fspath(image) if isinstance(image, (str, os.PathLike)) else name
        choose_face([], where=where, refused=found.refused)
    return [face.chip for face in found.faces]


def entry_threshold(encoder: Encoder) -> float:
    """The entry's own least cosine of a match.

    Raises:
        ConfigError: The entry has none.
    """
    rule = encoder.config.provenance.get("verification")
    value = rule.get("cosine") if isinstance(rule, dict) else None
    if not isinstance(value, (int, float)) or not -1 <= value <= 1:
        raise ConfigError(
            f"threshold: {encoder.name} has none of its own; give one, or a calibration that `embedkit calibrate` made "
            "from images like yours"
        )
    return float(value)
