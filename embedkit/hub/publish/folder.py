"""A zoo folder as it is written: entries are written and removed together with the index."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from embedkit._io.atomic import clear_leftovers, remove_folder, replacing_folder
from embedkit._io.reading import read_regular
from embedkit._io.text import one_line
from embedkit.errors import ConfigError, EmbedkitError, OutputError
from embedkit.hub.folder import FolderEntry, FolderZoo, check_replaceable
from embedkit.hub.limits import INDEX_LIMIT
from embedkit.hub.publish.index import build_facts, changed_index, check_zoo
from embedkit.hub.publish.published import Published
from embedkit.hub.verified import VerifiedEntry
from embedkit.model.layout import ENTRY_NAME, INDEX, MANIFEST


def publish_to_folder(entry: VerifiedEntry, zoo: Path) -> Published:
    """Publish an entry to a zoo folder, which is made where it is missing; see `publish`."""
    target = zoo / entry.name
    check_zoo(zoo)
    check_replaceable(target)
    try:
        zoo.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{zoo} cannot be written ({one_line(error)}); choose another folder") from None
    written: list[str] = []
    with changed_index(zoo, add={entry.name: build_facts(entry)}):
        before = _index_of(zoo)
        clear_leftovers(target)  # even if nothing is written: the last writer may have been killed
        if not _is_same(entry, target):
            old = _records(target)
            check_replaceable(target)  # again, under the lock
            with replacing_folder(target) as partial:
                for name in entry.manifest.files:
                    (partial / name).write_bytes(entry.read(name))
                (partial / MANIFEST).write_bytes(entry.manifest_bytes)
            files = entry.manifest.files
            written = [*(name for name in files if old.get(name) != files[name]), MANIFEST]
    if _index_of(zoo) != before:
        written.append(INDEX)
    return Published(name=entry.name, zoo=str(zoo), manifest_sha256=entry.revision, files=tuple(written))


def remove_from_folder(name: str, zoo: Path) -> None:
    """Remove an entry from a zoo folder; see `unpublish`.

    Where the folder is a symbolic link, only the link is removed.
    """
    if not ENTRY_NAME.fullmatch(name) or not _holds(zoo, name):
        raise ConfigError(f"{zoo} holds no entry {name!r}; give the whole name of its folder")
    folder = zoo / name
    with changed_index(zoo, remove=name):
        if os.path.islink(folder):
            folder.unlink()
        elif os.path.exists(folder):
            check_replaceable(folder)
            remove_folder(folder)
        clear_leftovers(folder)


def _holds(zoo: Path, name: str) -> bool:
    """Whether the zoo has the entry, or still lists it after a removal that was killed."""
    return os.path.isfile(zoo / name / MANIFEST) or (
        os.path.isdir(zoo) and name in FolderZoo(zoo).index().rows
    )


def _is_same(entry: VerifiedEntry, target: Path) -> bool:
    """Whether `target` is the entry itself, or a whole copy of it."""
    if os.path.realpath(entry.location) == os.path.realpath(target):
        return True
    try:
        copy = VerifiedEntry(entry.name, FolderEntry(target), manifest_sha256=entry.revision)
        for name in copy.manifest.files:
            copy.read(name)
    except EmbedkitError:
        return False
    return True


def _records(folder: Path) -> Mapping[str, object]:
    try:
        return VerifiedEntry(folder.name, FolderEntry(folder)).manifest.files
    except EmbedkitError:
        return {}


def _index_of(zoo: Path) -> bytes | None:
    try:
        return read_regular(zoo / INDEX, INDEX_LIMIT)
    except OSError:
        return None
