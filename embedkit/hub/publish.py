"""From a verified entry to a place: only what changed goes up, and what readers begin with goes last.

A reader begins with the index, then the manifest. So files go first, then the manifest, then the index; where a folder
cannot be replaced in one step (a bucket), each revision has a folder of its own, and the old one stays readable
for whoever still holds the old index, or pins it. A publisher that is killed leaves the old version; the next one ends
what it began.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedkit.entry import CARD, ENTRY_NAME, INDEX, MANIFEST, Manifest
from embedkit.errors import ConfigError, EmbedkitError, EntryError, OutputError
from embedkit.hub.address import file_path, is_url, parse_place
from embedkit.hub.buckets import BucketStorage
from embedkit.hub.download import persistent
from embedkit.hub.filelist import INDEX_LIMIT, MANIFEST_LIMIT, check_file_list
from embedkit.hub.files import clear_up, replacing_folder
from embedkit.hub.folder import FolderEntry, check_entry_place
from embedkit.hub.index import build_facts, check_zoo, index_bytes, make_index, update_index
from embedkit.hub.place import REVISION_DIGITS, Index, VerifiedEntry


@dataclass(frozen=True, kw_only=True)
class Published:
    """What a publication did.

    Attributes:
        name: The entry.
        place: Where it went.
        manifest_sha256: Its revision.
        files: What was written, the index included; nothing when all was there.
        version: What the place calls this version: a commit on the Hub, else empty.
    """

    name: str
    place: str
    manifest_sha256: str
    files: tuple[str, ...]
    version: str = ""


def publish(
    entry: VerifiedEntry, to: str, *, private: bool = False, tag: str | None = None, token: str | None = None
) -> Published:
    """Publish an entry to a folder, a bucket or the Hub.

    Args:
        entry: The entry; every byte is verified on its way.
        to: A folder, `file://`, `s3://bucket/zoo` or another URL of fsspec, or `hf://organisation`.
        private: Make the Hub's repository a private one, when it is made.
        tag: A further tag on the Hub, beside that of the revision.
        token: Credential for the Hub.

    Raises:
        ConfigError: The place cannot be published to, or the tag is another version's.
        EntryError: The entry is not fit to be published, or (IntegrityError) was changed.
        PlaceError: The place refuses, or (UnreachableError) is down.
        OutputError: The folder cannot be written.
    """
    if not to:
        raise ConfigError("expected a place to publish to: a folder, s3://bucket/zoo or hf://organisation")
    _check(entry)
    hub = to.startswith("hf://")
    if not hub and (private or tag):
        raise ConfigError("--private and --tag are the Hub's: a folder or a bucket has neither")
    if hub:
        from embedkit.hub.hubcommits import publish_to_hub

        return publish_to_hub(
            entry, parse_place(to).place.removeprefix("hf://"), private=private, tag=tag, token=token
        )
    if not is_url(to) or to.startswith("file://"):
        return _to_folder(entry, Path(file_path(to)))
    return _to_bucket(entry, _bucket(to))


def refresh(zoo: str) -> dict[str, Any]:
    """Verify every byte of a zoo folder, and write its index and table anew.

    Returns:
        The index.

    Raises:
        ConfigError: Not a folder.
        EntryError: Not an entry, or (IntegrityError) one that was changed.
    """
    if is_url(zoo) and not zoo.startswith("file://"):
        raise ConfigError(f"{zoo} is no folder: name the ENTRY that is to be published there")
    folder = Path(file_path(zoo))
    if not folder.is_dir():
        raise ConfigError(f"{zoo!r} is not a folder; name the one that holds the entries")
    check_zoo(folder)
    for path in sorted(folder.iterdir()):
        if path.is_dir() and ENTRY_NAME.fullmatch(path.name):
            _check(VerifiedEntry(path.name, FolderEntry(path)))
    return update_index(folder)


def withdraw(name: str, zoo: str, *, token: str | None = None) -> None:
    """Take an entry out of a zoo: off the index first, so that nobody finds half of it.

    On the Hub its repository stays: it may hold what is not ours, and is removed there.

    Raises:
        ConfigError: The place cannot be written, or has no such entry.
    """
    if zoo.startswith("hf://"):
        from embedkit.hub.hubcommits import unlist_on_hub

        unlist_on_hub(name, parse_place(zoo).place.removeprefix("hf://"), token=token)
    elif not is_url(zoo) or zoo.startswith("file://"):
        _from_folder(name, Path(file_path(zoo)))
    else:
        storage = _bucket(zoo)
        row = _bucket_index(storage)["entries"].get(name)
        if row is None:
            raise ConfigError(f"{zoo} lists no entry {name!r}")
        _write_bucket_index(storage, lambda entries: {k: v for k, v in entries.items() if k != name})
        storage.remove(name)


def merged_index(
    text: bytes | None, where: str, change: Callable[[dict[str, Any]], Mapping[str, Any]]
) -> bytes:
    """A zoo's index after a change of its entries; rows that are not touched keep all that they hold.

    Raises:
        EntryError: The index is not one.
    """
    old: dict[str, Any] = {}
    aliases: Mapping[str, str] = {}
    if text is not None:
        aliases = Index.from_json(text, where).aliases
        old = json.loads(text).get("entries", {})
    return index_bytes(make_index(dict(sorted(change(dict(old)).items())), aliases))


def _check(entry: VerifiedEntry) -> None:
    """Refuse what a reader would refuse, before anything is written."""
    if not ENTRY_NAME.fullmatch(entry.name):
        raise ConfigError(f"{entry.name!r}: expected an entry named <method>-<arch>.<data> in small letters")
    if entry.name.partition("-")[0] != entry.config.method:
        method = entry.config.method
        raise ConfigError(
            f"{entry.location}: an entry of the method {method} is named {method}-<arch>.<data>"
        )
    check_file_list(entry.manifest, entry.location)
    for name in entry.manifest.files:
        entry.read(name)
    front, end, _ = entry.card.removeprefix("---\n").partition("\n---\n")
    if not entry.card.startswith("---\n") or not end or "\nlicense:" not in f"\n{front}":
        raise EntryError(
            f"{entry.location}/{CARD}: expected a card that begins with YAML and states `license:`"
        )


# --- folders ----------------------------------------------------------------------------------------------


def _to_folder(entry: VerifiedEntry, zoo: Path) -> Published:
    target = zoo / entry.name
    check_zoo(zoo)
    check_entry_place(target)
    written: list[str] = []
    clear_up(target)  # also where nothing is left to write: the last one may have been killed while it tidied
    if not _same_folder(entry, target):
        old = _records(target)
        with replacing_folder(target) as partial:
            for name in entry.manifest.files:
                (partial / name).write_bytes(entry.read(name))
            (partial / MANIFEST).write_bytes(entry.manifest_bytes)
        files = entry.manifest.files
        written = [*(name for name in files if old.get(name) != files[name]), MANIFEST]
    before = _bytes_of(zoo / INDEX)
    update_index(zoo)
    if _bytes_of(zoo / INDEX) != before:
        written.append(INDEX)
    return Published(name=entry.name, place=str(zoo), manifest_sha256=entry.revision, files=tuple(written))


def _same_folder(entry: VerifiedEntry, target: Path) -> bool:
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


def _bytes_of(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _from_folder(name: str, zoo: Path) -> None:
    if not ENTRY_NAME.fullmatch(name) or not (zoo / name / MANIFEST).is_file():
        raise ConfigError(f"{zoo} holds no entry {name!r}; give the whole name of its folder")
    doomed = zoo / f".{name}.{os.getpid()}.partial"
    try:
        (zoo / name).rename(doomed)
    except OSError as error:
        raise OutputError(f"{zoo / name} cannot be removed ({error.strerror})") from None
    update_index(zoo)
    shutil.rmtree(doomed, ignore_errors=True)


# --- buckets ----------------------------------------------------------------------------------------------


def _bucket(to: str) -> BucketStorage:
    address = parse_place(to)
    if address.scheme in ("http", "https"):
        raise ConfigError(
            f"{to}: a web site cannot be written; publish to the folder or the bucket that it serves"
        )
    return BucketStorage(address.place)


def _to_bucket(entry: VerifiedEntry, storage: BucketStorage) -> Published:
    folder = f"{entry.name}/{entry.revision[:REVISION_DIGITS]}"
    old = _bucket_index(storage)["entries"].get(entry.name, {})
    at, before = old.get("path") or entry.name, _bucket_records(storage, old, entry.name)
    written: list[str] = []
    for name, record in entry.manifest.files.items():
        if storage.size(f"{folder}/{name}") == record.size:
            continue  # a store writes a file whole or not at all
        if before.get(name) == record and at != folder:
            storage.copy(f"{at}/{name}", f"{folder}/{name}")
            continue
        storage.write(f"{folder}/{name}", entry.read(name))
        written.append(name)
    if _small(storage, f"{folder}/{MANIFEST}", MANIFEST_LIMIT) != entry.manifest_bytes:
        storage.write(f"{folder}/{MANIFEST}", entry.manifest_bytes)
        written.append(MANIFEST)
    row = {**build_facts(entry), "path": folder}
    if _write_bucket_index(storage, lambda entries: {**entries, entry.name: row}):
        written.append(INDEX)
    return Published(name=entry.name, place=storage.uri, manifest_sha256=entry.revision, files=tuple(written))


def _bucket_records(storage: BucketStorage, row: Mapping[str, Any], name: str) -> Mapping[str, object]:
    """The files of the version that the index names now."""
    text = _small(storage, f"{row.get('path') or name}/{MANIFEST}", MANIFEST_LIMIT) if row else None
    try:
        return Manifest.from_json(text).files if text is not None else {}
    except EntryError:
        return {}


def _bucket_index(storage: BucketStorage) -> dict[str, Any]:
    text = _small(storage, INDEX, INDEX_LIMIT)
    return json.loads(merged_index(text, f"{storage.uri}/{INDEX}", dict))


def _write_bucket_index(
    storage: BucketStorage, change: Callable[[dict[str, Any]], Mapping[str, Any]]
) -> bool:
    """Write the index when a change makes another one."""
    old = _small(storage, INDEX, INDEX_LIMIT)
    new = merged_index(old, f"{storage.uri}/{INDEX}", change)
    if new == old:
        return False
    storage.write(INDEX, new)
    return True


def _small(storage: BucketStorage, path: str, limit: int) -> bytes | None:
    try:
        return persistent(lambda: storage.read(path, limit))
    except FileNotFoundError:
        return None
