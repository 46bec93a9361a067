"""What a container of images gives: the images in it, by name, and their readers.

Listing decodes no image. Many readers share one open container, few containers stay open, and a reader refuses one
that changed after it was listed. What a name inside becomes outside is the caller's: containers know neither ids nor
other sources. `embedkit.images.archives` and `embedkit.images.tables` read them.
"""

from __future__ import annotations

import functools
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple, TypeVar

from embedkit.errors import SourceError

#: The labels of what has none.
EMPTY: Mapping[str, object] = MappingProxyType({})

T = TypeVar("T")


class Image(NamedTuple):
    """One image inside a container.

    Attributes:
        name: The normalized name of a tar member; the path of a Parquet row, or `#row` (from 0) where the
            path is missing or not unique. It may hold `surrogateescape` where it is not UTF-8.
        size: Bytes of the tar member; of the whole file for a Parquet row.
        read: Gives the encoded bytes, in any thread. Raises OSError, `ImageError` or `SourceError`.
        labels: The scalar columns of a Parquet row; empty for a tar member.
    """

    name: str
    size: int
    read: Callable[[], bytes]
    labels: Mapping[str, object]


@dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """What one container holds.

    Attributes:
        images: Each once, in the container's order; made one by one, so they can be gone through once.
        label_schema: Label column -> Arrow type name; empty for a tar archive.
        damage: (member or "", reason) where an archive ends early; its whole members are listed all the same.
        notes: Sentences for the user.
        passed: The suffixes of members that are not listed, and how many members have each.
    """

    images: Iterator[Image]
    label_schema: Mapping[str, str] = field(default_factory=dict)
    damage: tuple[str, str] | None = None
    notes: tuple[str, ...] = ()
    passed: Counter[str] = field(default_factory=Counter)


def latest(factory: Callable[..., T], count: int) -> Callable[..., T]:
    """`factory`, its last `count` results kept, called by one thread at a time."""
    kept, lock = functools.lru_cache(count)(factory), threading.Lock()

    def get(*key: object) -> T:
        with lock:
            return kept(*key)

    return get


def check_unchanged(path: str, mtime_ns: int) -> None:
    """Raise a `SourceError` if a container is not the one that was listed."""
    if os.stat(path).st_mtime_ns != mtime_ns:
        raise SourceError(f"{path!r} changed after it was listed; run the command again")


def one_line(error: Exception) -> str:
    """An exception's own words: one line that can be printed, whatever names it holds."""
    words = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return words.splitlines()[0].encode("utf-8", "backslashreplace").decode()
