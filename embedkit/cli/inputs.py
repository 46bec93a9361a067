"""The inputs of commands: lists on standard input, entries and zoos, and the files that an output may not be."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from embedkit.errors import ConfigError

if TYPE_CHECKING:
    from embedkit.images.sources import PathList
    from embedkit.workflows.faces.finder import FaceFinder


def sources_of(given: Sequence[str], *, null: bool) -> list[str | PathList]:
    """The sources of images that the user named; `-` becomes the list of paths on standard input.

    Args:
        given: Paths, patterns or `-`.
        null: Whether the list is separated by NUL bytes instead of lines.

    Raises:
        SourceError: Standard input is not such a list.
    """
    from embedkit.images.sources import PathList

    return [PathList.parse(sys.stdin.buffer.read(), null=null) if name == "-" else name for name in given]


def with_token(name: str | None, token: str | None) -> str | None:
    """An entry that only the holder of a token can read, as the folder that it was pulled into.

    Args:
        name: As `load_encoder` takes it; None for the default encoder, which needs no token.
        token: Credential for its zoo; without one `name` is returned as it is.
    """
    if name is None or token is None or os.path.isdir(name):
        return name
    from embedkit.hub.access import Access
    from embedkit.hub.resolve import find_entry

    return find_entry(name, access=Access(token=token)).location


def folder_of(zoo: str) -> Path:
    """The folder of a zoo that an entry is made in.

    Raises:
        ConfigError: The zoo is a URL.
    """
    if "://" in zoo:
        raise ConfigError(
            f"--to {zoo}: an entry is made in a folder; make it there, and publish it with `embedkit publish`"
        )
    return Path(zoo)


def files_of(embeddings: str | os.PathLike[str], name: str = "EMB") -> dict[str, str]:
    """All files that stored embeddings consist of: a file, its side files, or a folder and its shards.

    Args:
        embeddings: As the user named them.
        name: How messages name them.

    Returns:
        Name of an input -> path, as `check_outputs` takes them.
    """
    from embedkit.embeddings.formats import files_of as stored_in

    first, *others = stored_in(embeddings)
    return {name: str(first), **{f"{name} ({file.name})": str(file) for file in others}}


def check_not_a_source(outputs: Mapping[str, str | os.PathLike[str] | None], source: str) -> None:
    """Refuse outputs that are images of a CSV of pairs, or of a folder with one sub-folder per identity.

    Args:
        outputs: Option as the user knows it -> the path; None where it was not given.
        source: The CSV or the folder.

    Raises:
        OutputError: One of them is.
    """
    from embedkit.analysis.matching.pairs import pair_names
    from embedkit.images.ids import check_no_image
    from embedkit.images.sources import list_sources

    if not any(path is not None and os.path.isfile(path) for path in outputs.values()):
        return
    if os.path.isdir(source):
        check_no_image(outputs, [item.id for item in list_sources([source]).items])
    else:
        check_no_image(outputs, pair_names(source), os.path.dirname(source) or None)


def finder_of(
    faces: bool, min_score: float | None, min_size: float | None, *, device: str, threads: str
) -> FaceFinder | None:
    """The finder of `--faces`; None without it.

    Raises:
        BadParameter: `--min-score` or `--min-size` without `--faces`.
    """
    if not faces:
        if min_score is not None or min_size is not None:
            raise typer.BadParameter("--min-score and --min-size need --faces")
        return None
    from embedkit.workflows.faces.finder import MIN_SCORE, FaceFinder

    return FaceFinder(
        min_score=MIN_SCORE if min_score is None else min_score,
        min_size=min_size or 0,
        device=device,
        threads=threads,
    )
