"""The index of a zoo, `index.json`, and pins of manifests."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from reprlib import repr as _short
from typing import Any

from embedkit.errors import EntryError, IntegrityError
from embedkit.model.layout import (
    ENTRY_NAME,
    SCHEMA_VERSION,
    parse_json,
    sha256_hex,
)

#: What may be a folder name or an alias; no separator and no wildcard.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}")


INDEX_LIMIT = 16 << 20  # some thousand entries; as Python objects it takes ten times as much


#: Hex digits of a manifest's sha256 that name a revision's folder, and its tag on the Hub.
REVISION_DIGITS = 12


@dataclass(frozen=True, kw_only=True)
class Pin:
    """The sha256 that a manifest must have, who requires it, and how the user can lift the requirement."""

    sha256: str
    by: str
    way_out: str

    def check(self, manifest: bytes, where: str, name: str) -> None:
        """Refuse another manifest.

        Raises:
            IntegrityError: The manifest is not the pinned one.
        """
        found = sha256_hex(manifest)
        if found != self.sha256:
            raise IntegrityError(
                f"{where}: the manifest's sha256 is {found[:12]}..., and {self.by} pins {self.sha256[:12]}... "
                f"for {name}; {self.way_out}"
            )


@dataclass(frozen=True, kw_only=True)
class IndexRow:
    """One line of `index.json`: an entry's card facts and its identity.

    A folder stores an entry's files in `<name>/`. In a bucket no folder can be replaced in one step, so each revision
    has its own, `<name>/<12 hex digits>/`, which is in `path`.
    """

    name: str
    manifest_sha256: str
    method: str
    architecture: str
    data: str
    dim: int
    license: str
    bytes: int = 0
    metrics: Mapping[str, object] = dataclasses.field(default_factory=dict)
    path: str = ""
    kind: str = "encoder"

    @property
    def folder(self) -> str:
        """The folder of the entry's files, relative to the index."""
        return self.path or self.name


_SHA256 = re.compile(r"[0-9a-f]{64}")


#: The fields of a row and their types in JSON.
_ROW = {
    row.name: {"dim": int, "bytes": int, "metrics": dict}.get(row.name, str)
    for row in dataclasses.fields(IndexRow)
}


@dataclass(frozen=True, kw_only=True)
class Index:
    """`index.json`: rows by folder name, and the bare alias of each entry that has one."""

    rows: Mapping[str, IndexRow] = dataclasses.field(default_factory=dict)
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def folder_of(self, name: str) -> str | None:
        """The folder name of a folder name or an alias; None when the index has neither."""
        return name if name in self.rows else self.aliases.get(name)

    @property
    def names(self) -> list[str]:
        """Every folder name and alias."""
        return sorted({*self.rows, *self.aliases})

    @classmethod
    def from_json(cls, text: bytes, where: str) -> Index:
        """Parse and check an index.

        Raises:
            EntryError: Not JSON, another schema version, or an invalid row.
        """
        data = parse_json(text, where)
        if not isinstance(data, dict) or data.get("schema") != SCHEMA_VERSION:
            raise EntryError(f"{where}: expected an index of schema {SCHEMA_VERSION}; upgrade embedkit")
        rows: dict[str, IndexRow] = {}
        entries = _mapping(data, "entries", where)
        for name in entries:
            if not ENTRY_NAME.fullmatch(name):
                raise EntryError(f"{where}: {name[:80]!r} is not an entry's name (<method>-<arch>.<data>)")
            optional = {"bytes": 0, "metrics": {}, "path": "", "kind": "encoder"}
            facts = {**optional, **_mapping(entries, name, where), "name": name}
            for key, kind in _ROW.items():
                if type(facts.get(key)) is not kind:
                    raise EntryError(
                        f"{where}: {name}.{key}: expected {kind.__name__}, found {_short(facts.get(key))}"
                    )
            if not _SHA256.fullmatch(facts["manifest_sha256"]):
                raise EntryError(
                    f"{where}: {name}.manifest_sha256: expected 64 hex digits, found {_short(facts['manifest_sha256'])}"
                )
            digits = facts["manifest_sha256"][:REVISION_DIGITS]
            if facts["path"] not in ("", name, f"{name}/{digits}"):
                raise EntryError(
                    f"{where}: {name}.path: expected {name}/{digits} or nothing, found {_short(facts['path'])}"
                )
            rows[name] = IndexRow(**{key: facts[key] for key in _ROW})
        aliases = _mapping(data, "aliases", where).items()
        return cls(
            rows=rows,
            aliases={k: v for k, v in aliases if NAME.fullmatch(k) and isinstance(v, str) and v in rows},
        )


def _mapping(data: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    value = data.get(key, {})
    if not isinstance(value, dict):
        raise EntryError(f"{where}: {key}: expected an object, found {type(value).__name__}")
    return value


def index_pin(name: str, sha256: str) -> Pin:
    """The pin of an index."""
    return Pin(
        sha256=sha256,
        by="the index",
        way_out=f"ask for {name}@latest to take the zoo's current version",
    )
