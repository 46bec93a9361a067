"""Files in any store that fsspec reaches: S3, Google Cloud, SFTP, memory."""

from __future__ import annotations

from collections.abc import Generator
from functools import cached_property
from typing import Any

from embedkit.errors import (
    AccessError,
    ConfigError,
    EmbedkitError,
    IntegrityError,
    MissingDependencyError,
    PlaceError,
    UnreachableError,
)

#: One request brings so much.
PART = 8 << 20

_UNREACHABLE = ("Connect", "Timeout", "Endpoint", "Unavailable", "SlowDown", "ServerDisconnected")


class BucketStorage:
    """Files below one URL of an fsspec file system. Credentials are the file system's own business.

    The file system is made at the first question: its event loop has sockets, and what is in the cache needs none.
    """

    def __init__(self, uri: str):
        """Take a URL such as `s3://bucket/zoo`; nothing is opened yet."""
        self._uri = uri

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        scheme = self._uri.partition("://")[0]
        try:
            from fsspec.core import url_to_fs
        except ImportError:
            raise MissingDependencyError(f"{self._uri} needs fsspec: pip install 'embedkit[hub]'") from None
        try:
            # Listings are not kept: what another process publishes must be seen.
            store, root = url_to_fs(self._uri, use_listings_cache=False)
        except ImportError as error:
            raise MissingDependencyError(f"{self._uri}: {' '.join(str(error).split())}") from None
        except ValueError as error:
            raise ConfigError(f"{self._uri}: no file system is known for {scheme}:// ({error})") from None
        return store, root.rstrip("/")

    @property
    def store(self) -> Any:
        """The file system.

        Raises:
            MissingDependencyError: fsspec, or its driver for this protocol, is not installed.
            ConfigError: fsspec knows no such protocol.
        """
        return self._opened[0]

    @property
    def uri(self) -> str:
        """The URL."""
        return self._uri

    def read(self, path: str, limit: int) -> bytes:
        """All bytes of a small file; see `Storage`."""
        data = self._ask(path, self.store.cat_file, self._path(path), start=0, end=limit + 1)
        if len(data) > limit:
            raise PlaceError(f"{self._uri}/{path}: expected at most {limit} bytes, and there are more")
        return data

    def stream(self, path: str, start: int, size: int) -> tuple[int, Generator[bytes]]:
        """The bytes of a file from `start` on; see `Storage`."""
        found = self.size(path)
        if found is None:
            raise FileNotFoundError(2, "No such file", f"{self._uri}/{path}")
        if found != size:
            raise IntegrityError(f"{self._uri}/{path}: expected {size} bytes, and the place has {found}")
        return start, self._parts(path, start, size)

    def size(self, path: str) -> int | None:
        """Bytes of a file, None when it is not there."""
        try:
            return self._ask(path, self.store.info, self._path(path))["size"]
        except FileNotFoundError:
            return None

    def write(self, path: str, content: bytes) -> None:
        """Write a file whole, as an object store does."""
        self._ask(path, self.store.pipe_file, self._path(path), content)

    def copy(self, source: str, target: str) -> None:
        """Copy a file inside the store."""
        self._ask(source, self.store.cp_file, self._path(source), self._path(target))

    def remove(self, path: str) -> None:
        """Remove a file or all below a folder."""
        self._ask(path, self.store.rm, self._path(path), recursive=True)

    def _path(self, path: str) -> str:
        return f"{self._opened[1]}/{path}"

    def _parts(self, path: str, start: int, size: int) -> Generator[bytes]:
        while start < size:
            end = min(start + PART, size)
            chunk = self._ask(path, self.store.cat_file, self._path(path), start=start, end=end)
            if not chunk:
                return  # the caller counts
            yield chunk
            start += len(chunk)

    def _ask(self, path: str, function: Any, *arguments: Any, **options: Any) -> Any:
        where = f"{self._uri}/{path}"
        try:
            return function(*arguments, **options)
        except EmbedkitError:
            raise
        except FileNotFoundError:
            raise FileNotFoundError(2, "No such file", where) from None
        except PermissionError:
            raise AccessError(f"{where}: access is refused; check the credentials of this store") from None
        except Exception as error:  # each driver has its own
            kind = type(error).__name__
            what = UnreachableError if isinstance(error, (ConnectionError, TimeoutError)) else PlaceError
            if any(word in kind for word in _UNREACHABLE) or any(
                word in str(error)[:500] for word in _UNREACHABLE
            ):
                what = UnreachableError
            raise what(f"{where}: {kind}: {' '.join(str(error).split())[:200]}") from None
