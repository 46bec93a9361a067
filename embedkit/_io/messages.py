"""What strangers say, made fit for a message of ours: one line, no terminal escapes, no credential, not too long.

A server that is asked with a token may give it back in a header, a redirect or an error, and a message ends in logs
and bug reports.
"""

from __future__ import annotations

import base64
import re
from urllib.parse import quote

_LONGEST = 200
#: Controls (C0, C1, DEL), marks that turn the direction of text, invisible characters, and lone surrogates.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]+"
)
#: Credentials that are known by their form: of the Hub, and in links that are signed.
_TOKEN = re.compile(
    r"hf_\w+|(?i:\b(?:bearer|basic)\s+)\S+|(?i:(?<=[?&])(?:[\w-]*(?:signature|token|credential|key-pair-id)|sig)=)[^&\s]+"
)


def one_line(text: object) -> str:
    """`text` without line breaks, controls and invisible characters, each run of which becomes a space."""
    return " ".join(_UNSAFE.sub(" ", str(text)).split())


def redacted(text: object, *secrets: str | None) -> str:
    """`text` with each secret replaced by `...`, also where it is escaped for a URL, in Base64 or in other letters.

    Args:
        text: Anything that a server had a part in.
        secrets: The tokens that it was given; those that are None or empty count for nothing.
    """
    found = str(text)
    for secret in filter(None, secrets):
        plain = secret.encode(errors="surrogateescape")
        for form in (secret, quote(secret, safe=""), base64.b64encode(plain).decode().rstrip("=")):
            found = re.sub(re.escape(form), "...", found, flags=re.IGNORECASE)
    return _TOKEN.sub("...", found)


def quoted(text: object, *secrets: str | None, longest: int = _LONGEST) -> str:
    """What a stranger said, for a message: one line of at most `longest` characters without `secrets`.

    Args:
        text: What was said.
        secrets: As for `redacted`; they are taken out before the text is cut.
        longest: Greatest number of characters.
    """
    return redacted(one_line(text), *secrets)[:longest]
