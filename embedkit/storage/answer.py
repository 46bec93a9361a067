"""One HTTP request and its answer, every wait of which has an end.

A socket's own timeout begins again with each byte, so that a server which sends a byte now and then is waited for
without end: in the head, in the size of a chunk, in its extension or in a trailer. Two rules hold here instead. The
connection, the request and the head together have one timeout. In the body each read has one, whatever it reads on
its way to the next byte of content, and the content must come at `SLOWEST` bytes a second or more.
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

from embedkit._io.messages import quoted, redacted
from embedkit.errors import AccessError, IntegrityError, UnreachableError, ZooError
from embedkit.storage.origins import is_loopback

CHUNK = 1 << 16
#: Bytes a second below which a place counts as stalled, over one timeout.
SLOWEST = 1000

_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)")


class Answer:
    """One open answer: its head was read within the timeout.

    Attributes:
        url: Where it comes from, for messages: without query and without the token.
        status: The HTTP status.
        length: Bytes of the body, None where it does not say.
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
        """Send a request, a POST where it has a body, and read the head of its answer.

        Args:
            target: The server.
            path: On it, with the query.
            headers: Of the request.
            seconds: That connection, request and head may take, and each read of the body.
            body: Of the request.
            secret: The token, which stands in no message, even where the server repeats it.

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
            if cut.is_set():  # http.client takes a head that ends early for a whole one
                raise TimeoutError
        except (OSError, http.client.HTTPException, ValueError) as error:
            self._connection.close()
            raise UnreachableError(f"{self.url}: no answer ({self._reason(error)})") from None
        self.status = self._response.status
        self.length = self._response.length

    def header(self, name: str) -> str:
        """A header of the answer, empty where it has none."""
        return self._response.getheader(name, "") or ""

    def close(self) -> None:
        """End the connection."""
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
        """Refuse whatever is not the whole or a part of a file; an answer that is refused is closed."""
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
            return UnreachableError(f"{self.url}: the place is overloaded or broken ({self.status})", seconds)
        if self.status not in (200, 206, 416):
            return ZooError(f"{self.url}: an unexpected answer ({self.status})")
        if self.header("content-encoding").lower() not in ("", "identity"):
            return ZooError(f"{self.url}: a compressed answer to a request for plain bytes is refused")
        return None

    def begin(self, start: int, size: int) -> int:
        """Where in the file of `size` bytes the body begins: at `start`, or at 0."""
        if self.status == 416:
            raise IntegrityError(
                f"{self.url}: expected {size} bytes, and there are none from byte {start} on"
            )
        if self.status == 206:
            match = _RANGE.fullmatch(self.header("content-range"))
            if not match or int(match[1]) != start or match[3] not in ("*", str(size)):
                raise IntegrityError(
                    f"{self.url}: expected bytes {start}-{size - 1}/{size}, and the place gives "
                    f"{quoted(self.header('content-range'), self._secret, longest=80)!r}"
                )
            return start
        if self.length is not None and self.length != size:
            raise IntegrityError(f"{self.url}: expected {size} bytes, and the place has {self.length}")
        return 0

    def whole(self, limit: int) -> bytes:
        """The body of a small file.

        Raises:
            ZooError: It has more than `limit` bytes.
            UnreachableError: It is cut or stalls.
        """
        if self.length is not None and self.length > limit:
            self.close()
            raise ZooError(f"{self.url}: expected at most {limit} bytes, and {self.length} are announced")
        data = bytearray()
        with contextlib.closing(self.chunks()) as chunks:
            for chunk in chunks:
                data += chunk
                if len(data) > limit:
                    raise ZooError(f"{self.url}: expected at most {limit} bytes, and more came")
        return bytes(data)

    def json(self, limit: int) -> object:
        """The body as JSON, None where it is empty.

        Raises:
            ZooError: No JSON, or more than `limit` bytes.
            UnreachableError: It is cut or stalls.
        """
        try:
            return json.loads(self.whole(limit) or b"null")
        except (ValueError, RecursionError):
            raise ZooError(f"{self.url}: expected JSON, and something else came ({self.status})") from None

    def chunks(self) -> Generator[bytes]:
        """The body; a cut or stalled one ends in UnreachableError. Time that the caller takes does not count."""
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
            if left:  # http.client takes a body that ends early for a whole one
                raise UnreachableError(f"{self.url}: the connection broke off ({left} bytes are missing)")


class _Response(http.client.HTTPResponse):
    """An answer that is read through `_Timed`."""

    def __init__(self, sock: socket.socket, *arguments: Any, **options: Any):
        super().__init__(sock, *arguments, **options)
        self.timed = _Timed(self.fp.detach(), sock)
        self.fp = io.BufferedReader(self.timed, CHUNK)


class _Timed(io.RawIOBase):
    """A socket's bytes until a moment, however few come at a time."""

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
    """The connection, straight or through the environment's proxy, and what to ask for on it."""
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
    """Cut a connection after so many seconds: sending, and what a proxy says, have no end of their own.

    Yields:
        Whether it was cut.
    """
    done = threading.Event()

    def cut() -> None:
        done.set()
        with contextlib.suppress(
            OSError, AttributeError
        ):  # there may be no socket yet: its own timeout ends it
            connection.sock.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, cut)
    timer.daemon = True
    timer.start()
    try:
        yield done
    finally:
        timer.cancel()


def shown(target: SplitResult, secret: str | None = None) -> str:
    """A URL for messages: without query, which may hold a signature, and without the token."""
    return redacted(f"{target.scheme}://{target.netloc}{target.path}", secret)
