"""The protocol of a place that holds entries, its index, and an entry whose every byte is verified."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from reprlib import repr as _short
from typing import Any, Protocol

from embedkit.entry import (
    CARD,
    CONFIG,
    ENTRY_NAME,
    MANIFEST,
    SCHEMA_VERSION,
    EntryConfig,
    Manifest,
    parse_json,
    sha256_hex,
)
from embedkit.errors import EntryError, IntegrityError


class EntryFiles(Protocol):
    """The raw files of one entry, wherever they lie."""

    @property
    def location(self) -> str:
        """The folder or URL, for messages."""

    def read(self, name: str) -> bytes:
        """All bytes of one file; `FileNotFoundError` when it is not there."""


class Place(Protocol):
    """A zoo: a folder, the package, later a site, a bucket or the Hub."""

    @property
    def uri(self) -> str:
        """How the user named it."""

    def index(self) -> Index:
        """What the place says that it holds."""

    def find(self, name: str) -> EntryFiles | None:
        """The entry of this folder name or alias, None when the place does not hold it."""


@dataclass(frozen=True, kw_only=True)
class IndexRow:
    """One line of `index.json`: an entry's card facts and its identity."""

    name: str
    manifest_sha256: str
    method: str
    architecture: str
    data: str
    dim: int
    licence: str
    bytes: int = 0
    metrics: Mapping[str, object] = dataclasses.field(default_factory=dict)


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
        """The folder name behind a folder name or an alias, None when neither is known."""
        return name if name in self.rows else self.aliases.get(name)

    @property
    def names(self) -> list[str]:
        """Every folder name and alias."""
        return sorted({*self.rows, *self.aliases})

    @classmethod
    def from_json(cls, text: bytes, where: str) -> Index:
        """Parse and check an index.

        Raises:
            EntryError: Not JSON, another schema version, or a row that is not usable.
        """
        data = parse_json(text, where)
        if not isinstance(data, dict) or data.get("schema") != SCHEMA_VERSION:
            raise EntryError(f"{where}: expected an index of schema {SCHEMA_VERSION}; upgrade embedkit")
        rows: dict[str, IndexRow] = {}
        entries = _mapping(data, "entries", where)
        for name in entries:
            if not ENTRY_NAME.fullmatch(name):
                raise EntryError(f"{where}: {name[:80]!r} is not an entry's name (<method>-<arch>.<data>)")
            facts = {"bytes": 0, "metrics": {}, **_mapping(entries, name, where), "name": name}
            for key, kind in _ROW.items():
                if type(facts.get(key)) is not kind:
                    raise EntryError(
                        f"{where}: {name}.{key}: expected {kind.__name__}, found {_short(facts.get(key))}"
                    )
            rows[name] = IndexRow(**{key: facts[key] for key in _ROW})
        aliases = _mapping(data, "aliases", where).items()
        return cls(rows=rows, aliases={k: v for k, v in aliases if isinstance(v, str) and v in rows})


def _mapping(data: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    value = data.get(key, {})
    if not isinstance(value, dict):
        raise EntryError(f"{where}: {key}: expected an object, found {type(value).__name__}")
    return value


class VerifiedEntry:
    """An entry that gives out a file's bytes only after they matched the manifest.

    Attributes:
        name: The folder's name.
        location: Where it lies, for messages.
        manifest: The parsed manifest.
        config: The parsed `config.json`.
    """

    def __init__(self, name: str, files: EntryFiles, *, manifest_sha256: str | None = None):
        """Read and check the manifest and the configuration.

        Args:
            name: The folder's name.
            files: The raw files.
            manifest_sha256: What the manifest's bytes must hash to, when a pin says so.

        Raises:
            EntryError: No manifest, or a file that is not what an entry needs.
            IntegrityError: Bytes that do not match the pin or the manifest.
        """
        self.name = name
        self.location = files.location
        self._files = files
        try:
            raw = files.read(MANIFEST)
        except OSError:
            raise EntryError(f"{self.location} is not a zoo entry: it has no readable {MANIFEST}") from None
        if manifest_sha256 is not None and sha256_hex(raw) != manifest_sha256:
            raise IntegrityError(
                f"{self.location}: the manifest's sha256 is {sha256_hex(raw)[:12]}..., and the index pins "
                f"{manifest_sha256[:12]}... for {name}; ask for {name}@latest to take what is there"
            )
        self.manifest = Manifest.from_json(raw, f"{self.location}/{MANIFEST}")
        self.config = EntryConfig.from_json(self.read(CONFIG), f"{self.location}/{CONFIG}")

    @property
    def revision(self) -> str:
        """The manifest's sha256: the entry's identity, 64 hex digits."""
        return self.manifest.sha256

    def read(self, name: str) -> bytes:
        """The verified bytes of one file.

        Raises:
            EntryError: The entry does not list the file, or it cannot be read.
            IntegrityError: Its size or sha256 differs from the manifest.
        """
        record = self.manifest.files.get(name)
        if record is None:
            raise EntryError(f"{self.location}: the entry has no {name}")
        try:
            data = self._files.read(name)
        except OSError as error:
            raise EntryError(
                f"{self.location}/{name} cannot be read ({error.strerror}); pull it again"
            ) from None
        found = (len(data), sha256_hex(data))
        if found != (record.size, record.sha256):
            raise IntegrityError(
                f"{self.location}/{name}: expected {record.size} bytes of sha256 {record.sha256[:12]}..., found "
                f"{found[0]} bytes of {found[1][:12]}...; pull the entry again"
            )
        return data

    @property
    def card(self) -> str:
        """The model card, Markdown with a YAML head."""
        return self.read(CARD).decode(errors="replace")
