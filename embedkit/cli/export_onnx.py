"""`embedkit export-onnx`: an entry as one ordinary ONNX file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from embedkit._io.optional import requires
from embedkit._io.outputs import check_outputs
from embedkit.cli.inputs import with_token
from embedkit.cli.options import AsJson, EntryArgument, LocalFilesOnly, LookIn, Quiet, Token, output
from embedkit.cli.output import print_json, print_line, tell


def export_onnx(
    entry: EntryArgument,
    output: Annotated[Path, output("FILE.onnx", "The ONNX file.")],
    float_input: Annotated[
        bool,
        typer.Option(
            "--float-input",
            help="Take normalized float32 pixels, as torchvision and timm give them, instead of uint8.",
        ),
    ] = False,
    zoo: LookIn = None,
    token: Token = None,
    local_files_only: LocalFilesOnly = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write an entry as one self-contained float32 ONNX file.

    The graph takes `pixels`, uint8 (N, C, H, W), and normalizes them itself. With --float-input it takes
    `pixel_values`, float32 (N, C, H, W): scaled to [0, 1], less the mean, divided by the standard deviation. It gives
    `embedding`, not L2-normalized. The steps from an image to the input are printed, and are in the file's metadata as
    `recipe`: another resize gives other embeddings. `embedkit embed --decode exact` follows the same steps.

    Examples:
        embedkit export-onnx simclr-r10 -o simclr.onnx
        embedkit export-onnx simclr-r10 -o simclr.onnx --float-input
    """
    folder = Path(entry)
    held = sorted(folder.iterdir()) if os.path.isdir(folder) else [folder]
    check_outputs({"--output": output}, {str(path): path for path in held})
    with requires("export-onnx", "onnx"):
        from embedkit.authoring.onnx_export import export_onnx as write
        from embedkit.authoring.onnx_export import recipe
    from embedkit.hub.resolve import find_entry

    found = find_entry(with_token(entry, token) or entry)
    done = write(found, output, float_input=float_input)
    steps = recipe(found.config.preprocess, float_input=float_input).splitlines()
    if as_json:
        print_json({"output": done, "recipe": steps})
        return
    print_line(done)
    tell("preprocess images like this:")
    for step in steps:
        tell(step)
