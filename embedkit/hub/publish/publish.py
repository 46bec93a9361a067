"""Publish a verified entry to a zoo: only changed files are written, and the index last.

A reader starts from the index, then reads the manifest. So files are written first, then the manifest, then the index.
Where a folder cannot be replaced in one step (a bucket), each revision has its own, and the old one stays readable for
readers that have the old index or a pin. A killed publisher leaves the old version; the next one completes the new.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from embedkit._io.text import quoted
from embedkit.errors import ConfigError, EntryError
from embedkit.hub.access import check_online
from embedkit.hub.folder import FolderEntry
from embedkit.hub.limits import check_file_list
from embedkit.hub.publish.bucket import open_bucket, publish_to_bucket, remove_from_bucket
from embedkit.hub.publish.fitness import check_facts
from embedkit.hub.publish.folder import publish_to_folder, remove_from_folder
from embedkit.hub.publish.hf import publish_to_hub, unlist_on_hub
from embedkit.hub.publish.index import build_facts, check_zoo, pages, update_index
from embedkit.hub.publish.published import Published
from embedkit.hub.urls import file_path, is_url, parse_zoo
from embedkit.hub.verified import VerifiedEntry
from embedkit.model.layout import CARD, ENTRY_NAME


def publish(
    entry: VerifiedEntry, to: str, *, private: bool = False, tag: str | None = None, token: str | None = None
) -> Published:
    """Publish an entry to a folder, a bucket or the Hub.

    Args:
        entry: The entry; every byte is verified.
        to: A folder, `file://`, `s3://bucket/zoo` or another URL of fsspec, or `hf://organization`.
        private: Make the repository on the Hub private, if it is created.
        tag: An additional tag on the Hub, besides that of the revision.
        token: Credential for the Hub.

    Raises:
        ConfigError: The zoo cannot be published to, or the tag is on another version.
        EntryError: The entry is not fit to be published, or (IntegrityError) was changed.
        ZooError: The zoo refuses, or (UnreachableError) is down.
        OutputError: The folder cannot be written.
    """
    if not to:
        raise ConfigError("expected a zoo to publish to: a folder, s3://bucket/zoo or hf://organization")
    _check(entry)
    if is_url(to) and not to.startswith("file://"):
        check_online(to)
    hub = to.startswith("hf://")
    if not hub and (private or tag):
        raise ConfigError("--private and --tag are the Hub's: a folder or a bucket has neither")
    if hub:
        return publish_to_hub(
            entry, parse_zoo(to).zoo.removeprefix("hf://"), private=private, tag=tag, token=token
        )
    if not is_url(to) or to.startswith("file://"):
        return publish_to_folder(entry, Path(file_path(to)))

    return publish_to_bucket(entry, open_bucket(to))


def refresh(zoo: str) -> dict[str, Any]:
    """Verify every byte of a zoo folder, and rewrite its index and pages.

    Returns:
        The index.

    Raises:
        ConfigError: Not a folder.
        EntryError: Not an entry, or (IntegrityError) one that was changed.
    """
    if is_url(zoo) and not zoo.startswith("file://"):
        raise ConfigError(f"{zoo} is not a folder: name the ENTRY to publish there")
    folder = Path(file_path(zoo))
    if not os.path.isdir(folder):
        raise ConfigError(f"{zoo!r} is not a folder; name the one that holds the entries")
    check_zoo(folder)
    for path in sorted(folder.iterdir()):
        if os.path.isdir(path) and ENTRY_NAME.fullmatch(path.name):
            _check(VerifiedEntry(path.name, FolderEntry(path)))
    return update_index(folder)


def unpublish(name: str, zoo: str, *, token: str | None = None) -> None:
    """Remove an entry from a zoo. It disappears in one step, so that no reader finds half of it.

    Only files that embedkit wrote are deleted: a folder that holds anything else is refused. On the Hub the
    repository stays, since it may hold other files; delete it there.

    Raises:
        ConfigError: The zoo cannot be written, has no such entry, or holds other files in its folder.
        OutputError: The folder cannot be written.
    """
    if is_url(zoo) and not zoo.startswith("file://"):
        check_online(zoo)
    if zoo.startswith("hf://"):
        unlist_on_hub(name, parse_zoo(zoo).zoo.removeprefix("hf://"), token=token)
    elif not is_url(zoo) or zoo.startswith("file://"):
        remove_from_folder(name, Path(file_path(zoo)))
    else:
        remove_from_bucket(name, open_bucket(zoo))


def _check(entry: VerifiedEntry) -> None:
    """Refuse an entry that a reader would refuse, before anything is written."""
    if not ENTRY_NAME.fullmatch(entry.name):
        raise ConfigError(f"{entry.name!r}: expected an entry named <method>-<arch>.<data> in lower case")
    if entry.name.partition("-")[0] != entry.config.method:
        method = quoted(entry.config.method, longest=80)
        raise ConfigError(
            f"{entry.location}: an entry of the method {method} is named {method}-<arch>.<data>"
        )
    check_file_list(entry.manifest, entry.location)
    facts = build_facts(entry)
    check_facts(facts, entry.location)
    pages({"entries": {entry.name: facts}})  # refuse an entry that the pages cannot show
    for name in entry.manifest.files:
        entry.read(name)
    front, end, _ = entry.card.removeprefix("---\n").partition("\n---\n")
    if not entry.card.startswith("---\n") or not end or "\nlicense:" not in f"\n{front}":
        raise EntryError(
            f"{entry.location}/{CARD}: expected a card that begins with YAML and states `license:`"
        )
