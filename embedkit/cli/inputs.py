"""The files that a command reads, as what its outputs may not be."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from embedkit.images.ids import check_no_image


def files_of(embeddings: str | os.PathLike[str], name: str = "EMB") -> dict[str, str]:
    """All files that stored embeddings consist of: a file, its side files, or a folder and its shards.

    Args:
        embeddings: As the user named them.
        name: How messages name them.

    Returns:
        Name of an input -> path, as `check_outputs` takes them.
    """
    from embedkit.embeddings.npy import ids_path, metadata_path
    from embedkit.embeddings.paths import errors_path

    text = os.fspath(embeddings)
    path = Path(text)
    if "://" in text:
        return {}
    if path.is_dir():
        return {name: text, **{f"{name} ({file.name})": str(file) for file in sorted(path.glob("*.parquet"))}}
    beside = [errors_path(path)]
    if path.suffix == ".npy":
        beside += [ids_path(path), metadata_path(path)]
    return {name: text, **{f"{name} ({file.name})": str(file) for file in beside}}


def check_known(outputs: Mapping[str, str | os.PathLike[str] | None], source: str) -> None:
    """Refuse outputs that are images of a CSV of pairs, or of a folder with one sub-folder per identity.

    Args:
        outputs: Option as the user knows it -> the path; None where it was not given.
        source: The CSV or the folder.

    Raises:
        OutputError: One of them is.
    """
    from embedkit.analysis.matching.pairs import pair_names
    from embedkit.images.sources import list_sources

    if not any(path is not None and os.path.isfile(path) for path in outputs.values()):
        return
    if os.path.isdir(source):
        check_no_image(outputs, [item.id for item in list_sources([source]).items])
    else:
        check_no_image(outputs, pair_names(source), os.path.dirname(source) or None)
