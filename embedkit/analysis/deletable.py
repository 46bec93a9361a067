"""Which image of a group to keep, and which files a list may contain, so that deleting all of them loses no image.

Several rows of embeddings may be one file (a link, a hard link, a folder that was embedded under two names), and a file
may have been moved or changed since. The file system is therefore checked when the list is written.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from embedkit.errors import ConfigError, ImageError
from embedkit.images.decode import size_in_header
from embedkit.images.ids import path_of

__all__ = ["KEEP", "DeleteList", "FileStates", "deletable"]

#: Which image of a group is kept: the one with the most pixels, then the most bytes, then the oldest one; the oldest
#: one; or the one whose row comes first.
KEEP = ("largest", "oldest", "first")

_GONE = "the file no longer exists"
_CHANGED = "changed since it was embedded: embed again"
_LINK = "a link"
_ODD = "neither a file nor a link"
_INSIDE = "inside an archive"
_SAME = "the same file as one that is kept"
_TWICE = "already listed under another name"
_BREAK = "a line break in its name: use --null"

#: Device and inode: the identity of a file, whatever its name.
_Key = tuple[int, int]


@dataclass(frozen=True)
class DeleteList:
    """The files that may be deleted.

    Attributes:
        files: Absolute paths, without links in them, each once.
        left_out: Reason -> the names of the duplicates that are left out for it.
        larger: Names of listed images, each with the name of its kept image, which has fewer pixels; fewer bytes where
            a header cannot be read.
        unread: Names of listed images that were compared by bytes, since a header cannot be read.
    """

    files: list[str]
    left_out: dict[str, list[str]] = field(default_factory=dict)
    larger: list[tuple[str, str]] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.files)

    def why(self) -> str:
        """A sentence about what was left out; empty if nothing was."""
        count = sum(map(len, self.left_out.values()))
        if not count:
            return ""
        reasons = "; ".join(f"{len(names)}: {reason}" for reason, names in self.left_out.items())
        first = next(iter(self.left_out.values()))[0]
        return f"{count} left out ({reasons}), the first is {first!r}"

    def warnings(self) -> list[str]:
        """Sentences about listed images that may be better than the kept ones."""
        found = []
        if self.larger:
            name, kept = self.larger[0]
            found.append(
                f"{len(self.larger)} of the listed files are larger than the images that are kept instead; the first "
                f"is {name!r}, of which {kept!r} is kept"
            )
        if self.unread:
            found.append(
                f"the pixels of {len(self.unread)} of the listed files, or of their kept images, cannot be counted, so "
                f"their sizes in bytes were compared; the first is {self.unread[0]!r}"
            )
        return found


@dataclass(frozen=True)
class _State:
    """The current state of a row's file: `fault` says why it may not be deleted or kept; empty if it may.

    `size` and `time` are its bytes and its modification time in ns; 0 if there is no file.
    """

    fault: str
    key: _Key | None = None
    path: str = ""
    size: int = 0
    time: int = 0


class FileStates:
    """The current states of the files of rows, each looked up once."""

    def __init__(
        self,
        names: Sequence[str],
        recorded: tuple[np.ndarray, np.ndarray] | None,
        root: str | os.PathLike[str] | None,
    ):
        """Look up nothing yet.

        Args:
            names: The ids, one per row.
            recorded: int64 (N,), (N,), sizes in bytes and modification times in ns at embedding; None if
                unknown.
            root: The folder that ids are relative to; the working folder when None.
        """
        self._names, self._recorded, self._root = names, recorded, root
        self._states: dict[int, _State] = {}
        self._pixels: dict[int, int] = {}

    def of(self, row: int) -> _State:
        """The state of one row's file."""
        if row not in self._states:
            self._states[row] = self._look(row)
        return self._states[row]

    def pixels(self, row: int) -> int:
        """Number of pixels by the header of a row's file; 0 if it may not be kept, or has no such header."""
        if row not in self._pixels:
            state, count = self.of(row), 0
            if not state.fault:
                with contextlib.suppress(ImageError, OSError):
                    width, height = size_in_header(state.path)
                    count = width * height
            self._pixels[row] = count
        return self._pixels[row]

    def rank(self, rows: Sequence[int], keep: str = "largest") -> np.ndarray:
        """Rank of each row as the one to keep, int64 (n,), the best one lowest.

        Real files come first, then links, then members of archives, then what no longer exists; among these, those
        that `keep` prefers. Equal ones have equal ranks.

        Raises:
            ConfigError: `keep` is none of its values.
        """
        if keep not in KEEP:
            raise ConfigError(f"keep: expected one of {', '.join(KEEP)}, found {keep!r}")
        if not len(rows):
            return np.empty(0, np.int64)
        order = {"": 0, _LINK: 1, _INSIDE: 2}
        keys = [(order.get(self.of(row).fault, 3), *self._order(row, keep)) for row in rows]
        return np.unique(np.array(keys, np.int64), axis=0, return_inverse=True)[1].reshape(-1)

    def _order(self, row: int, keep: str) -> tuple[int, ...]:
        if keep == "first":
            return ()
        state = self.of(row)
        size, time = state.size, state.time
        if self._recorded is not None:  # of what is inside an archive or gone, too
            size, time = (int(column[row]) for column in self._recorded)
        return (time,) if keep == "oldest" else (-self.pixels(row), -size, time)

    def _look(self, row: int) -> _State:
        path = path_of(self._names[row], self._root)
        try:
            itself, target = os.lstat(path), os.stat(path)
        except (OSError, ValueError):
            return _State(_INSIDE if _lies_inside(path) else _GONE)
        key = (target.st_dev, target.st_ino)
        about = (target.st_size, target.st_mtime_ns)
        if not stat.S_ISREG(target.st_mode):
            return _State(_ODD)
        if self._recorded is not None:
            if tuple(int(column[row]) for column in self._recorded) != about:
                return _State(_CHANGED, key)
        if not stat.S_ISREG(itself.st_mode):
            return _State(_LINK, key)
        real = os.path.realpath(path)
        try:
            found = os.lstat(real)
        except OSError:
            return _State(_GONE)
        return _State("", key, real, *about) if key == (found.st_dev, found.st_ino) else _State(_CHANGED, key)


def deletable(
    states: FileStates,
    names: Sequence[str],
    kept: Iterable[int],
    redundant: Iterable[tuple[int, int]],
    *,
    line_breaks: bool = False,
) -> DeleteList:
    """Choose the files that may be deleted.

    A file is listed if it exists, is unchanged and is not a link, and if the same holds for the kept image, which is
    another file. A file that is kept under another name is never listed.

    Args:
        states: The current states of the files.
        names: One per row.
        kept: Rows that are kept, of all groups.
        redundant: Rows that could go, each with the kept row that it is a duplicate of.
        line_breaks: Whether paths with line breaks can be listed.
    """
    held = {state.key for state in map(states.of, kept) if state.key is not None}
    files: dict[str, None] = {}
    left_out: dict[str, list[str]] = {}
    larger: list[tuple[str, str]] = []
    unread: list[str] = []
    for row, of in redundant:
        state, keeper = states.of(row), states.of(of)
        fault = state.fault
        if not fault and state.key in held:
            fault = _SAME
        if not fault and keeper.fault:
            fault = (
                f"the image to keep is {keeper.fault}" if keeper.fault != _GONE else "the kept one is gone"
            )
        if not fault and not line_breaks and ("\n" in state.path or "\r" in state.path):
            fault = _BREAK
        if not fault and state.path in files:
            fault = _TWICE
        if fault:
            left_out.setdefault(fault, []).append(names[row])
            continue
        files[state.path] = None
        sizes = states.pixels(row), states.pixels(of)
        if not all(sizes):
            sizes = state.size, keeper.size
            unread.append(names[row])
        if sizes[0] > sizes[1]:
            larger.append((names[row], names[of]))
    return DeleteList(list(files), left_out, larger, unread)


def _lies_inside(path: str) -> bool:
    """Whether `path` names a member of an existing container."""
    at = path.find("::")
    while at >= 0:
        if os.path.isfile(path[:at]):
            return True
        at = path.find("::", at + 2)
    return False
