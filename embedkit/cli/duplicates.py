"""`embedkit duplicates` and `embedkit leaks`: duplicates, and test images that the training set holds too."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from embedkit.cli.options import (
    AsJson,
    FailOver,
    LabeledPairs,
    Null,
    OptionalThreshold,
    Quiet,
    Root,
    Sheet,
    StoredEmbeddings,
    Threshold,
)
from embedkit.cli.output import Heading, Id, Number, print_json, print_table, tell, warn
from embedkit.cli.sheet import write_sheet

if TYPE_CHECKING:
    from embedkit.analysis.duplicates import Duplicates


class Keep(StrEnum):
    """Which image of a group is kept."""

    largest = "largest"
    oldest = "oldest"
    first = "first"


def duplicates(
    source: StoredEmbeddings,
    threshold: OptionalThreshold = None,
    target_precision: Annotated[
        float | None,
        typer.Option(help="Instead of --threshold: the share of true duplicates; needs --pairs."),
    ] = None,
    pairs: LabeledPairs = None,
    write_pairs: Annotated[
        Path | None,
        typer.Option(metavar="PAIRS.csv", help="Up to 1,000 of the pairs, uniformly drawn, to be labeled."),
    ] = None,
    write_delete_list: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The paths of files that can be deleted; for each, the kept image is another existing file. "
            "Nothing is deleted.",
        ),
    ] = None,
    keep: Annotated[
        Keep,
        typer.Option(
            help="Of a group, the image with the most pixels, then bytes; the oldest one; or the first row.",
        ),
    ] = Keep.largest,
    null: Null = False,
    draw_sheet: Sheet = None,
    root: Root = None,
    fail_over: FailOver = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Print groups of duplicate images, the largest first.

    The largest image of a group is kept (--keep), and each one that is not a duplicate of a kept one; each of the
    others is listed with the kept image that it duplicates. Existing files come before links, and links before files
    that no longer exist.

    A threshold of 1 finds equal rows. With the default encoder, 0.99 finds files that were encoded again at a high
    quality; 0.95 also most copies of a low quality, of half the size or slightly cropped; 0.85 nearly all of these, and
    different images of one subject.

    Examples:
        embedkit duplicates photos.parquet --threshold 0.95 --draw-sheet doubles.html
        embedkit duplicates photos.parquet --threshold 0.99 --write-delete-list doubles --null
    """
    from embedkit.embeddings.formats import is_embeddings, open_rows

    if not is_embeddings(source):
        open_rows(source)  # raises: a folder of images has to be embedded before a threshold matters
    if (threshold is None) == (target_precision is None) or (target_precision is None) != (pairs is None):
        raise typer.BadParameter(
            "give --threshold (0.95 finds most copies; see --help), or --target-precision with --pairs"
        )
    if null and write_delete_list is None:
        raise typer.BadParameter("--null needs --write-delete-list FILE")
    from embedkit._io.outputs import check_outputs
    from embedkit.analysis.duplicates import find_duplicates
    from embedkit.analysis.matching import pairs as files
    from embedkit.analysis.vectors import Rows
    from embedkit.cli.inputs import files_of
    from embedkit.images.ids import check_no_image

    outputs = {
        "--write-pairs": write_pairs,
        "--write-delete-list": write_delete_list,
        "--draw-sheet": draw_sheet,
    }
    check_outputs(outputs, {**files_of(source), "--pairs": pairs})
    if draw_sheet is not None:
        from embedkit.workflows.faces.parts import originals_of
        from embedkit.workflows.visual import contact_sheet as sheets

        sheets.check_sheet(draw_sheet)  # before the work
        originals = originals_of(source, root)
    rows = Rows(source)
    names = rows.names()
    check_no_image(outputs, names, root)
    # Two near-duplicates of one image need not be near-duplicates: a label belongs to its pair only.
    known = files.read_pairs(pairs, names, identities=False) if pairs else None
    found = find_duplicates(
        rows, threshold, target_precision=target_precision, labeled=known, root=root, keep=keep.value
    )
    if write_pairs is not None:
        files.write_pairs(write_pairs, found.names, found.sample)
    if write_delete_list is not None:
        listed = found.write_delete_list(write_delete_list, null=null)
        left = f"; {why}" if (why := listed.why()) else ""
        tell(f"{write_delete_list} names {len(listed)} files; nothing was deleted{left}")
        for warning in listed.warnings():
            warn(warning)
    if draw_sheet is not None and found.groups:
        title = f"Duplicates in {source} at a cosine of {found.threshold:g} or more"
        write_sheet(draw_sheet, title, sheets.sheet_of_duplicates(found), originals)
    elif draw_sheet is not None:
        tell(f"there are no duplicates, so {draw_sheet} is not written")
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
        print_json({**facts, "redundant": redundant, "groups": groups})
    else:
        columns: list[Heading] = [Number("group"), Id("id"), Id("duplicate of"), Number("cosine", ".4f")]
        print_table(columns, _listed(found))
    tell(
        f"{len(found.groups)} groups, {redundant} of {len(found.names)} rows can be deleted; "
        f"{found.pairs} pairs at a cosine of {found.threshold:g} or more"
    )
    _check_share(redundant / max(len(found.names), 1), fail_over)


def _listed(found: Duplicates) -> Iterator[tuple[object, ...]]:
    """Each group, numbered from 1: the kept images, then each of the others with the one that it duplicates."""
    for number, group in enumerate(found.groups, 1):
        for row in group.kept:
            yield number, found.names[row], None, None
        for row, of, cosine in zip(group.redundant, group.of, group.cosines.tolist(), strict=True):
            yield number, found.names[row], found.names[of], cosine


def _check_share(share: float, limit: float | None) -> None:
    if limit is not None and share > limit:
        warn(f"{share:.3%} is above the limit of {limit:.3%}")
        raise typer.Exit(3)


def leaks(
    train: Annotated[str, typer.Argument(help="The training set's embeddings.")],
    test: Annotated[str, typer.Argument(help="The test set's embeddings.")],
    threshold: Threshold,
    fail_over: FailOver = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Print test images that the training set holds too.

    A threshold of 1 finds equal rows; --fail-over is a share of the test set.

    Examples:
        embedkit leaks train.parquet test.parquet --threshold 0.97
        embedkit leaks train.parquet test.parquet --threshold 0.97 --fail-over 0.001 --quiet
    """
    from embedkit.analysis.leaks import find_leaks

    found = find_leaks(train, test, threshold)
    if as_json:
        rows = [
            {"test": leak.test, "train": leak.train, "cosine": round(leak.cosine, 6)} for leak in found.found
        ]
        print_json({"threshold": threshold, "tested": found.tested, "rate": found.rate, "leaks": rows})
    else:
        listed = ((leak.test, leak.train, leak.cosine) for leak in found.found)
        print_table([Id("test"), Id("train"), Number("cosine", ".4f")], listed)
    tell(
        f"{len(found.found)} of {found.tested} test rows ({found.rate:.3%}) are in the training set "
        f"at a cosine of {threshold:g} or more"
    )
    _check_share(found.rate, fail_over)
