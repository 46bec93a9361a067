"""From a verified entry to a place: only what changed goes up, and what readers begin with goes last.

A reader begins with the index, then the manifest. So files go first, then the manifest, then the index; where a folder
cannot be replaced in one step (a bucket), each revision has a folder of its own, and the old one stays readable
for whoever still holds the old index, or pins it. A publisher that is killed leaves the old version; the next one ends
what it began.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedkit._io.messages import quoted
from embedkit.errors import ConfigError, EntryError
from embedkit.hub.access import check_online
from embedkit.hub.catalog import Index
from embedkit.hub.folder import FolderEntry
from embedkit.hub.limits import check_file_list
from embedkit.hub.publish.fitness import check_facts
from embedkit.hub.publish.index import build_facts, check_zoo, index_bytes, make_index, pages, update_index
from embedkit.hub.urls import file_path, is_url, parse_zoo
from embedkit.hub.verified import VerifiedEntry
from embedkit.model.layout import CARD, ENTRY_NAME


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
        to: A folder, `file://`, `s3://bucket/zoo` or another URL of fsspec, or `hf://organization`.
        private: Make the Hub's repository a private one, when it is made.
        tag: A further tag on the Hub, beside that of the revision.
        token: Credential for the Hub.

    Raises:
        ConfigError: The place cannot be published to, or the tag is another version's.
        EntryError: The entry is not fit to be published, or (IntegrityError) was changed.
        ZooError: The place refuses, or (UnreachableError) is down.
        OutputError: The folder cannot be written.
    """
    if not to:
        raise ConfigError("expected a place to publish to: a folder, s3://bucket/zoo or hf://organization")
    _check(entry)
    if is_url(to) and not to.startswith("file://"):
        check_online(to)
    hub = to.startswith("hf://")
    if not hub and (private or tag):
        raise ConfigError("--private and --tag are the Hub's: a folder or a bucket has neither")
    if hub:
        from embedkit.hub.publish.hf import publish_to_hub

        return publish_to_hub(
            entry, parse_zoo(to).place.removeprefix("hf://"), private=private, tag=tag, token=token
        )
    if not is_url(to) or to.startswith("file://"):
        from embedkit.hub.publish.folder import publish_to_folder

        return publish_to_folder(entry, Path(file_path(to)))
    from embedkit.hub.publish.bucket import open_bucket, publish_to_bucket

    return publish_to_bucket(entry, open_bucket(to))


def refresh(zoo: str) -> dict[str, Any]:
    """Verify every byte of a zoo folder, and write its index and table again.

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
    """Take an entry out of a zoo: it leaves under its name in one step, so that no reader finds half of it.

    Only files that embedkit wrote are deleted: a folder that holds anything else is refused. On the Hub the
    repository stays: it may hold what is not ours, and is removed there.

    Raises:
        ConfigError: The place cannot be written, has no such entry, or holds other files in its folder.
        OutputError: The folder cannot be written.
    """
    if is_url(zoo) and not zoo.startswith("file://"):
        check_online(zoo)
    if zoo.startswith("hf://"):
        from embedkit.hub.publish.hf import unlist_on_hub

        unlist_on_hub(name, parse_zoo(zoo).place.removeprefix("hf://"), token=token)
    elif not is_url(zoo) or zoo.startswith("file://"):
        from embedkit.hub.publish.folder import remove_from_folder

        remove_from_folder(name, Path(file_path(zoo)))
    else:
        from embedkit.hub.publish.bucket import open_bucket, remove_from_bucket

        remove_from_bucket(name, open_bucket(zoo))


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
        method = quoted(entry.config.method, longest=80)
        raise ConfigError(
            f"{entry.location}: an entry of the method {method} is named {method}-<arch>.<data>"
        )
    check_file_list(entry.manifest, entry.location)
    facts = build_facts(entry)
    check_facts(facts, entry.location)
    pages({"entries": {entry.name: facts}})  # what cannot be shown ends here
    for name in entry.manifest.files:
        entry.read(name)
    front, end, _ = entry.card.removeprefix("---\n").partition("\n---\n")
    if not entry.card.startswith("---\n") or not end or "\nlicense:" not in f"\n{front}":
        raise EntryError(
            f"{entry.location}/{CARD}: expected a card that begins with YAML and states `license:`"
        )
