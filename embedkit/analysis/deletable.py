"""Which files a list of duplicates may contain, so that deleting all of them loses no image.

Several rows of embeddings may be one file (a link, a hard link, a folder that was embedded under two names), and a file
may have been moved or changed since. The file system is therefore checked when the list is written.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from embedkit.images.ids import path_of

__all__ = ["DeleteList", "FileStates", "deletable"]

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
    """

    files: list[str]
    left_out: dict[str, list[str]] = field(default_factory=dict)

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


@dataclass(frozen=True)
class _State:
    """The current state of a row's file: `fault` says why it may not be deleted or kept; empty if it may."""

    fault: str
    key: _Key | None = None
    path: str = ""


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

    def of(self, row: int) -> _State:
        """The state of one row's file."""
        if row not in self._states:
            self._states[row] = self._look(row)
        return self._states[row]

    def rank(self, rows: Iterable[int]) -> np.ndarray:
        """Rank of each row as the one to keep, int64 (n,): 0 a real file, then links, then members of archives."""
        order = {"": 0, _LINK: 1, _INSIDE: 2}
        return np.array([order.get(self.of(row).fault, 3) for row in rows], np.int64)

    def _look(self, row: int) -> _State:
        path = path_of(self._names[row], self._root)
        try:
            itself, target = os.lstat(path), os.stat(path)
        except (OSError, ValueError):
            return _State(_INSIDE if _lies_inside(path) else _GONE)
        key = (target.st_dev, target.st_ino)
        if not stat.S_ISREG(target.st_mode):
            return _State(_ODD)
        if self._recorded is not None:
            size, time = (int(column[row]) for column in self._recorded)
            if (size, time) != (target.st_size, target.st_mtime_ns):
                return _State(_CHANGED, key)
        if not stat.S_ISREG(itself.st_mode):
            return _State(_LINK, key)
        real = os.path.realpath(path)
        try:
            found = os.lstat(real)
        except OSError:
            return _State(_GONE)
        return _State("", key, real) if key == (found.st_dev, found.st_ino) else _State(_CHANGED, key)


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
        else:
            files[state.path] = None
    return DeleteList(list(files), left_out)


def _lies_inside(path: str) -> bool:
    """Whether `path` names a member of an existing container."""
    at = path.find("::")
    while at >= 0:
        if os.path.isfile(path[:at]):
            return True
        at = path.find("::", at + 2)
    return False
