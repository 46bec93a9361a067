"""A remote zoo behind the cache."""

from __future__ import annotations

import logging
from functools import cached_property
from pathlib import Path

from embedkit.errors import UnreachableError
from embedkit.hub.access import Access
from embedkit.hub.base import EntryFiles, RemoteZoo
from embedkit.hub.catalog import Index, Pin
from embedkit.hub.folder import FolderEntry
from embedkit.hub.progress import DownloadBar
from embedkit.model.layout import INDEX, REVISION

_LOGGER = logging.getLogger(__name__)


class CachedZoo:
    """A remote zoo behind the cache. The cache answers for pinned entries, and while the zoo is down."""

    def __init__(self, remote: RemoteZoo, access: Access, *, local: bool = False):
        """Put the cache in front of a remote zoo.

        Args:
            remote: The zoo.
            access: Cache folder, credentials and license gate.
            local: Whether reading it opens no connection, as for an archive.
        """
        self._remote, self._access, self._cache = remote, access, access.cache
        self._offline = access.offline and not local

    @property
    def uri(self) -> str:
        """As of the remote zoo."""
        return self._remote.uri

    @property
    def tagged(self) -> bool:
        """As of the remote zoo."""
        return self._remote.tagged

    def index(self) -> Index:
        """The zoo's index; the last one in the cache when the zoo cannot be reached."""
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
                _LOGGER.warning("%s is down (%s); using its last list from the cache", self.uri, error)
        return Index() if raw is None else Index.from_json(raw, f"{self.uri}/{INDEX}")

    def offers(self, name: str) -> bool:
        """Whether the zoo's index has this folder name."""
        return name in self.index().rows

    def holds(self, name: str) -> bool:
        """Whether the version that the index names is in the cache."""
        row = self.index().rows.get(name)
        return row is not None and self._cache.get(row.manifest_sha256) is not None

    def find(self, name: str, revision: str | None = None, pin: Pin | None = None) -> EntryFiles | None:
        """The entry: from the cache where a digest proves that it is the same, else downloaded into it.

        Raises:
            UnreachableError: The zoo is down, and the entry is not in the cache.
            EmbedkitError: As for `Cache.pull`.
        """
        found = self._by_digest(name, revision, pin)
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
            with DownloadBar() as bar:
                entry = self._cache.pull(
                    located, pin=pin, gate=access.gate, watcher=access.watcher or bar, admit=access.admit
                )
        except UnreachableError as error:
            last = self._cache.noted(self.uri, asked) if pin is None else None
            if last is None:
                raise
            _LOGGER.warning("%s is down (%s); %s comes from the cache", self.uri, error, last.name)
            return last
        self._cache.note(self.uri, asked, located, Path(entry.location).parent.name)
        entry.version = located.revision
        return entry

    def _by_digest(self, name: str, revision: str | None, pin: Pin | None) -> FolderEntry | None:
        """The cached entry of a digest: the same bytes from whatever zoo."""
        if pin is not None and revision is None:
            return self._cache.get(pin.sha256)
        if revision is None or not REVISION.fullmatch(revision):
            return None
        for sha256 in self._cache.revisions(prefix=revision):
            entry = self._cache.get(sha256)
            if entry is not None and name in (entry.name, entry.name.partition(".")[0]):
                return entry
        return None
