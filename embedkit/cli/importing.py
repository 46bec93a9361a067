"""`embedkit import`: foreign weights to a zoo entry."""

from __future__ import annotations

import dataclasses
import os
from typing import Annotated

import typer

from embedkit._io.optional import requires
from embedkit.cli.inputs import folder_of
from embedkit.cli.options import (
    AcceptLicense,
    Architecture,
    AsJson,
    License,
    OptionalNewEntry,
    Quiet,
    ShowList,
    To,
    Token,
    TrainedOn,
)
from embedkit.cli.output import Id, Number, print_json, print_line, print_table, tell
from embedkit.errors import ConfigError


def _numbers(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r}: expected numbers such as 0.485,0.456,0.406, or one") from None


def importing(
    source: Annotated[
        str | None,
        typer.Argument(
            help="An ONNX file, a checkpoint file, hf-hub:org/name[@revision], local-dir:PATH, or a timm name with "
            "weights."
        ),
    ] = None,
    name: OptionalNewEntry = None,
    list_: ShowList = False,
    layout: Annotated[
        str | None,
        typer.Option(
            help="The layout of a checkpoint file, such as simsiam, or timm for timm's own. [default: recognized]"
        ),
    ] = None,
    architecture: Architecture = None,
    node: Annotated[
        str | None,
        typer.Option(
            metavar="NODE",
            help="The output of an ONNX file that is the embedding, or another value or node. [default: the only one]",
        ),
    ] = None,
    pool: Annotated[
        str | None,
        typer.Option(
            metavar="mean|cls|none",
            help="How the vectors of an image's parts become one; none puts them one after the other (ONNX).",
        ),
    ] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Pixels of a side.")] = None,
    mean: Annotated[
        str | None, typer.Option(metavar="NUMBERS", help="Per channel, or one for all, in units of [0, 1].")
    ] = None,
    std: Annotated[str | None, typer.Option(metavar="NUMBERS", help="The same.")] = None,
    resize: Annotated[
        str | None,
        typer.Option(
            metavar="RULE", help="shortest, longest or squash, or with the pixels, such as shortest:256."
        ),
    ] = None,
    crop: Annotated[str | None, typer.Option(metavar="center|none", help="What is cut off.")] = None,
    interpolation: Annotated[str | None, typer.Option(help="bilinear, bicubic, and so on.")] = None,
    color: Annotated[
        str | None, typer.Option(metavar="rgb|gray|lab_l", help="What the channels are.")
    ] = None,
    license: License = None,
    accept_license: AcceptLicense = False,
    origin: Annotated[
        str | None,
        typer.Option(metavar="WORDS", help="Where the weights come from, a URL or words, for the card."),
    ] = None,
    trained_on: TrainedOn = None,
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

    Every tensor of the encoder must be present and fit; heads are left out. No code of a pickle is run, and an ONNX
    file needs no torch. What is not given is taken from the weights: layout, architecture, preprocessing, license. The
    license of weights of your own is --license. --list shows encoders that are worth importing. --to is a folder.

    Examples:
        embedkit import --list
        embedkit import encoder.onnx --name own-net.photos --license MIT --mean 0 --std 1
        embedkit import hf-hub:timm/vit_small_patch16_224.dino --name dino-vit_s16.in1k
    """
    if list_:
        _print_list(as_json)
        return
    if source is None or name is None:
        missing = "'SOURCE'" if source is None else "'--name'"
        raise typer.BadParameter(f"{missing} is needed; --list shows encoders that are worth importing")
    from embedkit.authoring.contract import Contract
    from embedkit.authoring.import_request import Request, is_onnx

    contract = Contract(
        image_size=image_size,
        mean=_numbers(mean),
        std=_numbers(std),
        resize=resize,
        crop=crop,
        interpolation=interpolation,
        color=color,
    )
    request = Request(
        name=name,
        zoo=folder_of(to),
        license=license,
        origin=origin,
        data=trained_on,
        samples=samples,
        contract=contract,
        pool=pool,
        accept_license=accept_license,
    )
    is_file = os.path.isfile(source)
    if is_file and is_onnx(source):
        _refuse("a checkpoint file", layout=layout)
        with requires("import of an ONNX file", "onnx,cpu"):
            from embedkit.authoring.onnx_import import import_onnx
        done = import_onnx(source, request, architecture=architecture, output=node)
    else:
        _refuse("an ONNX file", node=node)
        with requires("import", "train,cpu"):
            from embedkit.training.importers.checkpoints import import_checkpoint
            from embedkit.training.importers.timm_models import import_timm
        if is_file:
            done = import_checkpoint(source, request, layout=layout, architecture=architecture)
        else:
            _refuse("a checkpoint file", layout=layout, architecture=architecture)
            done = import_timm(source, request, token=token)
    tell(f"{done.recognized}, license {done.license}")
    for note in done.notes:
        tell(note)
    if done.presumed:
        tell(
            f"{done.license} is the license of the published weights of this layout; for weights "
            "of your own, say otherwise with --license and --origin"
        )
    if as_json:
        print_json(dataclasses.asdict(done))
    else:
        print_line(done.folder)


def _refuse(what: str, **options: str | None) -> None:
    """Refuse options that do not belong to this kind of source."""
    for name, value in options.items():
        if value is not None:
            raise ConfigError(f"--{name} is for {what}: leave it out here")


def _print_list(as_json: bool) -> None:
    from embedkit.authoring.recommended import RECOMMENDED

    if as_json:
        print_json([dataclasses.asdict(one) for one in RECOMMENDED])
        return
    print_table(
        [
            *("name", "license", Number("M parameters", ".1f"), Number("dim"), "pixels", "pooling"),
            *(Id("good at"), Id("source")),
        ],
        (
            (
                *(one.name, one.license, one.parameters, one.dim),
                str(one.pixels) if one.pixels == one.native else f"{one.pixels} of {one.native}",
                *(one.pooling, one.good_at, one.source),
            )
            for one in RECOMMENDED
        ),
    )
    tell(
        "where pixels are `224 of 518`, give --image-size 224; a license that is not open asks --accept-license"
    )
