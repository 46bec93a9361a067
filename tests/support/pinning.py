"""Writers of a lock file, run in children."""

from __future__ import annotations

from pathlib import Path

from embedkit.hub.lockfile import LockFile


def pin(path: str, number: int) -> None:
    for turn in range(5):
        LockFile(Path(path)).write(
            f"linear-e{number}t{turn}", zoo="x", revision="r", manifest_sha256=f"{number:064x}"
        )


def pin_for_ever(path: str) -> None:
    turn = 0
    while True:
        LockFile(Path(path)).write(
            f"linear-e{turn % 50}", zoo="x" * 2000, revision="r", manifest_sha256="0" * 64
        )
        turn += 1
