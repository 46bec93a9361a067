"""Escape text of an entry for a Markdown page, so that it makes no heading, link, image, HTML or table column."""

from __future__ import annotations

import re

from embedkit._io.text import plain_line

_SPECIAL = re.compile(r"[\\`*\[\]|]|^[#+=~_-]|(?<=^\d)[.)]|(?<=^\d\d)[.)]")
#: Inline code of plain words, in which everything is visible.
_CODE = re.compile(r"(`[\w .:=-]{1,80}`)")


def escape(text: object) -> str:
    """`text` as one line of Markdown that renders as itself; plain words are unchanged.

    Inline code of plain words stays, for protocols that name a command. A bare URL may become a link, whose target is
    the visible address.

    Args:
        text: A value of a configuration or an index.
    """
    parts = _CODE.split(plain_line(text))
    parts[::2] = [_SPECIAL.sub(r"\\\g<0>", part) for part in parts[::2]]
    return "".join(parts).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def code(text: object) -> str:
    """`text` as inline code, empty where there is none; a backtick in it becomes an apostrophe."""
    line = plain_line(text).replace("`", "'")
    return f"`{line}`" if line else ""
