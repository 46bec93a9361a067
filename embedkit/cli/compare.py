"""`embedkit zoo compare`: entries side by side, by their metrics."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from embedkit._io.text import safe_for_terminal
from embedkit.cli.options import AsJson
from embedkit.cli.terminal import tell
from embedkit.errors import ConfigError


def compare(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Names or entries' folders.")],
    intervals: Annotated[bool, typer.Option(help="95 % intervals, a bootstrap over test images.")] = True,
    as_json: AsJson = False,
) -> None:
    """Compare entries on the data sets of their metrics, with the baselines."""
    from embedkit.hub.leaderboard import compare as compare_facts
    from embedkit.hub.leaderboard import with_protocols
    from embedkit.hub.publish.index import build_facts
    from embedkit.hub.resolve import find_entry

    entries = [find_entry(name) for name in names]
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
        print(json.dumps([dataclasses.asdict(table) for table in tables], indent=1))
        return
    for table, protocol in with_protocols(tables):
        print(safe_for_terminal(f"{table.data}\n\n{table.markdown(intervals=intervals)}\n", lines=True))
        if protocol:
            print(safe_for_terminal(f"{protocol}\n", lines=True))
