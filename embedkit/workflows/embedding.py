"""Embedding of query images: whole images or their one face, by the encoder of a given space.

An image is comparable with a file of embeddings only if the same encoder embeds it. The encoder is found by the name in
the metadata, and its space fingerprint is checked before anything is computed. The name is looked up in the user's own
zoos: a URL or a path in a file is never opened.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from embedkit.analysis.matching.calibration import Calibration
from embedkit.embeddings.metadata import Metadata
from embedkit.embeddings.table import Embeddings
from embedkit.encoder import Encoder, load_encoder, reason_of
from embedkit.errors import (
    ConfigError,
    EmbedkitError,
    EntryNotFoundError,
    ImageError,
    SourceError,
    SpaceMismatchError,
)
from embedkit.hub.catalog import NAME
from embedkit.hub.resolve import find_entry
from embedkit.images.originals import Originals
from embedkit.pipeline.report import Progress
from embedkit.workflows.faces.encoder import ENCODER, FaceEncoder
from embedkit.workflows.faces.finder import FaceFinder, choose_face

__all__ = [
    "Embedded",
    "ImageSource",
    "embed_images",
    "embed_readable",
    "encoder_of_images",
    "encoder_of_space",
    "find_image",
    "named",
]

_LOGGER = logging.getLogger(__name__)

#: Number of faces in one batch: 17 MB of pixels.
CHIPS = 256


class ImageSource(NamedTuple):
    """An image to embed: its name in messages, and a function that returns its encoded bytes."""

    name: str
    read: Callable[[], bytes]


@dataclass(frozen=True)
class Embedded:
    """The embeddings of a list of images.

    Attributes:
        embeddings: A row for each image that could be embedded, in order.
        kept: bool (N,), whether each image has a row.
        left_out: One sentence for each of the others: its path and the reason.
    """

    embeddings: Embeddings
    kept: np.ndarray
    left_out: list[str]


def find_image(name: str, originals: Originals) -> ImageSource:
    """An image by its path, or an archive's member as `file.tar::member`.

    Raises:
        ConfigError: It is a folder, or does not exist.
    """
    if os.path.isdir(name):
        raise ConfigError(f"{name!r} is a folder; give images, for example {os.path.join(name, '*.jpg')}")
    if not originals.has(name):
        raise ConfigError(f"{name!r} is not an existing image; check the path")
    return ImageSource(name, partial(originals.read, name))


def encoder_of_space(
    metadata: Metadata | None,
    encoder: Encoder | str | os.PathLike[str] | None,
    where: str,
    *,
    device: str = "auto",
    threads: int | str = "auto",
) -> Encoder:
    """The encoder of the space that metadata names.

    Args:
        metadata: Of the embeddings; None for plain vectors.
        encoder: Used instead of the one that the metadata names; its space must be the same.
        where: Name of the embeddings in messages.
        device: For an encoder that is loaded here.
        threads: For an encoder that is loaded here.

    Raises:
        ConfigError: Plain vectors, which name no encoder, or the metadata do not hold the name of an entry.
        EntryNotFoundError: No zoo has the encoder.
        SpaceMismatchError: The encoder's space is another one.
    """
    if metadata is None:
        raise ConfigError(f"{where} does not say which encoder made it, so queries must be ids, not images")
    if not isinstance(encoder, Encoder):
        named = encoder if encoder is not None else name_in_file(metadata.entry, where)
        try:
            encoder = load_encoder(named, device=device, threads=threads)
        except EntryNotFoundError as error:
            if encoder is not None:
                raise
            raise EntryNotFoundError(
                f"{where} was made with {metadata.entry}, which is needed for a query image: {error}; or give its "
                "folder with --encoder"
            ) from None
    space = encoder._space(normalized=metadata.normalized)
    if space != metadata.fingerprint:
        raise SpaceMismatchError(
            f"{where} holds embeddings of {metadata.entry} (space {metadata.fingerprint[:12]}), and {encoder.name} "
            f"at revision {encoder.revision[:12]} gives others (space {space[:12]}): a query must be embedded by the "
            "same encoder; name it with --encoder, or embed the images again"
        )
    if encoder.revision != metadata.manifest_sha256:
        _LOGGER.warning(
            "%s was made with %s@%s, and %s@%s is used; both give the same space",
            where,
            metadata.entry,
            metadata.manifest_sha256[:12],
            encoder.name,
            encoder.revision[:12],
        )
    return encoder


def name_in_file(name: str, where: str) -> str:
    """The name of an encoder from a file, if it is the name of an entry and not a URL or a path.

    Args:
        name: The text in the file.
        where: Name of the file in messages.

    Raises:
        ConfigError: It is not the name of an entry.
    """
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"{where} names {name[:80]!r} as its encoder, which is not the name of an entry, and a URL or a path "
            "in a file is never opened; name the encoder with --encoder"
        )
    return name


def encoder_of_images(
    encoder: str | os.PathLike[str] | None = None,
    *,
    faces: bool = False,
    finder: FaceFinder | None = None,
    calibration: Calibration | None = None,
    device: str = "auto",
    threads: int | str = "auto",
) -> Encoder | FaceEncoder:
    """The encoder of images that are not compared with existing embeddings.

    Args:
        encoder: A name or an entry's folder. When None, the one whose space was calibrated; without a calibration the
            default encoder, or the face encoder.
        faces: Embed the one face of each image.
        finder: Finds the faces; as made by `FaceFinder()` when None.
        calibration: The calibration that will decide on the images.
        device: As for `load_encoder`.
        threads: As for `load_encoder`.

    Raises:
        ConfigError: The calibrated encoder takes faces and whole images are asked for, or the other way round; or
            the calibration does not hold the name of an entry.
        EntryNotFoundError: No zoo has it.
        SpaceMismatchError: The encoder's space is not the calibrated one.
    """
    if encoder is None and calibration is not None and calibration.entry:
        encoder = name_in_file(calibration.entry, "the calibration")
        if find_entry(encoder).config.takes_aligned_faces != faces:
            what = "whole images: leave out --faces" if faces else "aligned faces: add --faces"
            raise ConfigError(
                f"the calibration is of {encoder}, which embeds {what}, or name an encoder with --encoder"
            )
    found: Encoder | FaceEncoder
    if faces:
        found = FaceEncoder(ENCODER if encoder is None else encoder, finder, device=device, threads=threads)
    else:
        found = load_encoder(encoder, device=device, threads=threads)
    if calibration is not None:
        embeds = found.encoder if isinstance(found, FaceEncoder) else found
        calibration._check_space(embeds.metadata(), f"the encoder {embeds.name}")
    return found


def embed_images(
    encoder: Encoder | FaceEncoder, images: Sequence[ImageSource], progress: Progress | None = None
) -> tuple[np.ndarray, dict[int, EmbedkitError]]:
    """Embed images, each once.

    Args:
        encoder: Of whole images; a `FaceEncoder` embeds the one face of each.
        images: N images.
        progress: Receives the progress.

    Returns:
        float32 (N, D) of length 1, zeros for an image that failed; and the errors by row, each naming its image:
        `ImageError` if it cannot be read, has no face or several; `SourceError` if it no longer exists.
    """
    progress = progress or Progress()
    progress.start(len(images))
    if isinstance(encoder, FaceEncoder):
        return _embed_faces(encoder, images, progress)
    faults: dict[int, EmbedkitError] = {}
    blocks = [np.empty((0, encoder.dim), np.float32)]
    size = encoder.default_batch_size
    chunks = [[one.read for one in images[at : at + size]] for at in range(0, len(images), size)]
    first = 0
    with closing(encoder._flow(chunks)) as flow:
        for block, failed in flow:
            blocks.append(block)
            for row, fault in failed.items():
                faults[first + row] = named(images[first + row].name, fault)
            first += len(block)
            progress.advance(len(block) - len(failed), len(failed))
    return np.concatenate(blocks), faults


def embed_readable(
    encoder: Encoder | FaceEncoder,
    ids: Sequence[str],
    images: Sequence[ImageSource],
    progress: Progress | None = None,
) -> Embedded:
    """Embed images, and leave out those that cannot be embedded.

    ISO/IEC 19795-1 likewise counts a failure to acquire separately from errors of comparison.

    Args:
        encoder: Of whole images; a `FaceEncoder` embeds the one face of each.
        ids: One for each image.
        images: N images.
        progress: Receives the progress.

    Raises:
        SourceError: None of them can be embedded.
    """
    vectors, faults = embed_images(encoder, images, progress)
    kept = np.ones(len(images), bool)
    kept[list(faults)] = False
    left_out = [str(faults[row]) for row in sorted(faults)]
    if not kept.any():
        raise SourceError(f"none of the {len(images)} images can be embedded; the first: {left_out[0]}")
    names = [ids[row] for row in np.flatnonzero(kept).tolist()]
    metadata = (encoder.encoder if isinstance(encoder, FaceEncoder) else encoder).metadata()
    rows = Embeddings(names, np.zeros(len(names), np.int32), vectors[kept], metadata)
    return Embedded(rows, kept, left_out)


def _embed_faces(
    encoder: FaceEncoder, images: Sequence[ImageSource], progress: Progress
) -> tuple[np.ndarray, dict[int, EmbedkitError]]:
    rows = np.zeros((len(images), encoder.encoder.dim), np.float32)
    faults: dict[int, EmbedkitError] = {}
    for start in range(0, len(images), CHIPS):
        used, chosen = [], []
        for row, image in enumerate(images[start : start + CHIPS], start):
            try:
                found = encoder.finder.examine(image.read())
            except (EmbedkitError, OSError) as fault:
                faults[row] = named(image.name, fault)
            else:
                try:
                    chosen.append(choose_face(found.faces, where=image.name, refused=found.refused))
                    used.append(row)
                except ImageError as fault:
                    faults[row] = fault
            progress.advance(int(row not in faults), int(row in faults))
        if chosen:
            rows[used] = encoder.encode_faces(chosen)
    return rows, faults


def named(name: str, fault: Exception) -> EmbedkitError:
    """The error of one image, with its name in the message."""
    kind = fault.__class__ if isinstance(fault, (ImageError, SourceError)) else ImageError
    return kind(f"{name}: {reason_of(fault)}")
