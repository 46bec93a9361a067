"""One HTTP request and its answer, in which every wait is bounded.

The timeout of a socket restarts with each byte, so a server that sends a byte now and then can delay a client without
end: in the head, in the size of a chunk, in its extension or in a trailer. Two rules replace it. The connection, the
request and the head together have one timeout. In the body each read has one, which covers all that is read before the
next byte of content, and the content must arrive at `SLOWEST` bytes a second or more.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import re
import socket
import ssl
import threading
import time
from base64 import b64encode
from collections.abc import Generator, Iterator
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from embedkit._io.text import quoted, redacted
from embedkit.errors import AccessError, IntegrityError, UnreachableError, ZooError
from embedkit.storage.origins import is_loopback

CHUNK = 1 << 16
#: Bytes a second, over one timeout, below which a server counts as stalled.
SLOWEST = 1000

_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)")


class Answer:
    """One open answer, whose head was read within the timeout.

    Attributes:
        url: The URL for messages, without query and token.
        status: The HTTP status.
        length: Bytes of the body; None where the server does not say.
    """

    def __init__(
        self,
        target: SplitResult,
        path: str,
        headers: dict[str, str],
        *,
        seconds: float,
        body: bytes | None = None,
        secret: str | None = None,
    ):
        """Send a request (a POST if it has a body) and read the head of the answer.

        Args:
            target: The server.
            path: The path on the server, with the query.
            headers: The headers of the request.
            seconds: The timeout of connection, request and head together, and of each read of the body.
            body: The body of the request.
            secret: The token; it is removed from messages, even where the server repeats it.

        Raises:
            UnreachableError: No answer within that time.
        """
        self._secret, self._timeout = secret, seconds
        self.url = shown(target, secret)
        self._connection, path, headers = _connection(target, path, headers, seconds)
        method = "GET" if body is None else "POST"
        try:
            with _deadline(self._connection, seconds) as cut:
                self._connection.connect()
                self._connection.request(method, path, body=body, headers=headers)
                self._response: Any = self._connection.getresponse()
            if cut.is_set():  # http.client accepts a head that ends early
                raise TimeoutError
        except (OSError, http.client.HTTPException, ValueError) as error:
            self._connection.close()
            raise UnreachableError(f"{self.url}: no answer ({self._reason(error)})") from None
        self.status = self._response.status
        self.length = self._response.length

    def header(self, name: str) -> str:
        """A header of the answer; empty where it is missing."""
        return self._response.getheader(name, "") or ""

    def close(self) -> None:
        """Close the connection."""
        self._response.close()
        self._connection.close()

    def _reason(self, error: Exception) -> str:
        if isinstance(error, TimeoutError):
            return "timed out"
        if isinstance(error, http.client.RemoteDisconnected):
            return "the connection was closed"
        text = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return quoted(text, self._secret)

    def check(self) -> None:
        """Raise unless this is a file or a part of one; a refused answer is closed."""
        error = self._fault()
        if error is not None:
            self.close()
            raise error

    def _fault(self) -> Exception | None:
        if self.status in (404, 410):
            return FileNotFoundError(2, "No such file", self.url)
        if self.status in (401, 403):
            return AccessError(
                f"{self.url}: access is refused ({self.status}); give a token that may read it, or check the address"
            )
        if self.status in (408, 429) or self.status >= 500:
            after = self.header("retry-after")
            seconds = float(after) if after.isdigit() and len(after) < 6 else 0.0
            return UnreachableError(
                f"{self.url}: the server is overloaded or broken ({self.status})", seconds
            )
        if self.status not in (200, 206, 416):
            return ZooError(f"{self.url}: an unexpected answer ({self.status})")
        if self.header("content-encoding").lower() not in ("", "identity"):
            return ZooError(f"{self.url}: a compressed answer to a request for plain bytes is refused")
        return None

    def begin(self, start: int, size: int) -> int:
        """The position of the body in the file of `size` bytes: `start`, or 0."""
        if self.status == 416:
            raise IntegrityError(f"{self.url}: expected {size} bytes, and there is none from byte {start} on")
        if self.status == 206:
            match = _RANGE.fullmatch(self.header("content-range"))
            if not match or int(match[1]) != start or match[3] not in ("*", str(size)):
                raise IntegrityError(
                    f"{self.url}: expected bytes {start}-{size - 1}/{size}, and the server sends "
                    f"{quoted(self.header('content-range'), self._secret, longest=80)!r}"
                )
            return start
        if self.length is not None and self.length != size:
            raise IntegrityError(f"{self.url}: expected {size} bytes, found {self.length}")
        return 0

    def whole(self, limit: int) -> bytes:
        """The body of a small file.

        Raises:
            ZooError: It has more than `limit` bytes.
            UnreachableError: It breaks off or stalls.
        """
        if self.length is not None and self.length > limit:
            self.close()
            raise ZooError(f"{self.url}: expected at most {limit} bytes, found {self.length}")
        data = bytearray()
        with contextlib.closing(self.chunks()) as chunks:
            for chunk in chunks:
                data += chunk
                if len(data) > limit:
                    raise ZooError(f"{self.url}: expected at most {limit} bytes, found more")
        return bytes(data)

    def json(self, limit: int) -> object:
        """The body as JSON; None where it is empty.

        Raises:
            ZooError: Not JSON, or more than `limit` bytes.
            UnreachableError: It breaks off or stalls.
        """
        try:
            return json.loads(self.whole(limit) or b"null")
        except (ValueError, RecursionError):
            raise ZooError(
                f"{self.url}: expected JSON, found something else (status {self.status})"
            ) from None

    def chunks(self) -> Generator[bytes]:
        """The body in chunks; UnreachableError if it breaks off or stalls. The caller's own time does not count."""
        with contextlib.closing(self):
            waited, got, left = 0.0, 0, self.length
            while left is None or left > 0:
                since = time.monotonic()
                self._response.timed.deadline = since + self._timeout
                try:
                    chunk = self._response.read1(CHUNK if left is None else min(CHUNK, left))
                except (OSError, http.client.HTTPException, ValueError) as error:
                    raise UnreachableError(
                        f"{self.url}: the connection broke off ({self._reason(error)})"
                    ) from None
                waited += time.monotonic() - since
                if not chunk:
                    break
                yield chunk
                left = None if left is None else left - len(chunk)
                got += len(chunk)
                if waited > self._timeout:
                    if got < SLOWEST * waited:
                        raise UnreachableError(f"{self.url}: slower than {SLOWEST} bytes a second")
                    waited, got = 0.0, 0
            if left:  # http.client accepts a body that ends early
                raise UnreachableError(f"{self.url}: the connection broke off ({left} bytes are missing)")


class _Response(http.client.HTTPResponse):
    """An HTTP response that is read through `_Timed`."""

    def __init__(self, sock: socket.socket, *arguments: Any, **options: Any):
        super().__init__(sock, *arguments, **options)
        self.timed = _Timed(self.fp.detach(), sock)
        self.fp = io.BufferedReader(self.timed, CHUNK)


class _Timed(io.RawIOBase):
    """The bytes of a socket until a deadline, however few arrive at a time."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket):
        self._raw, self._sock = raw, sock
        self.deadline = time.monotonic() + (sock.gettimeout() or 0.0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._sock.settimeout(left)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        if not self.closed:
            self._raw.close()
        super().close()


def _connection(
    target: SplitResult, path: str, headers: dict[str, str], seconds: float
) -> tuple[http.client.HTTPConnection, str, dict[str, str]]:
    """The connection, direct or through the environment's proxy, with the path and headers to send on it."""
    host, port = target.hostname or "", target.port
    secure = target.scheme == "https"
    proxy = None if is_loopback(host) or proxy_bypass(host) else getproxies().get(target.scheme)
    if not proxy:
        return _open(host, port, secure, seconds), path, headers
    way = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    login = {}
    if way.username:
        pair = f"{unquote(way.username)}:{unquote(way.password or '')}"
        login["Proxy-Authorization"] = "Basic " + b64encode(pair.encode()).decode()
    connection = _open(way.hostname or "", way.port or 80, secure, seconds)
    if secure:
        connection.set_tunnel(host, port or 443, login)
        return connection, path, headers
    return connection, f"{target.scheme}://{target.netloc}{path}", {**headers, **login}


def _open(host: str, port: int | None, secure: bool, seconds: float) -> http.client.HTTPConnection:
    connection = (
        http.client.HTTPSConnection(host, port, timeout=seconds, context=ssl.create_default_context())
        if secure
        else http.client.HTTPConnection(host, port, timeout=seconds)
    )
    connection.response_class = _Response
    return connection


@contextlib.contextmanager
def _deadline(connection: http.client.HTTPConnection, seconds: float) -> Iterator[threading.Event]:
    """Close a connection after so many seconds: sending, and the answer of a proxy, have no timeout of their own.

    Yields:
        An event that is set when the connection was cut.
    """
    done = threading.Event()

    def cut() -> None:
        done.set()
        with contextlib.suppress(OSError, AttributeError):  # without a socket yet, its own timeout applies
            connection.sock.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, cut)
    timer.daemon = True
    timer.start()
    try:
        yield done
    finally:
        timer.cancel()


def shown(target: SplitResult, secret: str | None = None) -> str:
    """A URL for messages, without the query, which may hold a signature, and without the token."""
    return redacted(f"{target.scheme}://{target.netloc}{target.path}", secret)
