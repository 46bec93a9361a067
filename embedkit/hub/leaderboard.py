"""Compare encoders on one data set: training cost and metrics.

Every metric was written into an entry by `embedkit evaluate`; nothing is measured here. Metrics of two protocols or
of two data sets are never in one table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from embedkit.hub.markdown import escape
from embedkit.model.config import BY_CHANCE
from embedkit.model.layout import ENTRY_NAME

__all__ = ["Comparison", "Row", "compare", "with_protocols"]

#: Columns of metrics: name in an entry, heading.
METRICS = {
    "knn_top1": "kNN",
    "probe_top1": "probe",
    "p_at_1": "P@1",
    "map_at_r": "MAP@R",
    "kmeans_acc": "ACC",
    "kmeans_nmi": "NMI",
    "kmeans_ari": "ARI",
    "mixture_nmi": "mixture NMI",
    "auc": "AUC",
    "tar_at_far_1e-3": "TAR@FAR 1e-3",
    "rankme": "RankMe",
}
BASELINES = ("random", "pixels", "pca")
#: What the columns mean beyond the protocol.
COLUMNS = (
    "Pretext task: on up to 2,048 held-out training images, when the run was exported. Minutes: wall-clock time on the "
    "machine that trained, under any other load; compare FLOPs instead."
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One encoder, or one baseline, on one data set.

    Attributes:
        name: The entry's, or the baseline's.
        method: How it was trained; empty for a baseline.
        family: The supervision of the method; empty where the entry does not say.
        images: Images seen in training; None where unknown.
        flops: Training FLOPs; None where unknown.
        minutes: Training time; None where unknown.
        metrics: Name -> value, as in the entry.
        intervals: 95 % intervals of the metrics that are means over test images.
        pretext: Metrics of the pretext task on held-out training images.
    """

    name: str
    method: str = ""
    family: str = ""
    images: int | None = None
    flops: float | None = None
    minutes: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    intervals: Mapping[str, Sequence[float]] = field(default_factory=dict)
    pretext: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The rows of one data set and one protocol.

    Attributes:
        data: The data set, with `by COLUMN` for labels other than `label`.
        protocol: How the metrics were measured, as text.
        rows: Encoders by name, then baselines.
    """

    data: str
    protocol: str
    rows: tuple[Row, ...]

    def markdown(self, *, links: bool = False, intervals: bool = False) -> str:
        """The rows as a Markdown table.

        Args:
            links: Whether an encoder's name links to its card, in the folder of its name.
            intervals: Whether to add the 95 % intervals of the metrics that have them.
        """
        shown = {key: text for key, text in METRICS.items() if any(key in row.metrics for row in self.rows)}
        heads = [
            "encoder",
            "method",
            "supervision",
            "images",
            "FLOPs",
            "minutes",
            *shown.values(),
            "pretext task",
        ]
        lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
        for row in self.rows:
            linked = links and ENTRY_NAME.fullmatch(row.name)
            name = f"[{row.name}]({row.name}/README.md)" if linked else escape(row.name)
            cells = [name, escape(row.method), escape(row.family)]
            cells.append(f"{row.images / 1e6:.2f} M" if row.images is not None else "")
            cells.append(f"{row.flops:.1e}" if row.flops is not None else "")
            cells.append(f"{row.minutes:.0f}" if row.minutes is not None else "")
            for key in shown:
                value = row.metrics.get(key)
                cell = "" if value is None else f"{value:.0f}" if key == "rankme" else f"{value:.3f}"
                if intervals and cell and key in row.intervals:
                    low, high = row.intervals[key]
                    cell += f" [{low:.3f}, {high:.3f}]"
                cells.append(cell)
            cells.append(", ".join(_pretext(row.pretext)))
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)


def _pretext(metrics: Mapping[str, float]) -> Iterator[str]:
    """Each metric of the pretext task in words, with its level by chance where that is known."""
    for key, value in metrics.items():
        if not key.endswith(BY_CHANCE):
            chance = metrics.get(f"{key}{BY_CHANCE}")
            beside = "" if chance is None else f" (chance {chance:.3g})"
            yield f"{escape(key)} {value:.3g}{beside}"


def compare(entries: Mapping[str, Mapping[str, Any]]) -> list[Comparison]:
    """The tables for the metrics of these entries, by data set and protocol.

    Args:
        entries: Name -> facts, as `embedkit.hub.publish.index.build_facts` gives them and an index holds them.
    """
    tables: dict[tuple[str, str], list[Row]] = {}
    baselines: dict[tuple[str, str], dict[str, Row]] = {}
    for name, facts in sorted(entries.items()):
        metrics = facts["metrics"]
        for data, values in metrics.get("results", {}).items():
            key = data, str(metrics.get("protocol", ""))
            tables.setdefault(key, []).append(_row(name, facts, data, values))
            for baseline, measured in metrics.get("baselines", {}).get(data, {}).items():
                title = _title(baseline, facts)
                baselines.setdefault(key, {}).setdefault(title, Row(name=title, metrics=measured))
    return [
        Comparison(
            data=data,
            protocol=protocol,
            rows=(*rows, *(row for _, row in sorted(baselines.get((data, protocol), {}).items()))),
        )
        for (data, protocol), rows in sorted(tables.items())
    ]


def with_protocols(tables: Sequence[Comparison]) -> Iterator[tuple[Comparison, str]]:
    """Each table with the text below it: its protocol; only below the last table where all have the same."""
    several = len({table.protocol for table in tables}) > 1
    for table in tables:
        yield table, f"{table.protocol} {COLUMNS}" if several or table is tables[-1] else ""


def _row(name: str, facts: Mapping[str, Any], data: str, metrics: Mapping[str, float]) -> Row:
    cost: Mapping[str, Any] = facts.get("cost", {})
    return Row(
        name=name,
        method=facts["method"],
        family=facts.get("family", ""),
        images=cost.get("images"),
        flops=cost.get("training_flops"),
        minutes=cost["seconds"] / 60 if "seconds" in cost else None,
        metrics=metrics,
        intervals=facts["metrics"].get("intervals", {}).get(data, {}),
        pretext=facts.get("pretext", {}),
    )


def _title(baseline: str, facts: Mapping[str, Any]) -> str:
    """The name of a baseline, which depends on the network, on its input, or on both."""
    given = facts.get("input", "")
    if baseline == "random":
        return f"{facts['architecture'].removeprefix('embedkit_')} at random, {given}"
    return f"{baseline} ({facts['dim']}), {given}" if baseline == "pca" else f"{baseline}, {given}"
