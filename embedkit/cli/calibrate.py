"""`embedkit calibrate`: a threshold for a false-match rate, from labeled images or embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from embedkit.cli.inputs import finder_of, with_token
from embedkit.cli.options import (
    AsJson,
    Device,
    Faces,
    LabeledPairs,
    LabelFromFolder,
    LocalFilesOnly,
    LookIn,
    MinScore,
    MinSize,
    OptionalEncoderName,
    Quiet,
    Seed,
    Threads,
    Token,
    label,
    output,
)
from embedkit.cli.output import Number, print_json, print_line, print_table, tell, tell_left_out


def calibrate(
    source: Annotated[
        str,
        typer.Argument(
            metavar="PAIRS.csv|DIR|EMB",
            help="A CSV with columns a, b (images, relative to it) and same (1 or 0); a folder of images with a "
            "folder for each identity; or embeddings: X.parquet, X.npy, shards, or lance://FOLDER/TABLE.",
        ),
    ],
    pairs: LabeledPairs = None,
    label: Annotated[str | None, label("The identity of each image.")] = None,
    label_from_folder: LabelFromFolder = False,
    encoder: OptionalEncoderName = None,
    faces: Faces = False,
    min_score: MinScore = None,
    min_size: MinSize = None,
    target_fmr: Annotated[float, typer.Option(min=0.0, max=1.0, help="The target false-match rate.")] = 1e-3,
    group: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN", help="A second label column; rates are given for each of its groups, too."
        ),
    ] = None,
    max_pairs: Annotated[
        int, typer.Option("--max-pairs", min=1, help="Pairs of each kind that are drawn from identities.")
    ] = 1 << 18,
    replicates: Annotated[int, typer.Option(min=10, help="Bootstrap samples.")] = 500,
    seed: Seed = 0,
    zoo: LookIn = None,
    token: Token = None,
    local_files_only: LocalFilesOnly = False,
    device: Device = "auto",
    threads: Threads = "auto",
    output: Annotated[Path, output("C.json", "The calibration.")] = Path("calibration.json"),
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Find the threshold for a false-match rate.

    Embeddings take one of --pairs, --label and --label-from-folder; images take --encoder or --faces, which needs
    exactly one face in each image. The threshold and the rates are given with their uncertainty. A rate is refused
    if the pairs are too few, or of too few identities, to support it.

    Examples:
        embedkit calibrate people.parquet --label-from-folder -o people.json --target-fmr 0.01
        embedkit calibrate people/ -o people.json --target-fmr 0.01
    """
    from embedkit._io.outputs import check_outputs
    from embedkit.cli.inputs import check_not_a_source, files_of
    from embedkit.embeddings.formats import open_rows
    from embedkit.images.ids import check_no_image
    from embedkit.workflows.calibrate import calibrate_images, holds_images, identities_of

    check_outputs({"--output": output}, {**files_of(source, "the source"), "--pairs": pairs})
    left_out: list[str] = []
    if holds_images(source):
        check_not_a_source({"--output": output}, source)
        if pairs is not None or label is not None or label_from_folder or group is not None:
            raise typer.BadParameter("--pairs, --label, --label-from-folder and --group go with embeddings")
        from embedkit.cli.progress import Bar

        finder = finder_of(faces, min_score, min_size, device=device, threads=threads)
        with Bar("embedding") as bar:
            done = calibrate_images(
                source,
                target_fmr,
                encoder=with_token(encoder, token),
                faces=faces,
                finder=finder,
                most=max_pairs,
                replicates=replicates,
                seed=seed,
                device=device,
                threads=threads,
                progress=bar,
            )
        found, left_out = done.calibration, done.left_out
    else:
        stored = open_rows(source)
        if (pairs is not None) + (label is not None) + label_from_folder != 1:
            raise typer.BadParameter("with embeddings give one of --pairs, --label and --label-from-folder")
        if encoder is not None or faces or min_score is not None or min_size is not None:
            raise typer.BadParameter(
                "--encoder, --faces and its options go with images; embeddings name their encoder"
            )
        from embedkit.analysis.matching.calibrate import calibrate_pairs
        from embedkit.analysis.matching.pairs import read_pairs, sample_pairs
        from embedkit.analysis.vectors import Rows

        rows = Rows(stored)
        ids = rows.names()  # refuses duplicate ids: such an image would be paired with itself
        check_no_image({"--output": output}, ids)
        if pairs is not None:
            chosen = read_pairs(pairs, ids)
        else:
            names = identities_of(stored, label, label_from_folder)
            chosen = sample_pairs(names, seed=seed, most=max_pairs, where=source)
        groups = stored.label(group) if group else None
        found = calibrate_pairs(rows, chosen, target_fmr, groups=groups, replicates=replicates, seed=seed)
    tell_left_out(left_out, f"of {source}")
    found.save(output)
    low, high = found.predict()
    tell(f"{output} is of {found.entry}, space {found.fingerprint[:12]}")
    if as_json:
        facts = {"predicted_fmr_interval": [low, high], "left_out": left_out}
        print_json({**found.to_json(), **facts})
        return
    table = [
        ("threshold", found.threshold, found.threshold_interval),
        ("false-match rate", found.fmr, found.fmr_interval),
        ("false-match rate, another sample of this size", found.fmr, (low, high)),
        ("false-non-match rate", found.fnmr, found.fnmr_interval),
        ("equal error rate", found.eer, found.eer_interval),
        ("area under the ROC curve", found.auc, found.auc_interval),
    ]
    tell(
        f"{found.genuine} genuine and {found.impostors} impostor pairs of {found.identities} identities, "
        f"worth {found.effective_impostors:.0f} independent impostor pairs"
    )
    interval = [Number("95 % from", ".4g"), Number("to", ".4g")]
    metrics = ((name, value, *between) for name, value, between in table)
    print_table(["metric", Number("value", ".4g"), *interval], metrics)
    if found.groups:
        print_line("")
        rates = [Number("FMR", ".4g"), *interval, Number("FNMR", ".4g"), *interval]
        print_table(
            ["group", Number("genuine"), Number("impostors"), *rates, "note"],
            (
                (
                    *(row.name, row.genuine, row.impostors),
                    *(row.fmr, *(row.fmr_interval or (None, None))),
                    *(row.fnmr, *(row.fnmr_interval or (None, None))),
                    None if row.supported else "too few impostor pairs for the target",
                )
                for row in found.groups
            ),
        )
