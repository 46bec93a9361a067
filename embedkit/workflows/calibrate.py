"""Pictures of known identity, and a calibration by them: from a folder, or from a list of pairs.

All that can be told from names is checked before the first picture is opened, since embedding many takes long.
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
from embedkit.embeddings.formats import Stored, is_stored
from embedkit.errors import ConfigError
from embedkit.images.originals import Originals
from embedkit.images.sources import list_sources
from embedkit.pipeline.job import Progress
from embedkit.workflows.embedding import Picture, embed_readable, encoder_of_pictures

__all__ = [
    "Calibrated",
    "Known",
    "calibrate_pictures",
    "holds_pictures",
    "identities_of",
    "known_pictures",
    "picture_pairs",
]


def holds_pictures(source: str | os.PathLike[str]) -> bool:
    """Whether a calibration by `source` embeds pictures: a CSV of pairs, or a folder that holds no embeddings."""
    return _is_list(source) or not is_stored(source)


def _is_list(source: str | os.PathLike[str]) -> bool:
    return os.fspath(source).lower().endswith(".csv")


@dataclass(frozen=True)
class Known:
    """Pictures of known identity, which nobody has opened yet.

    Attributes:
        ids: Their paths, relative to their folder.
        pictures: In the same order.
        identities: The folder of each.
        unlisted: A sentence for each file or folder that cannot be listed.
    """

    ids: list[str]
    pictures: list[Picture]
    identities: list[str]
    unlisted: list[str]


@dataclass(frozen=True)
class Calibrated:
    """A calibration by pictures.

    Attributes:
        calibration: Bound to the encoder's space.
        left_out: A sentence for each picture that could not be embedded; pairs with it are left out, too.
    """

    calibration: Calibration
    left_out: list[str]


def known_pictures(folder: str | os.PathLike[str]) -> Known:
    """List a folder that has one sub-folder per identity.

    Args:
        folder: A picture's identity is the folder that it lies in, relative to this one.

    Raises:
        SourceError: No picture in it.
        ConfigError: A picture that lies in no sub-folder.
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
        pictures=[Picture(item.path or item.id, item.read) for item in listing.items],
        identities=identities,
        unlisted=[f"{os.path.join(where, name)}: {reason}" for name, _, reason in listing.errors],
    )


def picture_pairs(path: str | os.PathLike[str]) -> tuple[list[Picture], Pairs]:
    """The pictures of a CSV of pairs, each once, and the pairs of these.

    Args:
        path: The CSV, with the columns `a` and `b`, paths of pictures, absolute or relative to the CSV's folder, and
            `same` (1 or 0).

    Raises:
        ConfigError: Not such a file, a picture that is not there, or pairs of one kind only.
    """
    where = os.fspath(path)
    folder = os.path.dirname(where) or os.curdir
    names = pair_names(path)
    originals = Originals(folder)
    missing = [name for name in names if not originals.has(name)]
    if missing:
        others = f", and {len(missing) - 1} more are missing" if len(missing) > 1 else ""
        raise ConfigError(
            f"{where} names {missing[0]!r}, and no such picture is there{others}; paths are absolute, or relative to "
            "the folder of the CSV"
        )
    # One picture may be spelt in several ways, and lie behind links: paired with itself it says nothing.
    files = {name: _file_of(name, folder, originals) for name in names}
    spelt = {file: name for name, file in files.items()}
    rows = {file: row for row, file in enumerate(spelt)}
    pairs = read_pairs(path, {name: rows[file] for name, file in files.items()})
    called = [os.path.normpath(os.path.join(folder, name)) for name in spelt.values()]
    return [
        Picture(shown, partial(originals.read, name))
        for shown, name in zip(called, spelt.values(), strict=True)
    ], pairs


def _file_of(name: str, folder: str, originals: Originals) -> str:
    """What tells one picture from others: its real path, with the member or row of a container behind it."""
    file = originals.file(name)
    if file is not None:
        return os.path.realpath(file)
    container, mark, member = name.partition("::")
    found = originals.file(container)
    if found is None:  # a name with `::` in its folders
        return os.path.normpath(os.path.join(folder, name))
    return os.path.realpath(found) + mark + member


def calibrate_pictures(
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
    """Calibrate an encoder by pictures, each of which is embedded once.

    A picture that is there and cannot be embedded, since it is damaged or has not the one face that is asked for, is
    left out with its pairs.

    Args:
        source: `PAIRS.csv`, see `picture_pairs`, or a folder with one sub-folder per identity.
        target_fmr: The false-match rate that is asked for.
        encoder: A name or an entry's folder; the default encoder when None, or that of faces.
        faces: Find the one face of each picture, and compare these; whole pictures otherwise.
        most: Pairs of each kind that are drawn from the identities of a folder.
        replicates: Bootstrap samples.
        seed: Of the pairs that are drawn, and of the bootstrap.
        device: As for `load_encoder`.
        threads: As for `load_encoder`.
        progress: Told how the embedding goes.

    Raises:
        ConfigError: No such pairs, a picture that is not there, or too few pairs for the rate.
        SourceError: No picture, or not one that can be embedded.
    """
    where = os.fspath(source)
    left_out: list[str] = []
    if _is_list(source):
        pictures, pairs = picture_pairs(source)
        ids = [picture.name for picture in pictures]
    else:
        known = known_pictures(source)
        ids, pictures, left_out = known.ids, known.pictures, known.unlisted
        pairs = sample_pairs(known.identities, seed=seed, most=most, where=where)
    check_support(int((~pairs.same).sum()), target_fmr)
    done = embed_readable(
        encoder_of_pictures(encoder, faces=faces, device=device, threads=threads), ids, pictures, progress
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
            f"{error} ({len(done.left_out)} of {len(pictures)} pictures could not be embedded; the first: "
            f"{done.left_out[0]})"
        ) from None
    return Calibrated(found, left_out)


def identities_of(stored: Stored, column: str | None, from_folder: bool) -> list:
    """The identities of stored rows, by a label column or by their pictures' folders.

    Raises:
        ConfigError: Neither or both, no such column, or a picture that lies in no folder.
    """
    if (column is None) == (not from_folder):
        raise ConfigError(
            f"{stored.where} holds embeddings: say whom they show with one of --identity COLUMN and "
            "--identity-from-folder"
        )
    return folder_identities(stored.keys()[0]) if column is None else stored.label(column)
