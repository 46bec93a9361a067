"""Files in any store of fsspec: S3, Google Cloud, SFTP, memory."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from functools import cached_property
from typing import Any

from embedkit._io.optional import requires
from embedkit._io.text import quoted
from embedkit.errors import (
    AccessError,
    ConfigError,
    EmbedkitError,
    IntegrityError,
    MissingDependencyError,
    UnreachableError,
    ZooError,
)

#: Bytes of one request.
PART = 8 << 20

_UNREACHABLE = ("Connect", "Timeout", "Endpoint", "Unavailable", "SlowDown", "ServerDisconnected")


#: Error codes of S3 where a condition does not hold or another write is under way, and of stores without conditional
#: writes.
_FAILED = ("PreconditionFailed", "ConditionalRequestConflict", "412", "409", "NoSuchKey")
_UNKNOWN = ("NotImplemented", "501")


class _RefusedError(EmbedkitError):
    """A conditional write was refused."""

    def __init__(self, *, unknown: bool):
        super().__init__("refused")
        self.unknown = unknown


class BucketStorage:
    """Files below one URL of an fsspec file system. The file system finds its own credentials.

    It is made at the first request: its event loop opens sockets, which reading from the cache must not.
    """

    def __init__(self, uri: str):
        """Take a URL such as `s3://bucket/zoo`; nothing is opened yet."""
        self._uri = uri

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        scheme = self._uri.partition("://")[0]
        with requires(self._uri, "hub"):
            from fsspec.core import url_to_fs
        try:
            # No cache of listings: what another process publishes must be visible.
            store, root = url_to_fs(self._uri, use_listings_cache=False)
        except ImportError as error:
            raise MissingDependencyError(f"{self._uri}: {quoted(error)}") from None
        except ValueError as error:
            raise ConfigError(
                f"{self._uri}: fsspec has no file system for {scheme}:// ({quoted(error)})"
            ) from None
        return store, root.rstrip("/")

    @property
    def store(self) -> Any:
        """The file system.

        Raises:
            MissingDependencyError: fsspec, or its driver for this protocol, is not installed.
            ConfigError: fsspec does not have this protocol.
        """
        return self._opened[0]

    @property
    def uri(self) -> str:
        """The URL."""
        return self._uri

    def read(self, path: str, limit: int) -> bytes:
        """All bytes of a small file; see `Storage`."""
        data: bytes = self._ask(path, self.store.cat_file, self._path(path), start=0, end=limit + 1)
        if len(data) > limit:
            raise ZooError(f"{self._uri}/{path}: expected at most {limit} bytes, found more")
        return data

    def stream(self, path: str, start: int, size: int) -> tuple[int, Generator[bytes]]:
        """The bytes of a file from `start` on; see `Storage`."""
        found = self.size(path)
        if found is None:
            raise FileNotFoundError(2, "No such file", f"{self._uri}/{path}")
        if found != size:
            raise IntegrityError(f"{self._uri}/{path}: expected {size} bytes, found {found}")
        return start, self._parts(path, start, size)

    def size(self, path: str) -> int | None:
        """Size of a file in bytes; None when it does not exist."""
        try:
            size: int | None = self._ask(path, self.store.info, self._path(path))["size"]
        except FileNotFoundError:
            return None
        return size

    def write(self, path: str, content: bytes) -> None:
        """Write a file in one step, as an object store does."""
        self._ask(path, self.store.pipe_file, self._path(path), content)

    def copy(self, source: str, target: str) -> None:
        """Copy a file inside the store."""
        self._ask(source, self.store.cp_file, self._path(source), self._path(target))

    def version(self, path: str) -> str | None:
        """The store's version (ETag) of a file; None where the file does not exist or has no version."""
        if not self._conditional:
            return None
        try:
            version: str | None = self._ask(path, self.store.info, self._path(path), refresh=True).get("ETag")
        except FileNotFoundError:
            return None
        return version

    def write_if(self, path: str, content: bytes, version: str | None) -> bool | None:
        """Write a file on the condition that its version is unchanged; None: that the file is missing.

        Returns:
            Whether it was written; None where the store has no conditional writes, and nothing was written.
        """
        if not self._conditional:
            return None
        condition = {"IfMatch": version} if version else {"IfNoneMatch": "*"}
        where = self._path(path)
        try:
            self._ask(path, self._refusable, self.store.pipe_file, where, content, **condition)
        except _RefusedError as refused:
            return None if refused.unknown else False
        return True

    def list(self, folder: str) -> list[str]:
        """The files below a folder, relative to the root."""
        root = self._path("")
        found = self._ask(folder, self.store.find, self._path(folder))
        return sorted(self.store._strip_protocol(path).removeprefix(root) for path in found)

    def remove(self, path: str) -> None:
        """Remove a file, if it exists."""
        with contextlib.suppress(FileNotFoundError):
            self._ask(path, self.store.rm_file, self._path(path))

    @property
    def _conditional(self) -> bool:
        """Whether the store accepts `If-Match`, as S3 and compatible stores do."""
        protocol = self.store.protocol
        return "s3" in ((protocol,) if isinstance(protocol, str) else protocol)

    @staticmethod
    def _refusable(function: Any, *arguments: Any, **options: Any) -> Any:
        """Call a function of the S3 driver, and separate failed conditions from other errors."""
        try:
            return function(*arguments, **options)
        except OSError as error:
            answer = getattr(error.__cause__ or error, "response", None)
            fault = answer.get("Error", {}).get("Code") if isinstance(answer, dict) else None
            if fault in _FAILED or isinstance(error, (FileExistsError, FileNotFoundError)):
                raise _RefusedError(unknown=False) from None
            if fault in _UNKNOWN:
                raise _RefusedError(unknown=True) from None
            raise

    def _path(self, path: str) -> str:
        return f"{self._opened[1]}/{path}"

    def _parts(self, path: str, start: int, size: int) -> Generator[bytes]:
        while start < size:
            end = min(start + PART, size)
            chunk = self._ask(path, self.store.cat_file, self._path(path), start=start, end=end)
            if not chunk:
                return  # the caller counts the bytes
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
            what = UnreachableError if isinstance(error, (ConnectionError, TimeoutError)) else ZooError
            if any(word in kind for word in _UNREACHABLE) or any(
                word in str(error)[:500] for word in _UNREACHABLE
            ):
                what = UnreachableError
            raise what(f"{where}: {kind}: {quoted(error)}") from None
