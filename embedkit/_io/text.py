"""Text from outside for messages and terminals: one line, no control characters, no credentials, nearest names.

A server that gets a token may send it back in a header, a redirect or an error, and messages end in logs and bug
reports.
"""

from __future__ import annotations

import base64
import difflib
import re
from collections.abc import Iterable
from itertools import islice
from urllib.parse import quote

__all__ = ["did_you_mean", "one_line", "plain_line", "quoted", "redacted", "safe_for_terminal"]

#: C0 and C1 control characters, line and paragraph separators, and what changes the direction of writing.
_CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]"
)
#: The same with line breaks, tabs, invisible characters and lone surrogates.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]+"
)
#: Credentials with a known form: those of the Hub, and those in signed links.
_TOKEN = re.compile(
    r"hf_\w+|(?i:\b(?:bearer|basic)\s+)\S+|(?i:(?<=[?&])(?:[\w-]*(?:signature|token|credential|key-pair-id)|sig)=)[^&\s]+"
)
#: Greatest number of characters of a quotation.
_LONGEST = 200
#: Names that are compared with a missing one; comparing is slow.
_MOST_NAMES = 100_000


def safe_for_terminal(text: str, *, lines: bool = False) -> str:
    """`text` with control characters escaped, so that a file name or a model card cannot control the terminal.

    Args:
        text: Any text.
        lines: Keep line breaks and tabs.
    """
    if lines:
        text = text.replace("\r\n", "\n")
    text = _CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)
    return text if lines else text.replace("\n", "\\n").replace("\t", "\\t")


def one_line(error: BaseException, most: int = _LONGEST) -> str:
    """The message of an exception as one line of at most `most` characters; its class where it has no message."""
    words = str(getattr(error, "strerror", None) or error).strip()
    line = (words or type(error).__name__).splitlines()[0]
    return safe_for_terminal(line.encode("utf-8", "backslashreplace").decode())[:most]


def plain_line(text: object) -> str:
    """`text` as one line: each run of line breaks, control and invisible characters becomes a space."""
    return " ".join(_UNSAFE.sub(" ", str(text)).split())


def redacted(text: object, *secrets: str | None) -> str:
    """`text` with `...` for each secret, also where it is escaped for a URL, in Base64, or in another case.

    Args:
        text: Anything that a server sent or influenced.
        secrets: The tokens that it got; None and empty ones are ignored.
    """
    found = str(text)
    for secret in filter(None, secrets):
        plain = secret.encode(errors="surrogateescape")
        for form in (secret, quote(secret, safe=""), base64.b64encode(plain).decode().rstrip("=")):
            found = re.sub(re.escape(form), "...", found, flags=re.IGNORECASE)
    return _TOKEN.sub("...", found)


def quoted(text: object, *secrets: str | None, longest: int = _LONGEST) -> str:
    """Text from outside for a message: one line of at most `longest` characters without `secrets`.

    Args:
        text: The text.
        secrets: As for `redacted`; they are removed before the text is cut.
        longest: Greatest number of characters.
    """
    return redacted(plain_line(text), *secrets)[:longest]


def did_you_mean(
    name: str, known: Iterable[str], *, most: int = 1, cutoff: float = 0.6, otherwise: str = ""
) -> str:
    """`did you mean 'x' or 'y'?` with the names nearest to `name`; `otherwise` where none is near.

    Args:
        name: The name that was not found.
        known: The names that exist.
        most: Greatest number of names to suggest.
        cutoff: How similar a name must be, from 0 to 1.
        otherwise: The text where no name is near.
    """
    near = difflib.get_close_matches(name, list(islice(known, _MOST_NAMES)), most, cutoff)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else otherwise
