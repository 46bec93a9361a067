"""Arguments and options that several commands share, each with one name, one help and one type."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

# --- what is read -----------------------------------------------------------------------------------------

StoredEmbeddings = Annotated[
    str,
    typer.Argument(metavar="EMB", help="X.parquet, X.npy, a folder of shards, or lance://FOLDER/TABLE."),
]
Root = Annotated[
    Path | None, typer.Option(help="The folder that ids are relative to, if `embed` was given one.")
]
SheetRoot = Annotated[
    Path | None,
    typer.Option(help="For --sheet: the folder that ids are relative to, if `embed` was given one."),
]
CalibrationFile = Annotated[
    Path | None, typer.Option(metavar="C.json", help="What `embedkit calibrate` wrote.")
]
Threshold = Annotated[
    float | None, typer.Option(help="The least cosine of a match; overrides the calibration's.")
]

# --- where entries come from ------------------------------------------------------------------------------

Zoo = Annotated[
    str | None,
    typer.Option(
        "--zoo",
        help="This zoo only: a folder, a .tar, https://host/zoo, s3://bucket/zoo, hf://organization.",
    ),
]
Token = Annotated[
    str | None,
    typer.Option(
        "--token", envvar="EMBEDKIT_TOKEN", help="Credential for the zoo; it is sent to no other origin."
    ),
]
Offline = Annotated[bool, typer.Option("--local-files-only", help="Never open a connection.")]
AcceptLicense = Annotated[
    bool, typer.Option("--accept-license", help="Pull what may not be used commercially, too.")
]

# --- how it runs and what it prints -----------------------------------------------------------------------

Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:<index>.")]
Threads = Annotated[str, typer.Option(help="Cores to keep busy, or auto.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
