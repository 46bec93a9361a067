"""`embedkit zoo list|info|verify` and `embedkit doctor`."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Annotated

import typer

from embedkit.commands.terminal import printable

zoo = typer.Typer(
    name="zoo", help="The encoders that names reach.", no_args_is_help=True, rich_markup_mode=None
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@zoo.command("list")
def list_(
    pattern: Annotated[str, typer.Argument(help="Shell wildcards, as '*-r10'.")] = "*",
    as_json: AsJson = False,
) -> None:
    """List encoders: name, width, method, training data, licence and where each would come from."""
    from embedkit.load import list_encoders

    rows = list_encoders(pattern)
    if as_json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
        return
    if not rows:
        print(f"embedkit: no encoder matches {pattern!r}", file=sys.stderr)
    for row in rows:
        where = row.place or "not in the places that are named"
        fields = (row.alias or row.name, row.name, str(row.dim), row.method, row.data, row.licence, where)
        print("\t".join(map(printable, fields)))


@zoo.command()
def info(
    name: Annotated[str, typer.Argument(help="A name, name@revision, or an entry's folder.")],
    as_json: AsJson = False,
) -> None:
    """Print an entry's model card, or with --json its configuration, revision and files."""
    from embedkit.load import find_entry

    entry = find_entry(name)
    if not as_json:
        print(printable(entry.card, lines=True))
        return
    files = {name: dataclasses.asdict(record) for name, record in entry.manifest.files.items()}
    facts = {"name": entry.name, "revision": entry.revision, "location": entry.location, "files": files}
    print(json.dumps({**facts, "config": entry.config.to_json()}, indent=1))


@zoo.command()
def verify(
    name: Annotated[str | None, typer.Argument(help="One entry; all that are at hand when left out.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:<index>.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Check every file of an entry against its manifest, and its golden vectors on this machine."""
    from embedkit.load import list_encoders
    from embedkit.verify import verify_entry

    names = [name] if name is not None else [row.name for row in list_encoders() if row.place]
    results = [verify_entry(one, device=device) for one in names]
    if as_json:
        print(json.dumps([dataclasses.asdict(result) for result in results], indent=1))
    else:
        for result in results:
            size = f"{result.files} files, {result.bytes / 1e6:.1f} MB"
            fields = ("ok" if result.ok else "FAILED", result.name, size, result.detail)
            print("\t".join(map(printable, fields)))
    if not all(result.ok for result in results):
        raise typer.Exit(1)


def doctor(as_json: AsJson = False) -> None:
    """Say what is installed, which providers there are, what would run, and what to mend."""
    from embedkit.doctor import examine

    report = examine()
    if as_json:
        print(json.dumps(dataclasses.asdict(report), indent=1))
    else:
        for key, value in report.facts.items():
            print(f"{key}: {printable(value)}")
        for problem in report.problems:
            print(f"problem: {printable(problem)}")
        if not report.problems:
            print("no problems found")
    if report.problems:
        raise typer.Exit(1)
