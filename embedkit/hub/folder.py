"""Folders: a zoo on disk, one entry on disk, and the zoo that the package carries."""

from __future__ import annotations

import functools
import importlib.resources
import os
import re
from pathlib import Path

from embedkit.entry import INDEX, MANIFEST
from embedkit.errors import ConfigError, EntryError
from embedkit.hub.place import EntryFiles, Index

#: What may be a folder name or an alias; no separator and no wildcard.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}")


class FolderEntry:
    """One entry's folder. Links are followed: the Hub's caches are made of them, and every byte is hashed."""

    def __init__(self, path: Path):
        """Take the folder at `path`; nothing is read yet."""
        self.path = path.absolute()  # the card is read, and the encoder unpickled, in whatever folder that is

    @property
    def location(self) -> str:
        """The folder, as text."""
        return str(self.path)

    def read(self, name: str) -> bytes:
        """All bytes of one file."""
        return (self.path / name).read_bytes()


class FolderPlace:
    """A zoo in a folder: one sub-folder per entry, and `index.json` for the aliases."""

    def __init__(self, path: str | os.PathLike[str]):
        """Take the folder at `path`.

        Raises:
            ConfigError: There is no such folder.
        """
        self.path = Path(os.path.expanduser(path))
        if not os.path.isdir(self.path):
            raise ConfigError(
                f"the zoo {str(path)!r} is not a folder; check EMBEDKIT_ZOO and the configuration file"
            )

    @property
    def uri(self) -> str:
        """The folder, as text."""
        return str(self.path)

    def index(self) -> Index:
        """The folder's `index.json`; an empty index when there is none."""
        try:
            text = (self.path / INDEX).read_bytes()
        except OSError:
            return Index()
        return Index.from_json(text, str(self.path / INDEX))

    def find(self, name: str) -> EntryFiles | None:
        """The entry of this folder name, alias, or only possible completion `<name>.<data>`.

        Raises:
            EntryError: Several folders complete the name and no index decides.
        """
        if not _NAME.fullmatch(name):
            return None
        folder = self.index().folder_of(name) or name
        if (self.path / folder / MANIFEST).is_file():
            return FolderEntry(self.path / folder)
        if "." in name:
            return None
        candidates = sorted(p.parent for p in self.path.glob(f"{name}.*/{MANIFEST}"))
        if len(candidates) > 1:
            names = ", ".join(p.name for p in candidates)
            raise EntryError(f"{self.path}: {name!r} could be {names}; give the whole name")
        return FolderEntry(candidates[0]) if candidates else None


@functools.cache
def package_zoo() -> FolderPlace:
    """The zoo inside the package: the whole index, and the default entry."""
    return FolderPlace(Path(str(importlib.resources.files("embedkit.zoo"))))
