"""Whether a folder is this user's own: what other users can write there, they choose what is read from it."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def foreign_access(folder: Path, *, sticky: bool = False) -> str:
    """How another user than this one and root can change what lies in a folder.

    Args:
        folder: The folder; links are followed.
        sticky: Whether a sticky folder, such as `/tmp`, will do: there nobody can rename or replace what is ours.

    Returns:
        What is wrong with it, to stand behind the folder's name in a sentence; empty when it is ours, or missing.
    """
    if os.name == "nt":  # there, a user's folders are closed to others by inheritance
        return ""
    try:
        status = os.stat(folder)
    except OSError:
        return ""
    if status.st_uid not in (os.geteuid(), 0):
        return f"belongs to another user ({status.st_uid})"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not (sticky and status.st_mode & stat.S_ISVTX):
        return "can be written by other users"
    return ""
