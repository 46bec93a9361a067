"""What a place that holds entries is, its index, and an entry whose every byte is verified."""

from __future__ import annotations

import dataclasses
import errno
import re
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from reprlib import repr as _short
from typing import Any, Protocol

from embedkit.entry import (
    CARD,
    CONFIG,
    ENTRY_NAME,
    GOLDEN,
    GRAPH,
    MANIFEST,
    SCHEMA_VERSION,
    EntryConfig,
    Manifest,
    parse_json,
    sha256_hex,
)
from embedkit.errors import EntryError, IntegrityError

#: What may be a folder name or an alias; no separator and no wildcard.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}")

#: Bytes of what is read before it can be held against a digest, or parsed as a whole.
MANIFEST_LIMIT = 1_000_000
CONFIG_LIMIT = 16 << 20
INDEX_LIMIT = 16 << 20  # some thousand entries; as Python objects it takes ten times as much

#: Greatest size of an entry's files in bytes: those that are parsed or shown whole, and all others.
_LIMITS = {CONFIG: CONFIG_LIMIT, CARD: 16 << 20, GRAPH: 64 << 20, GOLDEN: 64 << 20}
_FILE_LIMIT = 16 << 30

#: Hex digits of a manifest's sha256 that name a revision's folder, and its tag on the Hub.
REVISION_DIGITS = 12


class EntryFiles(Protocol):
    """The raw files of one entry, wherever they lie."""

    name: str  # the entry's folder name
    version: str  # what the place that it came from calls it, empty where that is the manifest's digest

    @property
    def location(self) -> str:
        """The folder or URL, for messages."""

    def read(self, name: str, limit: int) -> bytes:
        """All bytes of one file of at most `limit` bytes.

        Raises:
            FileNotFoundError: It is not there.
            OSError: It cannot be read, is no regular file, or is larger (`EFBIG`).
        """


class Place(Protocol):
    """A zoo as a look-up sees it: a folder, the package, or a remote zoo behind the cache."""

    @property
    def uri(self) -> str:
        """How the user named it."""

    @property
    def tagged(self) -> bool:
        """Whether a revision may be a tag or a commit, as on the Hub."""

    def index(self) -> Index:
        """What the place says that it holds."""

    def find(self, name: str, revision: str | None = None, pin: Pin | None = None) -> EntryFiles | None:
        """The entry of this folder name or alias, None when the place does not hold it.

        Args:
            name: A folder name or an alias.
            revision: The revision to prefer; a place that keeps one of each gives that.
            pin: What the manifest must hash to; a place may leave the check to `VerifiedEntry`.
        """

    def offers(self, name: str) -> bool:
        """Whether the entry of this folder name can be loaded from here."""

    def holds(self, name: str) -> bool:
        """Whether the entry of this folder name can be loaded from here without a connection."""


class Storage(Protocol):
    """Files below one remote root, by relative path."""

    @property
    def uri(self) -> str:
        """The root, for messages: without credentials or query."""

    def read(self, path: str, limit: int) -> bytes:
        """All bytes of a small file.

        Raises:
            FileNotFoundError: It is not there.
            PlaceError: It has more than `limit` bytes, or the place refuses or (UnreachableError) is down.
        """

    def stream(self, path: str, start: int, size: int) -> tuple[int, Generator[bytes]]:
        """The bytes of a file of `size` bytes from `start` on, in chunks.

        Returns:
            Where the bytes really begin (`start`, or 0 where the place cannot give a part), and the chunks.

        Raises:
            FileNotFoundError: It is not there.
            IntegrityError: The place says that the file has another size.
            PlaceError: As for `read`; the chunks raise it too.
        """


class RemotePlace(Protocol):
    """A zoo that is read over a connection (or out of one archive) into the cache."""

    @property
    def uri(self) -> str:
        """How the user named it, without credentials."""

    @property
    def tagged(self) -> bool:
        """As for `Place`."""

    def index_bytes(self) -> bytes:
        """The raw `index.json`.

        Raises:
            FileNotFoundError: The place has none.
            PlaceError: The place cannot be read.
        """

    def locate(self, name: str, revision: str | None) -> Located | None:
        """Find an entry, None when the place does not hold it.

        Args:
            name: A folder name or an alias.
            revision: A prefix of the manifest's sha256, a tag or a commit; what the place has now when None.
                A place that has only another revision gives that one.
        """

    def elsewhere(self, name: str, revision: str | None) -> EntryFiles | None:
        """A copy that other software keeps on this machine, for when no connection may be opened."""


@dataclass(frozen=True, kw_only=True)
class Located:
    """Where a remote entry lies.

    Attributes:
        name: The entry's folder name.
        place: The zoo that has it.
        storage: Rooted at the entry's files.
        revision: What the place calls this version: a commit on the Hub, empty elsewhere.
        manifest_sha256: What the place's index says, None when it says nothing.
    """

    name: str
    place: str
    storage: Storage
    revision: str = ""
    manifest_sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class Pin:
    """What a manifest must hash to, who says so, and how the user gets out of it."""

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

    A folder keeps an entry's files in `<name>/`. A bucket, where no folder can be replaced in one step, keeps
    each revision in `<name>/<12 hex digits>/`, and `path` says so.
    """

    name: str
    manifest_sha256: str
    method: str
    architecture: str
    data: str
    dim: int
    licence: str
    bytes: int = 0
    metrics: Mapping[str, object] = dataclasses.field(default_factory=dict)
    path: str = ""
    kind: str = "encoder"

    @property
    def folder(self) -> str:
        """Where the entry's files lie, relative to the index."""
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
        way_out=f"ask for {name}@latest to take what is there",
    )


class VerifiedEntry:
    """An entry that gives out a file's bytes only after they matched the manifest.

    Attributes:
        name: The folder's name.
        location: Where it lies, for messages.
        manifest: The parsed manifest.
        manifest_bytes: The same as it lies there.
        config: The parsed `config.json`.
    """

    def __init__(
        self, name: str, files: EntryFiles, *, manifest_sha256: str | None = None, pin: Pin | None = None
    ):
        """Read and check the manifest and the configuration.

        Args:
            name: The folder's name.
            files: The raw files.
            manifest_sha256: What the manifest's bytes must hash to, when an index says so.
            pin: The same, with who says so.

        Raises:
            EntryError: No manifest, or a file that is not what an entry needs.
            IntegrityError: Bytes that do not match the pin or the manifest.
        """
        self.name = name
        self.location = files.location
        self._files = files
        try:
            raw = files.read(MANIFEST, MANIFEST_LIMIT)
        except FileNotFoundError:
            raise EntryError(f"{self.location} is not a zoo entry: it has no readable {MANIFEST}") from None
        except OSError as error:
            raise EntryError(
                f"{self.location} is not a zoo entry: it has no readable {MANIFEST} ({error.strerror})"
            ) from None
        if manifest_sha256 is not None:
            pin = index_pin(name, manifest_sha256)
        if pin is not None:
            pin.check(raw, self.location, name)
        self.manifest_bytes = raw
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
        most = _LIMITS.get(name, _FILE_LIMIT)
        if record.size > most:
            raise EntryError(
                f"{self.location}/{MANIFEST}: {name} has {record.size} bytes, and at most {most} are read"
            )
        try:
            data = self._files.read(name, record.size + 1)
        except OSError as error:
            if error.errno == errno.EFBIG:
                raise IntegrityError(
                    f"{self.location}/{name}: expected {record.size} bytes, found more; pull the entry again"
                ) from None
            raise EntryError(
                f"{self.location}/{name} cannot be read ({error.strerror}); pull it again"
            ) from None
        except MemoryError:
            raise EntryError(
                f"{self.location}/{name}: its {record.size} bytes do not fit into memory"
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
