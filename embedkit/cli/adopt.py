"""`embedkit adopt`: metadata for embeddings that another program wrote."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from embedkit.cli.options import AsJson, Device, Threads
from embedkit.cli.terminal import tell


def adopt(
    source: Annotated[
        str,
        typer.Argument(
            metavar="FILE", help="A Parquet file, or X.npy beside X.ids.txt (one id a line) or X.ids.jsonl."
        ),
    ],
    encoder: Annotated[
        str, typer.Option(help="The encoder that made the rows: a zoo name or an entry's folder.")
    ],
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="X.parquet, X.npy, a folder ending in /, or lance://FOLDER/TABLE.",
            show_default="FILE.adopted.parquet or .npy",
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="The folder that ids are relative to; ids that lead out of it are not opened.",
            show_default="the working folder",
        ),
    ] = None,
    id: Annotated[str, typer.Option("--id", metavar="COLUMN", help="The column of ids.")] = "id",
    embedding: Annotated[str, typer.Option(metavar="COLUMN", help="The column of vectors.")] = "embedding",
    device: Device = "auto",
    threads: Threads = "auto",
    as_json: AsJson = False,
) -> None:
    """Give metadata to embeddings that pandas, Polars, DuckDB or another tool wrote, so that all commands read them.

    Widths, numbers and lengths are checked. Where images of the rows are at hand, some are embedded again and compared,
    and a wrong encoder is refused. FILE is not changed.
    """
    from embedkit.workflows.adopt import adopt as run

    done = run(
        source,
        encoder,
        output,
        images=images,
        id=id,
        embedding=embedding,
        device=device,
        threads=threads,
    )
    rows = f"{done.rows} row{'s' if done.rows > 1 else ''} of {done.metadata.entry}"
    raw = "" if done.metadata.normalized else ", not normalized"
    if done.compared:
        checked = f"{done.compared} embedded again, least cosine {done.cosine:.4f}"
    else:
        checked = f"not compared with images: {done.unchecked}"
    tell(f"{done.output}: {rows}{raw}; {checked}")
    if as_json:
        print(json.dumps(dataclasses.asdict(done), indent=1))
