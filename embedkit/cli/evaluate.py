"""`embedkit evaluate`: the metrics of an entry or a run, by one protocol."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from embedkit._io.optional import requires
from embedkit.cli.options import AsJson
from embedkit.cli.terminal import tell
from embedkit.errors import ConfigError


def evaluate(
    source: Annotated[str, typer.Argument(help="An entry's name or folder, or a run's folder.")],
    data: Annotated[
        str,
        typer.Option(
            help="A data set with a training and a test part: IDX files, Parquet files, class folders, or "
            "sklearn:digits."
        ),
    ],
    label: Annotated[
        list[str] | None, typer.Option(help="A label column; may be given several times. [default: label]")
    ] = None,
    baselines: Annotated[
        bool,
        typer.Option(
            help="Evaluate the same network at random initialization, raw pixels and their principal components too."
        ),
    ] = True,
    limit: Annotated[int, typer.Option(min=0, help="Images of each part; 0 for all.")] = 0,
    write: Annotated[bool, typer.Option("--write", help="Write the metrics into the entry.")] = False,
    as_json: AsJson = False,
) -> None:
    """Evaluate an encoder: kNN, linear probe, retrieval, clustering, verification and effective rank."""
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
        source,
        data=data,
        labels=label or ("label",),
        baselines=baselines,
        limit=limit,
        notify=tell,
    )
    print(json.dumps(found.to_json(), indent=1) if as_json else found.table())
    if limit:
        tell(
            "a limit leaves fewer images of each class and changes every metric: compare metrics of the same limit only"
        )
    if write:
        manifest = write_metrics(found, source, tell)
        tell(f"the metrics are in {source}, now revision {manifest.sha256[:12]}")
