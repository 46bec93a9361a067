"""The command line. Each command parses, calls the library and prints; heavy imports stay inside commands.

Data goes to stdout, progress and notes to stderr. An error is printed as one sentence: an `EmbedkitError` with exit
status 1, wrong usage and a bad value of an option with 2. An interrupted job reports that its work is saved.
"""

from __future__ import annotations

import sys
import warnings
from typing import Annotated

import typer

from embedkit import __version__
from embedkit.cli.adopt import adopt
from embedkit.cli.app import App, examples, status_of, statuses, usage_error
from embedkit.cli.atlas import atlas
from embedkit.cli.calibrate import calibrate
from embedkit.cli.classify import classify
from embedkit.cli.cluster import cluster
from embedkit.cli.compare import compare
from embedkit.cli.doctor import doctor
from embedkit.cli.duplicates import duplicates, leaks
from embedkit.cli.embed import embed
from embedkit.cli.evaluate import evaluate
from embedkit.cli.export import export
from embedkit.cli.export_onnx import export_onnx
from embedkit.cli.identify import identify
from embedkit.cli.importing import importing
from embedkit.cli.lint import lint
from embedkit.cli.output import show_warnings, tell_error, warn
from embedkit.cli.publish import publish
from embedkit.cli.search import search
from embedkit.cli.terminal import StreamError, drop_output, prepare_streams
from embedkit.cli.train import train
from embedkit.cli.verify import verify
from embedkit.cli.zoo import zoo
from embedkit.errors import EmbedkitError

app = App(name="embedkit", pretty_exceptions_enable=False)
app.command()(embed)
app.command()(adopt)
app.command()(search)
app.command()(cluster)
app.command()(duplicates)
app.command()(leaks)
app.command()(calibrate)
app.command()(verify)
app.command()(identify)
app.command()(classify)
app.command()(lint)
app.command()(atlas)
zoo.command()(compare)
app.add_typer(zoo, name="zoo")
app.command()(train)
app.command()(evaluate)
app.command()(export)
app.command("export-onnx")(export_onnx)
app.command("import")(importing)
app.command()(publish)
app.command()(doctor)


def _version(asked: bool) -> None:
    if asked:
        print(f"embedkit {__version__}")
        raise typer.Exit


@app.callback(
    epilog="\n\n".join(
        [
            examples(
                "embedkit embed photos/ -o photos.parquet",
                "embedkit search cat.jpg photos.parquet",
                "embedkit duplicates photos.parquet --threshold 0.95",
            ),
            statuses(),
        ]
    )
)
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Image embeddings from a folder of images, without PyTorch."""


def main() -> None:
    """Run the command line and exit."""
    warnings.showwarning = _one_line
    prepare_streams()
    show_warnings()
    try:
        try:
            status = _run()
        finally:
            sys.stdout.flush()
    except EmbedkitError as error:
        tell_error(str(error))
        raise SystemExit(status_of(error)) from None
    except StreamError as error:
        drop_output()
        tell_error(str(error))
        raise SystemExit(1) from None
    if status == 130:  # Typer's own answer to an interrupt
        tell_error(
            "interrupted; finished work is saved, and the same command continues it (a training run: embedkit train "
            "--resume RUN)"
        )
    raise SystemExit(status)


def _run() -> int:
    """Run the command, and return its exit status."""
    try:
        return app(standalone_mode=False, prog_name="embedkit") or 0
    except Exception as error:
        # Typer uses its own Click or the installed one, so its errors are recognized by their attributes.
        if not (hasattr(error, "show") and hasattr(error, "exit_code")):
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()  # the whole help
        else:
            tell_error(usage_error(error))
        return int(error.exit_code)


def _one_line(message: Warning | str, *_: object, **__: object) -> None:
    warn(str(message))
