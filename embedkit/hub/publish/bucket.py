"""A zoo in a bucket as it is written: a folder per revision, and an index that several publishers may change at once.

A folder of a bucket cannot be replaced in one step, so each revision has its own, and the index, one object, names the
current one. The index is written on the condition that it is unchanged since it was read. Where the store has no
conditional writes, it is read back after the write, and a change that another publisher overwrote is repeated.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Any

from embedkit.errors import ConfigError, EntryError, ZooError
from embedkit.hub.catalog import REVISION_DIGITS
from embedkit.hub.download import persistent
from embedkit.hub.limits import INDEX_LIMIT, MANIFEST_LIMIT, SUFFIXES
from embedkit.hub.publish.index import build_facts, merged_index
from embedkit.hub.publish.published import Published
from embedkit.hub.urls import parse_zoo
from embedkit.hub.verified import VerifiedEntry
from embedkit.model.layout import INDEX, MANIFEST
from embedkit.model.manifest import Manifest
from embedkit.storage.fsspec import BucketStorage

#: Attempts to write an index that others change at the same time.
INDEX_TRIES = 20
#: Seconds before an index written without a condition is read back, and before another attempt.
SETTLE = 0.2

_Change = Callable[[dict[str, Any]], Mapping[str, Any]]


def open_bucket(to: str) -> BucketStorage:
    """The bucket behind a URL.

    Raises:
        ConfigError: A web site, or no usable URL.
    """
    address = parse_zoo(to)
    if address.scheme in ("http", "https"):
        raise ConfigError(
            f"{to}: a web site cannot be written to; publish to the folder or the bucket behind it"
        )
    return BucketStorage(address.zoo)


def publish_to_bucket(entry: VerifiedEntry, storage: BucketStorage) -> Published:
    """Publish an entry to a bucket; see `publish`."""
    folder = f"{entry.name}/{entry.revision[:REVISION_DIGITS]}"
    row = {**build_facts(entry), "path": folder}
    index = _read(storage)
    _merged(storage, index, lambda entries: {**entries, entry.name: row})  # refuse before anything is written
    old = json.loads(index or b"{}").get("entries", {}).get(entry.name, {})
    at, before = old.get("path") or entry.name, _records(storage, old, entry.name)
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
    if change_index(storage, lambda entries: {**entries, entry.name: row}):
        written.append(INDEX)
    return Published(name=entry.name, zoo=storage.uri, manifest_sha256=entry.revision, files=tuple(written))


def remove_from_bucket(name: str, storage: BucketStorage) -> None:
    """Remove an entry from a bucket, all revisions of it; see `unpublish`."""
    if name not in json.loads(_merged(storage, _read(storage), dict))["entries"]:
        raise ConfigError(f"{storage.uri} lists no entry {name!r}")
    ours = _ours(storage, name)
    change_index(storage, lambda entries: {k: v for k, v in entries.items() if k != name})
    for path in ours:
        storage.remove(path)


def change_index(storage: BucketStorage, change: _Change) -> bool:
    """Change the entries of the index on top of concurrent changes of others; returns whether anything was written.

    Raises:
        EntryError: The index is damaged.
        ZooError: The store refuses, or others keep changing the index.
    """
    for turn in range(INDEX_TRIES):
        version = storage.version(INDEX)  # first: if it changes before it is read, the condition fails
        old = _read(storage)
        new = _merged(storage, old, change)
        if new == old:
            return turn > 0
        outcome = storage.write_if(INDEX, new, version)
        if outcome is True:
            return True
        if outcome is None:
            storage.write(INDEX, new)
        time.sleep(SETTLE * random.uniform(0.5, 1.5))
    raise ZooError(
        f"{storage.uri}/{INDEX}: other publishers changed it {INDEX_TRIES} times in a row; publish again"
    )


def _merged(storage: BucketStorage, old: bytes | None, change: _Change) -> bytes:
    return merged_index(old, f"{storage.uri}/{INDEX}", change)


def _ours(storage: BucketStorage, name: str) -> list[str]:
    """The files of all revisions of an entry, manifests first.

    Raises:
        ConfigError: There is another file among them.
    """
    ours: list[str] = []
    records: dict[str, Mapping[str, object]] = {}
    for path in storage.list(name):
        folder, file = str(PurePosixPath(path).parent), PurePosixPath(path).name
        if folder not in records:
            records[folder] = _listed(storage, folder)
        revision = re.fullmatch(rf"{re.escape(name)}/[0-9a-f]{{{REVISION_DIGITS}}}", folder)
        # A publisher that was killed leaves files of a revision without their manifest.
        usual = file.endswith(SUFFIXES) or file in ("LICENSE", "NOTICE")
        listed = file == MANIFEST or file in records[folder]
        if not (listed if folder == name else revision and (listed or usual)):
            raise ConfigError(
                f"{storage.uri}/{name} would be removed, and holds {path[len(name) + 1 :][:100]!a}, which is not "
                "part of the entry: move it away"
            )
        ours.append(path)
    return sorted(ours, key=lambda path: (not path.endswith(f"/{MANIFEST}"), path))


def _listed(storage: BucketStorage, folder: str) -> Mapping[str, object]:
    text = _small(storage, f"{folder}/{MANIFEST}", MANIFEST_LIMIT)
    try:
        return Manifest.from_json(text).files if text is not None else {}
    except EntryError:
        return {}


def _records(storage: BucketStorage, row: Mapping[str, Any], name: str) -> Mapping[str, object]:
    """The files of the version that the index names."""
    return _listed(storage, row.get("path") or name) if row else {}


def _read(storage: BucketStorage) -> bytes | None:
    return _small(storage, INDEX, INDEX_LIMIT)


def _small(storage: BucketStorage, path: str, limit: int) -> bytes | None:
    try:
        return persistent(lambda: storage.read(path, limit))
    except FileNotFoundError:
        return None
