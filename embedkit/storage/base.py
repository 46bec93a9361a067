"""The protocol of a storage: files below one remote root, by relative path."""

from __future__ import annotations

from collections.abc import Generator
from typing import Protocol


class Storage(Protocol):
    """Files below one remote root, by relative path."""

    @property
    def uri(self) -> str:
        """The root, for messages: without credentials or query."""

    def read(self, path: str, limit: int) -> bytes:
        """All bytes of a small file.

        Raises:
            FileNotFoundError: There is no such file.
            ZooError: It has more than `limit` bytes, or the server refuses or (UnreachableError) is down.
        """

    def stream(self, path: str, start: int, size: int) -> tuple[int, Generator[bytes]]:
        """The bytes of a file of `size` bytes from `start` on, in chunks.

        Returns:
            Where the bytes begin (`start`, or 0 where the server cannot send a part), and the chunks.

        Raises:
            FileNotFoundError: There is no such file.
            IntegrityError: The file has another size.
            ZooError: As for `read`; the chunks raise it too.
        """
