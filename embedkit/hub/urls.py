"""Parse and check the URLs of zoos and entries before anything is opened."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from urllib.request import url2pathname

from embedkit.errors import ConfigError
from embedkit.hub.catalog import NAME
from embedkit.storage.origins import check_web, without_login

#: An organization or a repository of the Hub.
_HUB_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?")


_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*")


#: A tag, a commit or digits of a digest.
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,99}")


#: A segment between the slashes of a URL: it needs no escape and is read alike by every server.
_SEGMENT = re.compile(r"[A-Za-z0-9_~.+-]{1,200}")


@dataclass(frozen=True, kw_only=True)
class Address:
    """A parsed URL.

    Attributes:
        scheme: `hf`, `https`, `http`, `file`, or the protocol of an fsspec file system.
        zoo: The URL of the zoo, without a slash at the end.
        name: The entry's name, empty when the URL names a zoo.
        revision: The part after `@`; None when there is none.
    """

    scheme: str
    zoo: str
    name: str = ""
    revision: str | None = None

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return f"{self.zoo}/{self.name}{at}" if self.name else self.zoo


def is_url(text: str) -> bool:
    """Whether `text` is a URL rather than a name or a path."""
    return "://" in text


def parse_zoo(uri: str) -> Address:
    """Parse the URL of a zoo.

    Raises:
        ConfigError: It is invalid.
    """
    scheme, rest = _split(uri)
    _check_path(scheme, rest, uri)
    if scheme == "hf" and not _is_hub_name(rest):
        raise ConfigError(f"the zoo {without_login(uri)}: expected hf://organization, as hf://my-team")
    return Address(scheme=scheme, zoo=f"{scheme}://{rest}")


def parse_entry(url: str) -> Address:
    """Parse the URL of an entry: `hf://org/name@revision`, `https://host/zoo/name`, `s3://bucket/zoo/name`.

    Raises:
        ConfigError: It is invalid, or the URL of a zoo.
    """
    scheme, rest = _split(url)
    zoo, _, last = rest.rpartition("/")
    name, at, revision = last.partition("@")
    hub = scheme == "hf"
    if not zoo or not NAME.fullmatch(name) or (hub and not (_is_hub_name(zoo) and _is_hub_name(name))):
        form = "hf://organization/name" if hub else f"{scheme}://.../name"
        raise ConfigError(
            f"{without_login(url)} is not the URL of an entry: expected {form}, and @revision if you pin one"
        )
    if at and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise ConfigError(f"{without_login(url)}: {revision[:80]!r} is not a revision")
    _check_path(scheme, f"{zoo}/{name}", url)
    return Address(scheme=scheme, zoo=f"{scheme}://{zoo}", name=name, revision=revision if at else None)


def file_path(uri: str) -> str:
    """The path behind `file://`; any other text is a path already."""
    return url2pathname(uri.removeprefix("file://")) if uri.startswith("file://") else os.path.expanduser(uri)


def _split(uri: str) -> tuple[str, str]:
    scheme, _, rest = uri.partition("://")
    rest = rest.rstrip("/")
    # With `::` fsspec chains file systems, which could reach any address.
    if not _SCHEME.fullmatch(scheme) or not rest or "::" in uri:
        raise ConfigError(
            f"{without_login(uri)} is not a usable URL: expected a form such as https://host/zoo"
        )
    return scheme, rest


def _check_path(scheme: str, rest: str, uri: str) -> None:
    """Refuse what servers read differently: escapes, dots, credentials, empty segments."""
    if scheme == "file":
        return
    if scheme in ("http", "https"):
        check_web(f"{scheme}://{rest}")
        rest = rest.partition("/")[2]
    for segment in rest.split("/") if rest else ():
        if not _SEGMENT.fullmatch(segment) or segment in (".", ".."):
            raise ConfigError(
                f"{without_login(uri)}: expected letters, digits and . _ ~ + - between the slashes of a zoo's URL"
            )


def _is_hub_name(text: str) -> bool:
    return bool(_HUB_NAME.fullmatch(text)) and "--" not in text and ".." not in text
