"""Face detection: boxes, 68 landmarks and an aligned chip for each face of an image.

A detector gives boxes and scores. A landmark network marks the points of each box, at several turns; a box whose points
do not agree is no face. Where no face is found in what may hold one, the image is looked at again on a larger page, and
turned by quarters.
"""

from __future__ import annotations

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
from embedkit.workflows.faces.alignment import chip_of, sharpness_of
from embedkit.workflows.faces.boxes import View, best_boxes, merged_boxes, page, views_of
from embedkit.workflows.faces.landmarks import Landmarker, Marked, from_input

__all__ = [
    "DETECTOR",
    "LANDMARKS",
    "MIN_SCORE",
    "Face",
    "FaceFinder",
    "Findings",
    "Refused",
    "choose_face",
    "draw_faces",
]

DETECTOR = "face_detector-ssd_mobilenet1.widerface"
LANDMARKS = "face_landmarks-dense68.faceapi"
#: The least score of a face.
MIN_SCORE = 0.5
#: An image that holds a box of this score may hold a face that is turned or cut off: nine of ten images without a face
#: stay below.
HINT = 0.1


@dataclass(frozen=True, eq=False)
class Face:
    """One face of an image. Pixels are those of the upright image, (0, 0) its upper left corner.

    Attributes:
        box: Left, top, right and bottom, in pixels.
        score: How sure the detector is, in [0, 1].
        points: float64 (68, 2), x and y in pixels, in dlib's order (iBUG 300-W).
        chip: uint8 (150, 150, 3), the face upright and in the middle; black beyond the image's edge.
        roll: How far the face is turned from upright, in degrees counterclockwise.
    """

    box: tuple[float, float, float, float]
    score: float
    points: np.ndarray
    chip: np.ndarray
    roll: float = 0.0

    @property
    def sharpness(self) -> float:
        """How sharp the chip is: the variance of its Laplacian, in squared gray values."""
        return sharpness_of(self.chip)


@dataclass(frozen=True)
class Refused:
    """A box that looks like a face to the detector, and is not taken for one.

    Attributes:
        box: Left, top, right and bottom, in pixels.
        score: How sure the detector is, in [0, 1].
        reason: Why it is refused.
    """

    box: tuple[float, float, float, float]
    score: float
    reason: str


@dataclass(frozen=True)
class Findings:
    """What an image holds.

    Attributes:
        faces: The faces, the largest first.
        refused: What the detector took for faces besides, the largest first.
    """

    faces: list[Face]
    refused: list[Refused]


class FaceFinder:
    """Images -> faces, by a detector and a landmark network of the zoo. Thread-safe.

    Attributes:
        min_score: The least score of a face, in [0, 1].
        min_size: The least side of a face's box, in pixels.

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
        min_score: float = MIN_SCORE,
        min_size: float = 0,
        device: str = "auto",
        threads: int | str = "auto",
    ):
        """Load both networks.

        Args:
            detector: A name or an entry's folder, as for `load_encoder`, of kind detector.
            landmarks: The same, of kind landmarks.
            min_score: The least score of a face, in [0, 1].
            min_size: The least side of a face's box, in pixels.
            device: `auto`, `cpu`, `cuda` or `cuda:<index>`.
            threads: Cores to keep busy, or `auto`.

        Raises:
            ConfigError: `min_score` is not a share, or `min_size` is below 0.
            EntryNotFoundError: No zoo has one of them.
            EntryError: An entry is of another kind, or not what its files promise.
            DeviceError: What was asked for cannot run.
        """
        self.min_score, self.min_size = _checked_score(min_score), min_size
        if not min_size >= 0:
            raise ConfigError(f"min_size: expected a number of pixels from 0 on, found {min_size}")
        options = EngineOptions(
            device=device, threads=resolve_threads(threads), cache_dir=default_cache_dir()
        )
        self._detector, self._detector_takes = _open_kind(detector, "detector", options)
        self._landmarker = Landmarker(*_open_kind(landmarks, "landmarks", options))

    def find(self, image: ImageLike, *, min_score: float | None = None) -> list[Face]:
        """Find the faces of an image, the largest first.

        Args:
            image: A path, the bytes of an image file, a Pillow image, or a uint8 array (H, W, 3) or (H, W).
            min_score: The least score of a face, in [0, 1]; the finder's own when None.

        Returns:
            The faces; none where nothing scores enough, or what does is no face.

        Raises:
            ImageError: The image cannot be read; the message names it where it is a path.
            ConfigError: `min_score` is not a share.

        Examples:
            >>> finder = embedkit.FaceFinder()
            >>> len(finder.find("samples/astronaut.jpg")), finder.find("samples/rocket.jpg")
            (1, [])
        """
        return self.examine(image, min_score=min_score).faces

    def examine(self, image: ImageLike, *, min_score: float | None = None) -> Findings:
        """Find the faces of an image, and what only looks like one.

        Args:
            image: As for `find`.
            min_score: As for `find`.

        Returns:
            The faces, and what was refused with the reasons.

        Raises:
            ImageError: The image cannot be read; the message names it where it is a path.
            ConfigError: `min_score` is not a share.

        Examples:
            >>> found = embedkit.FaceFinder().examine("samples/cat.jpg")
            >>> len(found.faces), len(found.refused)
            (0, 1)
        """
        least = self.min_score if min_score is None else _checked_score(min_score)
        try:
            picture = upright(image)
        except (ImageError, OSError) as fault:
            if not isinstance(image, (str, os.PathLike)):
                raise
            raise ImageError(f"{os.fspath(image)}: {reason_of(fault)}") from None
        boxes, scores = self._boxes(picture, views_of(picture.size), min(least, HINT))
        enough = scores >= least
        found = self._judged(picture, boxes[enough], scores[enough])
        quarters = {round(face.roll / 90) % 4 for face in found.faces}
        if not found.faces:
            # The face may fill the image, or be on its side: neither has a good score.
            for turn in (0, 1, 3, 2) if scores.max(initial=0) >= HINT else ():
                again = self._judged(picture, *self._boxes(picture, [page(picture.size, turn)], least))
                if again.faces:
                    return again
                if len(again.refused) > len(found.refused):
                    found = again
        elif quarters == {1} or quarters == {2} or quarters == {3}:
            # The photograph was taken on its side, and other faces may be missed so.
            views = [*views_of(picture.size), View((0, 0, *picture.size), -quarters.pop() % 4)]
            return self._judged(picture, *self._boxes(picture, views, least))
        return found

    def _judged(self, image: Image.Image, boxes: np.ndarray, scores: np.ndarray) -> Findings:
        """Boxes, the largest first, as faces, or refused."""
        found = Findings([], [])
        for box, score, marked in zip(boxes, scores, self._landmarker.mark(image, boxes), strict=True):
            edges = (float(box[0]), float(box[1]), float(box[2]), float(box[3]))
            size = min(edges[2] - edges[0], edges[3] - edges[1])
            if reason := _reason_against(marked):
                found.refused.append(Refused(edges, float(score), reason))
            elif size < self.min_size:
                reason = f"its side of {size:.0f} pixels is below the least size of {self.min_size:g}"
                found.refused.append(Refused(edges, float(score), reason))
            else:
                chip = chip_of(image, marked.points)
                found.faces.append(Face(edges, float(score), marked.points, chip, marked.roll))
        return found

    def _boxes(
        self, image: Image.Image, views: Sequence[View], least: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Boxes float64 (F, 4) in the image's pixels and their scores (F,), the largest box first."""
        found = []
        for view in views:
            part = view.pixels(image)
            outputs = self._detector.run_all(read_pixels(part, self._detector_takes, decode="exact")[None])
            boxes, scores = outputs["boxes"][0].astype(np.float64), outputs["scores"][0]
            enough = scores >= least
            corners = from_input(boxes[enough].reshape(-1, 2, 2), part.size, self._detector_takes)
            boxes, scores = np.clip(corners, 0, part.size).reshape(-1, 4), scores[enough]
            inside = (boxes[:, 2:] - boxes[:, :2] >= 1).all(axis=1)
            boxes, scores = boxes[inside], scores[inside]
            kept = best_boxes(boxes, scores)
            found.append((view, boxes[kept], scores[kept]))
        return merged_boxes(found, image.size)


def choose_face(
    faces: Sequence[Face],
    part: int | None = None,
    *,
    where: str = "the image",
    refused: Sequence[Refused] = (),
) -> Face:
    """The one face that is meant.

    Args:
        faces: Those of an image, the largest first.
        part: Its number, from 0; None where there must be just one.
        where: The image, for messages.
        refused: What was refused in the image, for messages.

    Raises:
        ImageError: No face, several where one was expected, or none of this number.
    """
    count = len(faces)
    if not count and refused:
        left, top, right, bottom = (round(edge) for edge in refused[0].box)
        raise ImageError(
            f"{where}: no face was found; what scores {refused[0].score:.2f} at {left}, {top}, {right}, {bottom} is "
            f"refused: {refused[0].reason}"
        )
    if not count:
        raise ImageError(
            f"{where}: no face was found; it must be at least about 1/20 of the photograph's longer side high: crop "
            "the photograph"
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


def _checked_score(score: float) -> float:
    if not 0 <= score <= 1:
        raise ConfigError(f"min_score: expected a number in [0, 1], found {score}")
    return score


def _reason_against(marked: Marked) -> str:
    """Why what was marked is no face; empty for a face."""
    if marked.is_face:
        return ""
    return (
        f"its landmarks move by {max(marked.moved, marked.mirrored):.2f} of the face's length where its crop is "
        "changed or mirrored, as they do on animals, drawings and covered faces"
    )
