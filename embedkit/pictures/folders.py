"""Pictures in one folder per cluster: copies or links. The originals are read, and never moved, changed or deleted.

All is put together in a folder aside and renamed at the end, so that a run that was killed leaves nothing behind
but that folder.
"""

from __future__ import annotations

import os
import posixpath
import shutil
import unicodedata
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from embedkit.analysis.clustering import Clustering
from embedkit.errors import EmbedkitError, OutputError, SourceError
from embedkit.pictures.reading import Originals

__all__ = ["Sorted", "check_free", "sort_into_folders"]

#: First bytes of a picture -> suffix, for rows of Parquet files, which have no name.
_MAGIC = {b"\xff\xd8": ".jpg", b"\x89PNG": ".png", b"GIF8": ".gif", b"RIFF": ".webp", b"BM": ".bmp"}


@dataclass(frozen=True)
class Sorted:
    """What was done.

    Attributes:
        folder: That holds one folder per cluster.
        pictures: Copies or links that were made.
        missing: Ids of pictures that are not there any more.
    """

    folder: Path
    pictures: int
    missing: list[str]


def sort_into_folders(
    clustering: Clustering,
    folder: str | os.PathLike[str],
    *,
    link: bool = False,
    root: str | os.PathLike[str] | None = None,
) -> Sorted:
    """Put every picture into the folder of its cluster: `cluster-0` and so on, and `noise`.

    Names stay, and where two pictures of a cluster have one name, the later ones get `-2`, `-3` and so on behind
    it, also where only a file system that ignores case would take them for one. A picture whose parts are in one
    cluster is there once.

    Args:
        clustering: Its ids are paths as they were embedded, or archive members and rows of Parquet files.
        folder: It must not exist, or be empty.
        link: Symbolic links to the originals instead of copies.
        root: The folder that ids are relative to, if they are; else the working folder.

    Raises:
        OutputError: The folder holds something already, or cannot be written.
        SourceError: None of the pictures is there, or links to members of an archive are asked for.
    """
    folder = Path(folder)
    check_free(folder)
    originals = Originals(root)
    wanted = dict.fromkeys(zip(clustering.labels.tolist(), clustering.ids, strict=True))
    missing: dict[str, None] = {}
    found: list[tuple[int, str]] = []
    for label, name in wanted:
        if not originals.has(name):
            missing[name] = None
        elif link and originals.file(name) is None:
            container = name.partition("::")[0]
            raise SourceError(f"{name!r} lies inside {container!r}, where no link leads to; use --copy-into")
        else:
            found.append((label, name))
    if not found:
        raise SourceError(
            f"none of the {len(missing)} pictures is there (the first is {next(iter(missing))!r}); run the command "
            "where they were embedded, or name the folder that ids are relative to with --root"
        )
    digits = len(str(max(len(clustering) - 1, 0)))
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    taken: defaultdict[Path, dict[str, int]] = defaultdict(dict)
    made = 0
    try:
        aside.mkdir()
        for label, name in found:
            place = aside / (f"cluster-{label:0{digits}d}" if label >= 0 else "noise")
            if place not in taken:
                place.mkdir()
            file = originals.file(name)
            if file is not None:
                target = place / _free_name(os.path.basename(file), taken[place])
                if link:
                    target.symlink_to(file)
                else:
                    shutil.copy2(file, target)
            else:
                try:
                    data = originals.read(name)
                except (EmbedkitError, OSError):
                    missing[name] = None
                    continue
                (place / _free_name(_name_of(name, data), taken[place])).write_bytes(data)
            made += 1
        if folder.exists():
            folder.rmdir()
        aside.rename(folder)
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be written ({error.strerror or error}); nothing is left there, choose another folder"
        ) from None
    finally:
        if aside.exists():
            shutil.rmtree(aside, ignore_errors=True)  # copies and links of ours alone
    return Sorted(folder, made, list(missing))


def _name_of(name: str, data: bytes) -> str:
    """What a member of a container is to be called as a file."""
    inner = name.partition("::")[2]
    bare = posixpath.basename(inner.replace("\\", "/"))
    if bare.startswith("#") or bare in ("", ".", ".."):
        suffix = next((suffix for magic, suffix in _MAGIC.items() if data.startswith(magic)), "")
        bare = f"row-{bare.lstrip('#.')}{suffix}"
    return bare


def _free_name(name: str, taken: dict[str, int]) -> str:
    """`name`, or with a number behind its stem where that is taken; `taken` counts, by what may be one name."""

    def key(text: str) -> str:
        return unicodedata.normalize("NFC", text).casefold()

    stem, suffix = os.path.splitext(name)
    candidate, first = name, key(name)
    while key(candidate) in taken:
        taken[first] += 1
        candidate = f"{stem}-{taken[first]}{suffix}"
    taken[key(candidate)] = 1
    return candidate


def check_free(folder: Path) -> None:
    """Refuse a folder that pictures cannot be sorted into.

    Raises:
        OutputError: It holds something already, is a file, or lies in no folder.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        raise OutputError(f"{folder} is a file already; choose another folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise OutputError(
            f"{folder} holds something already, and nothing is overwritten; choose a new or an empty folder"
        )
    if not folder.absolute().parent.is_dir():
        raise OutputError(f"the folder {folder.absolute().parent} does not exist; create it first")
