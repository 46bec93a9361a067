"""The index of a zoo: `index.json` for programs and, in a folder, a table in `README.md` for people.

Both are functions of the entries alone (and of who held an alias before), so that a test can hold them
against what is committed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embedkit.entry import ENTRY_NAME, INDEX, MANIFEST, SCHEMA_VERSION
from embedkit.errors import ConfigError
from embedkit.hub.comparison import compare, with_protocols
from embedkit.hub.files import write_file
from embedkit.hub.folder import FolderEntry, FolderPlace
from embedkit.hub.locks import locked_folder
from embedkit.hub.place import VerifiedEntry
from embedkit.hub.plot import plot_bytes

TABLE = "README.md"
_HEAD = "# The zoo\n\nWritten by `embedkit publish` from the entries; do not edit.\n"


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
    check_zoo(zoo)
    FolderPlace(zoo)  # refused by its name, before it is locked
    with locked_folder(zoo):  # of two writers the later one sees the entries of both
        index = build_index(zoo)
        for name, content in (*pages(index).items(), (INDEX, index_bytes(index))):
            path = zoo / name
            if not path.is_file() or path.read_bytes() != content:
                write_file(path, content)
    return index


def check_zoo(zoo: Path) -> None:
    """Refuse a folder whose `README.md` is somebody else's, or that is an entry itself: it would be overwritten.

    Raises:
        ConfigError: It is such a folder.
    """
    if (zoo / MANIFEST).is_file():
        raise ConfigError(f"{zoo} is an entry; name the folder that holds it")
    table = zoo / TABLE
    if table.is_file() and not (zoo / INDEX).is_file() and not table.read_bytes().startswith(_HEAD.encode()):
        raise ConfigError(
            f"{table} is no table of a zoo, and would be overwritten: give the zoo a folder of its own"
        )


def build_index(zoo: Path) -> dict[str, Any]:
    """What `index.json` of this folder has to hold: `schema`, `entries` by name, `aliases` name -> entry."""
    place = FolderPlace(zoo)
    entries = {
        folder.name: build_facts(VerifiedEntry(folder.name, FolderEntry(folder)))
        for folder in sorted(zoo.iterdir())
        if folder.is_dir() and ENTRY_NAME.fullmatch(folder.name)
    }
    return make_index(entries, place.index().aliases)


def make_index(entries: Mapping[str, dict[str, Any]], aliases: Mapping[str, str]) -> dict[str, Any]:
    """An index over the facts of entries.

    An alias is the folder's name without `.<data>`. The entry that already holds it keeps it; a free one goes
    to the first by name.

    Args:
        entries: Name -> facts, see `build_facts`.
        aliases: Who held which alias before.
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
        "licence": config.licence,
        "bytes": len(entry.manifest_bytes) + sum(record.size for record in entry.manifest.files.values()),
        "kind": config.kind,
        "family": str(config.provenance.get("family", "")),
        "input": f"{config.preprocess.color} {height}x{width}",
        "cost": {key: cost[key] for key in ("images", "training_flops", "seconds") if key in cost},
        "pretext": dict(config.provenance.get("pretext", {})),
        "metrics": dict(config.metrics),
    }


def index_bytes(index: dict[str, Any]) -> bytes:
    """The index as it stands in the file, the same bytes for the same index."""
    return (json.dumps(index, indent=1, sort_keys=True) + "\n").encode()


def pages(index: dict[str, Any]) -> dict[str, bytes]:
    """What people read of an index, by file name: the table, and a plot for each data set with several encoders."""
    tables = compare(index["entries"])
    plots: dict[str, bytes] = {}
    sections: list[str] = []
    for table, protocol in with_protocols(tables):
        sections += [f"## {table.data}", "", table.markdown(links=True), ""]
        figure = "probe_top1" if any("probe_top1" in row.figures for row in table.rows) else "map_at_r"
        if sum(row.flops is not None and figure in row.figures for row in table.rows) > 1:
            name = f"quality-{re.sub('[^a-z0-9]+', '-', table.data.lower())}.svg"
            plots[name] = plot_bytes(table, figure)
            sections += [f"![{figure} over training FLOPs]({name})", ""]
        if protocol:
            sections += [protocol, ""]
    return {TABLE: table_bytes(index) + "\n".join(["", *sections]).encode(), **plots}


def table_bytes(index: dict[str, Any]) -> bytes:
    """The index as a Markdown page for people."""
    lines = [
        _HEAD,
        "| entry | method | network | data | dim | size | licence |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, facts in sorted(index["entries"].items()):
        size = f"{facts['bytes'] / 1e6:.1f} MB"
        data = " ".join(facts["data"].replace("|", "\\|").split())
        cells = (f"[{name}]({name}/README.md)", facts["method"], facts["architecture"], data)
        lines.append(f"| {' | '.join(cells)} | {facts['dim']} | {size} | {facts['licence']} |")
    return ("\n".join(lines) + "\n").encode()
