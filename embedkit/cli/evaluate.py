"""`embedkit evaluate`: the metrics of an entry or a run, by one protocol."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from embedkit._io.optional import requires
from embedkit.cli.completion import entry_names
from embedkit.cli.inputs import with_token
from embedkit.cli.options import AsJson, Data, LocalFilesOnly, LookIn, OptionalLimit, Quiet, Token, label
from embedkit.cli.output import Number, print_json, print_table, tell
from embedkit.errors import ConfigError

if TYPE_CHECKING:
    from embedkit.training.evaluation.protocol import Evaluation


def evaluate(
    source: Annotated[
        str,
        typer.Argument(help="An entry's name or folder, or a run's folder.", autocompletion=entry_names),
    ],
    data: Data,
    label: Annotated[list[str] | None, label("Classes. Repeatable. [default: label]")] = None,
    baselines: Annotated[
        bool,
        typer.Option(
            help="Evaluate the same network at random initialization, raw pixels and their principal components too."
        ),
    ] = True,
    limit: OptionalLimit = None,
    write: Annotated[bool, typer.Option("--write", help="Write the metrics into the entry.")] = False,
    zoo: LookIn = None,
    token: Token = None,
    local_files_only: LocalFilesOnly = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Evaluate an encoder on a data set.

    The metrics are kNN, linear probe, retrieval, clustering, verification and effective rank. The data set has a
    training and a test part; --limit counts the images of each.

    Examples:
        embedkit evaluate simclr-r10 --data sklearn:digits
        embedkit evaluate runs/first --data photos.parquet --label category --limit 1000
    """
    if write and limit:
        raise ConfigError(
            "metrics of a part of the data are not written into an entry: give --write or --limit"
        )
    with requires("evaluation", "train,cpu"):
        from embedkit.training.evaluation import protocol
        from embedkit.training.evaluation.record import check_writable, write_metrics
    if write:
        check_writable(source)  # before the long work

    found = protocol.evaluate(
        with_token(source, token) or source,
        data=data,
        labels=label or ("label",),
        baselines=baselines,
        limit=limit or 0,
        notify=tell,
    )
    if as_json:
        print_json(found.to_json())
    else:
        _print(found)
    if limit:
        tell(
            "a limit leaves fewer images of each class and changes every metric: compare metrics of the same limit only"
        )
    if write:
        manifest = write_metrics(found, source, tell)
        tell(f"the metrics are in {source}, now revision {manifest.sha256[:12]}")


def _print(found: Evaluation) -> None:
    """A row for each label column and metric, a column for each model."""
    models = list(dict.fromkeys(result.model for result in found.results))
    values = {(one.label, one.model): one.metrics for one in found.results}
    rows = [
        (column, metric, *(_cell(values.get((column, model), {}).get(metric)) for model in models))
        for column in found.classes
        for metric in next(one.metrics for one in found.results if one.label == column)
    ]
    none = [None] * (len(models) - 1)
    rows += [(None, f"pretext {name}", _cell(value), *none) for name, value in found.pretext.items()]
    print_table(["label", "metric", *map(Number, models)], rows)
    for column, classes in found.classes.items():
        new = "new " if column in found.open_set else ""
        tell(
            f"{found.source} on {found.data}, {column}: {classes} {new}classes, {found.train} training and "
            f"{found.test} test images"
        )


def _cell(value: float | None) -> str | None:
    return None if value is None else f"{value:.4g}" if value >= 10 else f"{value:.4f}"
