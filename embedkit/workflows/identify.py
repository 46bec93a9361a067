"""Identification: which identity of a gallery an image shows, or no match.

A gallery is a folder with one subfolder per identity, or a file of embeddings. If faces are compared, each face of a
query is identified, and an image of the gallery must have exactly one. A query that cannot be read, or has no face, is
an error. Such an image of the gallery is left out and reported, unless
its identity has no other image: that identity could never be matched.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from embedkit.analysis.matching.calibration import Calibration, check_threshold
from embedkit.analysis.matching.identification import Identification, identify
from embedkit.analysis.vectors import Rows
from embedkit.embeddings.formats import is_embeddings, open_rows
from embedkit.encoder import Encoder
from embedkit.errors import ConfigError, EmbedkitError, ImageError, SourceError
from embedkit.images.originals import Originals
from embedkit.pipeline.report import Progress
from embedkit.workflows.calibrate import LabeledImages, identities_of, labeled_images
from embedkit.workflows.embedding import (
    ImageSource,
    embed_images,
    embed_readable,
    encoder_of_images,
    encoder_of_space,
    find_image,
    named,
)
from embedkit.workflows.faces.encoder import FaceEncoder
from embedkit.workflows.faces.finder import Face, FaceFinder, choose_face
from embedkit.workflows.verify import entry_threshold

__all__ = ["Identified", "QueryFace", "identify_images"]


@dataclass(frozen=True)
class QueryFace:
    """Which face of a query was identified.

    Attributes:
        part: Its number, 0 the largest.
        box: Left, top, right and bottom, in pixels of the upright image.
        score: How sure the detector is, in [0, 1].
    """

    part: int
    box: tuple[float, float, float, float]
    score: float


@dataclass(frozen=True)
class Identified:
    """The identities of images.

    Attributes:
        found: One for each query that could be embedded, in order; of faces, one for each face, and `query` is then
            `IMAGE#PART` for all but the largest face of an image.
        failed: One sentence for each of the other queries: its path and the reason.
        encoder: The name of the encoder.
        images: Number of rows of the gallery.
        identities: Number of identities of the gallery.
        left_out: One sentence for each image of the gallery without a row: its path and the reason.
        faces: The face of each of `found`; None where whole images are compared.
    """

    found: list[Identification]
    failed: list[str]
    encoder: str
    images: int
    identities: int
    left_out: list[str]
    faces: list[QueryFace] | None = None


def identify_images(
    queries: Sequence[str],
    gallery: str | os.PathLike[str],
    *,
    identity: str | None = None,
    identity_from_folder: bool = False,
    calibration: Calibration | None = None,
    threshold: float | None = None,
    encoder: str | os.PathLike[str] | None = None,
    faces: bool = False,
    finder: FaceFinder | None = None,
    device: str = "auto",
    threads: int | str = "auto",
    progress: Progress | None = None,
) -> Identified:
    """Match images to the identities of a gallery, or report no match.

    Args:
        queries: Images: paths, or archive members as `file.tar::member`.
        gallery: A folder of images with one sub-folder per identity, or embeddings: then `identity` or
            `identity_from_folder` names the identities of the rows.
        identity: The label column of the embeddings that names identities.
        identity_from_folder: The identity of a row is the folder of its image.
        calibration: Gives the threshold and the expected rate.
        threshold: Cosine; overrides the calibration's. Without either, the entry's own threshold decides, if it has
            one.
        encoder: A name or an entry's folder; by default the one that made the embeddings, or for a folder the one
            that was calibrated, the default encoder, or that of faces.
        faces: Identify each face of the queries, by the one face of each image of the gallery; else compare whole
            images. Rows of embeddings are not changed.
        finder: Finds the faces; as made by `FaceFinder()` when None.
        device: As for `load_encoder`.
        threads: As for `load_encoder`.
        progress: Receives the progress of embedding the gallery.

    Raises:
        ConfigError: No query, a missing one, unknown identities, or no threshold.
        ImageError: No query can be read, or none has a face; the message names the first.
        SourceError: No image in the gallery, or an identity none of whose images can be embedded.
        SpaceMismatchError: Gallery, encoder and calibration of different spaces.

    Examples:
        >>> done = embedkit.workflows.identify_images(["samples/rocket.jpg"], "things/", threshold=0.5)
        >>> done.found[0].identity
        'rocket'
    """
    if not queries:
        raise ConfigError("expected at least one query image")
    if threshold is not None:
        check_threshold(threshold)
    originals = Originals()
    asked = [find_image(query, originals) for query in queries]
    where = os.fspath(gallery)
    identities: list[Any]
    labeled: LabeledImages | None = None
    model: Encoder | FaceEncoder
    # All checks come before the gallery is embedded, which may take long.
    if is_embeddings(gallery):
        stored = open_rows(gallery)
        identities, metadata = identities_of(stored, identity, identity_from_folder), stored.metadata
        embeds = encoder_of_space(metadata, encoder, where, device=device, threads=threads)
        model = FaceEncoder(embeds, finder, device=device, threads=threads) if faces else embeds
    else:
        if identity is not None:
            raise ConfigError(
                f"{where} is a folder of images, whose sub-folders are the identities; leave out --label"
            )
        labeled = labeled_images(gallery)
        model = encoder_of_images(
            encoder, faces=faces, finder=finder, calibration=calibration, device=device, threads=threads
        )
        embeds = model.encoder if isinstance(model, FaceEncoder) else model
        metadata = embeds.metadata()
    if calibration is not None:
        calibration._check_space(metadata, where)
    elif threshold is None:
        threshold = entry_threshold(embeds)
    shown: list[QueryFace] | None = None
    if isinstance(model, FaceEncoder):
        names, shown, vectors, faults = _faces_of(model, asked)
    else:
        vectors, faults = embed_images(model, asked)
        good = [row for row in range(len(asked)) if row not in faults]
        names, vectors = [queries[row] for row in good], vectors[good]
    if len(faults) == len(asked):
        raise faults[min(faults)]
    left_out: list[str] = []
    if labeled is None:
        rows = Rows(stored)
    else:
        done = embed_readable(model, labeled.ids, labeled.images, progress)
        identities = [name for name, kept in zip(labeled.identities, done.kept.tolist(), strict=True) if kept]
        _check_every_identity(labeled, identities, done.kept.tolist(), done.left_out, where)
        rows, left_out = Rows(done.embeddings, where), labeled.unlisted + done.left_out
    found = identify(vectors, rows, identities, calibration=calibration, threshold=threshold)
    return Identified(
        found=[replace(one, query=name) for one, name in zip(found, names, strict=True)],
        failed=[str(faults[row]) for row in sorted(faults)],
        encoder=embeds.name,
        images=len(rows),
        identities=len(set(identities)),
        left_out=left_out,
        faces=shown,
    )


def _faces_of(
    model: FaceEncoder, queries: Sequence[ImageSource]
) -> tuple[list[str], list[QueryFace], np.ndarray, dict[int, EmbedkitError]]:
    """All faces of the queries: their names, which they are, float32 (F, D), and the errors by query."""
    names: list[str] = []
    shown: list[QueryFace] = []
    chosen: list[Face] = []
    faults: dict[int, EmbedkitError] = {}
    for row, query in enumerate(queries):
        try:
            found = model.finder.examine(query.read())
        except (EmbedkitError, OSError) as fault:
            faults[row] = named(query.name, fault)
            continue
        if not found.faces:
            try:
                choose_face([], where=query.name, refused=found.refused)
            except ImageError as fault:
                faults[row] = fault
        for part, face in enumerate(found.faces):
            names.append(f"{query.name}#{part}" if part else query.name)
            shown.append(QueryFace(part, face.box, face.score))
            chosen.append(face)
    vectors = model.encode_faces(chosen) if chosen else np.empty((0, model.encoder.dim), np.float32)
    return names, shown, vectors, faults


def _check_every_identity(
    labeled: LabeledImages, identities: list[str], kept: list[bool], left_out: list[str], where: str
) -> None:
    """Refuse a gallery if an identity has no usable image."""
    present = set(identities)
    without = [name for name, here in zip(labeled.identities, kept, strict=True) if not here]
    for name, reason in zip(without, left_out, strict=True):
        if name not in present:
            raise SourceError(
                f"{where} has no image of {name!r} that can be used ({reason}), so this identity could never be "
                f"matched; add another image, or remove its folder"
            )
