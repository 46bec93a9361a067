"""Which web addresses may be requested: schemes, hosts and ports."""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import urlsplit

from embedkit.errors import ConfigError

_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]|\.(?!\.))*|[0-9a-fA-F:]*:[0-9a-fA-F:.]*")


def is_loopback(host: str) -> bool:
    """Whether a host is this machine itself."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_web(url: str) -> None:
    """Refuse a web address that is not encrypted, or that holds credentials.

    Raises:
        ConfigError: Neither `https://` nor on this machine, or an invalid address.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        raise ConfigError(f"{without_login(url)} is not a valid address") from None
    if parts.username is not None or parts.password is not None:
        raise ConfigError("a URL with a user or a password in it is refused: give the credential as token")
    if not _HOST.fullmatch(host) or parts.query or parts.fragment:
        raise ConfigError(f"{without_login(url)} is not a valid address: expected https://host/path")
    if parts.scheme != "https" and not (parts.scheme == "http" and is_loopback(host)):
        raise ConfigError(
            f"{without_login(url)} is not encrypted: expected https:// (http:// only to this machine)"
        )


def without_login(text: str) -> str:
    """`text` for a message, without the user and password in it."""
    scheme, separator, rest = text.partition("://")
    host, slash, path = rest.partition("/")
    return repr(f"{scheme}{separator}{host.rpartition('@')[2]}{slash}{path}"[:200])
