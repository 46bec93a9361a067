"""The protocols of a zoo: the files of an entry, a zoo as a look-up sees it, and a remote zoo."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from embedkit.hub.catalog import Index, Pin
from embedkit.storage.base import Storage


class EntryFiles(Protocol):
    """The raw files of one entry, wherever they are stored."""

    name: str  # the entry's folder name
    version: str  # the zoo's own name for this version (a commit); empty where that is the manifest's digest

    @property
    def location(self) -> str:
        """The folder or URL, for messages."""

    def read(self, name: str, limit: int) -> bytes:
        """All bytes of one file of at most `limit` bytes.

        Raises:
            FileNotFoundError: It is not there.
            OSError: It cannot be read, is no regular file, or is larger (`EFBIG`).
        """


class Zoo(Protocol):
    """A zoo as a look-up sees it: a folder, the package, or a remote zoo behind the cache."""

    @property
    def uri(self) -> str:
        """How the user named it."""

    @property
    def tagged(self) -> bool:
        """Whether a revision may be a tag or a commit, as on the Hub."""

    def index(self) -> Index:
        """The entries that the zoo lists."""

    def find(self, name: str, revision: str | None = None, pin: Pin | None = None) -> EntryFiles | None:
        """The entry of this folder name or alias; None when the zoo does not have it.

        Args:
            name: A folder name or an alias.
            revision: The preferred revision; a zoo that keeps a single version returns that one.
            pin: The digest that the manifest must have; a zoo may leave the check to `VerifiedEntry`.
        """

    def offers(self, name: str) -> bool:
        """Whether the entry of this folder name can be loaded from here."""

    def holds(self, name: str) -> bool:
        """Whether the entry of this folder name can be loaded from here without a connection."""


class RemoteZoo(Protocol):
    """A zoo that is read over a connection (or out of one archive) into the cache."""

    @property
    def uri(self) -> str:
        """How the user named it, without credentials."""

    @property
    def tagged(self) -> bool:
        """As for `Zoo`."""

    def index_bytes(self) -> bytes:
        """The raw `index.json`.

        Raises:
            FileNotFoundError: The zoo has no index.
            ZooError: The zoo cannot be read.
        """

    def locate(self, name: str, revision: str | None) -> Located | None:
        """Find an entry; None when the zoo does not have it.

        Args:
            name: A folder name or an alias.
            revision: A prefix of the manifest's sha256, a tag or a commit; the current version when None.
                A zoo that has only another revision returns that one.
        """

    def elsewhere(self, name: str, revision: str | None) -> EntryFiles | None:
        """A copy that other software keeps on this machine, used when no connection may be opened."""


@dataclass(frozen=True, kw_only=True)
class Located:
    """Where a remote entry is stored.

    Attributes:
        name: The entry's folder name.
        zoo: The zoo that has the entry.
        storage: Rooted at the entry's files.
        revision: The zoo's own name for this version: a commit on the Hub, empty elsewhere.
        manifest_sha256: The digest in the zoo's index; None when the index has none.
    """

    name: str
    zoo: str
    storage: Storage
    revision: str = ""
    manifest_sha256: str | None = None
