"""`embedkit embed`: folders of images to a file of embeddings."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from embedkit.cli.options import (
    AsJson,
    BatchSize,
    Device,
    Faces,
    LabelFromFolder,
    LocalFilesOnly,
    Lock,
    LookIn,
    MinScore,
    MinSize,
    Null,
    OptionalEncoderName,
    Quiet,
    Revision,
    Root,
    Threads,
    Token,
    choice,
    output,
)
from embedkit.cli.output import print_json, tell, tell_error, warn
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
        str, output("EMB", "X.parquet, X.npy, a folder ending in /, or lance://FOLDER/TABLE.")
    ] = "images.parquet",
    encoder: OptionalEncoderName = None,
    revision: Revision = EmbedOptions.revision,
    zoo: LookIn = None,
    token: Token = None,
    faces: Faces = False,
    min_score: MinScore = None,
    min_size: MinSize = None,
    batch_size: BatchSize = EmbedOptions.batch_size,
    device: Device = EmbedOptions.device,
    providers: Annotated[
        str | None, typer.Option(help="ONNX Runtime providers, separated by commas; overrides --device.")
    ] = None,
    precision: Annotated[
        str, choice("fp32", "tf32", "fp16", help="tf32 needs CUDA, fp16 TensorRT.")
    ] = EmbedOptions.precision,
    threads: Threads = "auto",
    decode: Annotated[
        str | None,
        choice(
            "auto", "exact", help="auto: large JPEGs at a reduced scale; exact: never.", show_default="auto"
        ),
    ] = EmbedOptions.decode,
    max_pixels: Annotated[
        int | None, typer.Option(min=1, help="Refuse images of more pixels.", show_default="179 million")
    ] = EmbedOptions.max_pixels,
    image_column: Annotated[
        str | None, typer.Option(help="The column of Parquet files that holds the images.")
    ] = EmbedOptions.image_column,
    root: Root = None,
    null: Null = False,
    normalize: Annotated[bool, typer.Option(help="Rows of Euclidean length 1.")] = EmbedOptions.normalize,
    dtype: Annotated[
        str | None,
        choice(
            "float32",
            "float16",
            help="float16 stores rows in half the size; they are read as float32.",
            show_default="float32",
        ),
    ] = EmbedOptions.dtype,
    recursive: Annotated[bool, typer.Option(help="Enter folders inside folders.")] = EmbedOptions.recursive,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Leave out images and folders of this name, or with a / this path below the source: 'b/*' leaves out "
            "photos/b of the source photos. Repeatable; added to ._*, @eaDir and #recycle, which --exclude '' turns "
            "off.",
        ),
    ] = None,
    label_from_folder: LabelFromFolder = EmbedOptions.label_from_folder,
    on_error: Annotated[
        str, choice("skip", "stop", help="skip lists bad images beside the output; stop ends.")
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
    local_files_only: LocalFilesOnly = EmbedOptions.local_files_only,
    lock: Lock = EmbedOptions.lock,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start again.")] = EmbedOptions.overwrite,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Embed images into a file of embeddings.

    The file is Parquet, .npy, a folder of shards, or a Lance table. The same command continues a job that was
    killed, and embeds only what is new or changed in a finished output. The encoder is supervised-efficientnet_lite0
    if none is named.

    With --label-from-folder, the label is the first folder below the source. Images that failed are listed in
    X.errors.parquet beside X.parquet, and the exit status is 0, or 3 if more failed than --max-failures allows.

    With --faces, each face has a row: part counts the faces of an image, 0 the largest; left, top, right and bottom
    are its box in pixels; score, roll, sharpness and landmarks describe it. Images without a face have no row. The
    encoder is then face-r29.dlib if none is named.

    Examples:
        embedkit embed photos/ -o photos.parquet
        embedkit embed photos/ --exclude 'cat-*' -o others.parquet
        find photos/ -name '*.jpg' -print0 | embedkit embed - --null -o list.parquet
    """
    from embedkit.cli.inputs import finder_of, sources_of, with_token
    from embedkit.cli.progress import Bar
    from embedkit.pipeline.embed import embed as run

    worker_of = _worker(worker)
    finder = finder_of(faces, min_score, min_size, device=device, threads=threads)
    parts = None
    if finder is not None:
        from embedkit.workflows.faces.encoder import ENCODER
        from embedkit.workflows.faces.parts import FaceParts

        parts, encoder = FaceParts(finder), encoder or ENCODER
    try:
        with Bar("embedding") as bar:
            report = run(
                sources_of(source, null=null),
                output,
                encoder=with_token(encoder, token),
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
                parts=parts,
                progress=bar,
            )
    except TooManyFailuresError as error:
        tell_error(str(error))
        raise typer.Exit(3) from None
    for note in report.notes:
        tell(note)
    if as_json:
        fields = {**dataclasses.asdict(report), "images_per_second": round(report.images_per_second, 1)}
        print_json(fields)
    (warn if report.failed else tell)(str(report))


def _worker(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    part, slash, parts = text.partition("/")
    if not slash or not part.isdigit() or not parts.isdigit() or not 1 <= int(part) <= int(parts):
        raise typer.BadParameter(f"expected I/N with I from 1 to N, found {text!r}", param_hint="--worker")
    return int(part), int(parts)
