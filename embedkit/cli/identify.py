"""`embedkit identify`: which identity of a gallery each image shows, or no match."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from embedkit.cli.inputs import finder_of, with_token
from embedkit.cli.options import (
    AsJson,
    CalibrationFile,
    Device,
    ExitStatus,
    Faces,
    LabelFromFolder,
    LocalFilesOnly,
    LookIn,
    MinScore,
    MinSize,
    OptionalEncoderName,
    OptionalThreshold,
    Quiet,
    Threads,
    Token,
    label,
)
from embedkit.cli.output import Heading, Id, Number, print_json, print_table, tell, tell_error, tell_left_out


def identify(
    query: Annotated[list[str], typer.Argument(metavar="QUERY", help="Images.")],
    gallery: Annotated[
        str,
        typer.Option(
            metavar="DIR|EMB",
            help="Images, a folder for each identity; or embeddings, with --label or --label-from-folder.",
        ),
    ],
    label: Annotated[str | None, label("The identity of each row.")] = None,
    label_from_folder: LabelFromFolder = False,
    calibration: CalibrationFile = None,
    threshold: OptionalThreshold = None,
    faces: Faces = False,
    min_score: MinScore = None,
    min_size: MinSize = None,
    encoder: OptionalEncoderName = None,
    exit_status: ExitStatus = False,
    zoo: LookIn = None,
    token: Token = None,
    local_files_only: LocalFilesOnly = False,
    device: Device = "auto",
    threads: Threads = "auto",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Print which identity of a gallery each image shows.

    An image has no match if the nearest one scores below the threshold. With a calibration also the expected
    false-positive identification rate (FPIR) is printed: how often, at most, an identity outside the gallery is
    matched. It is as certain as the calibration's false-match rate. If no encoder is named, the one that made the
    embeddings or that was calibrated is used; with --faces, face-r29.dlib.

    With --faces, each face of an image has a row, `IMAGE#1` for the second largest and so on, with its box in pixels:
    left, top, right and bottom.

    Examples:
        embedkit identify cat.jpg --gallery people/ --calibration people.json
        embedkit identify cat.jpg --gallery people.parquet --label-from-folder --threshold 0.5
    """
    from embedkit.analysis.matching.calibration import Calibration
    from embedkit.cli.progress import Bar
    from embedkit.workflows.identify import identify_images

    loaded = Calibration.load(calibration) if calibration is not None else None
    finder = finder_of(faces, min_score, min_size, device=device, threads=threads)
    with Bar("embedding the gallery") as bar:
        done = identify_images(
            query,
            gallery,
            identity=label,
            identity_from_folder=label_from_folder,
            calibration=loaded,
            threshold=threshold,
            encoder=with_token(encoder, token),
            faces=faces,
            finder=finder,
            device=device,
            threads=threads,
            progress=bar,
        )
    if as_json:
        facts = dataclasses.asdict(done)
        for one in facts["found"]:
            one["score"] = round(one["score"], 6)
        print_json(facts)
    else:
        columns: list[Heading] = [Id("query"), "identity", Id("nearest"), Number("score", ".4f")]
        columns.append(Number("expected FPIR", ".2g"))
        rows: list[list[object]] = [
            [
                one.query,
                "no match" if one.identity is None else one.identity,
                *(one.nearest, one.score, one.expected_fpir),
            ]
            for one in done.found
        ]
        if done.faces is not None:
            columns.append("box")
            for row, face in zip(rows, done.faces, strict=True):
                row.append(" ".join(f"{edge:.0f}" for edge in face.box))
        print_table(columns, rows)
    for fault in done.failed:
        tell_error(fault)
    tell_left_out(done.left_out, "of the gallery")
    who = "1 identity" if done.identities == 1 else f"{done.identities} identities"
    among = "1 image" if done.images == 1 else f"{done.images} images"
    tell(f"{who} in {among}; a match needs a cosine of {done.found[0].threshold:.4f}")
    if done.identities == 1:
        tell("with one identity in the gallery this is a verification: each query is that one, or no match")
    if loaded is None:
        tell(
            f"by {done.encoder}, uncalibrated: the rate of false matches is unknown; "
            "`embedkit calibrate` measures it"
        )
    if done.failed:
        raise typer.Exit(1)
    if exit_status and any(one.identity is None for one in done.found):
        raise typer.Exit(3)
