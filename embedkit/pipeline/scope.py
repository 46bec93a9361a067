"""What a job's sources cover: which rows of an earlier output come from them, and whose files are gone."""

from __future__ import annotations

import glob
import os
from collections.abc import Collection, Sequence
from functools import cached_property
from urllib.parse import unquote_to_bytes

from embedkit.images.sources import PathList

__all__ = ["Scope"]


class Scope:
    """Tells for the id of a row whether its image lies in the sources of a job."""

    def __init__(
        self, sources: Sequence[str | PathList], root: str | None, recursive: bool, listed: Collection[str]
    ):
        """Take the sources as given.

        Args:
            sources: Paths, patterns or lists of paths.
            root: The folder that ids are relative to; the working directory when None.
            recursive: Whether folders inside folders were entered.
            listed: The ids of the listing.
        """
        self._sources, self._root, self._recursive = sources, root, recursive
        self._listed = listed

    def covers(self, name: str) -> bool:
        """Whether a row's image lies in the sources: if it still existed, it would have been listed."""
        path = os.path.abspath(self._path(name))
        container = path.partition("::")[0]
        if path in self._files or (container != path and container in self._files):
            return True
        folder = os.path.dirname(container)
        if folder in self._folders:
            return True
        while self._recursive and folder != (folder := os.path.dirname(folder)):
            if folder in self._folders:
                return True
        return False

    def has_file(self, name: str) -> bool:
        """Whether the file of a row exists; of a member of an archive, the archive."""
        path = self._path(name)
        while not os.path.exists(path):
            path, inside, _ = path.rpartition("::")
            if not inside:
                return False
        return True

    @cached_property
    def _paths(self) -> list[str]:
        found: list[str] = []
        for source in self._sources:
            if isinstance(source, PathList):  # it names images one by one; the archives are in the listing
                containers = {name.partition("::")[0] for name in self._listed if "::" in name}
                found += [self._path(container) for container in containers]
            elif os.path.exists(source):
                found.append(source)
            else:
                found += glob.glob(source, recursive=True)
        return [os.path.abspath(path) for path in found]

    @cached_property
    def _folders(self) -> set[str]:
        return {path for path in self._paths if os.path.isdir(path)}

    @cached_property
    def _files(self) -> set[str]:
        return set(self._paths) - self._folders

    def _path(self, name: str) -> str:
        if name.startswith("file:"):
            name = os.fsdecode(unquote_to_bytes(name.removeprefix("file:")))
        return name if self._root is None else os.path.join(self._root, name)
