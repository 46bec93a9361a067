"""Checks of output paths: never an input, never one file twice, never a file that embedkit did not write."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from embedkit.errors import OutputError

_Paths = Mapping[str, str | os.PathLike[str] | None]


def check_outputs(outputs: _Paths, inputs: _Paths | None = None) -> None:
    """Refuse outputs that are inputs, that are one file twice, or that have no name. Nothing is written.

    Args:
        outputs: Option as the user knows it (`-o`, `--write-delete-list`) -> the path; None where it was not given, `-`
            for standard output.
        inputs: Name of the input -> its path. A folder is an input only by its own path; the files in it are not.

    Raises:
        OutputError: The first output that may not be written.
    """
    taken = [
        (option, path) for option, path in (inputs or {}).items() if path is not None and _is_file_name(path)
    ]
    for option, path in outputs.items():
        if path is None or os.fspath(path) == "-":
            continue
        if not os.fspath(path):
            raise OutputError(f"{option}: the name of the output is empty; give a path")
        for other, there in taken:
            if _is_same(path, there):
                what = "is also the input" if other not in outputs else "is also written by"
                raise OutputError(f"{option}: {os.fspath(path)!r} {what} {other}; choose another name")
        taken.append((option, path))


def check_ours(path: Path, is_ours: Callable[[Path], bool], what: str) -> None:
    """Refuse to replace or delete a file that embedkit did not write.

    Args:
        path: The file or folder that is about to be replaced; one that is missing is fine.
        is_ours: Whether embedkit wrote it, by its content. Errors of reading it count as no.
        what: What embedkit would write there, for the message: "a table of errors".

    Raises:
        OutputError: It is there, and not ours.
    """
    if not os.path.lexists(path):
        return
    try:
        ours = is_ours(path)
    except Exception:  # whatever cannot be read was not written by us
        ours = False
    if not ours:
        raise OutputError(
            f"{path} exists and was not written by embedkit, which would put {what} there; "
            "move it away or choose another output"
        )


def _is_file_name(path: str | os.PathLike[str]) -> bool:
    return os.fspath(path) not in ("", "-")


def _is_same(left: str | os.PathLike[str], right: str | os.PathLike[str]) -> bool:
    try:
        return os.path.samefile(left, right)
    except (OSError, ValueError):
        return os.path.realpath(left) == os.path.realpath(right)
