"""Calibration of an encoder on labeled images: from a folder, or from a list of pairs.

Everything that names alone can show is checked before the first image is opened, since embedding takes long.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from typing import Any

from embedkit.analysis.matching.calibrate import REPLICATES, calibrate_pairs, check_support
from embedkit.analysis.matching.calibration import Calibration
from embedkit.analysis.matching.pairs import (
    MOST,
    Pairs,
    check_both_kinds,
    folder_identities,
    pair_names,
    read_pairs,
    sample_pairs,
)
from embedkit.analysis.vectors import Rows
from embedkit.embeddings.base import StoredRows
from embedkit.embeddings.formats import is_embeddings
from embedkit.errors import ConfigError
from embedkit.images.originals import Originals
from embedkit.images.sources import list_sources
from embedkit.pipeline.report import Progress
from embedkit.workflows.embedding import ImageSource, embed_readable, encoder_of_images
from embedkit.workflows.faces.finder import FaceFinder

__all__ = [
    "Calibrated",
    "LabeledImages",
    "calibrate_images",
    "holds_images",
    "identities_of",
    "labeled_images",
    "image_pairs",
]


def holds_images(source: str | os.PathLike[str]) -> bool:
    """Whether a calibration by `source` embeds images: a CSV of pairs, or a folder that holds no embeddings."""
    return _is_list(source) or not is_embeddings(source)


def _is_list(source: str | os.PathLike[str]) -> bool:
    return os.fspath(source).lower().endswith(".csv")


@dataclass(frozen=True)
class LabeledImages:
    """Images with identity labels, not opened yet.

    Attributes:
        ids: Their paths, relative to their folder.
        images: In the same order.
        identities: Their folders.
        unlisted: One sentence for each file or folder that cannot be listed.
    """

    ids: list[str]
    images: list[ImageSource]
    identities: list[str]
    unlisted: list[str]


@dataclass(frozen=True)
class Calibrated:
    """A calibration on images.

    Attributes:
        calibration: Bound to the encoder's space.
        left_out: One sentence for each image that could not be embedded; its pairs are left out too.
    """

    calibration: Calibration
    left_out: list[str]


def labeled_images(folder: str | os.PathLike[str]) -> LabeledImages:
    """List a folder that has one sub-folder per identity.

    Args:
        folder: The identity of an image is its subfolder of this folder.

    Raises:
        SourceError: No image in it.
        ConfigError: An image that is not in a subfolder.
    """
    where = os.fspath(folder)
    listing = list_sources([folder], root=folder)
    if not listing.items:
        raise listing.empty(where)
    ids = [item.id for item in listing.items]
    try:
        identities = folder_identities(ids)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return LabeledImages(
        ids=ids,
        images=[ImageSource(item.path or item.id, item.read) for item in listing.items],
        identities=identities,
        unlisted=[f"{os.path.join(where, name)}: {reason}" for name, _, reason in listing.errors],
    )


def image_pairs(path: str | os.PathLike[str]) -> tuple[list[ImageSource], Pairs]:
    """The images of a CSV of pairs, each once, and the pairs of these.

    Args:
        path: The CSV, with the columns `a` and `b`, paths of images, absolute or relative to the CSV's folder, and
            `same` (1 or 0).

    Raises:
        ConfigError: Not such a file, an image that is not there, or pairs of one kind only.
    """
    where = os.fspath(path)
    folder = os.path.dirname(where) or os.curdir
    names = pair_names(path)
    originals = Originals(folder)
    missing = [name for name in names if not originals.has(name)]
    if missing:
        others = f", and {len(missing) - 1} more are missing" if len(missing) > 1 else ""
        raise ConfigError(
            f"{where} names {missing[0]!r}, and no such image is there{others}; paths are absolute, or relative to "
            "the folder of the CSV"
        )
    # Resolve symlinks and spellings, so that an image is never paired with itself.
    files = {name: _file_of(name, folder, originals) for name in names}
    names_of = {file: name for name, file in files.items()}
    rows = {file: row for row, file in enumerate(names_of)}
    pairs = read_pairs(path, {name: rows[file] for name, file in files.items()})
    called = [os.path.normpath(os.path.join(folder, name)) for name in names_of.values()]
    return [
        ImageSource(shown, partial(originals.read, name))
        for shown, name in zip(called, names_of.values(), strict=True)
    ], pairs


def _file_of(name: str, folder: str, originals: Originals) -> str:
    """The identity of an image file: its real path, followed by the member or row of a container."""
    file = originals.file(name)
    if file is not None:
        return os.path.realpath(file)
    container, mark, member = name.partition("::")
    found = originals.file(container)
    if found is None:  # a name with `::` in its folders
        return os.path.normpath(os.path.join(folder, name))
    return os.path.realpath(found) + mark + member


def calibrate_images(
    source: str | os.PathLike[str],
    target_fmr: float = 1e-3,
    *,
    encoder: str | os.PathLike[str] | None = None,
    faces: bool = False,
    finder: FaceFinder | None = None,
    most: int = MOST,
    replicates: int = REPLICATES,
    seed: int = 0,
    device: str = "auto",
    threads: int | str = "auto",
    progress: Progress | None = None,
) -> Calibrated:
    """Calibrate an encoder on images, each of which is embedded once.

    An image that exists but cannot be embedded (it is damaged, or does not have exactly one face) is left out with its
    pairs.

    Args:
        source: `PAIRS.csv`, see `image_pairs`, or a folder with one sub-folder per identity.
        target_fmr: The target false-match rate.
        encoder: A name or an entry's folder; by default the default encoder, or the face encoder.
        faces: Find the one face of each image, and compare these; whole images otherwise.
        finder: Finds the faces; as made by `FaceFinder()` when None.
        most: Pairs of each kind that are drawn from the identities of a folder.
        replicates: Bootstrap samples.
        seed: Of the pairs that are drawn, and of the bootstrap.
        device: As for `load_encoder`.
        threads: As for `load_encoder`.
        progress: Receives the progress of embedding.

    Raises:
        ConfigError: No such pairs, a missing image, or too few pairs for the rate.
        SourceError: No image, or none that can be embedded.

    Examples:
        >>> done = embedkit.workflows.calibrate_images("things/", target_fmr=0.1, replicates=50)
        >>> done.calibration.identities, done.left_out
        (10, [])
    """
    where = os.fspath(source)
    left_out: list[str] = []
    if _is_list(source):
        images, pairs = image_pairs(source)
        ids = [image.name for image in images]
    else:
        labeled = labeled_images(source)
        ids, images, left_out = labeled.ids, labeled.images, labeled.unlisted
        pairs = sample_pairs(labeled.identities, seed=seed, most=most, where=where)
    check_support(int((~pairs.same).sum()), target_fmr)
    done = embed_readable(
        encoder_of_images(encoder, faces=faces, finder=finder, device=device, threads=threads),
        ids,
        images,
        progress,
    )
    left_out = left_out + done.left_out
    rows = Rows(done.embeddings, where)
    if not done.left_out:
        return Calibrated(
            calibrate_pairs(rows, pairs, target_fmr, replicates=replicates, seed=seed), left_out
        )
    pairs = pairs.among(done.kept)
    try:
        check_both_kinds(pairs.same, where)
        found = calibrate_pairs(rows, pairs, target_fmr, replicates=replicates, seed=seed)
    except ConfigError as error:
        raise ConfigError(
            f"{error} ({len(done.left_out)} of {len(images)} images could not be embedded; the first: "
            f"{done.left_out[0]})"
        ) from None
    return Calibrated(found, left_out)


def identities_of(stored: StoredRows, column: str | None, from_folder: bool) -> list[Any]:
    """The identities of stored rows, by a label column or by their images' folders.

    Raises:
        ConfigError: Neither or both, no such column, or an image that lies in no folder.
    """
    if (column is None) == (not from_folder):
        raise ConfigError(
            f"{stored.where} holds embeddings: say who they show with one of --label COLUMN and "
            "--label-from-folder"
        )
    return folder_identities(stored.keys()[0]) if column is None else stored.label(column)
