"""`embedkit calibrate`: a threshold for a false-match rate, from labeled images or embeddings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from embedkit._io.text import safe_for_terminal
from embedkit.cli.terminal import tell, tell_left_out


def calibrate(
    source: Annotated[
        str,
        typer.Argument(
            metavar="PAIRS.csv|DIR|EMB",
            help="A CSV with columns a, b (images, relative to it) and same (1 or 0); a folder of images with a "
            "folder for each identity; or embeddings: X.parquet, X.npy, shards, or lance://FOLDER/TABLE.",
        ),
    ],
    pairs: Annotated[
        Path | None,
        typer.Option(metavar="PAIRS.csv", help="For embeddings: columns a, b (ids) and same (1 or 0)."),
    ] = None,
    identity: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="For embeddings: the label column that names identities."),
    ] = None,
    identity_from_folder: Annotated[
        bool,
        typer.Option("--identity-from-folder", help="For embeddings: an image's folder is its identity."),
    ] = False,
    encoder: Annotated[
        str | None,
        typer.Option(
            help="For images: a zoo name or an entry's folder.", show_default="face-r29.dlib with --faces"
        ),
    ] = None,
    faces: Annotated[
        bool,
        typer.Option(
            "--faces", help="For images: compare the aligned face of each, which must be the only one."
        ),
    ] = False,
    target_fmr: Annotated[float, typer.Option(min=0.0, max=1.0, help="The target false-match rate.")] = 1e-3,
    group: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN", help="For embeddings: a label column; rates are given for each group, too."
        ),
    ] = None,
    most: Annotated[
        int, typer.Option("--most-pairs", min=1, help="Pairs of each kind that are drawn from identities.")
    ] = 1 << 18,
    replicates: Annotated[int, typer.Option(min=10, help="Bootstrap samples.")] = 500,
    seed: Annotated[int, typer.Option(min=0, help="Of the pairs that are drawn, and of the bootstrap.")] = 0,
    device: Annotated[str, typer.Option(help="For images: auto, cpu, cuda or cuda:<index>.")] = "auto",
    threads: Annotated[str, typer.Option(help="For images: cores to keep busy, or auto.")] = "auto",
    output: Annotated[Path, typer.Option("--output", "-o", metavar="C.json")] = Path("calibration.json"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the calibration as JSON.")] = False,
) -> None:
    """Find the threshold for a false-match rate, with its uncertainty.

    A rate is refused if the pairs are too few, or of too few identities, to support it.
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
        if pairs is not None or identity is not None or identity_from_folder or group is not None:
            raise typer.BadParameter(
                "--pairs, --identity, --identity-from-folder and --group go with embeddings"
            )
        from embedkit.cli.progress import Bar

        with Bar("embedding") as bar:
            done = calibrate_images(
                source,
                target_fmr,
                encoder=encoder,
                faces=faces,
                most=most,
                replicates=replicates,
                seed=seed,
                device=device,
                threads=threads,
                progress=bar,
            )
        found, left_out = done.calibration, done.left_out
    else:
        stored = open_rows(source)
        if (pairs is not None) + (identity is not None) + identity_from_folder != 1:
            raise typer.BadParameter(
                "with embeddings give one of --pairs, --identity and --identity-from-folder"
            )
        if encoder is not None or faces:
            raise typer.BadParameter("--encoder and --faces go with images; embeddings name their encoder")
        from embedkit.analysis.matching.calibrate import calibrate_pairs
        from embedkit.analysis.matching.pairs import read_pairs, sample_pairs
        from embedkit.analysis.vectors import Rows

        rows = Rows(stored)
        ids = rows.names()  # refuses duplicate ids: such an image would be paired with itself
        check_no_image({"--output": output}, ids)
        if pairs is not None:
            chosen = read_pairs(pairs, ids)
        else:
            names = identities_of(stored, identity, identity_from_folder)
            chosen = sample_pairs(names, seed=seed, most=most, where=source)
        groups = stored.label(group) if group else None
        found = calibrate_pairs(rows, chosen, target_fmr, groups=groups, replicates=replicates, seed=seed)
    tell_left_out(left_out, f"of {source}")
    found.save(output)
    low, high = found.predict()
    tell(f"{output} is of {found.entry}, space {found.fingerprint[:12]}")
    if as_json:
        facts = {"predicted_fmr_interval": [low, high], "left_out": left_out}
        print(json.dumps({**found.to_json(), **facts}))
        return
    table = [
        ("threshold", found.threshold, found.threshold_interval),
        ("false-match rate", found.fmr, found.fmr_interval),
        ("false-match rate, another sample of this size", found.fmr, (low, high)),
        ("false-non-match rate", found.fnmr, found.fnmr_interval),
        ("equal error rate", found.eer, found.eer_interval),
        ("area under the ROC curve", found.auc, found.auc_interval),
    ]
    print(
        f"{found.genuine} genuine and {found.impostors} impostor pairs of {found.identities} identities, "
        f"worth {found.effective_impostors:.0f} independent impostor pairs"
    )
    print("metric\tvalue\t95 % from\tto")
    for name, value, (least, greatest) in table:
        print(f"{name}\t{value:.4g}\t{least:.4g}\t{greatest:.4g}")
    if found.groups:
        print("\ngroup\tgenuine\timpostors\tFMR\t95 % from\tto\tFNMR\t95 % from\tto\tnote")
    for row in found.groups:
        rates = [*_cells(row.fmr, row.fmr_interval), *_cells(row.fnmr, row.fnmr_interval)]
        note = "" if row.supported else "too few impostor pairs for the target"
        print("\t".join([safe_for_terminal(row.name), str(row.genuine), str(row.impostors), *rates, note]))


def _cells(rate: float | None, interval: tuple[float, float] | None) -> list[str]:
    if rate is None or interval is None:
        return ["-", "-", "-"]
    return [f"{value:.4g}" for value in (rate, *interval)]
