"""`embedkit verify`: whether two images, or the faces in them, show one identity."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from embedkit.cli.inputs import finder_of, with_token
from embedkit.cli.options import (
    AsJson,
    CalibrationFile,
    Device,
    ExitStatus,
    Faces,
    LocalFilesOnly,
    LookIn,
    MinScore,
    MinSize,
    OptionalEncoderName,
    OptionalThreshold,
    Quiet,
    Threads,
    Token,
)
from embedkit.cli.output import Heading, Number, print_json, print_table, tell

Part = Annotated[
    int | None, typer.Option(min=0, help="Which face of the image, 0 the largest; only with --faces.")
]


def verify(
    a: Annotated[str, typer.Argument(metavar="A", help="An image.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another image.")],
    encoder: OptionalEncoderName = None,
    calibration: CalibrationFile = None,
    threshold: OptionalThreshold = None,
    faces: Faces = False,
    min_score: MinScore = None,
    min_size: MinSize = None,
    part_a: Part = None,
    part_b: Part = None,
    draw_faces: Annotated[
        Path | None,
        typer.Option(metavar="OUT.png", help="Draw the faces that were found; needs --faces."),
    ] = None,
    exit_status: ExitStatus = False,
    zoo: LookIn = None,
    token: Token = None,
    local_files_only: LocalFilesOnly = False,
    device: Device = "auto",
    threads: Threads = "auto",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Decide whether two images show one identity.

    Prints the decision, the score (a cosine) and, with a calibration, how often two different identities would pass.
    The encoder is the calibrated one if none is named; with --faces, face-r29.dlib. The exit status is 0 whatever the
    decision; with --exit-status it is 3 for no match, for `if` and `&&` of a shell. The keys of --json are score,
    threshold, is_match, expected_fmr and probability (null without a calibration), and encoder.

    With --faces, an image may show several people: the most similar pair of faces is printed, and which faces they
    are, 0 the largest. --part-a and --part-b choose one face, and --draw-faces shows the numbers.

    Examples:
        embedkit verify cat.jpg cat-closer.jpg --threshold 0.5
        embedkit verify cat.jpg cat-closer.jpg --threshold 0.5 --exit-status && echo same
        embedkit verify cat.jpg coffee.jpg --threshold 0.5 --exit-status
    """
    if not faces and (draw_faces is not None or part_a is not None or part_b is not None):
        raise typer.BadParameter("--draw-faces, --part-a and --part-b need --faces")
    from embedkit._io.outputs import check_outputs
    from embedkit.analysis.matching.calibration import Calibration, check_threshold
    from embedkit.workflows.embedding import encoder_of_images
    from embedkit.workflows.faces import finder
    from embedkit.workflows.faces.encoder import FaceEncoder
    from embedkit.workflows.verify import FaceVerification
    from embedkit.workflows.verify import verify as decide

    images = {"A": a.partition("::")[0], "B": b.partition("::")[0]}
    check_outputs({"--draw-faces": draw_faces}, {**images, "--calibration": calibration})
    if threshold is not None:
        check_threshold(threshold)  # before anything is loaded
    loaded = Calibration.load(calibration) if calibration is not None else None
    found: list[list[finder.Face]] = []
    encoder = with_token(encoder, token)
    model = encoder_of_images(
        encoder,
        faces=faces,
        finder=finder_of(faces, min_score, min_size, device=device, threads=threads),
        calibration=loaded,
        device=device,
        threads=threads,
    )
    if isinstance(model, FaceEncoder):
        findings = [model.finder.examine(path) for path in (a, b)]
        found = [one.faces for one in findings]
        if draw_faces is not None:
            # Before the faces are chosen, since the drawing shows their numbers.
            finder.draw_faces([(a, found[0]), (b, found[1])], draw_faces)
            tell(f"{draw_faces} shows the faces that were found")
        chosen: list[list[finder.Face]] = []
        for path, one, part in zip((a, b), findings, (part_a, part_b), strict=True):
            if part is None and one.faces:
                chosen.append(one.faces)
            else:
                chosen.append([finder.choose_face(one.faces, part, where=path, refused=one.refused)])
        result = decide(model, chosen[0], chosen[1], threshold, loaded)
        name = model.encoder.name
    else:
        result = decide(model, a, b, threshold, loaded)
        name = model.name
    if as_json:
        boxes = [[{"box": face.box, "score": face.score} for face in several] for several in found]
        facts = {**dataclasses.asdict(result), "score": round(result.score, 6), "encoder": name}
        if isinstance(result, FaceVerification):
            facts |= {
                "part_a": result.part_a if part_a is None else part_a,
                "part_b": result.part_b if part_b is None else part_b,
                "faces": boxes,
            }
        print_json(facts)
    else:
        columns: list[Heading] = ["decision", Number("score", ".4f"), Number("threshold", ".4f")]
        row: list[object] = ["match" if result.is_match else "no match", result.score, result.threshold]
        if result.expected_fmr is not None:
            columns += [Number("expected FMR", ".2g"), Number("probability of one identity", ".3f")]
            row += [result.expected_fmr, result.probability]
        if isinstance(result, FaceVerification) and result.pairs > 1:
            columns += [Number("face of A"), Number("face of B")]
            row += [
                result.part_a if part_a is None else part_a,
                result.part_b if part_b is None else part_b,
            ]
        print_table(columns, [row])
    if result.expected_fmr is None:
        tell(
            f"by {name}, uncalibrated: its error rate on images like yours is unknown; "
            "`embedkit calibrate` measures it"
        )
    if exit_status and not result.is_match:
        raise typer.Exit(3)
