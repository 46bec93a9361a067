"""Ids of images: from a path, and what a container at it calls an image, to the id of a row, and back.

An id is a path with `/` separators; inside a container it is `file.tar::member`. Where that is not text, or where two
images could share it, it is a percent-encoded `file:` URI, in which `::` stands between container and member alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from urllib.parse import quote, unquote_to_bytes

_SCHEME = "file:"


def id_of(path: str, inner: str = "") -> str:
    """The id of the file at `path`, or of what a container there calls `inner`.

    Args:
        path: Normalized; bytes that are not UTF-8 as `surrogateescape`.
        inner: The name inside a container; empty for the file itself.
    """
    path = path.replace(os.sep, "/")
    text = f"{path}::{inner}" if inner else path
    # A path that looks like such a URI, or like a member of a container, is written as a URI too, or two images could
    # share an id.
    if path.startswith(_SCHEME) or "::" in path or not _is_text(text):
        text = _SCHEME + quote(os.fsencode(path), safe="/:").replace("::", "%3A%3A")
        if inner:
            text += f"::{quote(os.fsencode(inner), safe='/:')}"
    return text


def path_of(id: str) -> str:
    """The path behind an id, with what is inside a container still behind it."""
    if id.startswith(_SCHEME):
        id = os.fsdecode(unquote_to_bytes(id.removeprefix(_SCHEME)))
    return id.replace("/", os.sep)


def containers_of(id: str) -> Iterator[str]:
    """The ids of the files that may be the container of an image: what stands before each `::`."""
    at = id.find("::")
    while at >= 0:
        yield id[:at]
        at = id.find("::", at + 2)


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
