"""Text of an entry in a Markdown page, where it must stay text: no heading, link, image, HTML or column of its own."""

from __future__ import annotations

import re

from embedkit.hub.messages import one_line

_SPECIAL = re.compile(r"[\\`*\[\]|]|^[#+=~_-]|(?<=^\d)[.)]|(?<=^\d\d)[.)]")


def escape(text: object) -> str:
    """`text` as one line of Markdown that shows it as it is; plain words stay the same.

    A bare URL may still become a link: it leads where it says.

    Args:
        text: Whatever a configuration or an index holds, or its `str`.
    """
    line = _SPECIAL.sub(r"\\\g<0>", one_line(text))
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def code(text: object) -> str:
    """`text` as inline code, empty where there is none; a backtick in it becomes an apostrophe."""
    line = one_line(text).replace("`", "'")
    return f"`{line}`" if line else ""
