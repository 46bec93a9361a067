"""Copying a zoo between two places, entry by entry, each verified on its way."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator

from embedkit.errors import ConfigError
from embedkit.hub.access import Access
from embedkit.hub.base import Zoo
from embedkit.hub.folder import FolderZoo
from embedkit.hub.open import open_zoo
from embedkit.hub.publish.publish import Published, publish
from embedkit.hub.verified import VerifiedEntry
from embedkit.model.layout import ENTRY_NAME


def entry_names(place: Zoo, pattern: str = "*") -> list[str]:
    """The folder names of a place's entries; those that hold an alias first, so that a copy gives it to them too."""
    index = place.index()
    names = set(index.rows)
    if isinstance(place, FolderZoo):
        names = {
            path.name for path in place.path.iterdir() if path.is_dir() and ENTRY_NAME.fullmatch(path.name)
        }
    holders = set(index.aliases.values())
    return sorted(fnmatch.filter(names, pattern), key=lambda name: (name not in holders, name))


def entries_of(place: Zoo, pattern: str = "*") -> Iterator[VerifiedEntry]:
    """A place's entries, pulled into the cache where they are remote."""
    for name in entry_names(place, pattern):
        files = place.find(name)
        if files is None:
            raise ConfigError(f"{place.uri} lists {name} and does not hold it: publish it there again")
        yield VerifiedEntry(files.name, files)


def mirror(
    source: str,
    to: str,
    *,
    pattern: str = "*",
    access: Access | None = None,
    private: bool = False,
    token: str | None = None,
) -> Iterator[Published]:
    """Copy the entries of a zoo to another place; one that is there already is not written again.

    Args:
        source: A place that can be read.
        to: A place that can be published to.
        pattern: Shell wildcards over the entries' names.
        access: How the source is read.
        private: As for `publish`.
        token: Credential for `to`.

    Yields:
        What was done, entry by entry.

    Raises:
        EmbedkitError: As for reading the one and publishing to the other.
    """
    for entry in entries_of(open_zoo(source, access), pattern):
        yield publish(entry, to, private=private, token=token)
