"""`embedkit import`: foreign weights to a zoo entry."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from embedkit._io.optional import requires
from embedkit.cli.terminal import tell
from embedkit.errors import ConfigError


def importing(
    source: Annotated[
        str,
        typer.Argument(
            help="A checkpoint file, hf-hub:org/name[@revision], local-dir:PATH, or a timm name with weights."
        ),
    ],
    name: Annotated[
        str, typer.Option(help="The new entry, <method>-<arch>.<data>, for example simsiam-r50.in1k.")
    ],
    layout: Annotated[
        str | None,
        typer.Option(help="The layout of a checkpoint file, such as simsiam. [default: recognized]"),
    ] = None,
    architecture: Annotated[
        str | None,
        typer.Option(help="timm's name of a checkpoint's network. [default: by its shapes]"),
    ] = None,
    license: Annotated[
        str | None,
        typer.Option(help="SPDX identifier of the weights' license. [default: the known one]"),
    ] = None,
    origin: Annotated[
        str | None,
        typer.Option("--source", help="Where the weights come from, an address or words; kept with them."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="What they were trained on, in words. [default: the name's last part]")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Pixels of a side, for a checkpoint file. [default: 224]")
    ] = None,
    zoo: Annotated[Path, typer.Option(help="The folder that holds the entries.")] = Path("zoo"),
    samples: Annotated[
        str | None,
        typer.Option(help="64 or more images to measure rounding and parity on. [default: synthetic]"),
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(envvar="EMBEDKIT_TOKEN", help="Credential for the Hub; it is sent nowhere else."),
    ] = None,
) -> None:
    """Write foreign weights as a zoo entry.

    Every tensor of the encoder must be present and fit; heads are left out. No code of a pickle is run. The entry keeps
    the license of the weights; --license is required if it is unknown.
    """
    with requires("import", "train,cpu"):
        from embedkit.training.importers.checkpoints import import_checkpoint
        from embedkit.training.importers.request import Request
        from embedkit.training.importers.timm_models import import_timm
    request = Request(name=name, zoo=zoo, license=license, origin=origin, data=data, samples=samples)
    if os.path.isfile(source):
        done = import_checkpoint(
            source, request, layout=layout, architecture=architecture, image_size=image_size
        )
    elif layout or architecture or image_size:
        raise ConfigError(
            "--layout, --architecture and --image-size are for a checkpoint file, not for timm's"
        )
    else:
        done = import_timm(source, request, token=token)
    tell(f"{done.recognized}, license {done.license}")
    if done.presumed:
        tell(
            f"{done.license} is the license of the published weights of this layout; for weights "
            "of your own, say otherwise with --license and --source"
        )
    print(done.folder)
