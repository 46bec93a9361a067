"""Ids of images: from a path, and the name inside a container, to the id of a row, and back.

An id is a path with `/` separators; inside a container it is `file.tar::member`. If that is not text, or
if two images could share it, the id is a percent-encoded `file:` URI, in which `::` occurs only before a member's name.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from urllib.parse import quote, unquote_to_bytes

from embedkit.errors import OutputError

_SCHEME = "file:"


def id_of(path: str, inner: str = "") -> str:
    """The id of the file at `path`, or of the image `inner` in a container there.

    Args:
        path: Normalized; bytes that are not UTF-8 as `surrogateescape`.
        inner: The name inside a container; empty for the file itself.
    """
    path = path.replace(os.sep, "/")
    text = f"{path}::{inner}" if inner else path
    # A path that looks like such a URI, or like a member of a container, becomes a URI too: ids must be unique.
    if path.startswith(_SCHEME) or "::" in path or not _is_text(text):
        text = _SCHEME + quote(os.fsencode(path), safe="/:").replace("::", "%3A%3A")
        if inner:
            text += f"::{quote(os.fsencode(inner), safe='/:')}"
    return text


def path_of(id: str, root: str | os.PathLike[str] | None = None) -> str:
    """The path of an id, still followed by `::` and the name inside a container if there is one.

    Args:
        id: The id of a row.
        root: The folder that ids are relative to; the working folder when None.
    """
    if id.startswith(_SCHEME):
        id = os.fsdecode(unquote_to_bytes(id.removeprefix(_SCHEME)))
    path = id.replace("/", os.sep)
    return path if root is None else os.path.join(root, path)


def containers_of(id: str) -> Iterator[str]:
    """The ids of the possible containers of an image: what precedes each `::`."""
    at = id.find("::")
    while at >= 0:
        yield id[:at]
        at = id.find("::", at + 2)


def check_no_image(
    outputs: Mapping[str, str | os.PathLike[str] | None],
    ids: Iterable[str],
    root: str | os.PathLike[str] | None = None,
) -> None:
    """Refuse outputs that would overwrite an embedded image, or an archive of embedded images.

    Args:
        outputs: Name of an option -> its path; None if it was not given.
        ids: The ids of the rows.
        root: The folder that ids are relative to; the working folder when None.

    Raises:
        OutputError: The first output that is one of the images.
    """
    taken: dict[tuple[int, int], str] = {}
    for option, path in outputs.items():
        if path is not None and os.path.isfile(path):
            status = os.stat(path)
            taken[status.st_dev, status.st_ino] = option
    if not taken:
        return
    paths = dict.fromkeys(path_of(part, root) for name in ids for part in (*containers_of(name), name))
    for path in paths:
        try:
            status = os.stat(path)
        except (OSError, ValueError):
            continue
        option = taken.get((status.st_dev, status.st_ino), "")
        if option:
            raise OutputError(
                f"{option}: {os.fspath(outputs[option] or '')!r} is one of the embedded images "
                f"({path!r}); choose another name"
            )


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
