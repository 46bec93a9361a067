"""`embedkit doctor`: what is installed, and what to fix."""

from __future__ import annotations

import dataclasses

import typer

from embedkit.cli.options import AsJson, Quiet
from embedkit.cli.output import print_json, print_table, tell


def doctor(as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Say what is installed, what would run, and what to fix.

    The exit status is 1 if there is a problem.

    Examples:
        embedkit doctor
        embedkit doctor --json
    """
    from embedkit.workflows.doctor import examine

    report = examine()
    if as_json:
        print_json(dataclasses.asdict(report))
    else:
        print_table(
            ["fact", "value"], [*report.facts.items(), *(("problem", one) for one in report.problems)]
        )
    if not report.problems:
        tell("no problems found")
    else:
        raise typer.Exit(1)
