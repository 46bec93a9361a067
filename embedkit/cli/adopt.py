"""`embedkit adopt`: metadata for embeddings that another program wrote."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from embedkit.cli.inputs import with_token
from embedkit.cli.options import (
    AsJson,
    Device,
    LocalFilesOnly,
    LookIn,
    OptionalEncoderName,
    Quiet,
    Root,
    Threads,
    Token,
    output,
)
from embedkit.cli.output import print_json, tell


def adopt(
    source: Annotated[
        str,
        typer.Argument(
            metavar="FILE", help="A Parquet file, or X.npy beside X.ids.txt (one id a line) or X.ids.jsonl."
        ),
    ],
    encoder: OptionalEncoderName = None,
    like: Annotated[
        str | None,
        typer.Option(
            metavar="EMB", help="Instead of --encoder: embeddings of the same encoder, such as the original."
        ),
    ] = None,
    output: Annotated[
        str | None,
        output(
            "EMB",
            "X.parquet, X.npy, a folder ending in /, or lance://FOLDER/TABLE. [default: FILE.adopted.parquet or .npy]",
        ),
    ] = None,
    root: Root = None,
    id: Annotated[str, typer.Option("--id", metavar="COLUMN", help="The column of ids.")] = "id",
    embedding: Annotated[str, typer.Option(metavar="COLUMN", help="The column of vectors.")] = "embedding",
    zoo: LookIn = None,
    token: Token = None,
    local_files_only: LocalFilesOnly = False,
    device: Device = "auto",
    threads: Threads = "auto",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Give metadata to embeddings that another tool wrote.

    All commands read what was filtered or written by pandas, Polars, DuckDB or others then. Widths, numbers and lengths
    are checked. Where images of the rows are at hand, some are embedded again and compared, and a wrong encoder is
    refused. Ids that lead out of --root, by default the working folder, are not opened. FILE is not changed.

    Examples:
        embedkit adopt filtered.parquet --encoder supervised-efficientnet_lite0
        embedkit adopt filtered.parquet --like train.parquet -o back.parquet
    """
    if (encoder is None) == (like is None):
        raise typer.BadParameter(
            "give --encoder NAME (`embedkit zoo list` prints the names), or --like EMB, which the same encoder made"
        )
    if like is not None:
        from embedkit.embeddings.formats import open_rows

        made = open_rows(like).metadata
        encoder = f"{made.entry}@{made.manifest_sha256[:12]}"
    assert encoder is not None
    from embedkit.workflows.adopt import adopt as run

    done = run(
        source,
        with_token(encoder, token) or encoder,
        output,
        images=root,
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
        print_json(dataclasses.asdict(done))
