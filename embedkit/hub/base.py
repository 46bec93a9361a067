"""What a place that holds entries is, its index, and an entry whose every byte is verified."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from embedkit.hub.catalog import Index, Pin
from embedkit.storage.base import Storage


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


class Zoo(Protocol):
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
            FileNotFoundError: The place has none.
            ZooError: The place cannot be read.
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
