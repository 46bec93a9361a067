"""`embedkit import`: foreign weights to a zoo entry."""

from __future__ import annotations

import dataclasses
import os
from typing import Annotated

import typer

from embedkit._io.optional import requires
from embedkit.cli.inputs import folder_of
from embedkit.cli.options import Architecture, AsJson, License, NewEntry, Quiet, To, Token, TrainedOn
from embedkit.cli.output import print_json, print_line, tell
from embedkit.errors import ConfigError


def importing(
    source: Annotated[
        str,
        typer.Argument(
            help="A checkpoint file, hf-hub:org/name[@revision], local-dir:PATH, or a timm name with weights."
        ),
    ],
    name: NewEntry,
    layout: Annotated[
        str | None,
        typer.Option(help="The layout of a checkpoint file, such as simsiam. [default: recognized]"),
    ] = None,
    architecture: Architecture = None,
    license: License = None,
    origin: Annotated[
        str | None,
        typer.Option(metavar="WORDS", help="Where the weights come from, a URL or words, for the card."),
    ] = None,
    trained_on: TrainedOn = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Pixels of a side, for a checkpoint file. [default: 224]")
    ] = None,
    to: To = "zoo",
    samples: Annotated[
        str | None,
        typer.Option(help="64 or more images to measure rounding and parity on. [default: synthetic]"),
    ] = None,
    token: Token = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write foreign weights as a zoo entry.

    Every tensor of the encoder must be present and fit; heads are left out. No code of a pickle is run. The entry keeps
    the license of the weights; --license is required if it is unknown. What is not given is taken from the weights:
    the layout, the architecture, the license. --to is a folder.

    Examples:
        embedkit import checkpoint_0099.pth.tar --name simsiam-r50.in1k
        embedkit import hf-hub:timm/vit_small_patch16_224.dino --name dino-vit_s16.in1k
    """
    with requires("import", "train,cpu"):
        from embedkit.authoring.import_request import Request
        from embedkit.training.importers.checkpoints import import_checkpoint
        from embedkit.training.importers.timm_models import import_timm
    folder = folder_of(to)
    request = Request(name=name, zoo=folder, license=license, origin=origin, data=trained_on, samples=samples)
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
            "of your own, say otherwise with --license and --origin"
        )
    if as_json:
        print_json(dataclasses.asdict(done))
    else:
        print_line(done.folder)
