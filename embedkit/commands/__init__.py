"""The command line. Each command parses, calls the library and prints; heavy imports stay inside commands.

Data goes to stdout, progress and notes to stderr. An `EmbedkitError` is printed as one sentence with exit status
1, wrong usage gives 2, and an interrupted job says that its work is kept.
"""

from __future__ import annotations

import sys
import warnings

import typer

from embedkit.commands.embed import embed
from embedkit.commands.zoo import doctor, zoo
from embedkit.errors import EmbedkitError

app = typer.Typer(
    name="embedkit",
    help="Image embeddings from a folder of pictures, without PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(embed)
app.add_typer(zoo, name="zoo")
app.command()(doctor)


def main() -> None:
    """Run the command line and exit."""
    warnings.showwarning = _one_line
    try:
        app()
    except EmbedkitError as error:
        print(f"embedkit: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("embedkit: stopped; what was done is kept, and the same command goes on", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        # The reader of stdout has gone, as in `embedkit zoo list | head -1`.
        sys.stderr.close()
        raise SystemExit(0) from None


def _one_line(message: Warning | str, *_: object, **__: object) -> None:
    print(f"embedkit: warning: {message}", file=sys.stderr)
