"""The index of a zoo folder: `index.json` for programs and a table in `README.md` for people.

Both are functions of the entries alone (and of who held an alias before), so that a test can hold them
against what is committed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from embedkit.entry import ENTRY_NAME, INDEX, MANIFEST, SCHEMA_VERSION
from embedkit.hub.folder import FolderEntry, FolderPlace
from embedkit.hub.place import VerifiedEntry
from embedkit.training.files import write_file

TABLE = "README.md"


def update_index(zoo: Path) -> dict[str, Any]:
    """Write `index.json` and the table of `README.md` anew from the entries in a zoo folder.

    Args:
        zoo: The folder whose subfolders are entries.

    Returns:
        The index, as written.

    Raises:
        EntryError: A folder that is named as an entry and is none, or (IntegrityError) a configuration that
            was changed by hand.
        ConfigError: There is no such folder.
        OutputError: The folder cannot be written.
    """
    index = build_index(zoo)
    write_file(zoo / INDEX, index_bytes(index))
    write_file(zoo / TABLE, table_bytes(index))
    return index


def build_index(zoo: Path) -> dict[str, Any]:
    """What `index.json` of this folder has to hold: `schema`, `entries` by name, `aliases` name -> entry.

    An alias is the folder's name without `.<data>`. The entry that already holds it keeps it; a free one goes
    to the first by name.
    """
    entries = {
        folder.name: _facts(folder)
        for folder in sorted(zoo.iterdir())
        if folder.is_dir() and ENTRY_NAME.fullmatch(folder.name)
    }
    aliases: dict[str, str] = {}
    for name in entries:
        aliases.setdefault(name.partition(".")[0], name)
    for alias, name in FolderPlace(zoo).index().aliases.items():
        if name in entries and name.partition(".")[0] == alias:
            aliases[alias] = name
    return {"schema": SCHEMA_VERSION, "entries": entries, "aliases": aliases}


def index_bytes(index: dict[str, Any]) -> bytes:
    """The index as it stands in the file, the same bytes for the same index."""
    return (json.dumps(index, indent=1, sort_keys=True) + "\n").encode()


def table_bytes(index: dict[str, Any]) -> bytes:
    """The index as a Markdown page for people."""
    lines = [
        "# The zoo",
        "",
        "Written by `embedkit.training.index` from the entries; do not edit.",
        "",
        "| entry | method | network | data | dim | size | licence |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, facts in sorted(index["entries"].items()):
        size = f"{facts['bytes'] / 1e6:.1f} MB"
        cells = (f"[{name}]({name}/README.md)", facts["method"], facts["architecture"], facts["data"])
        lines.append(f"| {' | '.join(cells)} | {facts['dim']} | {size} | {facts['licence']} |")
    return ("\n".join(lines) + "\n").encode()


def _facts(folder: Path) -> dict[str, Any]:
    entry = VerifiedEntry(folder.name, FolderEntry(folder))
    config = entry.config
    manifest_bytes = (folder / MANIFEST).stat().st_size
    return {
        "manifest_sha256": entry.revision,
        "method": config.method,
        "architecture": config.architecture,
        "data": config.data,
        "dim": config.dim,
        "licence": config.licence,
        "bytes": manifest_bytes + sum(record.size for record in entry.manifest.files.values()),
        "metrics": dict(config.metrics),
    }
