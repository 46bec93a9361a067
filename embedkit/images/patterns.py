"""Patterns of paths (`*`, `?`, `[a-z]`, `**`), expanded as by a shell, for both Unicode forms of a name."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

from embedkit.images.files import other_form

_MAGIC = re.compile(r"[*?[]")

#: Returns the entries of a folder in order, and records the error if it cannot be read.
Scan: TypeAlias = "Callable[[str], list[os.DirEntry[str]]]"


def is_pattern(path: str) -> bool:
    """Whether a path that does not exist may be a pattern."""
    return _MAGIC.search(path) is not None


def matches(pattern: str, scan: Scan) -> list[str]:
    """The paths that match a pattern, in the order of a walk.

    A part of the pattern that exists literally matches itself. If nothing matches, brackets are taken literally: they
    are common in names.
    """
    drive, tail = os.path.splitdrive(pattern.replace(os.sep, "/"))
    parts = [part for part in tail.split("/") if part]
    while parts and parts[-1] == "**":  # a folder is walked anyway
        parts.pop()
    base = drive + tail[: tail.startswith("/")]
    found = list(_match(base, parts, scan))
    if not found and "[" in pattern:
        found = list(_match(base, [part.replace("[", "[[]") for part in parts], scan))
    return found


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder, or a link to one that can be followed."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or into a closed folder
        return False


def _match(base: str, parts: Sequence[str], scan: Scan) -> Iterator[str]:
    """The paths below `base` that match `parts`; `**` matches any number of folders and follows no links."""
    if not parts:
        yield base or os.curdir
    elif not is_pattern(parts[0]) or os.path.lexists(os.path.join(base, parts[0])):
        path = os.path.join(base, parts[0])
        if not os.path.lexists(path):
            path = other_form(path) or path
        if os.path.lexists(path):
            yield from _match(path, parts[1:], scan)
    elif parts[0] == "**":
        pending = [base]
        while pending:
            folder = pending.pop()
            yield from _match(folder, parts[1:], scan)
            for entry in reversed(scan(folder)):
                if not entry.name.startswith(".") and is_folder(entry) and not entry.is_symlink():
                    pending.append(entry.path)
    else:
        wanted = _composed(parts[0])
        for entry in scan(base):
            hidden = entry.name.startswith(".") and not wanted.startswith(".")
            if hidden or not fnmatchcase(_composed(entry.name), wanted):
                continue
            if len(parts) == 1 or is_folder(entry):
                yield from _match(entry.path, parts[1:], scan)


def _composed(name: str) -> str:
    return name if name.isascii() else unicodedata.normalize("NFC", name)
