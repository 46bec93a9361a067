"""Operations on lists of entries: pull, pin, bundle, and evict from the cache."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from embedkit._io.outputs import check_outputs
from embedkit.errors import ConfigError, EmbedkitError, EntryNotFoundError
from embedkit.hub.access import Access
from embedkit.hub.cache import Gate
from embedkit.hub.catalog import NAME
from embedkit.hub.download import Watcher
from embedkit.hub.mirror import entry_names
from embedkit.hub.open import open_zoo
from embedkit.hub.resolve import find_entry, zoos
from embedkit.hub.signing import check_signature
from embedkit.hub.urls import is_url
from embedkit.hub.verified import VerifiedEntry
from embedkit.model.layout import REVISION


@dataclass(frozen=True, kw_only=True)
class Pulled:
    """An entry on this machine, every byte of it verified.

    Attributes:
        name: The entry.
        revision: The manifest's sha256.
        license: SPDX identifier.
        bytes: Of all files.
        location: The folder.
        copied: Whether it is in the cache; not if it is of a zoo on this machine, which is read where it is.
    """

    name: str
    revision: str
    license: str
    bytes: int
    location: str
    copied: bool


def pull(
    names: Sequence[str],
    *,
    zoo: str | None = None,
    gate: Gate,
    watcher: Watcher | None = None,
    token: str | None = None,
    lock: bool = False,
    verify_key: str | os.PathLike[str] | None = None,
) -> list[Pulled]:
    """Bring entries into the cache, and check every byte of those that are there.

    Args:
        names: Names, URLs, or archives; all of `zoo` when empty.
        zoo: Look in this zoo only.
        gate: Accepts or refuses an entry by its license.
        watcher: Receives the progress of a download.
        token: Credential of the zoo.
        lock: Pin each in the lock file, replacing an older pin.
        verify_key: The public key that must have signed each entry.

    Raises:
        SignatureError: An entry is not signed by this key.
        EmbedkitError: As for `find_entry`; a broken entry is not kept.
    """
    trust = None if verify_key is None else functools.partial(check_signature, public_key=verify_key)
    access = Access(token=token, gate=gate, watcher=watcher, trust=trust)
    return [_checked(name, source, access, lock) for name, source in _asked(names, zoo, access)]


def bundle(
    names: Sequence[str],
    out: Path,
    *,
    zoo: str | None = None,
    gate: Gate,
    watcher: Watcher | None = None,
    token: str | None = None,
) -> list[str]:
    """Write entries as one tar; see `embedkit.storage.tar`.

    Returns:
        The names of the entries in it.

    Raises:
        ConfigError: Nothing to write, or two entries of one name.
        EmbedkitError: As for `find_entry`.
    """
    from embedkit.hub.bundle import write_archive

    if not str(out).endswith(".tar"):
        raise ConfigError(f"output: expected a name that ends in .tar, found {str(out)!r}")
    check_outputs({"-o": out}, {"--zoo": zoo, **{name: name for name in names}})
    access = Access(token=token, gate=gate, watcher=watcher)
    entries = [find_entry(name, zoo=source, access=access) for name, source in _asked(names, zoo, access)]
    if not entries or len({entry.name for entry in entries}) != len(entries):
        raise ConfigError("expected entries of different names, one at least")
    return write_archive(entries, out)


def evict(name: str) -> list[str]:
    """Remove an entry from the cache.

    Args:
        name: Its whole name, or `name@revision`.

    Returns:
        The digests of the versions that were removed.

    Raises:
        ConfigError: Not a name or a revision.
        EntryNotFoundError: The cache does not have it.
    """
    bare, at, revision = name.partition("@")
    if not NAME.fullmatch(bare) or (at and not REVISION.fullmatch(revision)):
        raise ConfigError(f"{name!r}: expected an entry's whole name, or name@revision")
    cache = Access().cache
    gone = cache.revisions(bare, revision)
    if not gone:
        where = next((zoo.uri for zoo in zoos() if "://" not in zoo.uri and zoo.holds(bare)), None)
        there = "" if where is None else f"; it is in the zoo {where}, which evict leaves as it is"
        raise EntryNotFoundError(f"{name!r} is not in the cache ({cache.root}){there}")
    for sha256 in gone:
        cache.remove(sha256)
    return gone


def _asked(names: Sequence[str], zoo: str | None, access: Access) -> Iterator[tuple[str, str | None]]:
    """Each name with the zoo to look in; all names of the zoo when no name is given."""
    if not names:
        if zoo is None:
            raise ConfigError("name an entry, or a whole zoo with --zoo")
        yield from ((name, zoo) for name in entry_names(open_zoo(zoo, access)))
    for name in names:
        if name.endswith(".tar") and not is_url(name):
            yield from ((inner, name) for inner in entry_names(open_zoo(name, access)))
        else:
            yield name, zoo


def _checked(name: str, zoo: str | None, access: Access, lock: bool) -> Pulled:
    entry = find_entry(name, zoo=zoo, access=access, lock=lock)
    try:
        size = _read_all(entry)
    except EmbedkitError:
        if access.cache.root not in Path(entry.location).parents:
            raise
        access.cache.remove(entry.revision)  # the disk has changed a byte
        entry = find_entry(name, zoo=zoo, access=access, lock=lock)
        size = _read_all(entry)
    return Pulled(
        name=entry.name,
        revision=entry.revision,
        license=entry.config.license,
        bytes=size,
        location=entry.location,
        copied=access.cache.root in Path(entry.location).parents,
    )


def _read_all(entry: VerifiedEntry) -> int:
    return sum(len(entry.read(name)) for name in entry.manifest.files)
