"""Which images of a source are left out by their path: thumbnails and trash of a NAS, and what the user names."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase, translate

__all__ = ["DEFAULT_EXCLUDES", "Excludes"]

#: What macOS, Synology and QNAP put among images: resource forks, thumbnails, deleted files.
DEFAULT_EXCLUDES = ("._*", "@eaDir", "#recycle")


class Excludes:
    """Patterns of paths that are left out; it counts what they match.

    A pattern without `/` matches the name of a file or folder at any depth. One with `/` matches the path from the
    source on, part by part, with `**` for any folders. What lies in a matching folder is left out, too. The default
    patterns always apply, unless one of the patterns is empty.
    """

    def __init__(self, patterns: Sequence[str] = ()):
        """Take the user's patterns, which are added to the default ones."""
        given = [_composed(pattern.rstrip("/")) for pattern in patterns]
        self._defaults = () if "" in given else DEFAULT_EXCLUDES
        all_of_them = dict.fromkeys((*self._defaults, *filter(None, given)))
        self._names = [pattern for pattern in all_of_them if "/" not in pattern]
        self._paths = [pattern for pattern in all_of_them if "/" in pattern]
        self._any_name = re.compile("|".join(map(translate, self._names)) or r"(?!)")
        self._matched: dict[str, int] = Counter()

    def leaves_out(self, path: str) -> bool:
        """Whether a pattern matches a path, relative to its source, or a folder above it."""
        parts = [part for part in _composed(path).split("/") if part not in ("", ".")]
        return any(self._hit(parts[:depth]) for depth in range(1, len(parts) + 1))

    def leaves_out_entry(self, path: str) -> bool:
        """As `leaves_out`, for an entry of a folder that itself is not left out."""
        path = _composed(path)
        if not self._paths and not self._any_name.match(path.rpartition("/")[2]):
            return False  # without a list of parts for each of a million files
        return self._hit(path.split("/"))

    def notes(self) -> list[str]:
        """Sentences for the user about what was left out, and about patterns of theirs that left nothing out."""
        return [*self._left_out(), *self._idle()]

    def _left_out(self) -> list[str]:
        count = sum(self._matched.values())
        if not count:
            return []
        by = ", ".join(one for one in (*self._names, *self._paths) if one in self._matched)
        note = f"excluded {count} file{'s' * (count > 1)} or folder{'s' * (count > 1)} by {by}"
        if any(pattern in self._defaults for pattern in self._matched):
            note += "; --exclude '' turns the default patterns off"
        return [note]

    def _idle(self) -> list[str]:
        idle = [
            one
            for one in (*self._names, *self._paths)
            if one not in self._matched and one not in self._defaults
        ]
        if not idle:
            return []
        step = "check its spelling"
        if any("/" in one for one in idle):
            step = (
                "a pattern with a / starts below the source: 'b/*' leaves out photos/b of the source photos"
            )
        more = " more" if self._matched else ""
        return [f"--exclude {' and '.join(map(repr, idle))} left out nothing{more}; {step}"]

    def _hit(self, parts: list[str]) -> bool:
        """Whether a pattern matches the last one of these parts, or the whole path."""
        if self._any_name.match(parts[-1]):
            pattern = next(one for one in self._names if fnmatchcase(parts[-1], one))
        elif not (pattern := next((one for one in self._paths if _matches(parts, one)), "")):
            return False
        self._matched[pattern] += 1
        return True


def _matches(parts: list[str], pattern: str) -> bool:
    """Whether a pattern with `/` matches a path; `**` stands for any number of parts."""
    lines = {0}  # the parts that the pattern so far may have used up
    for piece in pattern.strip("/").split("/"):
        if piece == "**":
            lines = set(range(min(lines), len(parts) + 1)) if lines else lines
        else:
            lines = {at + 1 for at in lines if at < len(parts) and fnmatchcase(parts[at], piece)}
    return len(parts) in lines


def _composed(name: str) -> str:
    """A name in the Unicode form that a keyboard writes, with `/` between its parts."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)
