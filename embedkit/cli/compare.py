"""`embedkit zoo compare`: entries side by side, by their metrics."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

from embedkit.cli.completion import entry_names
from embedkit.cli.inputs import with_token
from embedkit.cli.options import AsJson, LocalFilesOnly, LookIn, Quiet, Token
from embedkit.cli.output import Id, Number, print_json, print_table, tell
from embedkit.errors import ConfigError

if TYPE_CHECKING:
    from embedkit.hub.leaderboard import Row


def compare(
    names: Annotated[
        list[str],
        typer.Argument(metavar="NAME", help="Names or entries' folders.", autocompletion=entry_names),
    ],
    intervals: Annotated[bool, typer.Option(help="95 % intervals, a bootstrap over test images.")] = True,
    zoo: LookIn = None,
    token: Token = None,
    local_files_only: LocalFilesOnly = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compare entries by their metrics.

    There is a row for each entry and each data set that it was evaluated on, and for the baselines.

    Examples:
        embedkit zoo compare simclr-r10 supervised-r10
        embedkit zoo compare simclr-r10 vae-r10 --no-intervals --json
    """
    from embedkit.hub.leaderboard import METRICS, with_protocols
    from embedkit.hub.leaderboard import compare as compare_facts
    from embedkit.hub.publish.index import build_facts
    from embedkit.hub.resolve import find_entry

    entries = [find_entry(with_token(name, token)) for name in names]
    facts = {entry.name: build_facts(entry) for entry in entries}
    for entry in entries:
        if facts[entry.name]["manifest_sha256"] != entry.revision:
            raise ConfigError(
                f"two entries are named {entry.name}, and a table can show only one: rename a folder"
            )
    without_metrics = [name for name, one in facts.items() if not one["metrics"].get("results")]
    if len(without_metrics) == len(facts):
        raise ConfigError(
            f"{', '.join(without_metrics)}: no metrics to compare; measure some with "
            "`embedkit evaluate FOLDER --data ... --write`"
        )
    for name in without_metrics:
        tell(f"{name} has no metrics yet")
    tables = compare_facts(facts)
    if as_json:
        print_json([dataclasses.asdict(table) for table in tables])
        return
    shown = {
        key: heading
        for key, heading in METRICS.items()
        if any(key in row.metrics for table in tables for row in table.rows)
    }
    costs = [Number("images"), Number("FLOPs", ".1e"), Number("minutes", ".0f")]
    print_table(
        [
            Id("data"),
            Id("encoder"),
            "method",
            "supervision",
            *costs,
            *map(Number, shown.values()),
            "pretext task",
        ],
        (
            (
                *(table.data, row.name, row.method or None, row.family or None),
                *(row.images, row.flops, row.minutes),
                *(_cell(row, key, intervals) for key in shown),
                ", ".join(f"{key} {value:.3g}" for key, value in row.pretext.items()) or None,
            )
            for table in tables
            for row in table.rows
        ),
    )
    for _, protocol in with_protocols(tables):
        if protocol:
            tell(protocol)


def _cell(row: Row, key: str, intervals: bool) -> str | None:
    value = row.metrics.get(key)
    if value is None:
        return None
    if intervals and key in row.intervals:
        low, high = row.intervals[key]
        return f"{value:.3f} [{low:.3f}, {high:.3f}]"
    return f"{value:.0f}" if key == "rankme" else f"{value:.3f}"
