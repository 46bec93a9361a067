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

from embedkit._io.text import did_you_mean
from embedkit.errors import ConfigError, EmbedkitError

__all__ = ["STATUSES", "App", "Command", "examples", "examples_of", "status_of", "statuses", "usage_error"]

#: How each command ends: the end of `embedkit --help`, and of the page of the command line.
STATUSES = {
    0: "done",
    1: "an error, which one sentence on stderr tells; or a failed check (zoo verify, doctor)",
    2: "wrong usage: no such command or option, or a value that an option does not take",
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

    def invoke(self, ctx: Any) -> Any:
        """Run the command; what the library refuses of an option is told by the option's name.

        The library begins such a message with the parameter: `threshold: expected ...` is `--threshold: expected ...`.
        """
        try:
            return super().invoke(ctx)
        except ConfigError as error:
            name, _, reason = str(error).partition(": ")
            if reason and (option := self._option_of(name)):
                error.args = (f"{option}: {reason}",)
            raise

    def _option_of(self, name: str) -> str | None:
        """The option of a parameter of the library: `k` is -k, `sheet` is what --draw-sheet takes."""
        options = [parameter.opts for parameter in self.params if parameter.param_type_name == "option"]
        same = [opts for opts in options if name.replace("_", "-") in {one.lstrip("-") for one in opts}]
        ends = [opts for opts in options if max(opts, key=len).endswith(f"-{name}")]
        found = same or ends
        return max(found[0], key=len) if len(found) == 1 else None


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


def status_of(error: EmbedkitError) -> int:
    """The exit status of an error: 2 when it is about an option, with whose name the message begins then."""
    return 2 if str(error).startswith("-") else 1


def usage_error(error: Any) -> str:
    """An error of Typer's parser as one sentence, which ends with where the help is."""
    message = str(error.format_message()).removeprefix("Invalid value: ").rstrip(".")
    context = error.ctx
    if context is None:
        return message
    wrong, command = getattr(error, "option_name", None), context.command
    if wrong is not None and len(wrong) == 2:  # of one letter, which is near to none
        short = [
            f"{one} ({max(parameter.opts, key=len)})"
            for parameter in command.params
            for one in parameter.opts
            if parameter.param_type_name == "option" and len(one) == 2
        ]
        message += f"; there are {', '.join(short)}"
    elif message.startswith("No such command") and "Did you mean" not in message:
        near = did_you_mean(message.split("'")[1], list(command.commands), cutoff=0.45)
        message += f" ({near})" if near else ""
    return f"{message[:1].lower()}{message[1:]}; see `{context.command_path} --help`"


def _listed(heading: str, lines: Iterable[str]) -> str:
    return "\n".join(["\b", heading, *(f"  {line}" for line in lines)])  # \b: lines stay lines
