"""Folders: a zoo on disk, one entry on disk, and the zoo that the package carries."""

from __future__ import annotations

import functools
import importlib.resources
import os
from pathlib import Path

from embedkit._io.reading import read_regular
from embedkit._io.text import one_line
from embedkit.errors import ConfigError, EntryError
from embedkit.hub.base import EntryFiles
from embedkit.hub.catalog import INDEX_LIMIT, NAME, REVISION_DIGITS, Index, Pin
from embedkit.hub.verified import MANIFEST_LIMIT
from embedkit.model.layout import INDEX, MANIFEST, REVISION
from embedkit.model.manifest import Manifest


class FolderEntry:
    """One entry's folder. Links are followed: the Hub's caches are made of them, and every byte is hashed."""

    def __init__(self, path: Path, name: str | None = None):
        """Take the folder at `path`; nothing is read yet. The entry's name is the folder's unless one is given."""
        self.path = (
            path.absolute()
        )  # the working folder may change before the card is read or the encoder unpickled
        self.name = name or path.name
        self.version = ""  # see `EntryFiles`

    @property
    def location(self) -> str:
        """The folder, as text."""
        return str(self.path)

    def read(self, name: str, limit: int) -> bytes:
        """All bytes of one regular file of at most `limit` bytes; see `EntryFiles`."""
        return read_regular(self.path / name, limit)


class FolderZoo:
    """A zoo in a folder: one sub-folder per entry, and `index.json` for the aliases."""

    tagged = False

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
        """The folder's `index.json`; an empty index when there is none.

        Raises:
            EntryError: It cannot be read, or is no index.
        """
        try:
            text = read_regular(self.path / INDEX, INDEX_LIMIT)
        except FileNotFoundError:
            return Index()
        except OSError as error:
            raise EntryError(f"{self.path / INDEX} cannot be read ({one_line(error)})") from None
        return Index.from_json(text, str(self.path / INDEX))

    def find(self, name: str, revision: str | None = None, pin: Pin | None = None) -> EntryFiles | None:
        """The entry of this folder name, alias, or only possible completion `<name>.<data>`.

        Raises:
            EntryError: Several folders complete the name and no index decides.
        """
        if not NAME.fullmatch(name):
            return None
        index = self.index()
        folder = index.folder_of(name) or name
        row = index.rows.get(folder)
        tries = [row.folder if row else folder, folder]
        # A copy of a bucket keeps each revision in a folder of its own.
        if revision is not None and REVISION.fullmatch(revision):
            if row is None or not row.manifest_sha256.startswith(revision):
                tries.insert(0, f"{folder}/{revision[:REVISION_DIGITS]}")
        for path in tries:
            if os.path.isfile(self.path / path / MANIFEST):
                return FolderEntry(self.path / path, folder)
        if "." in name:
            return None
        candidates = sorted(p.parent for p in self.path.glob(f"{name}.*/{MANIFEST}"))
        if len(candidates) > 1:
            names = ", ".join(p.name for p in candidates)
            raise EntryError(f"{self.path}: {name!r} could be {names}; give the whole name")
        return FolderEntry(candidates[0]) if candidates else None

    def offers(self, name: str) -> bool:
        """Whether the zoo has the entry."""
        return self.find(name) is not None

    holds = offers


def check_replaceable(folder: Path) -> None:
    """Refuse to replace a folder that is not an entry: its content would be lost.

    Raises:
        ConfigError: The folder is not an entry, or holds other files.
    """
    try:
        if not os.path.exists(folder):
            return
        there = sorted(path.name for path in folder.iterdir())
        manifest = read_regular(folder / MANIFEST, MANIFEST_LIMIT) if MANIFEST in there else b""
    except OSError as error:
        raise ConfigError(
            f"{folder}: its content cannot be read ({one_line(error)}); move it away, or choose another name"
        ) from None
    if there and not manifest:
        raise ConfigError(
            f"{folder} is not an entry, and holds {there[0][:100]!a}: move it away, or choose another name"
        )
    if not there:
        return
    try:
        listed = Manifest.from_json(manifest, f"{folder}: {MANIFEST}").files
    except EntryError as error:
        raise ConfigError(f"{error}; move the folder away, or choose another name") from None
    others = [name for name in there if name not in listed and name != MANIFEST]
    if others:
        raise ConfigError(
            f"{folder} would be replaced, and holds {others[0][:100]!a}, which is not part of the entry: move it away"
        )


@functools.cache
def package_zoo() -> FolderZoo:
    """The zoo inside the package: the whole index, and the default entry."""
    try:
        folder = Path(str(importlib.resources.files("embedkit.zoo")))
    except ModuleNotFoundError:  # in a checkout its `embedkit/` hides the package that is installed
        folder = Path(__file__).parents[2] / "zoo"
    return FolderZoo(folder)
