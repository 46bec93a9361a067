"""How places and entries are named: paths, archives and URLs, taken apart and checked before anything is opened."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from urllib.request import url2pathname

from embedkit.errors import ConfigError
from embedkit.hub.catalog import NAME
from embedkit.storage.origins import _shown, check_web

#: An organization or a repository of the Hub.
_HUB_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?")


_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*")


#: A tag, a commit or digits of a digest.
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,99}")


#: What may stand between the slashes of a URL: it needs no escape and means the same to everybody.
_SEGMENT = re.compile(r"[A-Za-z0-9_~.+-]{1,200}")


@dataclass(frozen=True, kw_only=True)
class Address:
    """A URL, taken apart.

    Attributes:
        scheme: `hf`, `https`, `http`, `file`, or the protocol of an fsspec file system.
        place: The URL of the zoo, without a slash at the end.
        name: The entry's name, empty when the URL names a zoo.
        revision: What stood behind `@`, None when nothing did.
    """

    scheme: str
    place: str
    name: str = ""
    revision: str | None = None

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return f"{self.place}/{self.name}{at}" if self.name else self.place


def is_url(text: str) -> bool:
    """Whether `text` names something by a URL and not by a name or a path."""
    return "://" in text


def parse_zoo(uri: str) -> Address:
    """Take the URL of a zoo apart.

    Raises:
        ConfigError: It cannot be one.
    """
    scheme, rest = _split(uri)
    _check_path(scheme, rest, uri)
    if scheme == "hf" and not _is_hub_name(rest):
        raise ConfigError(f"the zoo {_shown(uri)}: expected hf://organization, as hf://my-team")
    return Address(scheme=scheme, place=f"{scheme}://{rest}")


def parse_entry(url: str) -> Address:
    """Take the URL of an entry apart: `hf://org/name@revision`, `https://host/zoo/name`, `s3://bucket/zoo/name`.

    Raises:
        ConfigError: It cannot be one; a zoo's own URL is not.
    """
    scheme, rest = _split(url)
    place, _, last = rest.rpartition("/")
    name, at, revision = last.partition("@")
    hub = scheme == "hf"
    if not place or not NAME.fullmatch(name) or (hub and not (_is_hub_name(place) and _is_hub_name(name))):
        form = "hf://organization/name" if hub else f"{scheme}://.../name"
        raise ConfigError(
            f"{_shown(url)} is no entry of a zoo: expected {form}, and @revision if you pin one"
        )
    if at and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise ConfigError(f"{_shown(url)}: {revision[:80]!r} cannot be a revision")
    _check_path(scheme, f"{place}/{name}", url)
    return Address(scheme=scheme, place=f"{scheme}://{place}", name=name, revision=revision if at else None)


def file_path(uri: str) -> str:
    """The path behind `file://`; any other text is a path already."""
    return url2pathname(uri.removeprefix("file://")) if uri.startswith("file://") else os.path.expanduser(uri)


def _split(uri: str) -> tuple[str, str]:
    scheme, _, rest = uri.partition("://")
    rest = rest.rstrip("/")
    # With `::` fsspec chains file systems, which could lead from anywhere to anywhere.
    if not _SCHEME.fullmatch(scheme) or not rest or "::" in uri:
        raise ConfigError(f"{_shown(uri)} is not a usable URL: expected scheme://place, as https://host/zoo")
    return scheme, rest


def _check_path(scheme: str, rest: str, uri: str) -> None:
    """Refuse what could mean another place to somebody else: escapes, dots, credentials, empty segments."""
    if scheme == "file":
        return
    if scheme in ("http", "https"):
        check_web(f"{scheme}://{rest}")
        rest = rest.partition("/")[2]
    for segment in rest.split("/") if rest else ():
        if not _SEGMENT.fullmatch(segment) or segment in (".", ".."):
            raise ConfigError(
                f"{_shown(uri)}: expected letters, digits and . _ ~ + - between the slashes of a zoo's URL"
            )


def _is_hub_name(text: str) -> bool:
    return bool(_HUB_NAME.fullmatch(text)) and "--" not in text and ".." not in text
