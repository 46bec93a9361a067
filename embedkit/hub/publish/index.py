"""The index of a zoo: `index.json` for programs, and in a folder the pages for people (`pages`).

Both are functions of the entries (and of the entry that had an alias before), so that a test can compare them with what
is committed. They are built before anything is written: an entry that they cannot show is refused while the zoo is
unchanged.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from embedkit._io.atomic import write_file
from embedkit._io.locks import locked_folder
from embedkit._io.outputs import check_ours
from embedkit._io.reading import read_regular
from embedkit._io.text import plain_line
from embedkit.errors import ConfigError, EntryError
from embedkit.hub.catalog import Index
from embedkit.hub.folder import FolderEntry, FolderZoo
from embedkit.hub.limits import INDEX_LIMIT
from embedkit.hub.publish.pages import HEAD, TABLE, pages, table_bytes
from embedkit.hub.verified import VerifiedEntry
from embedkit.model.layout import ENTRY_NAME, INDEX, MANIFEST, SCHEMA_VERSION

_LOGGER = logging.getLogger(__name__)

__all__ = [
    "TABLE",
    "build_facts",
    "build_index",
    "changed_index",
    "check_zoo",
    "index_bytes",
    "make_index",
    "pages",
    "table_bytes",
    "update_index",
]


def update_index(zoo: Path) -> dict[str, Any]:
    """Write `index.json` and the pages again from the entries in a zoo folder.

    An entry that is damaged keeps its old row, or is left out, and a warning is logged.

    Args:
        zoo: The folder whose subfolders are entries.

    Returns:
        The index, as written.

    Raises:
        ConfigError: There is no such folder.
        OutputError: The folder cannot be written, or holds a file of these names that embedkit did not write.
    """
    with changed_index(zoo) as index:
        pass
    return index


@contextlib.contextmanager
def changed_index(
    zoo: Path, add: Mapping[str, dict[str, Any]] | None = None, remove: str = ""
) -> Iterator[dict[str, Any]]:
    """The index of a zoo folder after a change that the block makes, written when the block succeeds.

    The folder is locked for the block: the later of two writers sees the entries of both. The index and the pages are
    made, and the files that they replace are checked, before the block.

    Args:
        zoo: The folder.
        add: Name -> facts of entries that the block writes.
        remove: The name of an entry that the block removes.

    Yields:
        The index.

    Raises:
        EntryError: The pages cannot show an entry that is added.
        ConfigError, OutputError: As for `update_index`.
    """
    check_zoo(zoo)
    FolderZoo(zoo)  # refuse a missing folder before it is locked
    with locked_folder(zoo):
        index = build_index(zoo, add=add, remove=remove, damaged=_keep_row)
        files = {**pages(index), INDEX: index_bytes(index)}
        for name in files:
            check_ours(zoo / name, _is_ours, "a page of the zoo")
        yield index
        for name, content in files.items():
            if _old(zoo / name) != content:
                write_file(zoo / name, content)


def _is_ours(path: Path) -> bool:
    """Whether embedkit wrote this index, table or plot; a checkout may have changed its line ends."""
    content = read_regular(path, INDEX_LIMIT)
    if path.name == INDEX:
        Index.from_json(content, str(path))
        return True
    start = HEAD if path.name == TABLE else '<svg xmlns="http://www.w3.org/2000/svg" viewBox='
    return content[:4096].replace(b"\r\n", b"\n").startswith(start.encode())


def _old(path: Path) -> bytes | None:
    try:
        return read_regular(path, INDEX_LIMIT)
    except OSError:
        return None


def _keep_row(zoo: Path, name: str, error: EntryError) -> dict[str, Any] | None:
    """The row that a damaged entry has in the old index, if the row is valid."""
    _LOGGER.warning(
        "%s; its row of the index stays as it was, and the other entries are not affected", plain_line(error)
    )
    text = _old(zoo / INDEX)
    try:
        Index.from_json(text or b"", "")
        row: dict[str, Any] = json.loads(text or b"")["entries"][name]
        pages({"entries": {name: row}})
    except Exception:  # the old index may be damaged in any way
        return None
    return row


def check_zoo(zoo: Path) -> None:
    """Refuse a folder whose `README.md` or `index.json` is not a zoo's, or that is an entry itself.

    Raises:
        ConfigError: It is such a folder.
    """
    if os.path.isfile(zoo / MANIFEST):
        raise ConfigError(f"{zoo} is an entry; name the folder that contains it")
    for name, what in ((TABLE, "table"), (INDEX, "index")):
        path = zoo / name
        try:
            ours = not os.path.isfile(path) or _is_ours(path)
        except (OSError, EntryError):
            ours = False
        if not ours:
            raise ConfigError(
                f"{path} is not the {what} of a zoo, and would be overwritten: give the zoo a folder of its own"
            )


def build_index(
    zoo: Path,
    *,
    add: Mapping[str, dict[str, Any]] | None = None,
    remove: str = "",
    damaged: Callable[[Path, str, EntryError], dict[str, Any] | None] | None = None,
) -> dict[str, Any]:
    """The content of `index.json` for this folder: `schema`, `entries` by name, `aliases` name -> entry.

    Args:
        zoo: The folder.
        add: Facts of entries, replacing those in the folder.
        remove: A name to leave out.
        damaged: Gives the facts of an entry that cannot be read, or None to leave it out; by default its error is
            raised.

    Raises:
        EntryError: A folder with an entry's name is not an entry, or (IntegrityError) its configuration was
            changed by hand.
    """
    aliases = FolderZoo(zoo).index().aliases
    entries = dict(add or {})
    for folder in sorted(zoo.iterdir()):
        name = folder.name
        if name in entries or name == remove or not os.path.isdir(folder) or not ENTRY_NAME.fullmatch(name):
            continue
        try:
            facts: dict[str, Any] | None = build_facts(VerifiedEntry(name, FolderEntry(folder)))
        except EntryError as error:
            if damaged is None:
                raise
            facts = damaged(zoo, name, error)
        if facts is not None:
            entries[name] = facts
    return make_index(entries, aliases)


def make_index(entries: Mapping[str, dict[str, Any]], aliases: Mapping[str, str]) -> dict[str, Any]:
    """An index over the facts of entries.

    An alias is the folder's name without `.<data>`. The entry that already has it keeps it; a free one goes
    to the first entry by name.

    Args:
        entries: Name -> facts, see `build_facts`.
        aliases: Alias -> entry, before.
    """
    held: dict[str, str] = {}
    for name in sorted(entries):
        held.setdefault(name.partition(".")[0], name)
    for alias, name in aliases.items():
        if name in entries and name.partition(".")[0] == alias:
            held[alias] = name
    return {"schema": SCHEMA_VERSION, "entries": dict(entries), "aliases": held}


def build_facts(entry: VerifiedEntry) -> dict[str, Any]:
    """An entry's row in an index."""
    config = entry.config
    cost = config.provenance.get("cost", {})
    height, width = config.preprocess.size
    return {
        "manifest_sha256": entry.revision,
        "method": config.method,
        "architecture": config.architecture,
        "data": config.data,
        "dim": config.dim,
        "license": config.license,
        "bytes": len(entry.manifest_bytes) + sum(record.size for record in entry.manifest.files.values()),
        "kind": config.kind,
        "family": str(config.provenance.get("family", "")),
        "input": f"{config.preprocess.color} {height}x{width}",
        "cost": {key: cost[key] for key in ("images", "training_flops", "seconds") if key in cost},
        "pretext": dict(config.provenance.get("pretext", {})),
        "metrics": dict(config.metrics),
    }


def index_bytes(index: dict[str, Any]) -> bytes:
    """The bytes of `index.json`; the same bytes for the same index.

    Raises:
        EntryError: The index is larger than readers accept.
    """
    content = (json.dumps(index, indent=1, sort_keys=True) + "\n").encode()
    if len(content) > INDEX_LIMIT:
        raise EntryError(
            f"{INDEX}: expected at most {INDEX_LIMIT} bytes, found {len(content)}; remove entries from the zoo"
        )
    return content


def merged_index(
    text: bytes | None, where: str, change: Callable[[dict[str, Any]], Mapping[str, Any]]
) -> bytes:
    """A zoo's index after a change of its entries; rows that do not change are copied as they are.

    Raises:
        EntryError: The index is damaged.
    """
    old: dict[str, Any] = {}
    aliases: Mapping[str, str] = {}
    if text is not None:
        aliases = Index.from_json(text, where).aliases
        old = json.loads(text).get("entries", {})
    return index_bytes(make_index(dict(sorted(change(dict(old)).items())), aliases))
