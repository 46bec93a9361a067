"""Text from elsewhere on its way to a person: one line, nothing that drives a terminal, the nearest names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from itertools import islice

#: C0 and C1 control characters, line and paragraph separators, and what turns the direction of writing.
_CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]"
)
#: Names that are compared with one that is not there; comparing is slow.
_MOST_NAMES = 100_000


def safe_for_terminal(text: str, *, lines: bool = False) -> str:
    """`text` with control characters written out, so that a file name or a model card cannot drive the terminal.

    Args:
        text: Anything.
        lines: Keep line breaks and tabs.
    """
    if lines:
        text = text.replace("\r\n", "\n")
    text = _CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)
    return text if lines else text.replace("\n", "\\n").replace("\t", "\\t")


def one_line(error: BaseException, most: int = 200) -> str:
    """An exception's own words as one line of at most `most` letters; its class where it has no words."""
    words = str(getattr(error, "strerror", None) or error).strip()
    line = (words or type(error).__name__).splitlines()[0]
    return safe_for_terminal(line.encode("utf-8", "backslashreplace").decode())[:most]


def did_you_mean(name: str, known: Iterable[str], *, most: int = 1, otherwise: str = "") -> str:
    """`did you mean 'x' or 'y'?`, by the names that are nearest to `name`; `otherwise` where none is near."""
    near = difflib.get_close_matches(name, list(islice(known, _MOST_NAMES)), most)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else otherwise
