"""Text of an entry in a Markdown page, where it must stay text: no heading, link, image, HTML or column of its own."""

from __future__ import annotations

import re

from embedkit._io.messages import one_line

_SPECIAL = re.compile(r"[\\`*\[\]|]|^[#+=~_-]|(?<=^\d)[.)]|(?<=^\d\d)[.)]")
#: Inline code of plain words, which can hold nothing that is not shown.
_CODE = re.compile(r"(`[\w .:=-]{1,80}`)")


def escape(text: object) -> str:
    """`text` as one line of Markdown that shows it as it is; plain words stay the same.

    Inline code of plain words stays, for protocols that name a command. A bare URL may still become a link, which
    leads where it says.

    Args:
        text: Whatever a configuration or an index holds, or its `str`.
    """
    parts = _CODE.split(one_line(text))
    parts[::2] = [_SPECIAL.sub(r"\\\g<0>", part) for part in parts[::2]]
    return "".join(parts).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def code(text: object) -> str:
    """`text` as inline code, empty where there is none; a backtick in it becomes an apostrophe."""
    line = one_line(text).replace("`", "'")
    return f"`{line}`" if line else ""
