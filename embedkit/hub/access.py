"""From a path or a URL to a place that can be looked in: folders as they are, all else through the cache."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from embedkit.entry import INDEX, REVISION
from embedkit.errors import ConfigError, UnreachableError
from embedkit.hub.address import Address, file_path, is_url, parse_place
from embedkit.hub.cache import Cache, Gate, commercial_only
from embedkit.hub.download import Watcher
from embedkit.hub.folder import FolderEntry, FolderPlace
from embedkit.hub.place import EntryFiles, Index, Pin, Place, RemotePlace, VerifiedEntry


def default_cache_dir() -> str:
    """The user's cache folder for embedkit, from `EMBEDKIT_CACHE` or the platform's convention.

    A user without a home folder, as in many containers, gets one below the folder for temporary files.
    """
    import platformdirs

    if chosen := os.environ.get("EMBEDKIT_CACHE"):
        return chosen
    try:
        return platformdirs.user_cache_dir("embedkit", appauthor=False)
    except RuntimeError:  # no HOME, and no passwd entry
        return os.path.join(tempfile.gettempdir(), f"embedkit-{os.getuid()}")


def is_offline() -> bool:
    """Whether the environment forbids connections, by the names and values that the Hub's own client looks at."""
    return any(
        os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def check_online(place: str) -> None:
    """Refuse to write to a remote place where the environment forbids connections.

    Raises:
        ConfigError: It does.
    """
    if is_offline():
        raise ConfigError(
            f"{place} needs a connection, and HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids it; unset it for this"
        )


@dataclass(frozen=True, kw_only=True)
class Access:
    """How remote places are read.

    Attributes:
        cache_dir: Where entries are kept; the user's cache folder when None.
        local_files_only: Never open a connection; the environment may say the same, see `is_offline`.
        token: Credential for the place that is named, and for no other origin.
        gate: Decides by the licence whether an entry is pulled.
        watcher: Is told how far a download is.
        trust: Looks at an entry before it is given out, pinned or put into the cache, and raises to refuse.
    """

    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False
    token: str | None = field(default=None, repr=False)
    gate: Gate = commercial_only
    watcher: Watcher | None = None
    trust: Callable[[VerifiedEntry], None] | None = None

    def admit(self, entry: VerifiedEntry) -> None:
        """Let `trust` look at an entry."""
        if self.trust is not None:
            self.trust(entry)

    @property
    def offline(self) -> bool:
        """Whether no connection may be opened."""
        return self.local_files_only or is_offline()

    @property
    def cache(self) -> Cache:
        """The cache."""
        return Cache(self.cache_dir if self.cache_dir is not None else default_cache_dir())


def open_place(uri: str, access: Access | None = None) -> Place:
    """The place behind a path or a URL; nothing is asked of it yet.

    Args:
        uri: A folder, `file://`, a `.tar` of `embedkit zoo bundle`, `https://host/zoo`, `hf://organisation`, or any
            URL that fsspec knows, as `s3://bucket/zoo`.
        access: How to read it.

    Raises:
        ConfigError: Not a folder, or not a usable URL.
        MissingDependencyError: This kind of place needs a package that is not installed.
    """
    access = access or Access()
    if is_url(uri) and not uri.startswith("file://"):
        return CachedPlace(open_remote(parse_place(uri), access.token), access)
    path = file_path(uri)
    if path.endswith(".tar") and os.path.isfile(path):
        from embedkit.hub.archive import ArchiveStorage
        from embedkit.hub.site import StaticPlace

        return CachedPlace(StaticPlace(ArchiveStorage(Path(path))), access, local=True)
    return FolderPlace(path)


def open_remote(address: Address, token: str | None = None) -> RemotePlace:
    """The remote zoo behind an address."""
    if address.scheme == "hf":
        from embedkit.hub.huggingface import HubPlace

        return HubPlace(address.place.removeprefix("hf://"), token)
    from embedkit.hub.site import StaticPlace

    if address.scheme in ("http", "https"):
        from embedkit.hub.web import WebStorage

        return StaticPlace(WebStorage(address.place, token))
    from embedkit.hub.buckets import BucketStorage

    return StaticPlace(BucketStorage(address.place))


class CachedPlace:
    """A remote zoo behind the cache, which answers for what is pinned, and for a zoo that is down."""

    def __init__(self, remote: RemotePlace, access: Access, *, local: bool = False):
        """Put the cache before a place.

        Args:
            remote: The place.
            access: How it is read.
            local: Whether reading it opens no connection, as for an archive.
        """
        self._remote, self._access, self._cache = remote, access, access.cache
        self._offline = access.offline and not local

    @property
    def uri(self) -> str:
        """The place's own."""
        return self._remote.uri

    @property
    def tagged(self) -> bool:
        """The place's own."""
        return self._remote.tagged

    def index(self) -> Index:
        """The place's index; the one it gave last when it cannot be asked."""
        return self._index

    @cached_property
    def _index(self) -> Index:
        raw = self._cache.noted_index(self.uri) if self._offline else None
        if not self._offline:
            try:
                raw = self._remote.index_bytes()
                self._cache.note_index(self.uri, raw)
            except FileNotFoundError:
                return Index()
            except UnreachableError as error:
                raw = self._cache.noted_index(self.uri)
                if raw is None:
                    raise
                _say(f"{self.uri} is down ({error}); its list is the one that it gave last")
        return Index() if raw is None else Index.from_json(raw, f"{self.uri}/{INDEX}")

    def offers(self, name: str) -> bool:
        """Whether the place's index has this folder name."""
        return name in self.index().rows

    def holds(self, name: str) -> bool:
        """Whether the version that the index names is in the cache."""
        row = self.index().rows.get(name)
        return row is not None and self._cache.get(row.manifest_sha256) is not None

    def find(self, name: str, revision: str | None = None, pin: Pin | None = None) -> EntryFiles | None:
        """The entry, from the cache where that is sure to be the same, else pulled into it.

        Raises:
            UnreachableError: The place is down, and the entry is not in the cache.
            EmbedkitError: As for `Cache.pull`.
        """
        found = self._known(name, revision, pin)
        if found is not None:
            return found
        asked = f"{name}@{revision or ''}"
        if self._offline:
            return self._cache.noted(self.uri, asked) or self._remote.elsewhere(name, revision)
        try:
            located = self._remote.locate(
                name, pin.sha256 if pin is not None and revision is None else revision
            )
            if located is None:
                return None
            access = self._access
            entry = self._cache.pull(
                located, pin=pin, gate=access.gate, watcher=access.watcher, admit=access.admit
            )
        except UnreachableError as error:
            last = self._cache.noted(self.uri, asked) if pin is None else None
            if last is None:
                raise
            _say(f"{self.uri} is down ({error}); {last.name} comes from the cache, as it was pulled last")
            return last
        self._cache.note(self.uri, asked, located, Path(entry.location).parent.name)
        entry.version = located.revision
        return entry

    def _known(self, name: str, revision: str | None, pin: Pin | None) -> FolderEntry | None:
        """What the cache has for a digest: the same bytes wherever they come from."""
        if pin is not None and revision is None:
            return self._cache.get(pin.sha256)
        if revision is None or not REVISION.fullmatch(revision):
            return None
        for sha256 in self._cache.revisions(prefix=revision):
            entry = self._cache.get(sha256)
            if entry is not None and name in (entry.name, entry.name.partition(".")[0]):
                return entry
        return None


def _say(message: str) -> None:
    warnings.warn(message, stacklevel=4)
