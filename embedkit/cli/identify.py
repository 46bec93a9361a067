"""`embedkit identify`: which identity of a gallery each image shows, or no match."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from embedkit._io.text import safe_for_terminal
from embedkit.cli.options import AsJson, CalibrationFile, Device, Threads, Threshold
from embedkit.cli.terminal import tell, tell_left_out


def identify(
    query: Annotated[list[str], typer.Argument(metavar="QUERY...", help="Images.")],
    gallery: Annotated[
        str,
        typer.Option(
            metavar="DIR|EMB",
            help="Images, a folder for each identity; or embeddings, with --identity or --identity-from-folder.",
        ),
    ],
    identity: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="The label column that names identities.")
    ] = None,
    identity_from_folder: Annotated[
        bool, typer.Option("--identity-from-folder", help="An image's folder is its identity.")
    ] = False,
    calibration: CalibrationFile = None,
    threshold: Threshold = None,
    faces: Annotated[
        bool, typer.Option("--faces", help="Find the one face in each image, and compare these.")
    ] = False,
    encoder: Annotated[
        str | None,
        typer.Option(
            help="A zoo name or an entry's folder.",
            show_default="the one that made the embeddings, or that was calibrated; face-r29.dlib with --faces",
        ),
    ] = None,
    device: Device = "auto",
    threads: Threads = "auto",
    as_json: AsJson = False,
) -> None:
    """Print which identity of a gallery each image shows, or no match if the nearest scores below the threshold.

    With a calibration also the expected false-positive identification rate (FPIR): how often, at most, an identity
    outside the gallery is matched. It is as certain as the calibration's false-match rate.
    """
    from embedkit.analysis.matching.calibration import Calibration
    from embedkit.cli.progress import Bar
    from embedkit.workflows.identify import identify_images

    loaded = Calibration.load(calibration) if calibration is not None else None
    with Bar("embedding the gallery") as bar:
        done = identify_images(
            query,
            gallery,
            identity=identity,
            identity_from_folder=identity_from_folder,
            calibration=loaded,
            threshold=threshold,
            encoder=encoder,
            faces=faces,
            device=device,
            threads=threads,
            progress=bar,
        )
    if as_json:
        print(json.dumps(dataclasses.asdict(done), default=str))
    else:
        print("query\tidentity\tnearest\tscore\texpected FPIR")
        for one in done.found:
            who = "no match" if one.identity is None else safe_for_terminal(str(one.identity))
            rate = "-" if one.expected_fpir is None else f"{one.expected_fpir:.2g}"
            print(
                f"{safe_for_terminal(one.query)}\t{who}\t{safe_for_terminal(one.nearest)}\t{one.score:.4f}\t{rate}"
            )
    for fault in done.failed:
        tell(fault)
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
