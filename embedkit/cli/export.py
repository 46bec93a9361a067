"""`embedkit export`: a training run to a zoo entry."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from embedkit._io.optional import requires
from embedkit._io.text import safe_for_terminal
from embedkit.errors import ConfigError
from embedkit.model.layout import MANIFEST


def export(
    source: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder.")],
    name: Annotated[
        str | None, typer.Option(help="The new entry, <method>-<arch>.<data>, for example simclr-r10.fmnist.")
    ] = None,
    zoo: Annotated[Path, typer.Option(help="The folder that holds the entries.")] = Path("zoo"),
    license: Annotated[
        str | None,
        typer.Option(
            help="SPDX identifier of the new entry's license.",
            show_default="that of the weights it started from, or other",
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="What it was trained on, in words; by default as the run says.")
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            metavar="best|last",
            help="Which weights of a run: those of its best evaluation while training, or the last.",
        ),
    ] = None,
    limit: Annotated[
        list[str] | None,
        typer.Option(metavar="SENTENCE", help="One limit of the encoder, for its card. Repeatable."),
    ] = None,
    with_head: Annotated[
        bool, typer.Option("--with-head", help="Store the classifier too, for `embedkit classify`.")
    ] = False,
) -> None:
    """Write a training run as a zoo entry."""
    if (Path(source) / MANIFEST).is_file():
        raise ConfigError(
            f"{source} is already an entry; write it as one ONNX file with `embedkit export-onnx {source} -o OUT.onnx`"
        )
    if name is None:
        raise ConfigError("--name is missing: <method>-<arch>.<data>, for example simclr-r10.fmnist")
    with requires("export", "train,cpu"):
        from embedkit.training.export.from_run import export_run

        done = export_run(
            source,
            name,
            zoo,
            license=license,
            data=data,
            limits=limit or (),
            checkpoint=checkpoint,
            with_head=with_head,
        )
    print(safe_for_terminal(str(done)))
