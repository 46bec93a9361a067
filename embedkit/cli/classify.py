"""`embedkit classify`: the likeliest classes of images, by an entry's classifier."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from embedkit.cli.inputs import with_token
from embedkit.cli.options import (
    AsJson,
    Device,
    EncoderName,
    LocalFilesOnly,
    LookIn,
    Quiet,
    Threads,
    Token,
    output,
)
from embedkit.cli.output import Id, Number, print_json, print_table, tell, tell_left_out


def classify(
    images: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE", help="Files, folders, globs, a .tar, or a Parquet file of images."),
    ],
    encoder: EncoderName,
    output: Annotated[
        Path | None, output("OUT.parquet|OUT.csv", "The table, which is not printed then.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Classes for each image, the likeliest first.")] = 1,
    zoo: LookIn = None,
    token: Token = None,
    local_files_only: LocalFilesOnly = False,
    device: Device = "auto",
    threads: Threads = "auto",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Print the likeliest classes of images.

    The encoder's entry has a classifier: it was exported from a run with labels by `embedkit export --with-head`.

    Examples:
        embedkit classify photos/ --encoder zoo/supervised-r10.photos --top 3
        embedkit classify photos/ --encoder zoo/supervised-r10.photos -o classes.csv
    """
    from embedkit._io.outputs import check_outputs
    from embedkit.cli.progress import Bar
    from embedkit.workflows.classify import check_suffix, classify_images

    if output is not None:
        check_outputs({"--output": output}, {f"image {name}": name for name in images})
        check_suffix(output)
    with Bar("classifying") as bar:
        done = classify_images(
            images,
            encoder=with_token(encoder, token) or encoder,
            top=top,
            device=device,
            threads=threads,
            progress=bar,
        )
    rows = list(zip(done.ids, done.labels, done.probabilities.tolist(), strict=True))
    if output is not None:
        done.save(output)
    elif as_json:
        print_json([dict(zip(("id", "label", "probability"), row, strict=True)) for row in rows])
    else:
        print_table([Id("id"), "label", Number("probability", ".4f")], rows)
    tell_left_out(done.failed, "of the sources")
    if output is not None:
        tell(f"{output}: {len(rows)} rows by {done.encoder}")
