"""Files over HTTP: what a place may answer, where a redirect may lead, and who is given the token.

The standard library's client is enough: a request of ours is a GET with a range, and each rule below has to be
looked at before a redirect is followed, which is easier where we follow it. Rules: `https://` (or this machine); the
token goes to the origin that it was given for and to no other; at most five redirects, never to a file, never
from the net to this machine, never from `https` to `http`; no compressed body; a deadline for the head and a
lowest speed for the body. Proxies are those of the environment.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import socket
import ssl
import threading
import time
from base64 import b64encode
from collections.abc import Generator, Iterator
from urllib.parse import SplitResult, unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from embedkit.errors import AccessError, ConfigError, IntegrityError, PlaceError, UnreachableError
from embedkit.hub.address import check_web, is_loopback

REDIRECTS = 5
CHUNK = 1 << 16
#: Bytes a second below which a place counts as stalled, over one timeout.
SLOWEST = 1000

_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)")


def timeout() -> float:
    """Seconds that a place may take to answer, from `EMBEDKIT_TIMEOUT`; 30 by default."""
    try:
        seconds = float(os.environ.get("EMBEDKIT_TIMEOUT", "30"))
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 86400:
        raise ConfigError("EMBEDKIT_TIMEOUT: expected a number of seconds above 0")
    return seconds


class WebStorage:
    """Files below one URL."""

    def __init__(self, root: str, token: str | None = None):
        """Take the root; nothing is opened yet.

        Args:
            root: `https://host/path`, or `http://` to this machine.
            token: Sent as a bearer token to this origin alone.

        Raises:
            ConfigError: Not a usable address.
        """
        check_web(root)
        if token is not None and not re.fullmatch(r"[\x21-\x7e]+", token):
            raise ConfigError("the token holds characters that no token has: check where it was copied from")
        self._root = root.rstrip("/")
        self._token = token

    def __repr__(self) -> str:
        return f"<WebStorage {self._root}>"  # no token

    @property
    def uri(self) -> str:
        """The root."""
        return self._root

    def read(self, path: str, limit: int) -> bytes:
        """All bytes of a small file; see `Storage`."""
        url = f"{self._root}/{path}"
        with contextlib.closing(self._answer(url, 0)) as answer:
            if answer.length is not None and answer.length > limit:
                raise PlaceError(f"{url}: expected at most {limit} bytes, and {answer.length} are announced")
            data = bytearray()
            for chunk in answer.chunks():
                data += chunk
                if len(data) > limit:
                    raise PlaceError(f"{url}: expected at most {limit} bytes, and more came")
            if not data and answer.length is None:
                raise UnreachableError(f"{url}: the connection broke off before the first byte")
        return bytes(data)

    def stream(self, path: str, start: int, size: int) -> tuple[int, Generator[bytes]]:
        """The bytes of a file from `start` on; see `Storage`."""
        url = f"{self._root}/{path}"
        answer = self._answer(url, start)
        try:
            begin = answer.begin(start, size)
        except BaseException:
            answer.close()
            raise
        return begin, answer.chunks()

    def post_json(self, path: str, value: object) -> tuple[int, object]:
        """Send JSON to the root's origin; the status and what it answers, as JSON.

        Raises:
            PlaceError: No answer, or none that is JSON.
        """
        url = f"{self._root}/{path}"
        with contextlib.closing(self._request(urlsplit(url), 0, json.dumps(value).encode())) as answer:
            text = b"".join(answer.chunks())
            try:
                return answer.status, json.loads(text or b"null")
            except ValueError:
                raise PlaceError(f"{url}: expected JSON, and something else came ({answer.status})") from None

    def _answer(self, url: str, start: int) -> _Answer:
        """GET, following redirects by the rules."""
        origin = urlsplit(url)
        target = origin
        for _ in range(REDIRECTS + 1):
            answer = self._request(target, start)
            if answer.status not in (301, 302, 303, 307, 308):
                answer.check()
                return answer
            answer.close()
            target = _redirected(origin, target, answer.header("location"))
        raise PlaceError(f"{url}: more than {REDIRECTS} redirects; is this the address of a zoo?")

    def _request(self, target: SplitResult, start: int, body: bytes | None = None) -> _Answer:
        headers = {"Accept-Encoding": "identity", "User-Agent": "embedkit"}
        if start:
            headers["Range"] = f"bytes={start}-"
        if body is not None:
            headers["Content-Type"] = "application/json"
        if self._token is not None and _origin(target) == _origin(urlsplit(self._root)):
            headers["Authorization"] = f"Bearer {self._token}"
        path = (target.path or "/") + (f"?{target.query}" if target.query else "")
        return _Answer(target, "GET" if body is None else "POST", path, headers, body)


class _Answer:
    """One open answer: its head was read within the timeout."""

    def __init__(
        self, target: SplitResult, method: str, path: str, headers: dict[str, str], body: bytes | None
    ):
        self.url = f"{target.scheme}://{target.netloc}{target.path}"  # no query: it may hold a signature
        self._timeout = timeout()
        self._connection, path, headers = _connection(target, path, headers, self._timeout)
        try:
            self._connection.connect()
            with _deadline(self._connection.sock, self._timeout) as cut:
                self._connection.request(method, path, body=body, headers=headers)
                self._response = self._connection.getresponse()
            if cut.is_set():  # http.client takes a head that ends early for a whole one
                raise TimeoutError
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise UnreachableError(f"{self.url}: no answer ({_reason(error)})") from None
        self.status = self._response.status
        self.length = self._response.length

    def header(self, name: str) -> str:
        return self._response.getheader(name, "") or ""

    def close(self) -> None:
        self._response.close()
        self._connection.close()

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
            return PlaceError(f"{self.url}: an unexpected answer ({self.status})")
        if self.header("content-encoding").lower() not in ("", "identity"):
            return PlaceError(f"{self.url}: a compressed answer to a request for plain bytes is refused")
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
                    f"{self.header('content-range')[:80]!r}"
                )
            return start
        if self.length is not None and self.length != size:
            raise IntegrityError(f"{self.url}: expected {size} bytes, and the place has {self.length}")
        return 0

    def chunks(self) -> Generator[bytes]:
        """The body; a cut or stalled one ends in UnreachableError."""
        with contextlib.closing(self):
            since, got, left = time.monotonic(), 0, self.length
            while left is None or left > 0:
                try:
                    chunk = self._response.read1(CHUNK if left is None else min(CHUNK, left))
                except (OSError, http.client.HTTPException, ValueError) as error:
                    raise UnreachableError(
                        f"{self.url}: the connection broke off ({_reason(error)})"
                    ) from None
                if not chunk:
                    break
                yield chunk
                left = None if left is None else left - len(chunk)
                got += len(chunk)
                seconds = time.monotonic() - since
                if seconds > self._timeout:
                    if got < SLOWEST * seconds:
                        raise UnreachableError(f"{self.url}: slower than {SLOWEST} bytes a second")
                    since, got = time.monotonic(), 0
            if left:  # http.client takes a body that ends early for a whole one
                raise UnreachableError(f"{self.url}: the connection broke off ({left} bytes are missing)")


def _redirected(origin: SplitResult, target: SplitResult, location: str) -> SplitResult:
    """Where a redirect leads, when it may.

    Raises:
        PlaceError: A redirect to no web address, out of encryption, or from the net to this machine.
    """
    where = f"{target.scheme}://{target.netloc}{target.path}"
    try:
        new = urlsplit(urljoin(target.geturl(), location))
        host, _ = new.hostname or "", new.port
    except ValueError:
        raise PlaceError(f"{where}: a redirect to no usable address") from None
    inside = is_loopback(origin.hostname or "")
    if (
        not location
        or not host
        or new.scheme not in ("http", "https")
        or re.search(r"[^\x21-\x7e]", new.geturl())
    ):
        raise PlaceError(f"{where}: a redirect to no web address is refused ({new.scheme[:20]!r})")
    if new.scheme == "http" and not (inside and is_loopback(host)):
        raise PlaceError(f"{where}: a redirect to unencrypted http:// is refused")
    if is_loopback(host) and not inside:
        raise PlaceError(f"{where}: a redirect to this machine itself is refused")
    return new


def _origin(parts: SplitResult) -> tuple[str, str | None, int]:
    return parts.scheme, parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)


def _connection(
    target: SplitResult, path: str, headers: dict[str, str], seconds: float
) -> tuple[http.client.HTTPConnection, str, dict[str, str]]:
    """The connection, straight or through the environment's proxy, and what to ask for on it."""
    host, port = target.hostname or "", target.port
    proxy = None if is_loopback(host) or proxy_bypass(host) else getproxies().get(target.scheme)
    secure = target.scheme == "https"
    if not proxy:
        if secure:
            return (
                http.client.HTTPSConnection(
                    host, port, timeout=seconds, context=ssl.create_default_context()
                ),
                path,
                headers,
            )
        return http.client.HTTPConnection(host, port, timeout=seconds), path, headers
    way = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    login = {}
    if way.username:
        pair = f"{unquote(way.username)}:{unquote(way.password or '')}"
        login["Proxy-Authorization"] = "Basic " + b64encode(pair.encode()).decode()
    if secure:
        tunnel = http.client.HTTPSConnection(
            way.hostname or "", way.port or 80, timeout=seconds, context=ssl.create_default_context()
        )
        tunnel.set_tunnel(host, port or 443, login)
        return tunnel, path, headers
    plain = http.client.HTTPConnection(way.hostname or "", way.port or 80, timeout=seconds)
    return plain, f"{target.scheme}://{target.netloc}{path}", {**headers, **login}


@contextlib.contextmanager
def _deadline(connection: socket.socket | None, seconds: float) -> Iterator[threading.Event]:
    """Cut a connection whose answer comes byte by byte: a socket's own timeout begins anew with each byte.

    Yields:
        Whether it was cut.
    """
    done = threading.Event()

    def cut() -> None:
        if connection is not None:
            done.set()
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, cut)
    timer.daemon = True
    timer.start()
    try:
        yield done
    finally:
        timer.cancel()


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "timed out"
    if isinstance(error, http.client.RemoteDisconnected):
        return "the connection was closed"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())[:200]
