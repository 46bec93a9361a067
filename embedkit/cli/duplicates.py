"""`embedkit duplicates` and `embedkit leaks`: duplicates, and test images that the training set holds too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from embedkit._io.text import safe_for_terminal
from embedkit.cli.options import AsJson, Root, StoredEmbeddings
from embedkit.cli.sheet import write_sheet
from embedkit.cli.terminal import tell


def duplicates(
    source: StoredEmbeddings,
    threshold: Annotated[
        float | None, typer.Option(help="Cosine from which on two images are the same; 1 finds equal rows.")
    ] = None,
    precision: Annotated[
        float | None, typer.Option(help="Instead: the share of true duplicates; needs --labeled.")
    ] = None,
    labeled: Annotated[
        Path | None,
        typer.Option(
            metavar="PAIRS.csv", help="Pairs that a person has labeled: columns a, b and same (1 or 0)."
        ),
    ] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(
            metavar="PAIRS.csv", help="Write up to 1,000 of the pairs, uniformly drawn, to be labeled."
        ),
    ] = None,
    delete_list: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write the paths of files that can be deleted; for each, the kept image is another existing file. "
            "Nothing is deleted.",
        ),
    ] = None,
    null: Annotated[
        bool,
        typer.Option(
            "--null",
            help="Paths in the delete list end in NUL, so that no name can be misread: xargs -0 rm -- < FILE",
        ),
    ] = False,
    sheet: Annotated[
        Path | None, typer.Option(metavar="OUT.html|OUT.png", help="Draw a contact sheet of the groups.")
    ] = None,
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Print groups of duplicate images, the largest first: the kept ones, and after a tab the others.

    The first image of a group is kept, and each one that is not a duplicate of a kept one. Existing files come before
    links, and links before files that no longer exist.
    """
    if (threshold is None) == (precision is None) or (precision is None) != (labeled is None):
        raise typer.BadParameter("give --threshold, or --precision with --labeled")
    if null and delete_list is None:
        raise typer.BadParameter("--null needs --delete-list FILE")
    from embedkit._io.outputs import check_outputs
    from embedkit.analysis.duplicates import find_duplicates
    from embedkit.analysis.matching.pairs import read_pairs, write_pairs
    from embedkit.analysis.vectors import Rows
    from embedkit.cli.inputs import files_of
    from embedkit.images.ids import check_no_image

    outputs = {"--pairs": pairs, "--delete-list": delete_list, "--sheet": sheet}
    check_outputs(outputs, {**files_of(source), "--labeled": labeled})
    if sheet is not None:
        from embedkit.images.originals import Originals
        from embedkit.workflows.visual import contact_sheet as sheets

        sheets.check_sheet(sheet)  # before the work
        originals = Originals(root)
    rows = Rows(source)
    names = rows.names()
    check_no_image(outputs, names, root)
    # Two near-duplicates of one image need not be near-duplicates: a label belongs to its pair only.
    known = read_pairs(labeled, names, identities=False) if labeled else None
    found = find_duplicates(rows, threshold, precision=precision, labeled=known, root=root)
    # Files first: the reader of the table may stop early, as `head` does.
    if pairs is not None:
        write_pairs(pairs, found.names, found.sample)
    if delete_list is not None:
        listed = found.write_delete_list(delete_list, null=null)
        left = f"; {why}" if (why := listed.why()) else ""
        tell(f"{delete_list} names {len(listed)} files; nothing was deleted{left}")
    if sheet is not None and found.groups:
        title = f"Duplicates in {source} at a cosine of {found.threshold:g} or more"
        write_sheet(sheet, title, sheets.sheet_of_duplicates(found), originals)
    elif sheet is not None:
        tell(f"there are no duplicates, so {sheet} is not written")
    redundant = len(found.redundant)
    if as_json:
        groups = [
            {
                "kept": [found.names[row] for row in group.kept],
                "redundant": [
                    {"id": found.names[row], "of": found.names[of], "cosine": round(cosine, 6)}
                    for row, of, cosine in zip(group.redundant, group.of, group.cosines.tolist(), strict=True)
                ],
            }
            for group in found.groups
        ]
        facts = {"threshold": found.threshold, "rows": len(found.names), "pairs": found.pairs}
        print(json.dumps({**facts, "redundant": redundant, "groups": groups}))
    else:
        for group in found.groups:
            sides = (
                ", ".join(safe_for_terminal(found.names[row]) for row in side)
                for side in (group.kept, group.redundant)
            )
            print("\t".join(sides))
    tell(
        f"{len(found.groups)} groups, {redundant} of {len(found.names)} rows can be deleted; "
        f"{found.pairs} pairs at a cosine of {found.threshold:g} or more"
    )


def leaks(
    train: Annotated[str, typer.Argument(help="The training set's embeddings.")],
    test: Annotated[str, typer.Argument(help="The test set's embeddings.")],
    threshold: Annotated[
        float, typer.Option(help="Cosine from which on two images are the same; 1 finds equal rows.")
    ],
    fail_over: Annotated[
        float | None,
        typer.Option(
            min=0.0, max=1.0, help="Exit with status 3 when more than this share of the test set leaks."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print test images that the training set holds too, with the training image and the cosine."""
    from embedkit.analysis.leaks import find_leaks

    found = find_leaks(train, test, threshold)
    if as_json:
        rows = [
            {"test": leak.test, "train": leak.train, "cosine": round(leak.cosine, 6)} for leak in found.found
        ]
        print(json.dumps({"threshold": threshold, "tested": found.tested, "rate": found.rate, "leaks": rows}))
    else:
        for leak in found.found:
            print(f"{safe_for_terminal(leak.test)}\t{safe_for_terminal(leak.train)}\t{leak.cosine:.4f}")
    tell(
        f"{len(found.found)} of {found.tested} test rows ({found.rate:.3%}) are in the training set "
        f"at a cosine of {threshold:g} or more"
    )
    if fail_over is not None and found.rate > fail_over:
        tell(f"that is above the limit of {fail_over:.3%}")
        raise typer.Exit(3)
