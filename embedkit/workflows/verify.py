"""Verification: whether two images, or the faces in them, show one identity."""

from __future__ import annotations

import os

from embedkit.analysis.matching.calibration import Calibration, Verification, verify_vectors
from embedkit.encoder import Encoder
from embedkit.errors import ConfigError
from embedkit.images.transform import ImageLike
from embedkit.workflows.faces.encoder import FaceEncoder
from embedkit.workflows.faces.finder import Face, choose_face

__all__ = ["Verification", "entry_threshold", "verify"]


def verify(
    encoder: Encoder | FaceEncoder,
    image_a: ImageLike | Face,
    image_b: ImageLike | Face,
    threshold: float | None = None,
    calibration: Calibration | None = None,
    faces: bool = False,
) -> Verification:
    """Decide whether two images show one identity.

    Args:
        encoder: The encoder; a `FaceEncoder` to find the faces of photographs first.
        image_a: A path, the bytes of an image file, a Pillow image, a uint8 array, or a face that was found.
        image_b: The other one.
        threshold: The least cosine of a match; overrides the calibration's.
        calibration: Of this encoder's space; gives the threshold and the expected error. Without it and without a
            threshold, the entry's own threshold decides, if it has one.
        faces: Compare the aligned face of each image, which must be the only one; else compare whole images.

    Returns:
        Score, threshold, decision, and with a calibration the expected false-match rate.

    Raises:
        ImageError: An image cannot be read, has no face, or has several; the message names it.
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
    rows = []
    for name, image in (("the first image", image_a), ("the second image", image_b)):
        if isinstance(encoder, FaceEncoder) and not isinstance(image, Face):
            where = os.fspath(image) if isinstance(image, (str, os.PathLike)) else name
            image = choose_face(encoder.finder.find(image), where=where)
        rows.append(embeds.encode(image.chip if isinstance(image, Face) else image)[0])
    return verify_vectors(rows[0], rows[1], calibration=calibration, threshold=threshold)


def entry_threshold(encoder: Encoder) -> float:
    """The entry's own least cosine of a match.

    Raises:
        ConfigError: The entry has none.
    """
    rule = encoder.config.provenance.get("verification")
    value = rule.get("cosine") if isinstance(rule, dict) else None
    if not isinstance(value, (int, float)) or not -1 <= value <= 1:
        raise ConfigError(
            f"{encoder.name} has no threshold of its own: give one, or a calibration that `embedkit calibrate` made "
            "from images like yours"
        )
    return float(value)
