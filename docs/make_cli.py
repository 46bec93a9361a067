"""Write `docs/cli.md`, the help of every command as the commands print it.

    python docs/make_cli.py

A test compares the file with the commands, so that the page cannot drift.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main
from typer.testing import CliRunner

from embedkit.cli import app

PAGE = Path(__file__).with_name("cli.md")


def command_paths(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of every command and group, from the top down."""
    yield path
    for name, inner in getattr(command, "commands", {}).items():
        yield from command_paths(inner, (*path, name))


def render() -> str:
    """The whole page."""
    parts = ["# The command line", "", "Written by `docs/make_cli.py` from the commands themselves.", ""]
    for path in command_paths(typer.main.get_command(app)):
        result = CliRunner().invoke(
            app, [*path, "--help"], prog_name="embedkit", env={"COLUMNS": "100", "TERMINAL_WIDTH": "100"}
        )
        text = "\n".join(line.rstrip() for line in result.output.strip().splitlines())
        parts += [f"## {' '.join(('embedkit', *path))}", "", "```", text, "```", ""]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(render(), "utf-8")
