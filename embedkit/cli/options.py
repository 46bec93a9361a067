"""Arguments and options that several commands share: each is defined here, once, with one name and one meaning.

A command takes what it needs as annotations; every command takes `--json` and `--quiet`:

    def lint(embeddings: StoredEmbeddings, seed: Seed = 0, as_json: AsJson = False, quiet: Quiet = False) -> None:

`OptionalX` is the same option as `X` where it may be left out, and None then. `-o` and `--label` say in each command
what they name, so they are functions: `Annotated[Path, output("C.json", "The calibration.")]`.

Rules, which a test holds all commands to: an option that several commands take is defined here. What an option writes
is `-o/--output`, or its name begins with a verb (`--write-pairs`, `--draw-sheet`, `--copy-into`); any other option that
takes a file reads it. `--zoo` is the zoo that is read, `--to` the one that is written.

`--quiet`, `--local-files-only` and the `--zoo` of commands that load an encoder (`LookIn`) take effect by themselves.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from embedkit.cli.completion import entry_names
from embedkit.cli.output import set_quiet


def output(metavar: str, help: str) -> Any:
    """`-o/--output`: the file or the folder that is the command's result."""
    return typer.Option("--output", "-o", metavar=metavar, help=help)


def label(help: str) -> Any:
    """`--label`: a label column of the embeddings or of the data set."""
    return typer.Option("--label", metavar="COLUMN", help=help)


def choice(*values: str, help: str, name: str | None = None, **settings: Any) -> Any:
    """An option of a few values, which the help lists and a shell completes; the library refuses others."""
    return typer.Option(
        *([name] if name else []),
        metavar="|".join(values),
        help=help,
        autocompletion=lambda incomplete: [one for one in values if one.startswith(incomplete)],
        **settings,
    )


def _silence(context: typer.Context, value: bool) -> bool:
    set_quiet(value)
    if value:  # those of the library, and of the Hub's own client
        context.with_resource(_environment("HF_HUB_DISABLE_PROGRESS_BARS", "1"))
    return value


def _go_offline(context: typer.Context, value: bool) -> bool:
    if value:
        context.with_resource(_environment("HF_HUB_OFFLINE", "1"))
    return value


def _look_in(context: typer.Context, value: str | None) -> str | None:
    if value is not None:
        if "," in value:
            raise typer.BadParameter("one zoo, whose address has no comma; EMBEDKIT_ZOO takes several")
        context.with_resource(_environment("EMBEDKIT_ZOO", value))
    return value


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """One variable for as long as the command runs: processes that it starts have it too."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


# --- what is read -----------------------------------------------------------------------------------------

StoredEmbeddings = Annotated[
    str,
    typer.Argument(metavar="EMB", help="X.parquet, X.npy, a folder of shards, or lance://FOLDER/TABLE."),
]
Root = Annotated[Path | None, typer.Option("--root", help="The folder that ids are relative to.")]
Null = Annotated[
    bool,
    typer.Option("--null", help="Paths in lists end in NUL, not in a line break, so that none is misread."),
]
CalibrationFile = Annotated[
    Path | None, typer.Option("--calibration", metavar="C.json", help="What `embedkit calibrate` wrote.")
]
LabeledPairs = Annotated[
    Path | None,
    typer.Option("--pairs", metavar="PAIRS.csv", help="Labeled pairs: columns a, b (ids) and same (1 or 0)."),
]
LabelFromFolder = Annotated[
    bool, typer.Option("--label-from-folder", help="The folder of an image is its label.")
]
_data = typer.Option(
    "--data", help="A data set: IDX files, Parquet, CSV, class folders, sklearn:digits or synthetic:N."
)
OptionalData = Annotated[str | None, _data]
Data = Annotated[str, _data]

# --- what is computed -------------------------------------------------------------------------------------

_threshold = typer.Option("--threshold", help="The least cosine of two images that match.")
OptionalThreshold = Annotated[float | None, _threshold]
Threshold = Annotated[float, _threshold]
_neighbors = typer.Option("--neighbors", "-k", min=1, help="How many of the nearest rows.", show_default="10")
Neighbors = Annotated[int, _neighbors]
OptionalNeighbors = Annotated[int | None, _neighbors]
_limit = typer.Option("--limit", min=1, help="Use at most this many images.")
Limit = Annotated[int, _limit]
OptionalLimit = Annotated[int | None, _limit]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of everything that is drawn.")]
Faces = Annotated[bool, typer.Option("--faces", help="Find the faces in the images, and use these instead.")]
MinScore = Annotated[
    float | None,
    typer.Option(
        "--min-score", min=0.0, max=1.0, help="The least score of a face; with --faces.", show_default="0.5"
    ),
]
MinSize = Annotated[
    float | None,
    typer.Option("--min-size", min=0.0, help="The least side of a face in pixels; with --faces."),
]
FailOver = Annotated[
    float | None,
    typer.Option(
        "--fail-over", min=0.0, max=1.0, help="Exit with status 3 when more than this share is found."
    ),
]
ExitStatus = Annotated[
    bool, typer.Option("--exit-status", help="Exit with status 3 when an image has no match.")
]
Sheet = Annotated[
    Path | None,
    typer.Option("--draw-sheet", metavar="OUT.html|OUT.png", help="Draw a contact sheet of what is found."),
]

# --- entries, and where they come from ----------------------------------------------------------------------

EntryArgument = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="A name, name@revision, a URL, or an entry's folder.",
        autocompletion=entry_names,
    ),
]
EntriesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="NAME",
        help="Names, URLs, or entries' folders; all of --zoo when left out.",
        autocompletion=entry_names,
    ),
]
_encoder = typer.Option(
    "--encoder",
    metavar="NAME|DIR",
    help="A zoo name, a URL, or an entry's folder.",
    autocompletion=entry_names,
)
EncoderName = Annotated[str, _encoder]
OptionalEncoderName = Annotated[str | None, _encoder]
Revision = Annotated[
    str | None, typer.Option("--revision", help="12 or more hex digits of the manifest's sha256.")
]
_ZOO = "The zoo that names are looked up in: a folder, a .tar, https://host/zoo, s3://bucket/zoo, hf://organization."
_zoo = typer.Option("--zoo", metavar="ZOO", help=_ZOO)
Zoo = Annotated[str, _zoo]
OptionalZoo = Annotated[str | None, _zoo]
LookIn = Annotated[str | None, typer.Option("--zoo", metavar="ZOO", callback=_look_in, help=_ZOO)]
To = Annotated[
    str,
    typer.Option(
        "--to",
        metavar="ZOO",
        help="The zoo that is written to: a folder, s3://bucket/zoo, hf://organization.",
    ),
]
ToFolder = Annotated[Path, typer.Option("--to", metavar="ZOO", help="The zoo that is written to: a folder.")]
Token = Annotated[
    str | None,
    typer.Option(
        "--token", envvar="EMBEDKIT_TOKEN", help="Credential for the zoo; it is sent to no other origin."
    ),
]
LocalFilesOnly = Annotated[
    bool, typer.Option("--local-files-only", callback=_go_offline, help="Never open a connection.")
]
Lock = Annotated[
    bool, typer.Option("--lock", help="Pin the entry in embedkit.lock, in place of an older pin.")
]
AcceptLicense = Annotated[
    bool, typer.Option("--accept-license", help="Take what is not under an open license, too.")
]
Private = Annotated[
    bool, typer.Option("--private", help="Make the Hub's repository a private one, when it is made.")
]

# --- facts of an entry, which is written or looked for --------------------------------------------------------

_new_entry = typer.Option("--name", help="The new entry, <method>-<arch>.<data>, such as simclr-r10.fmnist.")
NewEntry = Annotated[str, _new_entry]
OptionalNewEntry = Annotated[str | None, _new_entry]
License = Annotated[
    str | None, typer.Option("--license", help="The license of the weights, an SPDX identifier.")
]
Architecture = Annotated[str | None, typer.Option("--architecture", help="The network, by timm's name.")]
TrainedOn = Annotated[
    str | None, typer.Option("--trained-on", metavar="WORDS", help="The images of training, in words.")
]

# --- how it runs and what it prints -----------------------------------------------------------------------

Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:<index>.")]
Threads = Annotated[str, typer.Option("--threads", help="Cores to keep busy, or auto.")]
BatchSize = Annotated[int | None, typer.Option("--batch-size", min=1, help="Images in one batch.")]
ShowList = Annotated[bool, typer.Option("--list", help="Print what there is to choose from, and do no more.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", callback=_silence, help="No notes and no progress; errors stay.")
]
