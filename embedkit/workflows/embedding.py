"""Images embedded on the spot, each once: whole, or the one face in it, by the encoder that a space asks for.

An image is comparable with a file of embeddings only when the very encoder of the file embeds it. It is found by the
name in the metadata, and held against the space fingerprint before anything is computed. The name is looked up in the
user's own zoos: a URL or a path that stands in a file is never opened.
"""

from __future__ import annotations

import os
import warnings
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
from embedkit.workflows.faces.faces import ENCODER, FaceEncoder, choose, metadata_of

__all__ = [
    "Embedded",
    "Image",
    "embed_images",
    "embed_readable",
    "encoder_of_images",
    "encoder_of_space",
    "find_image",
]

#: Faces that are cut out before they are embedded: 17 MB of pixels.
CHIPS = 256


class Image(NamedTuple):
    """An image that is to be embedded: how messages name it, and what gives its encoded bytes."""

    name: str
    read: Callable[[], bytes]


@dataclass(frozen=True)
class Embedded:
    """What became of a list of images.

    Attributes:
        embeddings: A row for each image that could be embedded, in order.
        kept: bool (N,), which these are.
        left_out: A sentence for each of the others: its path and the reason.
    """

    embeddings: Embeddings
    kept: np.ndarray
    left_out: list[str]


def find_image(name: str, originals: Originals) -> Image:
    """An image by its path, or an archive's member as `file.tar::member`.

    Raises:
        ConfigError: It is a folder, or not there.
    """
    if os.path.isdir(name):
        raise ConfigError(f"{name!r} is a folder; give images, for example {os.path.join(name, '*.jpg')}")
    if not originals.has(name):
        raise ConfigError(f"{name!r} is no image that is there; check the path")
    return Image(name, partial(originals.read, name))


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
        encoder: Taken instead of the one that the metadata names; its space must be the same.
        where: How messages name the embeddings.
        device: For an encoder that is loaded here.
        threads: For an encoder that is loaded here.

    Raises:
        ConfigError: Plain vectors, which name no encoder, or what the metadata names is no entry's name.
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
    space = encoder.space(normalized=metadata.normalized)
    if space != metadata.fingerprint:
        raise SpaceMismatchError(
            f"{where} holds embeddings of {metadata.entry} (space {metadata.fingerprint[:12]}), and {encoder.name} "
            f"at revision {encoder.revision[:12]} gives others (space {space[:12]}): a query must be embedded by the "
            "same encoder; name it with --encoder, or embed the images again"
        )
    if encoder.revision != metadata.manifest_sha256:
        warnings.warn(
            f"{where} was made with {metadata.entry}@{metadata.manifest_sha256[:12]}, and {encoder.name}@"
            f"{encoder.revision[:12]} is used; both give the same space",
            stacklevel=2,
        )
    return encoder


def name_in_file(name: str, where: str) -> str:
    """The name of an encoder that stands in a file, if it is an entry's name and neither a URL nor a path.

    Args:
        name: What the file says.
        where: How messages name the file.

    Raises:
        ConfigError: It is no name.
    """
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"{where} names {name[:80]!r} as its encoder, which is no entry's name, and what a file says is not "
            "opened: name the encoder with --encoder"
        )
    return name


def encoder_of_images(
    encoder: str | os.PathLike[str] | None = None,
    *,
    faces: bool = False,
    calibration: Calibration | None = None,
    device: str = "auto",
    threads: int | str = "auto",
) -> Encoder | FaceEncoder:
    """The encoder of images that belong to no space yet.

    Args:
        encoder: A name or an entry's folder. When None, the one whose space was calibrated; without a calibration the
            default encoder, or that of faces.
        faces: Embed the one face of each image.
        calibration: With which the images will be judged.
        device: As for `load_encoder`.
        threads: As for `load_encoder`.

    Raises:
        ConfigError: The calibrated encoder takes faces and whole images are asked for, or the other way round; or
            what the calibration names is no entry's name.
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
        found = FaceEncoder(ENCODER if encoder is None else encoder, device=device, threads=threads)
    else:
        found = load_encoder(encoder, device=device, threads=threads)
    if calibration is not None:
        embeds = found.encoder if isinstance(found, FaceEncoder) else found
        calibration.check_space(metadata_of(embeds), f"the encoder {embeds.name}")
    return found


def embed_images(
    encoder: Encoder | FaceEncoder, images: Sequence[Image], progress: Progress | None = None
) -> tuple[np.ndarray, dict[int, EmbedkitError]]:
    """Embed images, each once.

    Args:
        encoder: Of whole images; a `FaceEncoder` embeds the one face of each.
        images: N of them.
        progress: Told how it goes.

    Returns:
        float32 (N, D) of length 1, zeros for an image that failed; and the faults by row, each naming its image:
        `ImageError` for one that cannot be read, has no face or several, `SourceError` for one that is gone.
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
    with closing(encoder.flow(chunks)) as flow:
        for block, failed in flow:
            blocks.append(block)
            for row, fault in failed.items():
                faults[first + row] = _named(images[first + row].name, fault)
            first += len(block)
            progress.advance(len(block) - len(failed), len(failed))
    return np.concatenate(blocks), faults


def embed_readable(
    encoder: Encoder | FaceEncoder,
    ids: Sequence[str],
    images: Sequence[Image],
    progress: Progress | None = None,
) -> Embedded:
    """Embed those of many images that can be embedded.

    A failure to acquire is counted apart from errors of comparison in ISO/IEC 19795-1, too.

    Args:
        encoder: Of whole images; a `FaceEncoder` embeds the one face of each.
        ids: One for each image.
        images: N of them.
        progress: Told how it goes.

    Raises:
        SourceError: Not one of them can be embedded.
    """
    vectors, faults = embed_images(encoder, images, progress)
    kept = np.ones(len(images), bool)
    kept[list(faults)] = False
    left_out = [str(faults[row]) for row in sorted(faults)]
    if not kept.any():
        raise SourceError(f"none of the {len(images)} images can be embedded; the first: {left_out[0]}")
    names = [ids[row] for row in np.flatnonzero(kept).tolist()]
    metadata = metadata_of(encoder.encoder if isinstance(encoder, FaceEncoder) else encoder)
    rows = Embeddings(names, np.zeros(len(names), np.int32), vectors[kept], metadata)
    return Embedded(rows, kept, left_out)


def _embed_faces(
    people: FaceEncoder, images: Sequence[Image], progress: Progress
) -> tuple[np.ndarray, dict[int, EmbedkitError]]:
    rows = np.zeros((len(images), people.encoder.dim), np.float32)
    faults: dict[int, EmbedkitError] = {}
    for start in range(0, len(images), CHIPS):
        places, found = [], []
        for row, image in enumerate(images[start : start + CHIPS], start):
            try:
                faces = people.finder.find(image.read())
            except (EmbedkitError, OSError) as fault:
                faults[row] = _named(image.name, fault)
            else:
                try:
                    found.append(choose(faces, where=image.name))
                    places.append(row)
                except ImageError as fault:
                    faults[row] = fault
            progress.advance(int(row not in faults), int(row in faults))
        if found:
            rows[places] = people.encode_faces(found)
    return rows, faults


def _named(name: str, fault: Exception) -> EmbedkitError:
    kind = fault.__class__ if isinstance(fault, (ImageError, SourceError)) else ImageError
    return kind(f"{name}: {reason_of(fault)}")
