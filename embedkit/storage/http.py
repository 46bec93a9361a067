"""Files over HTTP, with rules for answers, redirects and the token.

The standard library's client suffices: a request is a GET with a range, and the rules must be checked before each
redirect, so redirects are followed here. The rules: `https://` only (or this machine); the token is sent only to the
origin that it was given for, and is in no message; at most five redirects, never to a file, from the network to this
machine, or from `https` to `http`; no compressed body; every wait is bounded (`answer`). Proxies are those of the
environment.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Generator
from urllib.parse import SplitResult, urljoin, urlsplit

from embedkit._io.text import quoted
from embedkit.errors import ConfigError, UnreachableError, ZooError
from embedkit.storage.answer import Answer, shown
from embedkit.storage.origins import check_web, is_loopback

REDIRECTS = 5
#: Greatest size in bytes of an answer to a POST.
POST_LIMIT = 1 << 20


def timeout() -> float:
    """Seconds that a server may take to answer, from `EMBEDKIT_TIMEOUT`; 30 by default."""
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
            token: Sent as a bearer token to this origin only.

        Raises:
            ConfigError: Not a valid address.
        """
        check_web(root)
        if token is not None and not re.fullmatch(r"[\x21-\x7e]+", token):
            raise ConfigError("the token has characters that no token has: copy it again")
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
        with contextlib.closing(self._answer(f"{self._root}/{path}", 0)) as answer:
            data = answer.whole(limit)
            if not data and answer.length is None:
                raise UnreachableError(f"{answer.url}: the connection broke off before the first byte")
        return data

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

    def get_json(self, path: str, limit: int) -> tuple[int, str, object]:
        """GET from an API: the status, `X-Error-Code` and, where the status is 200, the JSON.

        Raises:
            ZooError: Another status than 200, 401, 403 and 404, more than `limit` bytes, or not JSON.
        """
        with contextlib.closing(self._follow(f"{self._root}/{path}", 0)) as answer:
            if answer.status in (401, 403, 404):
                return answer.status, answer.header("x-error-code"), None
            answer.check()
            return answer.status, "", answer.json(limit)

    def post_json(self, path: str, value: object) -> tuple[int, object]:
        """POST JSON to the root's origin; returns the status and the JSON of the answer.

        Raises:
            ZooError: No answer, or one that is not JSON.
        """
        url = f"{self._root}/{path}"
        with contextlib.closing(self._request(urlsplit(url), 0, json.dumps(value).encode())) as answer:
            return answer.status, answer.json(POST_LIMIT)

    def _answer(self, url: str, start: int) -> Answer:
        """GET of a file, which must be there."""
        answer = self._follow(url, start)
        answer.check()
        return answer

    def _follow(self, url: str, start: int) -> Answer:
        """GET, following redirects by the rules."""
        origin = urlsplit(url)
        target = origin
        for _ in range(REDIRECTS + 1):
            answer = self._request(target, start)
            if answer.status not in (301, 302, 303, 307, 308):
                return answer
            answer.close()
            target = _redirected(origin, target, answer.header("location"), self._token)
        raise ZooError(
            f"{shown(origin, self._token)}: more than {REDIRECTS} redirects; is this the address of a zoo?"
        )

    def _request(self, target: SplitResult, start: int, body: bytes | None = None) -> Answer:
        headers = {"Accept-Encoding": "identity", "User-Agent": "embedkit"}
        if start:
            headers["Range"] = f"bytes={start}-"
        if body is not None:
            headers["Content-Type"] = "application/json"
        if self._token is not None and _origin(target) == _origin(urlsplit(self._root)):
            headers["Authorization"] = f"Bearer {self._token}"
        path = (target.path or "/") + (f"?{target.query}" if target.query else "")
        return Answer(target, path, headers, seconds=timeout(), body=body, secret=self._token)


def _redirected(origin: SplitResult, target: SplitResult, location: str, secret: str | None) -> SplitResult:
    """The target of a redirect, if it is allowed.

    Raises:
        ZooError: A redirect to something else than a web address, to `http`, or from the network to this machine.
    """
    where = shown(target, secret)
    try:
        new = urlsplit(urljoin(target.geturl(), location))
        host, _ = new.hostname or "", new.port
    except ValueError:
        raise ZooError(f"{where}: a redirect to an invalid address") from None
    inside = is_loopback(origin.hostname or "")
    if (
        not location
        or not host
        or new.scheme not in ("http", "https")
        or re.search(r"[^\x21-\x7e]", new.geturl())
    ):
        raise ZooError(
            f"{where}: a redirect that is not to a web address is refused ({quoted(new.scheme, secret, longest=20)!r})"
        )
    if new.scheme == "http" and not (inside and is_loopback(host)):
        raise ZooError(f"{where}: a redirect to unencrypted http:// is refused")
    if is_loopback(host) and not inside:
        raise ZooError(f"{where}: a redirect to this machine itself is refused")
    return new


def _origin(parts: SplitResult) -> tuple[str, str | None, int]:
    return parts.scheme, parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
