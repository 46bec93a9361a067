"""How commands are registered: the examples at the end of a docstring end the command's help.

A docstring ends with

Examples:
        embedkit lint photos.parquet
        embedkit lint photos.parquet --json > lint.json

One line is one example. A test runs each of them, so it names files that the test makes (see `tests/cli/test_help.py`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import typer
from typer.core import TyperCommand

__all__ = ["STATUSES", "App", "Command", "examples", "examples_of", "statuses"]

#: How each command ends: the end of `embedkit --help`, and of the page of the command line.
STATUSES = {
    0: "done",
    1: "an error, which one sentence on stderr tells; or a failed check (zoo verify, doctor)",
    2: "wrong usage: no such command or option, or a value that cannot be",
    3: "done, and a finding: --fail-over, --fail-on-warning, --max-failures or --exit-status asked for it",
    130: "interrupted; finished work is saved",
}

_HEADING = "Examples:"


class Command(TyperCommand):
    """A command whose help ends with the examples of its docstring."""

    def __init__(self, name: str | None, *, help: str | None = None, **settings: Any):
        """Take the examples out of `help`; the other arguments are those of Typer."""
        words, _, lines = inspect.cleandoc(help or "").partition(f"\n{_HEADING}\n")
        if found := [line.strip() for line in lines.splitlines() if line.strip()]:
            settings["epilog"] = examples(*found)
        super().__init__(name, help=words, **settings)
        for parameter in self.params:
            if parameter.param_type_name == "argument" and parameter.metavar is None:
                parameter.metavar = str(parameter.name).upper()


class App(typer.Typer):
    """An application, or a group, of such commands."""

    def __init__(self, **settings: Any):
        """Prepare; the arguments are those of Typer."""
        super().__init__(no_args_is_help=True, rich_markup_mode=None, **settings)

    def command(self, name: str | None = None, **settings: Any) -> Callable[..., Any]:
        """Register a function as a command; the arguments are those of Typer."""
        return super().command(name, cls=Command, **settings)


def examples(*lines: str) -> str:
    """Examples as the end of a help text."""
    return _listed(_HEADING, lines)


def examples_of(command: Any) -> list[str]:
    """The examples in the help of a command or a group, each a line that a shell runs."""
    lines = (command.epilog or "").partition(f"{_HEADING}\n")[2].partition("\n\n")[0]
    return [line.strip() for line in lines.splitlines()]


def statuses() -> str:
    """The exit statuses as the end of a help text."""
    return _listed("Exit status:", [f"{status:<4} {words}" for status, words in STATUSES.items()])


def _listed(heading: str, lines: Iterable[str]) -> str:
    return "\n".join(["\b", heading, *(f"  {line}" for line in lines)])  # \b: lines stay lines
