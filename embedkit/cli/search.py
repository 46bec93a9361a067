"""`embedkit search`: the most similar images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from embedkit._io.text import safe_for_terminal
from embedkit.cli.options import AsJson, Device, SheetRoot, Threads
from embedkit.cli.sheet import write_sheet
from embedkit.cli.terminal import tell


def search(
    query: Annotated[list[str], typer.Argument(metavar="QUERY...", help="Images, or ids of the embeddings.")],
    source: Annotated[
        str,
        typer.Argument(
            metavar="EMB|INDEX", help="A file or a folder of embeddings, lance://FOLDER/TABLE, or an index."
        ),
    ],
    k: Annotated[
        int | None, typer.Option("-k", min=1, help="How many for each query.", show_default="10")
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            help="Embeds query images: a zoo name or an entry's folder.",
            show_default="the one that made the embeddings",
        ),
    ] = None,
    index: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Cache an index here if there are so many embeddings that it pays off."
        ),
    ] = None,
    sheet: Annotated[
        Path | None, typer.Option(metavar="OUT.html|OUT.png", help="Draw a contact sheet of the matches.")
    ] = None,
    root: SheetRoot = None,
    device: Device = "auto",
    threads: Threads = "auto",
    as_json: AsJson = False,
) -> None:
    """Print the rows most similar to each query: the query, the id and the cosine, separated by tabs.

    The encoder that made the embeddings embeds query images; another one is refused.
    """
    from embedkit._io.outputs import check_outputs
    from embedkit.cli.inputs import files_of
    from embedkit.images.ids import check_no_image
    from embedkit.images.originals import Originals
    from embedkit.workflows.search import cached_index, open_index
    from embedkit.workflows.search import search as find
    from embedkit.workflows.visual import contact_sheet as sheets

    outputs = {"--index": index, "--sheet": sheet}
    check_outputs(
        outputs, {**files_of(source), **{f"the query {one!r}": one.partition("::")[0] for one in query}}
    )
    originals = Originals(root)
    if sheet is not None:
        sheets.check_sheet(sheet)  # before the work
    if index is None:
        base = open_index(source)
    else:
        base, cached = cached_index(source, index)
        where = f"cached in {index}" if cached else f"exact search is fast enough, so {index} is not written"
        tell(f"{base.kind} index of {len(base)} rows; {where}")
    check_no_image({"--sheet": sheet}, base.names, root)
    if base.recall < 1 or base.kind in ("ivf", "hnsw"):
        tell(f"approximate: {base.recall:.1%} of the true 10 nearest were found at building")
    found = find(base, query, k, encoder=encoder, device=device, threads=threads)
    if sheet is not None:  # before the table: its reader may stop early, as `head` does
        write_sheet(sheet, f"Most similar in {source}", sheets.sheet_of_matches(found), originals)
    if as_json:
        lines = [
            {
                "query": one.query,
                "is_row": one.is_row,
                "found": [{"id": hit.name, "cosine": round(hit.cosine, 6)} for hit in one.found],
            }
            for one in found
        ]
        print(json.dumps({"kind": base.kind, "recall": base.recall, "matches": lines}))
    else:
        for one in found:
            for hit in one.found:
                print(f"{safe_for_terminal(one.query)}\t{safe_for_terminal(hit.name)}\t{hit.cosine:.4f}")
