"""The list of encoders that can be loaded by name."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass

from embedkit.hub.access import Access
from embedkit.hub.catalog import IndexRow
from embedkit.hub.open import open_zoo
from embedkit.hub.resolve import working_zoo, zoos


@dataclass(frozen=True, kw_only=True)
class EncoderInfo(IndexRow):
    """A zoo entry as `list_encoders` shows it.

    Attributes:
        alias: The bare name; empty when another entry has it.
        zoo: The zoo it would be loaded from; empty when it is only in the package's index.
        at_hand: Whether it can be loaded without a connection.

    Examples:
        >>> info = embedkit.list_encoders("simclr-r10")[0]
        >>> info.name, info.alias, info.dim, info.license
        ('simclr-r10.fmnist', 'simclr-r10', 256, 'MIT')
    """

    alias: str = ""
    zoo: str = ""
    at_hand: bool = False


def list_encoders(
    pattern: str = "*",
    *,
    kind: str = "encoder",
    zoo: str | None = None,
    local_files_only: bool = False,
    token: str | None = None,
) -> list[EncoderInfo]:
    """The encoders that can be loaded by name.

    Args:
        pattern: Part of the name, as `simclr`, or shell wildcards for the whole of it, as `*-r10`.
        kind: `detector` or `landmarks` lists those entries instead; the empty text lists all.
        zoo: List this zoo only.
        local_files_only: Never open a connection; a remote zoo's last list in the cache is used.
        token: Credential for a remote zoo.

    Returns:
        Sorted by name; those that are only in the package's index have an empty `zoo`.

    Examples:
        >>> [info.name for info in embedkit.list_encoders("sim*-r10")]
        ['simclr-r10.fmnist', 'simsiam-r10.fmnist']
        >>> [info.name for info in embedkit.list_encoders(kind="landmarks")]
        ['face_landmarks-dense68.faceapi']
    """
    if not any(wildcard in pattern for wildcard in "*?["):
        pattern = f"*{pattern}*"
    access = Access(local_files_only=local_files_only, token=token)
    found: dict[str, EncoderInfo] = {}
    among = [*zoos(access), working_zoo()] if zoo is None else [open_zoo(zoo, access)]
    asked = [(one, one.index()) for one in among]
    for name in {name for _, index in asked for name in index.rows}:
        holder = next((one for one, _ in asked if one.offers(name)), None)
        # The facts are those of the zoo that has the entry, else of the first index that lists it.
        index = next(
            index for _, index in sorted(asked, key=lambda pair: pair[0] is not holder) if name in index.rows
        )
        alias = next((alias for alias, folder in index.aliases.items() if folder == name), "")
        found[name] = EncoderInfo(
            **{
                **vars(index.rows[name]),
                "alias": alias,
                "zoo": holder.uri if holder else "",
                "at_hand": holder is not None and holder.holds(name),
            }
        )
    return [
        info
        for name, info in sorted(found.items())
        if (not kind or info.kind == kind)
        and (fnmatch.fnmatchcase(name, pattern) or (info.alias and fnmatch.fnmatchcase(info.alias, pattern)))
    ]
