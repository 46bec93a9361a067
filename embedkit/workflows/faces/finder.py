"""Face detection: boxes, 68 landmarks and an aligned chip for each face of an image.

A detector gives boxes and scores. Non-maximum suppression keeps the best box of each face, and a landmark network marks
its points.

Source: non-maximum suppression, Felzenszwalb et al., Object Detection with Discriminatively Trained Part-Based Models
(TPAMI 2010, section 6).
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from embedkit._io.atomic import replacing
from embedkit.encoder import open_engine, reason_of, resolve_threads
from embedkit.errors import ConfigError, EntryError, ImageError, OutputError
from embedkit.hub.access import default_cache_dir
from embedkit.hub.resolve import find_entry
from embedkit.images.transform import ImageLike, read_pixels, upright
from embedkit.model.engines.onnx import OnnxEngine
from embedkit.model.preprocess import Preprocess
from embedkit.model.providers import EngineOptions
from embedkit.workflows.faces.alignment import chip_of

__all__ = [
    "DETECTOR",
    "LANDMARKS",
    "MAX_OVERLAP",
    "MIN_SCORE",
    "Face",
    "FaceFinder",
    "best_boxes",
    "choose_face",
    "draw_faces",
]

DETECTOR = "face_detector-ssd_mobilenet1.widerface"
LANDMARKS = "face_landmarks-dense68.faceapi"
#: The least score of a face, and how much two boxes of one face may overlap (intersection over union).
MIN_SCORE, MAX_OVERLAP = 0.5, 0.4


@dataclass(frozen=True, eq=False)
class Face:
    """One face of an image. Pixels are those of the upright image, (0, 0) its upper left corner.

    Attributes:
        box: Left, top, right and bottom, in pixels.
        score: How sure the detector is, in [0, 1].
        points: float64 (68, 2), x and y in pixels, in dlib's order (iBUG 300-W).
        chip: uint8 (150, 150, 3), the face upright and in the middle; black beyond the image's edge.
    """

    box: tuple[float, float, float, float]
    score: float
    points: np.ndarray
    chip: np.ndarray


class FaceFinder:
    """Images -> faces, by a detector and a landmark network of the zoo. Thread-safe.

    Examples:
        >>> (face,) = embedkit.FaceFinder().find("samples/astronaut.jpg")
        >>> face.points.shape, face.chip.shape
        ((68, 2), (150, 150, 3))
    """

    def __init__(
        self,
        detector: str | os.PathLike[str] = DETECTOR,
        landmarks: str | os.PathLike[str] = LANDMARKS,
        *,
        device: str = "auto",
        threads: int | str = "auto",
    ):
        """Load both networks.

        Args:
            detector: A name or an entry's folder, as for `load_encoder`, of kind detector.
            landmarks: The same, of kind landmarks.
            device: `auto`, `cpu`, `cuda` or `cuda:<index>`.
            threads: Cores to keep busy, or `auto`.

        Raises:
            EntryNotFoundError: No zoo has one of them.
            EntryError: An entry is of another kind, or not what its files promise.
            DeviceError: What was asked for cannot run.
        """
        options = EngineOptions(
            device=device, threads=resolve_threads(threads), cache_dir=default_cache_dir()
        )
        (self._detector, self._detector_takes), (self._landmarks, self._landmarks_take) = (
            _open_kind(name, kind, options)
            for name, kind in ((detector, "detector"), (landmarks, "landmarks"))
        )

    def find(self, image: ImageLike, *, min_score: float = MIN_SCORE) -> list[Face]:
        """Find the faces of an image, the largest first.

        Args:
            image: A path, the bytes of an image file, a Pillow image, or a uint8 array (H, W, 3) or (H, W).
            min_score: The least score of a face, in [0, 1].

        Returns:
            The faces; none where nothing scores enough.

        Raises:
            ImageError: The image cannot be read; the message names it where it is a path.
            ConfigError: `min_score` is not a share.

        Examples:
            >>> finder = embedkit.FaceFinder()
            >>> len(finder.find("samples/astronaut.jpg")), finder.find("samples/rocket.jpg")
            (1, [])
        """
        if not 0 <= min_score <= 1:
            raise ConfigError(f"min_score: expected a number in [0, 1], found {min_score}")
        try:
            upright_image = upright(image)
        except (ImageError, OSError) as fault:
            if not isinstance(image, (str, os.PathLike)):
                raise
            raise ImageError(f"{os.fspath(image)}: {reason_of(fault)}") from None
        boxes, scores = self._boxes(upright_image, min_score)
        if not len(boxes):
            return []
        # The network wants whole pixels, and nothing beyond the edge.
        crops = np.concatenate([np.floor(boxes[:, :2]), np.ceil(boxes[:, 2:])], axis=1).astype(int)
        faces = [upright_image.crop(tuple(crop)) for crop in crops.tolist()]
        pixels = np.stack([read_pixels(face, self._landmarks_take, decode="exact") for face in faces])
        shares = self._landmarks.run_all(pixels)["points"]  # (F, 68, 2)
        points = [
            _from_input(share, face.size, self._landmarks_take) + crop[:2]
            for share, face, crop in zip(shares.astype(np.float64), faces, crops, strict=True)
        ]
        return [
            Face(tuple(box.tolist()), float(score), marks, chip_of(upright_image, marks))
            for box, score, marks in zip(boxes, scores, points, strict=True)
        ]

    def _boxes(self, image: Image.Image, min_score: float) -> tuple[np.ndarray, np.ndarray]:
        """Boxes float64 (F, 4) in the image's pixels and their scores (F,), the largest box first."""
        pixels = read_pixels(image, self._detector_takes, decode="exact")
        outputs = self._detector.run_all(pixels[None])
        boxes, scores = outputs["boxes"][0].astype(np.float64), outputs["scores"][0]
        enough = scores >= min_score
        boxes, scores = boxes[enough], scores[enough]
        corners = _from_input(boxes.reshape(-1, 2, 2), image.size, self._detector_takes)
        boxes = np.clip(corners, 0, image.size).reshape(-1, 4)
        sides = boxes[:, 2:] - boxes[:, :2]
        inside = (sides >= 1).all(axis=1)
        boxes, scores = boxes[inside], scores[inside]
        kept = best_boxes(boxes, scores)
        boxes, scores = boxes[kept], scores[kept]
        order = np.argsort(-np.prod(boxes[:, 2:] - boxes[:, :2], axis=1), kind="stable")
        return boxes[order], scores[order]


def choose_face(faces: Sequence[Face], part: int | None = None, *, where: str = "the image") -> Face:
    """The one face that is meant.

    Args:
        faces: Those of an image, the largest first.
        part: Its number, from 0; None where there must be just one.
        where: The image, for messages.

    Raises:
        ImageError: No face, several where one was expected, or none of this number.
    """
    count = len(faces)
    if not count:
        raise ImageError(
            f"{where}: no face was found; it must be upright and at least about 1/20 of the photograph's longer side "
            "high: crop the photograph, or turn it"
        )
    if part is None and count > 1:
        raise ImageError(
            f"{where}: {count} faces were found where one was expected; crop the photograph to one of them, or say "
            f"which, from 0 (the largest) to {count - 1}: part= in Python, and --part-a or --part-b in `embedkit "
            "verify`, where --draw-faces shows the numbers"
        )
    if part is not None and not 0 <= part < count:
        raise ImageError(f"{where}: there is no face {part}; the last one is {count - 1}")
    return faces[part or 0]


def best_boxes(boxes: np.ndarray, scores: np.ndarray, max_overlap: float = MAX_OVERLAP) -> list[int]:
    """Non-maximum suppression: the best box, without those that overlap it too much, and so on.

    Args:
        boxes: float (A, 4), left, top, right and bottom.
        scores: float (A,).
        max_overlap: The largest intersection over union of two boxes that both stay.

    Returns:
        Indices of the boxes that stay, the best first.
    """
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    left = np.argsort(-scores, kind="stable")
    kept: list[int] = []
    while len(left):
        best = int(left[0])
        kept.append(best)
        first, last = (
            np.maximum(boxes[left, :2], boxes[best, :2]),
            np.minimum(boxes[left, 2:], boxes[best, 2:]),
        )
        common = np.prod(np.clip(last - first, 0, None), axis=1)
        overlap = common / (areas[left] + areas[best] - common)
        overlap[0] = math.inf  # itself, whatever its area
        left = left[overlap <= max_overlap]
    return kept


def draw_faces(
    images: Sequence[tuple[ImageLike, Sequence[Face]]], output: str | os.PathLike[str], *, height: int = 640
) -> None:
    """Draw images side by side, each face in a box with its number and its points, for people to look at.

    Args:
        images: Each with its faces, numbered in this order.
        output: A .png or .jpg file.
        height: Of every image in what is drawn, in pixels.

    Raises:
        OutputError: The file cannot be written.
    """
    panels = []
    for image, faces in images:
        drawn = upright(image)
        scale = height / drawn.height
        panel = drawn.resize((max(1, round(drawn.width * scale)), height), Image.Resampling.BICUBIC)
        pen = ImageDraw.Draw(panel)
        for number, face in enumerate(faces):
            left, top, right, bottom = (value * scale for value in face.box)
            pen.rectangle((left, top, right, bottom), outline="lime", width=2)
            pen.text((left + 4, top + 2), f"{number}  {face.score:.2f}", fill="lime", font_size=16)
            for x, y in face.points * scale:
                pen.ellipse((x - 1, y - 1, x + 1, y + 1), fill="yellow")
        panels.append(panel)
    sheet = Image.new("RGB", (sum(panel.width for panel in panels), height))
    at = 0
    for panel in panels:
        sheet.paste(panel, (at, 0))
        at += panel.width
    form = Image.registered_extensions().get(os.path.splitext(output)[1].lower())
    if form not in Image.SAVE:
        raise OutputError(f"{os.fspath(output)} cannot be written (an unknown suffix); give a .png file")
    with replacing(output) as file:
        sheet.save(file, form)


def _open_kind(
    name: str | os.PathLike[str], kind: str, options: EngineOptions
) -> tuple[OnnxEngine, Preprocess]:
    """The engine of an entry of this kind, and its preprocess contract."""
    entry = find_entry(name)
    config = entry.config
    needs = {"detector": ("boxes", "scores"), "landmarks": ("points",)}[kind]
    if config.kind != kind or not set(needs) <= set(config.outputs):
        raise EntryError(
            f"{entry.location}: expected a {kind} with {' and '.join(needs)}, found a {config.kind} with "
            f"{' and '.join(config.outputs)}"
        )
    if config.preprocess.resize == "shortest" or config.preprocess.crop != "none":
        raise EntryError(f"{entry.location}: its contract cuts pixels off, where faces may be")
    return open_engine(entry, options), config.preprocess


def _from_input(shares: np.ndarray, size: tuple[int, int], preprocess: Preprocess) -> np.ndarray:
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
