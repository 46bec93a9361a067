"""`embedkit export`: a training run to a zoo entry."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from embedkit._io.optional import requires
from embedkit.cli.inputs import folder_of
from embedkit.cli.options import AsJson, License, NewEntry, Quiet, To, TrainedOn, choice
from embedkit.cli.output import print_json, print_line
from embedkit.errors import ConfigError
from embedkit.model.layout import MANIFEST


def export(
    source: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder.")],
    name: NewEntry,
    to: To = "zoo",
    license: License = None,
    trained_on: TrainedOn = None,
    checkpoint: Annotated[
        str | None,
        choice(
            "best",
            "last",
            help="Which weights of a run: those of its best evaluation while training, or the last.",
        ),
    ] = None,
    limitation: Annotated[
        list[str] | None,
        typer.Option(metavar="SENTENCE", help="What the encoder is not fit for, for its card. Repeatable."),
    ] = None,
    with_head: Annotated[
        bool, typer.Option("--with-head", help="Store the classifier too, for `embedkit classify`.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a training run as a zoo entry.

    What it was trained on is as the run says, unless --trained-on is given. The license is that of the weights that the
    run started from, or other. --to is a folder.

    Examples:
        embedkit export runs/first --name simclr-r10.photos
        embedkit export runs/first --name simclr-r10.photos --license CC0-1.0
    """
    if os.path.isfile(Path(source) / MANIFEST):
        raise ConfigError(
            f"{source} is already an entry; write it as one ONNX file with `embedkit export-onnx {source} -o OUT.onnx`"
        )
    with requires("export", "train,cpu"):
        from embedkit.training.export.from_run import export_run

        done = export_run(
            source,
            name,
            folder_of(to),
            license=license,
            data=trained_on,
            limits=limitation or (),
            checkpoint=checkpoint,
            with_head=with_head,
        )
    if as_json:
        print_json({"output": done})
    else:
        print_line(done)
