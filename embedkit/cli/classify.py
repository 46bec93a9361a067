"""`embedkit classify`: the likeliest classes of images, by an entry's classifier."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from embedkit._io.text import safe_for_terminal
from embedkit.cli.options import AsJson, Device, Threads
from embedkit.cli.terminal import tell, tell_left_out


def classify(
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGES...", help="Files, folders, globs, a .tar, or a Parquet file of images."
        ),
    ],
    encoder: Annotated[str, typer.Option(help="An entry with a classifier: a zoo name or its folder.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="OUT.parquet|OUT.csv", help="Write the table into a file."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Classes for each image, the likeliest first.")] = 1,
    device: Device = "auto",
    threads: Threads = "auto",
    as_json: AsJson = False,
) -> None:
    """Print the likeliest classes of images: id, label and probability.

    The entry was exported from a run with labels by `embedkit export --with-head`.
    """
    from embedkit._io.outputs import check_outputs
    from embedkit.cli.progress import Bar
    from embedkit.workflows.classify import check_suffix, classify_images

    if output is not None:
        check_outputs({"--output": output}, {f"image {name}": name for name in images})
        check_suffix(output)
    with Bar("classifying") as bar:
        done = classify_images(images, encoder=encoder, top=top, device=device, threads=threads, progress=bar)
    rows = list(zip(done.ids, done.labels, done.probabilities.tolist(), strict=True))
    if output is not None:
        done.save(output)
    elif as_json:
        print(json.dumps([dict(zip(("id", "label", "probability"), row, strict=True)) for row in rows]))
    else:
        print("id\tlabel\tprobability")
        for name, label, probability in rows:
            print(f"{safe_for_terminal(name)}\t{safe_for_terminal(label)}\t{probability:.4f}")
    tell_left_out(done.failed, "of the sources")
    if output is not None:
        tell(f"{output}: {len(rows)} rows by {done.encoder}")
