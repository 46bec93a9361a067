"""Faces in photographs: found, marked with 68 points, cut out upright, and embedded.

A detector gives boxes and scores, of which non-maximum suppression keeps the best; a landmark network marks each face;
the least-squares similarity that takes the points to dlib's mean face gives the chip that its encoder was trained on.

Sources: non-maximum suppression, Felzenszwalb et al., Object Detection with Discriminatively Trained Part-Based Models
(TPAMI 2010, section 6); alignment, Umeyama, Least-Squares Estimation of Transformation Parameters Between Two Point
Patterns (TPAMI 1991, equations 34-43); the mean face and which points count, dlib's `get_face_chip_details`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from embedkit._io.atomic import replacing
from embedkit.embeddings.metadata import Metadata
from embedkit.embeddings.table import Embeddings
from embedkit.encoder import Encoder, load_encoder, open_engine, reason_of, resolve_threads
from embedkit.errors import ConfigError, EntryError, ImageError, OutputError
from embedkit.hub.access import default_cache_dir
from embedkit.hub.resolve import find_entry
from embedkit.images.transform import ImageLike, read_pixels, upright
from embedkit.model.preprocess import Preprocess
from embedkit.model.providers import EngineOptions

ENCODER = "face-r29.dlib"
DETECTOR = "face_detector-ssd_mobilenet1.widerface"
LANDMARKS = "face_landmarks-dense68.faceapi"

#: The least score of a face, and how much two boxes of one face may overlap (intersection over union).
MIN_SCORE, MAX_OVERLAP = 0.5, 0.4
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
    """Images -> faces, by a detector and a landmark network of the zoo. Thread-safe."""

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


class FaceEncoder:
    """Photographs -> faces -> embeddings.

    Attributes:
        finder: Finds and cuts out the faces.
        encoder: Embeds the chips.
    """

    def __init__(
        self,
        encoder: Encoder | str | os.PathLike[str] = ENCODER,
        finder: FaceFinder | None = None,
        *,
        device: str = "auto",
        threads: int | str = "auto",
    ):
        """Load what is not given.

        Args:
            encoder: An encoder of aligned faces, or its name.
            finder: As made by `FaceFinder()` when None.
            device: For what is loaded here.
            threads: For what is loaded here.
        """
        self.encoder = (
            encoder if isinstance(encoder, Encoder) else load_encoder(encoder, device=device, threads=threads)
        )
        self.finder = finder if finder is not None else FaceFinder(device=device, threads=threads)

    def encode(
        self, image: ImageLike, *, min_score: float = MIN_SCORE, normalize: bool = True
    ) -> tuple[list[Face], np.ndarray]:
        """Find the faces of one image and embed each.

        Args:
            image: As for `FaceFinder.find`.
            min_score: The least score of a face, in [0, 1].
            normalize: Whether rows have Euclidean length 1.

        Returns:
            The faces, the largest first, and float32 (F, D), a row for each.

        Raises:
            ImageError: The image cannot be read.
        """
        faces = self.finder.find(image, min_score=min_score)
        return faces, self.encode_faces(faces, normalize=normalize)

    def encode_faces(self, faces: Sequence[Face], *, normalize: bool = True) -> np.ndarray:
        """Embed faces that were found: float32 (F, D)."""
        return self.encoder.encode([face.chip for face in faces], decode="exact", normalize=normalize)

    def embed(self, images: Iterable[str | os.PathLike[str]], *, min_score: float = MIN_SCORE) -> Embeddings:
        """Embed every face of every image.

        Args:
            images: Paths, which become the ids.
            min_score: The least score of a face, in [0, 1].

        Returns:
            A row a face; `parts` counts the faces of an image from 0, the largest first. Images without a face have
            no row. Label columns: `left`, `top`, `right`, `bottom` (pixels) and `score`.

        Raises:
            ImageError: An image cannot be read; the message names it.
        """
        ids: list[str] = []
        parts: list[int] = []
        rows: list[np.ndarray] = []
        labels: dict[str, list] = {key: [] for key in ("left", "top", "right", "bottom", "score")}
        for path in images:
            faces, found = self.encode(path, min_score=min_score)
            ids += [os.fspath(path)] * len(faces)
            parts += range(len(faces))
            rows.append(found)
            for face in faces:
                for key, value in zip(labels, (*face.box, face.score), strict=True):
                    labels[key].append(value)
        vectors = np.concatenate(rows) if rows else np.empty((0, self.encoder.dim), np.float32)
        return Embeddings(ids, np.array(parts, np.int32), vectors, metadata_of(self.encoder), labels)


def choose(faces: Sequence[Face], part: int | None = None, *, where: str = "the image") -> Face:
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
            "verify`, where --draw shows the numbers"
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


def metadata_of(encoder: Encoder) -> Metadata:
    """The metadata of an encoder's normalized rows, without a run."""
    return Metadata(
        entry=encoder.name,
        manifest_sha256=encoder.revision,
        fingerprint=encoder.fingerprint,
        dim=encoder.dim,
        normalized=True,
    )


def _open_kind(name: str | os.PathLike[str], kind: str, options: EngineOptions):
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
    return (shares * (width, height) - margin) * np.array([size[0] / kept_w, size[1] / kept_h])
