"""Images of known identity, and a calibration by them: from a folder, or from a list of pairs.

All that can be told from names is checked before the first image is opened, since embedding many takes long.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial

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
from embedkit.workflows.embedding import Image, embed_readable, encoder_of_images

__all__ = [
    "Calibrated",
    "Known",
    "calibrate_images",
    "holds_images",
    "identities_of",
    "known_images",
    "image_pairs",
]


def holds_images(source: str | os.PathLike[str]) -> bool:
    """Whether a calibration by `source` embeds images: a CSV of pairs, or a folder that holds no embeddings."""
    return _is_list(source) or not is_embeddings(source)


def _is_list(source: str | os.PathLike[str]) -> bool:
    return os.fspath(source).lower().endswith(".csv")


@dataclass(frozen=True)
class Known:
    """Images of known identity, which nobody has opened yet.

    Attributes:
        ids: Their paths, relative to their folder.
        images: In the same order.
        identities: The folder of each.
        unlisted: A sentence for each file or folder that cannot be listed.
    """

    ids: list[str]
    images: list[Image]
    identities: list[str]
    unlisted: list[str]


@dataclass(frozen=True)
class Calibrated:
    """A calibration by images.

    Attributes:
        calibration: Bound to the encoder's space.
        left_out: A sentence for each image that could not be embedded; pairs with it are left out, too.
    """

    calibration: Calibration
    left_out: list[str]


def known_images(folder: str | os.PathLike[str]) -> Known:
    """List a folder that has one sub-folder per identity.

    Args:
        folder: An image's identity is the folder that it lies in, relative to this one.

    Raises:
        SourceError: No image in it.
        ConfigError: An image that lies in no sub-folder.
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
    return Known(
        ids=ids,
        images=[Image(item.path or item.id, item.read) for item in listing.items],
        identities=identities,
        unlisted=[f"{os.path.join(where, name)}: {reason}" for name, _, reason in listing.errors],
    )


def image_pairs(path: str | os.PathLike[str]) -> tuple[list[Image], Pairs]:
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
    # One image may be spelled in several ways, and lie behind links: paired with itself it says nothing.
    files = {name: _file_of(name, folder, originals) for name in names}
    spelled = {file: name for name, file in files.items()}
    rows = {file: row for row, file in enumerate(spelled)}
    pairs = read_pairs(path, {name: rows[file] for name, file in files.items()})
    called = [os.path.normpath(os.path.join(folder, name)) for name in spelled.values()]
    return [
        Image(shown, partial(originals.read, name))
        for shown, name in zip(called, spelled.values(), strict=True)
    ], pairs


def _file_of(name: str, folder: str, originals: Originals) -> str:
    """What tells one image from others: its real path, with the member or row of a container behind it."""
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
    most: int = MOST,
    replicates: int = REPLICATES,
    seed: int = 0,
    device: str = "auto",
    threads: int | str = "auto",
    progress: Progress | None = None,
) -> Calibrated:
    """Calibrate an encoder by images, each of which is embedded once.

    An image that is there and cannot be embedded, since it is damaged or has not the one face that is asked for, is
    left out with its pairs.

    Args:
        source: `PAIRS.csv`, see `image_pairs`, or a folder with one sub-folder per identity.
        target_fmr: The false-match rate that is asked for.
        encoder: A name or an entry's folder; the default encoder when None, or that of faces.
        faces: Find the one face of each image, and compare these; whole images otherwise.
        most: Pairs of each kind that are drawn from the identities of a folder.
        replicates: Bootstrap samples.
        seed: Of the pairs that are drawn, and of the bootstrap.
        device: As for `load_encoder`.
        threads: As for `load_encoder`.
        progress: Told how the embedding goes.

    Raises:
        ConfigError: No such pairs, an image that is not there, or too few pairs for the rate.
        SourceError: No image, or not one that can be embedded.
    """
    where = os.fspath(source)
    left_out: list[str] = []
    if _is_list(source):
        images, pairs = image_pairs(source)
        ids = [image.name for image in images]
    else:
        known = known_images(source)
        ids, images, left_out = known.ids, known.images, known.unlisted
        pairs = sample_pairs(known.identities, seed=seed, most=most, where=where)
    check_support(int((~pairs.same).sum()), target_fmr)
    done = embed_readable(
        encoder_of_images(encoder, faces=faces, device=device, threads=threads), ids, images, progress
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


def identities_of(stored: StoredRows, column: str | None, from_folder: bool) -> list:
    """The identities of stored rows, by a label column or by their images' folders.

    Raises:
        ConfigError: Neither or both, no such column, or an image that lies in no folder.
    """
    if (column is None) == (not from_folder):
        raise ConfigError(
            f"{stored.where} holds embeddings: say who they show with one of --identity COLUMN and "
            "--identity-from-folder"
        )
    return folder_identities(stored.keys()[0]) if column is None else stored.label(column)
