"""`embedkit embed`: folders of images to a file of embeddings."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Annotated

import typer

from embedkit._io.text import safe_for_terminal
from embedkit.cli.options import Device, Offline, Threads
from embedkit.cli.terminal import tell
from embedkit.errors import TooManyFailuresError
from embedkit.pipeline.options import EmbedOptions


def embed(
    source: Annotated[
        list[str],
        typer.Argument(
            help="Files, folders, globs, a .tar, a Parquet file with an image column, or - for a list."
        ),
    ],
    output: Annotated[
        str,
        typer.Option(
            "--output", "-o", help="X.parquet, X.npy, a folder ending in /, or lance://FOLDER/TABLE."
        ),
    ] = "images.parquet",
    encoder: Annotated[str | None, typer.Option(help="A zoo name or an entry's folder.")] = None,
    revision: Annotated[
        str | None, typer.Option(help="12 or more hex digits of the manifest's sha256.")
    ] = EmbedOptions.revision,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images in one batch.")
    ] = EmbedOptions.batch_size,
    device: Device = EmbedOptions.device,
    providers: Annotated[
        str | None, typer.Option(help="ONNX Runtime providers, separated by commas; overrides --device.")
    ] = None,
    precision: Annotated[
        str, typer.Option(help="fp32, tf32 (CUDA) or fp16 (TensorRT).")
    ] = EmbedOptions.precision,
    threads: Threads = "auto",
    decode: Annotated[
        str | None,
        typer.Option(help="auto: large JPEGs at a reduced scale; exact: never.", show_default="auto"),
    ] = EmbedOptions.decode,
    max_pixels: Annotated[
        int | None, typer.Option(min=1, help="Refuse images of more pixels.", show_default="179 million")
    ] = EmbedOptions.max_pixels,
    image_column: Annotated[
        str | None, typer.Option(help="The column of Parquet files that holds the images.")
    ] = EmbedOptions.image_column,
    root: Annotated[str | None, typer.Option(help="Ids are paths relative to this folder.")] = None,
    null: Annotated[
        bool, typer.Option("--null", help="The list on stdin is separated by NUL bytes.")
    ] = False,
    normalize: Annotated[bool, typer.Option(help="Rows of Euclidean length 1.")] = EmbedOptions.normalize,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float16 stores rows in half the size; they are read as float32.", show_default="float32"
        ),
    ] = EmbedOptions.dtype,
    recursive: Annotated[bool, typer.Option(help="Enter folders inside folders.")] = EmbedOptions.recursive,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Leave out images and folders of this name, or with a / this path from the source on. Repeatable; "
            "added to ._*, @eaDir and #recycle, which --exclude '' turns off.",
        ),
    ] = None,
    label_from_folder: Annotated[
        bool,
        typer.Option(
            "--label-from-folder",
            help="Store each image's class folder, the first below the source, as label.",
        ),
    ] = EmbedOptions.label_from_folder,
    on_error: Annotated[
        str, typer.Option(help="skip lists bad images beside the output; stop ends.")
    ] = EmbedOptions.on_error,
    max_failures: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            help="Stop with status 3 when more than N images fail, or a share such as 1%; what is done stays.",
        ),
    ] = None,
    prune: Annotated[
        bool,
        typer.Option(
            "--prune", help="Drop rows of the sources that are not listed any more, and rows without a file."
        ),
    ] = EmbedOptions.prune,
    verify_content: Annotated[
        bool, typer.Option("--verify-content", help="Find changed images by their sha256.")
    ] = EmbedOptions.verify_content,
    worker: Annotated[
        str | None, typer.Option(metavar="I/N", help="Embed part I of N (from 1) into a folder.")
    ] = None,
    local_files_only: Offline = EmbedOptions.local_files_only,
    lock: Annotated[
        bool, typer.Option("--lock", help="Pin the encoder in embedkit.lock, in place of an older pin.")
    ] = EmbedOptions.lock,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start again.")] = EmbedOptions.overwrite,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
) -> None:
    """Embed images into a Parquet file, a .npy file or a folder of shards.

    The same command continues a job that was killed, and embeds only what is new or changed in a finished output.

    Exit status: 0 also where images failed, which OUT.errors.parquet lists; 3 where more failed than --max-failures
    allows.
    """
    from embedkit.cli.inputs import sources_of
    from embedkit.cli.progress import Bar
    from embedkit.pipeline.embed import embed as run

    worker_of = _worker(worker)
    try:
        with Bar("embedding") as bar:
            report = run(
                sources_of(source, null=null),
                output,
                encoder=encoder,
                revision=revision,
                batch_size=batch_size,
                device=device,
                providers=[name.strip() for name in providers.split(",")] if providers else None,
                precision=precision,
                threads=threads,
                decode=decode,
                max_pixels=max_pixels,
                image_column=image_column,
                normalize=normalize,
                dtype=dtype,
                root=root,
                recursive=recursive,
                exclude=exclude or None,
                label_from_folder=label_from_folder,
                on_error=on_error,
                max_failures=max_failures,
                prune=prune,
                verify_content=verify_content,
                worker=worker_of,
                overwrite=overwrite,
                local_files_only=local_files_only,
                lock=lock,
                progress=bar,
            )
    except TooManyFailuresError as error:
        tell(str(error))
        raise typer.Exit(3) from None
    for note in report.notes:
        tell(note)
    if as_json:
        fields = {**dataclasses.asdict(report), "images_per_second": round(report.images_per_second, 1)}
        print(json.dumps(fields))
    print(safe_for_terminal(str(report)), file=sys.stderr)


def _worker(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    part, slash, parts = text.partition("/")
    if not slash or not part.isdigit() or not parts.isdigit() or not 1 <= int(part) <= int(parts):
        raise typer.BadParameter(f"expected I/N with I from 1 to N, found {text!r}", param_hint="--worker")
    return int(part), int(parts)
