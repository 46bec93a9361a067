"""What commands print: results on stdout, notes and warnings on stderr.

A command prints its result once, in one of three ways, and everything else as notes:

    if as_json:
        print_json(facts)
    else:
        print_table([Id("id"), Number("cosine", ".4f")], rows)  # or print_line(path), or print_text(card)
    tell("3 of 40 rows leak")

On a terminal a table is aligned, with long ids shortened in the middle; in a pipe it is tab-separated, whole, with
the same heading line. Names in results and notes are untrusted, so control characters are escaped.

`tell` is for notes, which `--quiet` silences; `warn` is for what the user must know, which it does not. A file that the
command writes is written before its table: the reader of a table may stop early, as `head` does.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

from embedkit._io.text import safe_for_terminal

__all__ = [
    "Heading",
    "Id",
    "Number",
    "is_quiet",
    "print_json",
    "print_line",
    "print_table",
    "print_text",
    "set_quiet",
    "show_warnings",
    "tell",
    "tell_error",
    "tell_left_out",
    "warn",
]

#: Columns between two cells on a terminal.
_GAP = 2
#: Characters that a text is never shortened below.
_LEAST = 16
_BOLD, _PLAIN = "\x1b[1m", "\x1b[0m"

_quiet = False


class Number(NamedTuple):
    """A column of numbers, which is right-aligned.

    Attributes:
        name: The heading.
        format: How a number is written, such as `.4f`; as Python does when empty. A text stays as it is.
    """

    name: str
    format: str = ""


class Id(NamedTuple):
    """A column of ids, paths or names, which a terminal shows shortened in the middle where it is too narrow.

    Attributes:
        name: The heading.
    """

    name: str


#: A column: a heading for texts, which are shown whole, or `Number` or `Id`.
Heading: TypeAlias = str | Number | Id


# --- results ----------------------------------------------------------------------------------------------


def print_table(columns: Sequence[Heading], rows: Iterable[Sequence[object]]) -> None:
    """Print a table on stdout: aligned on a terminal, tab-separated in a pipe.

    Args:
        columns: The headings.
        rows: Texts and numbers. None is an empty cell, `-` on a terminal. In a pipe each row is printed when it
            comes; on a terminal all are, also when `rows` raises.
    """
    formats = [column.format if isinstance(column, Number) else "" for column in columns]
    heading = [column if isinstance(column, str) else column.name for column in columns]
    if not sys.stdout.isatty():
        print("\t".join(heading))
        for row in rows:
            print("\t".join(_cells(row, formats)))
        return
    found: list[list[str]] = []
    try:
        for row in rows:
            found.append([cell or "-" for cell in _cells(row, formats)])
    finally:
        if found:
            _print_aligned(columns, heading, found)


def print_json(value: object) -> None:
    """Print a result as JSON on stdout: indented, ASCII, with null for a number that is not finite."""
    text = json.dumps(_finite(value), indent=1, default=_plain)
    print(text.replace("\x7f", "\\u007f"))


def print_line(text: object) -> None:
    """Print a result that is one line, such as the path of what was written."""
    print(safe_for_terminal(str(text)))


def print_text(text: str) -> None:
    """Print a result of several lines, such as a model card."""
    print(safe_for_terminal(text, lines=True))


# --- notes ------------------------------------------------------------------------------------------------


def set_quiet(quiet: bool) -> None:
    """Silence notes and progress, or not: what `--quiet` does."""
    global _quiet
    _quiet = quiet


def is_quiet() -> bool:
    """Whether notes and progress are silenced."""
    return _quiet


def tell(message: str) -> None:
    """Print a note, one sentence, on stderr."""
    if not _quiet:
        tell_error(message)


def warn(message: str) -> None:
    """Print a warning on stderr, also with `--quiet`."""
    tell_error(f"warning: {message}")


def tell_error(message: str) -> None:
    """Print an error on stderr, also with `--quiet`."""
    print(f"embedkit: {safe_for_terminal(message)}", file=sys.stderr)


def tell_left_out(left_out: Sequence[str], what: str) -> None:
    """Warn of images that were left out.

    Args:
        left_out: One sentence for each, with its path and the reason.
        what: Where they belong, such as `of the gallery`.
    """
    if left_out:
        count = f"1 image {what} is" if len(left_out) == 1 else f"{len(left_out)} images {what} are"
        warn(f"{count} left out; the first: {left_out[0]}")


class _Warnings(logging.Handler):
    """Tells warnings of the library. What a job notes is in its report, which the command prints."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.addFilter(lambda record: not record.name.startswith("embedkit.pipeline"))

    def emit(self, record: logging.LogRecord) -> None:
        warn(record.getMessage())


def show_warnings() -> None:
    """Print the warnings that the library logs, one line each. A second call changes nothing."""
    logger = logging.getLogger("embedkit")
    if not any(isinstance(handler, _Warnings) for handler in logger.handlers):
        logger.addHandler(_Warnings())


# --- how ----------------------------------------------------------------------------------------------------


def _cells(row: Sequence[object], formats: Sequence[str]) -> list[str]:
    texts = (
        "" if value is None else format(value, spec) if spec and not isinstance(value, str) else str(value)
        for value, spec in zip(row, formats, strict=True)
    )
    return list(map(safe_for_terminal, texts))


def _print_aligned(columns: Sequence[Heading], heading: list[str], rows: list[list[str]]) -> None:
    from rich.cells import cell_len  # the width of wide letters

    widths = [max(map(cell_len, column)) for column in zip(heading, *rows, strict=True)]
    room = shutil.get_terminal_size().columns - _GAP * (len(widths) - 1)
    ids = [at for at, column in enumerate(columns) if isinstance(column, Id)]
    while sum(widths) > room and ids:
        widest = max(ids, key=widths.__getitem__)
        if widths[widest] <= max(_LEAST, cell_len(heading[widest])):
            break
        widths[widest] -= 1
    bold = _BOLD if _has_styles() else ""
    for row in (heading, *rows):
        cells = []
        for column, cell, width in zip(columns, row, widths, strict=True):
            shown = _shortened(cell, width)
            fill = " " * (width - cell_len(shown))
            cells.append(fill + shown if isinstance(column, Number) else shown + fill)
        line = (" " * _GAP).join(cells).rstrip()
        print(f"{bold}{line}{_PLAIN}" if row is heading and bold else line)


def _shortened(text: str, width: int) -> str:
    """`text` in at most `width` columns: the start and the end are kept, since names differ there."""
    from rich.cells import cell_len, set_cell_size

    if cell_len(text) <= width:
        return text
    mark = "…" if (sys.stdout.encoding or "").lower().startswith("utf") else "..."
    room = width - len(mark)
    end = set_cell_size(text[::-1], room // 2)[::-1].lstrip()
    return set_cell_size(text, room - room // 2).rstrip() + mark + end


def _has_styles() -> bool:
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb" and os.name != "nt"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return value


def _plain(value: Any) -> Any:
    """What `json` does not know: a scalar or an array of NumPy, or a path."""
    return _finite(value.tolist()) if hasattr(value, "tolist") else str(value)
