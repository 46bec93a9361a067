"""Whether other users can write to a folder, and so choose what is read from it."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def foreign_access(folder: Path, *, sticky: bool = False) -> str:
    """How a user other than this one and root could change the content of a folder.

    Args:
        folder: The folder; links are followed.
        sticky: Accept a sticky folder such as `/tmp`, where other users cannot rename or replace this user's files.

    Returns:
        The problem, as the end of a sentence that begins with the folder's name; empty if there is none.
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
