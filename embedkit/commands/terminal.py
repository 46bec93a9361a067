"""Text from elsewhere on its way to a terminal."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def printable(text: str, *, lines: bool = False) -> str:
    """`text` with control characters written out, so that a file name or a card cannot drive the terminal.

    Args:
        text: Anything.
        lines: Keep line breaks and tabs.
    """
    if lines:
        text = text.replace("\r\n", "\n")
    text = _CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)
    return text if lines else text.replace("\n", "\\n").replace("\t", "\\t")


def tell_left_out(left_out: Sequence[str], what: str) -> None:
    """Warn on stderr of pictures that were left out.

    Args:
        left_out: A sentence for each, with its path and the reason.
        what: What they are pictures of, as `of the gallery`.
    """
    if left_out:
        count = f"1 picture {what} is" if len(left_out) == 1 else f"{len(left_out)} pictures {what} are"
        print(f"embedkit: warning: {count} left out; the first: {printable(left_out[0])}", file=sys.stderr)
