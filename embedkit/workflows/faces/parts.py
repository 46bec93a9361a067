"""Faces as rows of a file of embeddings: what `embedkit.embed` stores of each, and the crops that sheets show."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping

from embedkit.analysis.vectors import row_names
from embedkit.embeddings.formats import open_rows
from embedkit.errors import EmbedkitError
from embedkit.images.originals import Originals
from embedkit.images.transform import upright
from embedkit.pipeline.parts import Part
from embedkit.workflows.faces.finder import FaceFinder

__all__ = ["FaceCrops", "FaceParts", "originals_of"]

_BOX = ("left", "top", "right", "bottom")
#: Margin of a crop around the box of its face, as a share of the box's sides.
MARGIN = 0.25


class FaceParts:
    """Gives each face of an image a row: `embedkit.embed(folder, output, encoder="face-r29.dlib", parts=FaceParts())`.

    The columns are `left`, `top`, `right` and `bottom`, in pixels of the upright image; `score`; `roll`, in degrees
    counterclockwise; `sharpness`, see `sharpness_of`; and `landmarks`, 68 points as JSON, in pixels.

    Examples:
        >>> parts = embedkit.workflows.FaceParts()
        >>> done = embedkit.embed("samples/", "people.parquet", encoder="face-r29.dlib", parts=parts)
        >>> people = embedkit.Embeddings.load("people.parquet")
        >>> people.ids, people.parts.tolist(), round(people.label("score")[0], 1)
        (['samples/astronaut.jpg'], [0], 1.0)
    """

    name = "face"
    columns: Mapping[str, str] = {
        **dict.fromkeys((*_BOX, "score", "roll", "sharpness"), "double"),
        "landmarks": "string",
    }

    def __init__(self, finder: FaceFinder | None = None):
        """Take what finds the faces; as made by `FaceFinder()` when None."""
        self._finder = finder if finder is not None else FaceFinder()

    def find(self, data: bytes) -> list[Part]:
        """The faces of an image, the largest first.

        Raises:
            ImageError: It cannot be read.

        Examples:
            >>> from pathlib import Path
            >>> (face,) = embedkit.workflows.FaceParts().find(Path("samples/astronaut.jpg").read_bytes())
            >>> face.pixels.shape, round(face.labels["score"], 1)
            ((150, 150, 3), 1.0)
        """
        return [
            Part(
                face.chip,
                {
                    **dict(zip(_BOX, face.box, strict=True)),
                    "score": face.score,
                    "roll": face.roll,
                    "sharpness": face.sharpness,
                    "landmarks": json.dumps(face.points.round(1).tolist()),
                },
            )
            for face in self._finder.find(data)
        ]


class FaceCrops(Originals):
    """The images behind rows: where a row is of a face, what lies around its box."""

    def __init__(
        self,
        boxes: Mapping[str, tuple[float, float, float, float]],
        root: str | os.PathLike[str] | None = None,
    ):
        """Take the boxes by the names of rows; the others are whole images."""
        super().__init__(root)
        self._boxes = boxes

    def read(self, name: str) -> bytes:
        """The encoded bytes of one image, cropped to its face."""
        data = super().read(name)
        box = self._boxes.get(name)
        if box is None:
            return data
        image = upright(data)
        across, down = MARGIN * (box[2] - box[0]), MARGIN * (box[3] - box[1])
        edges = (
            max(0, round(box[0] - across)),
            max(0, round(box[1] - down)),
            min(image.width, round(box[2] + across)),
            min(image.height, round(box[3] + down)),
        )
        file = io.BytesIO()
        image.crop(edges).save(file, "PNG", compress_level=1)
        return file.getvalue()


def originals_of(source: str | os.PathLike[str], root: str | os.PathLike[str] | None = None) -> Originals:
    """The images behind the rows of embeddings, cropped where the rows are of faces.

    Args:
        source: Embeddings; the rows of anything else, such as an index, are of whole images.
        root: The folder that ids are relative to; the working folder when None.

    Raises:
        SourceError: The root is not a folder.
        OutputError: The columns of the embeddings cannot be read.
    """
    try:
        rows = open_rows(source)
    except EmbedkitError:
        return Originals(root)
    if not set(_BOX) <= set(rows.labels):
        return Originals(root)
    names = row_names(*rows.keys(), rows.where)
    boxes = zip(*(rows.label(edge) for edge in _BOX), strict=True)
    known = {name: box for name, box in zip(names, boxes, strict=True) if None not in box}
    return FaceCrops(known, root)
