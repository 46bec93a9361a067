"""Copy entries from one zoo to another; every byte is verified."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterator

from embedkit.errors import ConfigError
from embedkit.hub.access import Access
from embedkit.hub.base import Zoo
from embedkit.hub.folder import FolderZoo
from embedkit.hub.open import open_zoo
from embedkit.hub.publish.publish import publish
from embedkit.hub.publish.published import Published
from embedkit.hub.verified import VerifiedEntry
from embedkit.model.layout import ENTRY_NAME


def entry_names(zoo: Zoo, pattern: str = "*") -> list[str]:
    """The names of a zoo's entries. Those with an alias come first, so that a copy gives them the alias too."""
    index = zoo.index()
    names = set(index.rows)
    if isinstance(zoo, FolderZoo):
        names = {
            path.name
            for path in zoo.path.iterdir()
            if os.path.isdir(path) and ENTRY_NAME.fullmatch(path.name)
        }
    holders = set(index.aliases.values())
    return sorted(fnmatch.filter(names, pattern), key=lambda name: (name not in holders, name))


def entries_of(zoo: Zoo, pattern: str = "*") -> Iterator[VerifiedEntry]:
    """A zoo's entries; remote ones are downloaded into the cache."""
    for name in entry_names(zoo, pattern):
        files = zoo.find(name)
        if files is None:
            raise ConfigError(f"{zoo.uri} lists {name} but does not have it: publish it there again")
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
    """Copy the entries of a zoo to another one; entries that are already there are not written again.

    Args:
        source: A zoo that can be read.
        to: A zoo that can be published to.
        pattern: Shell wildcards over the entries' names.
        access: How the source is read.
        private: As for `publish`.
        token: Credential for `to`.

    Yields:
        The result for each entry.

    Raises:
        EmbedkitError: As for reading a zoo and for publishing to one.
    """
    for entry in entries_of(open_zoo(source, access), pattern):
        yield publish(entry, to, private=private, token=token)
