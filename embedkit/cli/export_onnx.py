"""`embedkit export-onnx`: an entry as one ordinary ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from embedkit._io.optional import requires
from embedkit._io.outputs import check_outputs
from embedkit._io.text import safe_for_terminal


def export_onnx(
    entry: Annotated[str, typer.Argument(metavar="ENTRY", help="A zoo name or an entry's folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE.onnx", help="The file to write.")],
    float_input: Annotated[
        bool,
        typer.Option(
            "--float-input",
            help="Take normalized float32 pixels, as torchvision and timm give them, instead of uint8.",
        ),
    ] = False,
) -> None:
    """Write an entry as one self-contained float32 ONNX file for other tools.

    The graph takes `pixels`, uint8 (N, C, H, W), and normalizes them itself. With --float-input it takes
    `pixel_values`, float32 (N, C, H, W): scaled to [0, 1], less the mean, divided by the standard deviation. It gives
    `embedding`, not L2-normalized. The file's metadata hold mean, standard deviation, size and resize rule.

    Example: embedkit export-onnx simclr-r50 -o simclr.onnx --float-input
    """
    folder = Path(entry)
    held = sorted(folder.iterdir()) if folder.is_dir() else [folder]
    check_outputs({"-o": output}, {str(path): path for path in held})
    with requires("export-onnx", "onnx"):
        from embedkit.authoring.onnx_export import export_onnx as write
    print(safe_for_terminal(str(write(entry, output, float_input=float_input))))
