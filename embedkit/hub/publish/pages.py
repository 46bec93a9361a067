"""The pages of a zoo: a table of its entries, tables of metrics, and a plot for each data set.

They are made in memory from the index, and from any index that parses: one unusual entry must not block the pages of
all others. Text of entries is escaped; a metric or a cost outside the range of a plot is left out of the plot.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

from embedkit.hub.leaderboard import Comparison, compare, with_protocols
from embedkit.hub.markdown import escape
from embedkit.hub.publish.plot import drawable, plot_bytes

TABLE = "README.md"
#: The beginning of each page: a file that begins otherwise was not written by embedkit.
HEAD = "# The zoo\n\nWritten by `embedkit publish` from the entries; do not edit.\n"
_LONGEST_NAME = 80


def pages(index: dict[str, Any]) -> dict[str, bytes]:
    """File name -> content: the page of tables, and a plot for each data set with several encoders."""
    plots: dict[str, bytes] = {}
    sections: list[str] = []
    for table, protocol in with_protocols(compare(index["entries"])):
        sections += [f"## {escape(table.data)}", "", table.markdown(links=True), ""]
        metric = "probe_top1" if any("probe_top1" in row.metrics for row in table.rows) else "map_at_r"
        if sum(drawable(row, metric) for row in table.rows) > 1:
            name = _plot_name(table, plots)
            plots[name] = plot_bytes(table, metric)
            sections += [f"![{metric} over training FLOPs]({name})", ""]
        if protocol:
            sections += [escape(protocol), ""]
    return {TABLE: table_bytes(index) + "\n".join(["", *sections]).encode(), **plots}


def _plot_name(table: Comparison, taken: dict[str, bytes]) -> str:
    """A file name for a data set's plot: short enough for every file system, and unique."""
    words = re.sub("[^a-z0-9]+", "-", table.data.lower())
    name = f"quality-{words}.svg"
    if len(words) > _LONGEST_NAME or not words.strip("-") or name in taken:
        digest = hashlib.sha256(f"{table.data}\0{table.protocol}".encode()).hexdigest()
        name = f"quality-{words[:_LONGEST_NAME].strip('-')}-{digest[:8]}.svg"
    return name


def table_bytes(index: dict[str, Any]) -> bytes:
    """The beginning of the page: the table of entries."""
    lines = [
        HEAD,
        "| entry | method | network | data | dim | size | license |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, facts in sorted(index["entries"].items()):
        cells = [f"[{name}]({name}/README.md)"]
        cells += [escape(facts[key]) for key in ("method", "architecture", "data", "dim")]
        cells += [f"{facts['bytes'] / 1e6:.1f} MB", escape(facts["license"])]
        lines.append(f"| {' | '.join(cells)} |")
    return ("\n".join(lines) + "\n").encode()
