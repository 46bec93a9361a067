"""Containers of images: the names of the images inside, and their readers.

Listing decodes no image. Many readers share one open container, few containers stay open, and a reader refuses a
container that changed after it was listed. The caller makes ids of the names: containers know neither ids nor other
sources. `embedkit.images.archives` and `embedkit.images.tables` implement them.
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

#: The labels of an image without labels.
EMPTY: Mapping[str, object] = MappingProxyType({})

T = TypeVar("T")


class ContainedImage(NamedTuple):
    """One image inside a container.

    Attributes:
        name: The normalized name of a tar member; the path of a Parquet row, or `#row` (from 0) where the
            path is missing or not unique. It may hold `surrogateescape` where it is not UTF-8.
        size: Bytes of the tar member; of the whole file for a Parquet row.
        read: Returns the encoded bytes, in any thread. Raises OSError, `ImageError` or `SourceError`.
        labels: The scalar columns of a Parquet row; empty for a tar member.
    """

    name: str
    size: int
    read: Callable[[], bytes]
    labels: Mapping[str, object]


@dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """The content of one container.

    Attributes:
        images: Each once, in the container's order; created lazily, so they can be iterated over once.
        label_schema: Label column -> Arrow type name; empty for a tar archive.
        damage: (member or "", reason) if an archive ends early; its complete members are listed nevertheless.
        notes: Sentences for the user.
        passed: Suffix of members that are not listed -> how many have it.
    """

    images: Iterator[ContainedImage]
    label_schema: Mapping[str, str] = field(default_factory=dict)
    damage: tuple[str, str] | None = None
    notes: tuple[str, ...] = ()
    passed: Counter[str] = field(default_factory=Counter)


def latest(factory: Callable[..., T], count: int) -> Callable[..., T]:
    """`factory` with a cache of its last `count` results, called by one thread at a time."""
    cached, lock = functools.lru_cache(count)(factory), threading.Lock()

    def get(*key: object) -> T:
        with lock:
            return cached(*key)

    return get


def check_unchanged(path: str, mtime_ns: int) -> None:
    """Raise a `SourceError` if a container is not the one that was listed."""
    if os.stat(path).st_mtime_ns != mtime_ns:
        raise SourceError(f"{path!r} changed after it was listed; run the command again")
