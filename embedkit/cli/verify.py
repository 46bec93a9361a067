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
    from embedkit.workflows.faces import faces as faces_of
    from embedkit.workflows.verify import verify as decide

    check_outputs(
        {"--draw": draw}, {"A": a.partition("::")[0], "B": b.partition("::")[0], "--calibration": calibration}
    )
    if threshold is not None:
        check_threshold(threshold)  # before anything is loaded
    known = Calibration.load(calibration) if calibration is not None else None
    found: list[list[faces_of.Face]] = []
    people = encoder_of_images(encoder, faces=faces, calibration=known, device=device, threads=threads)
    if isinstance(people, faces_of.FaceEncoder):
        found = [people.finder.find(path) for path in (a, b)]
        if draw is not None:
            # Before the faces are chosen: the drawing is what shows their numbers.
            faces_of.draw_faces([(a, found[0]), (b, found[1])], draw)
            tell(f"{draw} shows what was found")
        chosen = [
            faces_of.choose(several, part, where=path)
            for path, several, part in zip((a, b), found, (part_a, part_b), strict=True)
        ]
        result = decide(people, chosen[0], chosen[1], threshold, known)
        name = people.encoder.name
    else:
        result = decide(people, a, b, threshold, known)
        name = people.name
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
            f"by {name}, uncalibrated: nobody knows how often this is wrong for images like "
            "yours; `embedkit calibrate` finds out"
        )
    else:
        print(f"expected false-match rate\t{result.expected_fmr:.2g}")
        print(f"probability of one identity\t{result.probability:.3f}")
