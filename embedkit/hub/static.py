"""A zoo of static files: one layout, the same on a web site, in a bucket and in an archive.

index.json                             rows by entry, aliases
<name>/manifest.json, config.json ...  an entry, where a folder can be replaced in one step
<name>/<12 hex digits>/manifest.json   one revision, where it cannot; the index names the current one
"""

from __future__ import annotations

from collections.abc import Generator

from embedkit.hub.base import EntryFiles, Located
from embedkit.hub.catalog import REVISION_DIGITS, Index
from embedkit.hub.download import persistent
from embedkit.hub.limits import INDEX_LIMIT, MANIFEST_LIMIT
from embedkit.model.layout import ENTRY_NAME, INDEX, MANIFEST, REVISION, sha256_hex
from embedkit.storage.base import Storage


class SubStorage:
    """The files below one folder of a storage."""

    def __init__(self, storage: Storage, folder: str):
        """Take the folder, relative to the storage's root."""
        self._storage, self._folder = storage, folder

    @property
    def uri(self) -> str:
        """The folder."""
        return f"{self._storage.uri}/{self._folder}"

    def read(self, path: str, limit: int) -> bytes:
        """See `Storage`."""
        return self._storage.read(f"{self._folder}/{path}", limit)

    def stream(self, path: str, start: int, size: int) -> tuple[int, Generator[bytes]]:
        """See `Storage`."""
        return self._storage.stream(f"{self._folder}/{path}", start, size)


class StaticZoo:
    """A zoo of static files in any storage."""

    tagged = False

    def __init__(self, storage: Storage):
        """Take the storage; nothing is read yet."""
        self._storage = storage

    @property
    def uri(self) -> str:
        """The storage's root."""
        return self._storage.uri

    def index_bytes(self) -> bytes:
        """See `RemoteZoo`."""
        return persistent(lambda: self._storage.read(INDEX, INDEX_LIMIT))

    def locate(self, name: str, revision: str | None) -> Located | None:
        """See `RemoteZoo`."""
        try:
            index = Index.from_json(self.index_bytes(), f"{self.uri}/{INDEX}")
        except FileNotFoundError:
            index = Index()  # a single entry on a site, without an index
        folder = index.folder_of(name) or name
        row = index.rows.get(folder)
        if revision is not None and REVISION.fullmatch(revision):
            if row is None or not row.manifest_sha256.startswith(revision):
                old = SubStorage(self._storage, f"{folder}/{revision[:REVISION_DIGITS]}")
                if self._manifest(old) is not None:
                    return Located(name=folder, zoo=self.uri, storage=old)
        if row is not None:
            storage = SubStorage(self._storage, row.folder)
            return Located(name=folder, zoo=self.uri, storage=storage, manifest_sha256=row.manifest_sha256)
        storage = SubStorage(self._storage, folder)
        manifest = self._manifest(storage) if ENTRY_NAME.fullmatch(folder) else None
        if manifest is None:
            return None
        return Located(name=folder, zoo=self.uri, storage=storage, manifest_sha256=sha256_hex(manifest))

    def elsewhere(self, name: str, revision: str | None) -> EntryFiles | None:
        """See `RemoteZoo`: no other software keeps copies of sites."""
        return None

    def _manifest(self, storage: Storage) -> bytes | None:
        try:
            return persistent(lambda: storage.read(MANIFEST, MANIFEST_LIMIT))
        except FileNotFoundError:
            return None
