"""What is asked of an importer, what it gives, and the license: as stated, as published for the layout, or as given."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from embedkit.authoring.contract import Contract
from embedkit.errors import ConfigError
from embedkit.model.layout import ENTRY_NAME

__all__ = ["Imported", "License", "Request", "decide_license", "is_onnx", "license_in"]

#: One line of an SPDX expression, or of the name that a hub has for a license.
_LICENSE = re.compile(r"[A-Za-z0-9.+() -]{1,100}")
#: Words that are given as a license and name none.
_NO_LICENSE = ("", "unknown", "other")
#: Characters of the words that are kept with an entry.
_MOST_WORDS = 500


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be made of foreign weights.

    Attributes:
        name: The entry, `<method>-<arch>.<data>`.
        zoo: The folder that holds the entries.
        license: SPDX identifier of the weights' license; None takes the one that is known.
        origin: Where the weights come from, an address or words.
        data: What they were trained on, in words; the name's last part when None.
        samples: 64 or more images to measure rounding and parity on; synthetic ones when None.
        contract: What replaces the preprocessing that the weights state.
        pool: `mean` or `cls`: how the vectors of an image's parts become one; as the weights state when None.
        accept_license: Whether weights are taken that are not under an open license.

    Raises:
        ConfigError: The name cannot be an entry's, or the license or the words cannot stand in its files.
    """

    name: str
    zoo: Path
    license: str | None = None
    origin: str | None = None
    data: str | None = None
    samples: str | os.PathLike[str] | None = None
    contract: Contract = Contract()
    pool: str | None = None
    accept_license: bool = False

    def __post_init__(self) -> None:
        if not ENTRY_NAME.fullmatch(self.name):
            raise ConfigError(
                f"{self.name!r}: expected <method>-<arch>.<data> in small letters, such as simsiam-r50.in1k"
            )
        license_in(self.license, "--license")
        for option, words in (("--origin", self.origin), ("--trained-on", self.data)):
            # A lone surrogate, which no file can hold, is not printable either.
            if words and not (words.strip() and words.isprintable() and len(words) <= _MOST_WORDS):
                raise ConfigError(
                    f"{option} {words[:60]!a}: expected one line of at most {_MOST_WORDS} printable characters"
                )

    @property
    def method(self) -> str:
        """The first part of the name."""
        return self.name.partition("-")[0]

    @property
    def tag(self) -> str:
        """The last part of the name."""
        return self.name.partition(".")[2]


@dataclass(frozen=True, kw_only=True)
class Imported:
    """An entry that was written.

    Attributes:
        folder: The entry.
        architecture: The network's name.
        license: SPDX identifier of the weights' license.
        recognized: The layout and the network, in words.
        presumed: Whether that license is only the one under which others published weights of this layout.
        notes: What the user must know of these weights, a sentence each.
    """

    folder: Path
    architecture: str
    license: str
    recognized: str
    presumed: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class License:
    """The license of an entry, and where it is from.

    Attributes:
        name: SPDX identifier.
        stated_by: The source of this statement, in words.
        published: The published license that it replaces, if any.
        presumed: Whether no one stated or gave it, so that it is that of the published weights of the layout.
    """

    name: str
    stated_by: str
    published: str | None = None
    presumed: bool = False


def license_in(text: str | None, where: str) -> str | None:
    """A license as written, without surrounding space; None where it names none.

    Args:
        text: What was written.
        where: For messages.

    Raises:
        ConfigError: It is not the name of a license.
    """
    name = (text or "").strip()
    if name.casefold() in _NO_LICENSE:
        return None
    if not _LICENSE.fullmatch(name):
        raise ConfigError(
            f"{where}: {name[:60]!a} is not the name of a license: expected one line of at most 100 letters, digits, "
            "spaces and .+()-, such as Apache-2.0"
        )
    return name


def decide_license(request: Request, published: str | None, *, stated: bool, where: str) -> License:
    """The license of imported weights; no license is assumed silently, and a replaced one is named.

    Args:
        request: What was asked for.
        published: The license that is known, if any.
        stated: Whether these weights state it themselves; else it is the one under which the weights of this layout
            were published, and a checkpoint of one's own may have another.
        where: For messages.

    Raises:
        ConfigError: No license is known and none was given, or what was given is none, or another than the weights
            state, or than was published without saying where these come from.
    """
    given = license_in(request.license, "--license")
    if not published:
        if not given:
            raise ConfigError(
                f"{where}: no license is known for these weights; look it up and give it with --license"
            )
        return License(name=given, stated_by="the person who imported them")
    if not given or given.casefold() == published.casefold():
        return License(
            name=published,
            stated_by="the weights' source" if stated else "those who published this layout",
            presumed=not stated and not given,
        )
    if stated:
        raise ConfigError(
            f"{where}: these weights state the license {published}: leave --license {given} out"
        )
    if not request.origin:
        raise ConfigError(
            f"{where}: the published weights of this layout are under {published}: leave --license {given} out, or say "
            "with --origin where other weights come from"
        )
    return License(name=given, stated_by="the person who imported them", published=published)


def is_onnx(path: str | os.PathLike[str]) -> bool:
    """Whether a file is an ONNX model: by its suffix, or by how protobuf begins such a model."""
    if os.fspath(path).lower().endswith(".onnx"):
        return True
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError:
        return False
    # The field `ir_version`, a small number, comes first; the header of a safetensors file begins with a brace.
    return len(start) == 9 and start[0] == 8 and 1 <= start[1] <= 32 and start[8:9] != b"{"
