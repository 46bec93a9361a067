"""Who of a gallery images show, if anybody.

A gallery lies in a folder, one sub-folder per identity, or in a file of embeddings. A query that cannot be read, or has
not the one face that is asked for, is an error; such an image of the gallery is left out and named, unless it was the
last one of its identity, who would be taken for nobody from then on.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from embedkit.analysis.matching.calibration import Calibration, check_threshold
from embedkit.analysis.matching.identification import Identification, identify
from embedkit.analysis.vectors import Rows
from embedkit.embeddings.formats import is_embeddings, open_rows
from embedkit.encoder import Encoder
from embedkit.errors import ConfigError, SourceError
from embedkit.images.originals import Originals
from embedkit.pipeline.report import Progress
from embedkit.workflows.calibrate import Known, identities_of, known_images
from embedkit.workflows.embedding import (
    embed_images,
    embed_readable,
    encoder_of_images,
    encoder_of_space,
    find_image,
)
from embedkit.workflows.faces.faces import FaceEncoder, metadata_of
from embedkit.workflows.verify import known_threshold

__all__ = ["Identified", "identify_images"]


@dataclass(frozen=True)
class Identified:
    """Who images show.

    Attributes:
        found: One for each query that could be embedded, in order.
        failed: A sentence for each of the other queries: its path and the reason.
        encoder: The name of what embedded them.
        images: How many rows the gallery has.
        identities: How many identities.
        left_out: A sentence for each image of the gallery without a row: its path and the reason.
    """

    found: list[Identification]
    failed: list[str]
    encoder: str
    images: int
    identities: int
    left_out: list[str]


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
    device: str = "auto",
    threads: int | str = "auto",
    progress: Progress | None = None,
) -> Identified:
    """Say who of a gallery images show, if anybody.

    Args:
        queries: Images: paths, or archive members as `file.tar::member`.
        gallery: A folder of images with one sub-folder per identity, or embeddings: then `identity` or
            `identity_from_folder` says who their rows show.
        identity: The label column of the embeddings that names identities.
        identity_from_folder: A row's identity is its image's folder.
        calibration: Gives the threshold and the expected rate.
        threshold: Cosine; overrides the calibration's. Without either, the entry's own threshold decides where it has
            one.
        encoder: A name or an entry's folder; by default the one that made the embeddings, or for a folder the one
            that was calibrated, the default encoder, or that of faces.
        faces: Find the one face of each image, and compare these; whole images otherwise. Rows of embeddings are
            taken as they are.
        device: As for `load_encoder`.
        threads: As for `load_encoder`.
        progress: Told how the gallery's embedding goes.

    Raises:
        ConfigError: No query, one that is not there, identities that are not known, or no threshold.
        ImageError: No query can be read, or none has one face; the message names the first.
        SourceError: No image in the gallery, or an identity none of whose images can be embedded.
        SpaceMismatchError: Gallery, encoder and calibration of different spaces.
    """
    if not queries:
        raise ConfigError("expected a query: an image")
    if threshold is not None:
        check_threshold(threshold)
    originals = Originals()
    asked = [find_image(query, originals) for query in queries]
    where = os.fspath(gallery)
    identities: list[Any]
    known: Known | None = None
    people: Encoder | FaceEncoder
    # Whatever can be refused is refused before the gallery is embedded, which may take long.
    if is_embeddings(gallery):
        stored = open_rows(gallery)
        identities, metadata = identities_of(stored, identity, identity_from_folder), stored.metadata
        embeds = encoder_of_space(metadata, encoder, where, device=device, threads=threads)
        people = FaceEncoder(embeds, device=device, threads=threads) if faces else embeds
    else:
        if identity is not None:
            raise ConfigError(
                f"{where} is a folder of images, whose sub-folders are the identities; leave out --identity"
            )
        known = known_images(gallery)
        people = encoder_of_images(
            encoder, faces=faces, calibration=calibration, device=device, threads=threads
        )
        embeds = people.encoder if isinstance(people, FaceEncoder) else people
        metadata = metadata_of(embeds)
    if calibration is not None:
        calibration.check_space(metadata, where)
    elif threshold is None:
        threshold = known_threshold(embeds)
    vectors, faults = embed_images(people, asked)
    if len(faults) == len(asked):
        raise faults[min(faults)]
    good = [row for row in range(len(asked)) if row not in faults]
    left_out: list[str] = []
    if known is None:
        rows = Rows(stored)
    else:
        done = embed_readable(people, known.ids, known.images, progress)
        identities = [name for name, kept in zip(known.identities, done.kept.tolist(), strict=True) if kept]
        _check_nobody_is_lost(known, identities, done.kept.tolist(), done.left_out, where)
        rows, left_out = Rows(done.embeddings, where), known.unlisted + done.left_out
    found = identify(vectors[good], rows, identities, calibration=calibration, threshold=threshold)
    return Identified(
        found=[replace(one, query=queries[row]) for one, row in zip(found, good, strict=True)],
        failed=[str(faults[row]) for row in sorted(faults)],
        encoder=embeds.name,
        images=len(rows),
        identities=len(set(identities)),
        left_out=left_out,
    )


def _check_nobody_is_lost(
    known: Known, identities: list[str], kept: list[bool], left_out: list[str], where: str
) -> None:
    """Refuse a gallery of which an identity has no image left."""
    present = set(identities)
    without = [name for name, here in zip(known.identities, kept, strict=True) if not here]
    for name, reason in zip(without, left_out, strict=True):
        if name not in present:
            raise SourceError(
                f"{where} has no image of {name!r} that can be used, so that whoever it is would be taken for nobody "
                f"({reason}); bring another image, or take that folder away"
            )
