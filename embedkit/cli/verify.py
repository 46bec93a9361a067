"""`embedkit verify`: whether two images, or the faces in them, show one identity."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from embedkit.cli.options import CalibrationFile, Device, Threads, Threshold
from embedkit.cli.terminal import tell

Part = Annotated[
    int | None, typer.Option(min=0, help="Which face of the image, 0 the largest; only with --faces.")
]


def verify(
    a: Annotated[str, typer.Argument(metavar="A", help="An image.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another image.")],
    encoder: Annotated[
        str | None,
        typer.Option(
            help="A zoo name or an entry's folder.",
            show_default="the one that was calibrated; face-r29.dlib with --faces",
        ),
    ] = None,
    calibration: CalibrationFile = None,
    threshold: Threshold = None,
    faces: Annotated[
        bool, typer.Option("--faces", help="Find the face in each photograph, and compare these.")
    ] = False,
    part_a: Part = None,
    part_b: Part = None,
    draw: Annotated[
        Path | None,
        typer.Option(metavar="OUT.png", help="Draw the faces that were found; needs --faces."),
    ] = None,
    device: Device = "auto",
    threads: Threads = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the decision as JSON.")] = False,
) -> None:
    """Decide whether two images show one identity.

    Prints the score (a cosine), the decision and, with a calibration, how often two different identities would pass.
    """
    if not faces and (draw is not None or part_a is not None or part_b is not None):
        raise typer.BadParameter("--draw, --part-a and --part-b need --faces")
    from embedkit._io.outputs import check_outputs
    from embedkit.analysis.matching.calibration import Calibration, check_threshold
    from embedkit.workflows.embedding import encoder_of_images
    from embedkit.workflows.faces import finder
    from embedkit.workflows.faces.encoder import FaceEncoder
    from embedkit.workflows.verify import verify as decide

    check_outputs(
        {"--draw": draw}, {"A": a.partition("::")[0], "B": b.partition("::")[0], "--calibration": calibration}
    )
    if threshold is not None:
        check_threshold(threshold)  # before anything is loaded
    loaded = Calibration.load(calibration) if calibration is not None else None
    found: list[list[finder.Face]] = []
    model = encoder_of_images(encoder, faces=faces, calibration=loaded, device=device, threads=threads)
    if isinstance(model, FaceEncoder):
        found = [model.finder.find(path) for path in (a, b)]
        if draw is not None:
            # Before the faces are chosen, since the drawing shows their numbers.
            finder.draw_faces([(a, found[0]), (b, found[1])], draw)
            tell(f"{draw} shows the faces that were found")
        chosen = [
            finder.choose_face(several, part, where=path)
            for path, several, part in zip((a, b), found, (part_a, part_b), strict=True)
        ]
        result = decide(model, chosen[0], chosen[1], threshold, loaded)
        name = model.encoder.name
    else:
        result = decide(model, a, b, threshold, loaded)
        name = model.name
    if as_json:
        boxes = [[{"box": face.box, "score": face.score} for face in several] for several in found]
        print(
            json.dumps({**dataclasses.asdict(result), "encoder": name, **({"faces": boxes} if faces else {})})
        )
        return
    print(
        f"{'match' if result.is_match else 'no match'}\t{result.score:.4f}\tthreshold {result.threshold:.4f}"
    )
    if result.expected_fmr is None:
        tell(
            f"by {name}, uncalibrated: its error rate on images like yours is unknown; "
            "`embedkit calibrate` measures it"
        )
    else:
        print(f"expected false-match rate\t{result.expected_fmr:.2g}")
        print(f"probability of one identity\t{result.probability:.3f}")
