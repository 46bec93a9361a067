"""Copies or links of images in one folder per cluster. The originals are never moved, changed or deleted.

Ids may come from an untrusted file, so only images below one root folder are used. The result is built in a temporary
folder and renamed at the end; the next run removes the temporary folder of a killed one.
"""

from __future__ import annotations

import os
import posixpath
import shutil
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from embedkit._io.atomic import replacing_folder
from embedkit._io.reading import open_regular
from embedkit.analysis.clustering.cluster import Clustering
from embedkit.errors import EmbedkitError, OutputError, SourceError
from embedkit.images.ids import path_of
from embedkit.images.originals import Originals

__all__ = ["ClusterFolders", "check_free", "cluster_folders"]

#: Bytes of a file's name, on all common file systems.
_MAX_NAME = 255
_CHUNK = 1 << 20
#: First bytes of an image -> suffix, for rows of Parquet files, which have no name.
_MAGIC = {b"\xff\xd8": ".jpg", b"\x89PNG": ".png", b"GIF8": ".gif", b"RIFF": ".webp", b"BM": ".bmp"}


@dataclass(frozen=True)
class ClusterFolders:
    """The folders that were written.

    Attributes:
        folder: The folder that holds one folder per cluster.
        images: Number of copies or links.
        missing: Ids of images that no longer exist, or cannot be read.
        outside: Ids of images that are skipped because they are not below the root.
    """

    folder: Path
    images: int
    missing: list[str]
    outside: list[str] = field(default_factory=list)


def cluster_folders(
    clustering: Clustering,
    folder: str | os.PathLike[str],
    *,
    link: bool = False,
    root: str | os.PathLike[str] | None = None,
) -> ClusterFolders:
    """Copy or link every image into the folder of its cluster: `cluster-0` and so on, and `noise`.

    Names are kept. If two images of a cluster have the same name (ignoring case), the later ones get the suffix `-2`,
    `-3` and so on. An image whose parts are all in one cluster appears there once.

    Args:
        clustering: Its ids are paths as at embedding, or archive members and rows of Parquet files.
        folder: It must not exist, or must be empty.
        link: Make symbolic links to the originals instead of copies.
        root: The folder that ids are relative to; the working folder when None. No image outside of it is used. Links
            below it are followed: they belong to its owner.

    Raises:
        OutputError: The folder is not empty, or cannot be written.
        SourceError: None of the images exists, all are outside the root, or links to members of an archive are
            requested.

    Examples:
        >>> done = embedkit.workflows.cluster_folders(embedkit.cluster("samples.parquet", n_clusters=3), "sorted")
        >>> done.images, sorted(path.name for path in done.folder.iterdir())
        (10, ['cluster-0', 'cluster-1', 'cluster-2'])
    """
    folder = Path(folder)
    check_free(folder)
    finder = _Finder(root)
    wanted = dict.fromkeys(zip(clustering.labels.tolist(), clustering.ids, strict=True))
    found: list[tuple[int, str, _Image]] = []
    for label, name in wanted:
        image = finder.find(name)
        if image is None:
            continue
        if link and image.file is None:
            container = name.partition("::")[0]
            raise SourceError(
                f"{name!r} is inside {container!r}, which a link cannot point into; use --copy-into"
            )
        found.append((label, name, image))
    if not found:
        raise finder.nothing()
    digits = len(str(max(len(clustering) - 1, 0)))
    used: defaultdict[Path, dict[str, int]] = defaultdict(dict)
    made = 0
    with replacing_folder(folder, replace=False) as aside:
        for label, name, image in found:
            target = aside / (f"cluster-{label:0{digits}d}" if label >= 0 else "noise")
            if target not in used:
                target.mkdir()
            names = used[target]
            try:
                if image.file is None:
                    data = _member(image.originals, name)
                    (target / _free_name(_name_of(name, data), names)).write_bytes(data)
                elif link:
                    (target / _free_name(os.path.basename(image.file), names)).symlink_to(image.file)
                else:
                    _copy(image.file, target, names)
            except _UnreadableError:
                finder.missing[name] = None
            else:
                made += 1
    return ClusterFolders(folder, made, list(finder.missing), list(finder.outside))


@dataclass(frozen=True)
class _Image:
    """An image that may be used: its own file, or None for a member of a container."""

    originals: Originals
    file: str | None


class _Finder:
    """Finds the images of ids, only below one folder."""

    def __init__(self, root: str | os.PathLike[str] | None):
        self._root = os.path.abspath(root if root is not None else os.curdir)
        self._ways = [Originals(root)]
        if root is not None:  # ids may also be paths from the working folder, into the root
            self._ways.append(Originals())
        self.missing: dict[str, None] = {}
        self.outside: dict[str, None] = {}

    def find(self, name: str) -> _Image | None:
        """The image of an id; None for one that is recorded as missing or outside."""
        ways = [originals for originals in self._ways if self._is_inside(originals, name)]
        for originals in ways:
            if originals.has(name):
                return _Image(originals, originals.file(name))
        (self.missing if ways else self.outside)[name] = None
        return None

    def nothing(self) -> SourceError:
        """The error if no image can be used."""
        if self.outside and not self.missing:
            return SourceError(
                f"all {len(self.outside)} images lie outside {self._root} (the first is "
                f"{next(iter(self.outside))!r}), and only images below it are used; name the folder that holds them "
                "with --root"
            )
        first = next(iter(self.missing))
        return SourceError(
            f"none of the {len(self.missing) + len(self.outside)} images exists (the first is {first!r}); run the "
            "command in the folder where they were embedded, or name the folder that ids are relative to with --root"
        )

    def _is_inside(self, originals: Originals, name: str) -> bool:
        """Whether the path of an id, and the container that it may name, are below the root."""
        container = path_of(name).partition("::")[0]
        # Ids are normalized: `link/../x` could point to another file than its text suggests.
        if os.path.normpath(container or os.curdir) != container:
            return False
        path = path_of(name, originals.root)
        return self._holds(path) and self._holds(path.partition("::")[0])

    def _holds(self, path: str) -> bool:
        return os.path.join(os.path.abspath(path), "").startswith(os.path.join(self._root, ""))


class _UnreadableError(Exception):
    """An existing image cannot be read."""


def _member(originals: Originals, name: str) -> bytes:
    try:
        return originals.read(name)
    except (EmbedkitError, OSError) as error:
        raise _UnreadableError(str(error)) from None


def _copy(file: str, folder: Path, used: dict[str, int]) -> None:
    """Copy a file with its times and permissions, under its name or a free one like it."""
    chunks = _chunks(file)
    first = next(chunks)  # before the name is reserved
    target = folder / _free_name(os.path.basename(file), used)
    with open(target, "wb") as output:
        output.write(first)
        try:
            output.writelines(chunks)
        except _UnreadableError:
            target.unlink()
            raise
    try:
        shutil.copystat(file, target)
    except OSError:
        pass  # a file system without such times or permissions; the image itself is complete


def _chunks(file: str) -> Iterator[bytes]:
    """The content of a regular file, at least one piece."""
    try:
        with open_regular(file) as source:
            yield source.read(_CHUNK)
            while chunk := source.read(_CHUNK):
                yield chunk
    except OSError as error:
        raise _UnreadableError(str(error)) from None


def _name_of(name: str, data: bytes) -> str:
    """The file name for a member of a container."""
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

    name = _fitting(name, "")
    candidate, first = name, key(name)
    while key(candidate) in taken:
        taken[first] += 1
        candidate = _fitting(name, f"-{taken[first]}")
    taken[key(candidate)] = 1
    return candidate


def _fitting(name: str, number: str) -> str:
    """`name` with a number behind its stem, the stem cut where a file system could not hold the name."""
    stem, suffix = os.path.splitext(name)
    end = os.fsencode(number) + os.fsencode(suffix)[:32]
    room = _MAX_NAME - len(end)
    data = os.fsencode(stem)
    if len(data) <= room:
        return stem + number + suffix if len(suffix) <= 32 else os.fsdecode(data + end)
    # Do not split a character.
    return data[:room].decode("utf-8", "ignore") + os.fsdecode(end)


def check_free(folder: Path) -> None:
    """Refuse a folder that cannot take the cluster folders.

    Raises:
        OutputError: It is not empty, is a file, or its parent folder does not exist.
    """
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise OutputError(f"{folder} is a file; choose another folder")
    if os.path.isdir(folder) and any(folder.iterdir()):
        raise OutputError(
            f"{folder} is not empty, and nothing is overwritten; choose a new or an empty folder"
        )
    if not os.path.isdir(folder.absolute().parent):
        raise OutputError(f"the folder {folder.absolute().parent} does not exist; create it first")
