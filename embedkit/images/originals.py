"""From the id of a row back to its image: a file, a member of a tar archive, or a row of a Parquet file.

`embedkit.images.sources` made the ids, so its listing reads containers here too. Each container is listed once.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator
from functools import partial

from embedkit.errors import EmbedkitError, SourceError
from embedkit.images.files import other_form, read_file
from embedkit.images.ids import containers_of, path_of
from embedkit.images.sources import list_sources

__all__ = ["Originals", "nothing_readable"]

_PART = re.compile(r"#[0-9]+$")


class Originals:
    """The images behind ids. Thread-safe.

    Attributes:
        root: The folder that ids are relative to; the working folder when None.
    """

    def __init__(self, root: str | os.PathLike[str] | None = None):
        """Open nothing yet.

        Args:
            root: The folder that ids are relative to; the working folder when None.

        Raises:
            SourceError: The root is not a folder.
        """
        self.root = None if root is None else os.fspath(root)
        if self.root is not None and not os.path.isdir(self.root):
            raise SourceError(
                f"the root {self.root!r} is not a folder; name the folder that ids are relative to"
            )
        self._members: dict[str, dict[str, Callable[[], bytes]]] = {}
        self._lock = threading.Lock()

    def read(self, name: str) -> bytes:
        """The encoded bytes of one image.

        Args:
            name: The id, or the name of a row: `id#part` for the further parts of an image.

        Raises:
            SourceError: It no longer exists, or its container cannot be read.
            ImageError: A Parquet row without bytes.
            OSError: The file exists and cannot be read.
        """
        reader = self._find(name)
        if reader is None:
            raise SourceError("the image no longer exists")
        return reader()

    def file(self, name: str) -> str | None:
        """The absolute path of an image that is a file; None if it no longer exists or is inside a container."""
        for candidate in _names(name):
            path = self._file(candidate)
            if path is not None:
                return os.path.abspath(path)
        return None

    def has(self, name: str) -> bool:
        """Whether the image exists; an unreadable container has no images."""
        try:
            return self._find(name) is not None
        except EmbedkitError:
            return False

    def _find(self, name: str) -> Callable[[], bytes] | None:
        for candidate in _names(name):
            for container in self._containers(candidate):
                reader = self._listed(container).get(candidate)
                if reader is not None:
                    return reader
            path = self._file(candidate)
            if path is not None:
                return partial(read_file, path)
        return None

    def _file(self, name: str) -> str | None:
        """The path of the file of this id, under either Unicode form of its name; None if there is none."""
        if self._containers(name):
            return None
        path = self._path(name)
        if not os.path.isfile(path):
            path = other_form(path) or ""
        return path if os.path.isfile(path) else None

    def _containers(self, name: str) -> list[str]:
        """The paths of the possible containers of this id: what precedes each `::`.

        The id of a file whose own path contains `::` is a URI, in which `::` is percent-encoded.
        """
        return [path for inside in containers_of(name) if os.path.isfile(path := self._path(inside))]

    def _listed(self, container: str) -> dict[str, Callable[[], bytes]]:
        """The images of one container by id, as at embedding."""
        with self._lock:
            if container not in self._members:
                root = self.root
                if root is not None and not _is_inside(container, root):
                    root = None  # absolute ids do not depend on the root
                # Nothing is left out here: a row may be of a job that turned the default patterns off.
                items = list_sources([container], root=root, exclude=("",)).items
                self._members[container] = {item.id: item.read for item in items}
            return self._members[container]

    def _path(self, name: str) -> str:
        """The path of an id, still followed by the name inside a container."""
        return path_of(name, self.root)


def nothing_readable(count: int, first: str, reason: str) -> SourceError:
    """The error of a job none of whose images can be read.

    Args:
        count: The number of images.
        first: The id of the first.
        reason: Why the first cannot be read.
    """
    if count > 1:
        what = f"none of the {count} images can be read (the first is {first!r}: {reason})"
    else:
        what = f"the image {first!r} cannot be read ({reason})"
    return SourceError(
        f"{what}; run the command in the folder where `embedkit embed` ran, or name the folder that ids are relative "
        "to with --root"
    )


def _names(name: str) -> Iterator[str]:
    """The ids that a row's name may stand for: `x.parquet::#12` is an id, `x.parquet::#12#1` a part of that image."""
    yield from dict.fromkeys((name, _PART.sub("", name)))


def _is_inside(path: str, folder: str) -> bool:
    return os.path.join(os.path.abspath(path), "").startswith(os.path.join(os.path.abspath(folder), ""))
