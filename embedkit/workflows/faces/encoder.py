"""Face encoding: find the faces of photographs, and embed each."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import numpy as np

from embedkit.embeddings.table import Embeddings
from embedkit.encoder import Encoder, load_encoder
from embedkit.images.transform import ImageLike
from embedkit.workflows.faces.finder import Face, FaceFinder

__all__ = ["ENCODER", "FaceEncoder"]

ENCODER = "face-r29.dlib"


class FaceEncoder:
    """Photographs -> faces -> embeddings.

    Attributes:
        finder: Finds and cuts out the faces.
        encoder: Embeds the chips.

    Examples:
        >>> faces, rows = embedkit.FaceEncoder().encode("samples/astronaut.jpg")
        >>> len(faces), rows.shape
        (1, (1, 128))
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
        self, image: ImageLike, *, min_score: float | None = None, normalize: bool = True
    ) -> tuple[list[Face], np.ndarray]:
        """Find the faces of one image and embed each.

        Args:
            image: As for `FaceFinder.find`.
            min_score: The least score of a face, in [0, 1]; the finder's own when None.
            normalize: Whether rows have Euclidean length 1.

        Returns:
            The faces, the largest first, and float32 (F, D), a row for each.

        Raises:
            ImageError: The image cannot be read.

        Examples:
            >>> faces, rows = embedkit.FaceEncoder().encode("samples/astronaut.jpg")
            >>> [round(edge, -1) for edge in faces[0].box], rows.shape
            ([170.0, 70.0, 250.0, 160.0], (1, 128))
        """
        faces = self.finder.find(image, min_score=min_score)
        return faces, self.encode_faces(faces, normalize=normalize)

    def encode_faces(self, faces: Sequence[Face], *, normalize: bool = True) -> np.ndarray:
        """Embed faces that were found: float32 (F, D).

        Examples:
            >>> faces = embedkit.FaceFinder().find("samples/astronaut.jpg")
            >>> embedkit.FaceEncoder().encode_faces(faces).shape
            (1, 128)
        """
        return self.encoder.encode([face.chip for face in faces], decode="exact", normalize=normalize)

    def embed(
        self, images: Iterable[str | os.PathLike[str]], *, min_score: float | None = None
    ) -> Embeddings:
        """Embed every face of every image.

        Args:
            images: Paths, which become the ids.
            min_score: The least score of a face, in [0, 1]; the finder's own when None.

        Returns:
            A row a face; `parts` counts the faces of an image from 0, the largest first. Images without a face have
            no row. Label columns: `left`, `top`, `right`, `bottom` (pixels) and `score`.

        Raises:
            ImageError: An image cannot be read; the message names it.

        Examples:
            >>> table = embedkit.FaceEncoder().embed(["samples/astronaut.jpg", "samples/rocket.jpg"])
            >>> table.ids, table.vectors.shape, sorted(table.labels)
            (['samples/astronaut.jpg'], (1, 128), ['bottom', 'left', 'right', 'score', 'top'])
        """
        ids: list[str] = []
        parts: list[int] = []
        rows: list[np.ndarray] = []
        labels: dict[str, list[object]] = {key: [] for key in ("left", "top", "right", "bottom", "score")}
        for path in images:
            faces, found = self.encode(path, min_score=min_score)
            ids += [os.fspath(path)] * len(faces)
            parts += range(len(faces))
            rows.append(found)
            for face in faces:
                for key, value in zip(labels, (*face.box, face.score), strict=True):
                    labels[key].append(value)
        vectors = np.concatenate(rows) if rows else np.empty((0, self.encoder.dim), np.float32)
        return Embeddings(ids, np.array(parts, np.int32), vectors, self.encoder.metadata(), labels)
