"""The result of a publication."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Published:
    """The result of a publication.

    Attributes:
        name: The entry.
        zoo: The zoo that it was published to.
        manifest_sha256: Its revision.
        files: The files that were written, the index included; empty when all were there.
        version: The zoo's own name for this version: a commit on the Hub, else empty.
    """

    name: str
    zoo: str
    manifest_sha256: str
    files: tuple[str, ...]
    version: str = ""
