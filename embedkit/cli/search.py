"""`embedkit search`: the most similar images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from embedkit.cli.inputs import with_token
from embedkit.cli.options import (
    AsJson,
    Device,
    LocalFilesOnly,
    LookIn,
    OptionalEncoderName,
    OptionalNeighbors,
    Quiet,
    Root,
    Sheet,
    Threads,
    Token,
)
from embedkit.cli.output import Id, Number, print_json, print_table, tell
from embedkit.cli.sheet import write_sheet
from embedkit.errors import OutputError


def search(
    query: Annotated[list[str], typer.Argument(metavar="QUERY", help="Images, or ids of the embeddings.")],
    source: Annotated[
        str,
        typer.Argument(
            metavar="EMB|INDEX", help="A file or a folder of embeddings, lance://FOLDER/TABLE, or an index."
        ),
    ],
    neighbors: OptionalNeighbors = None,
    encoder: OptionalEncoderName = None,
    cache_index: Annotated[
        Path | None,
        typer.Option(
            "--cache-index",
            metavar="FILE",
            help="Keep an index in this file if there are so many embeddings that it pays off.",
        ),
    ] = None,
    draw_sheet: Sheet = None,
    root: Root = None,
    zoo: LookIn = None,
    token: Token = None,
    local_files_only: LocalFilesOnly = False,
    device: Device = "auto",
    threads: Threads = "auto",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Print the rows most similar to each query.

    The encoder that made the embeddings embeds query images; another one is refused.

    Examples:
        embedkit search cat.jpg photos.parquet -k 5
        embedkit search holiday/*.jpg photos.parquet --draw-sheet found.html
    """
    from embedkit._io.outputs import check_outputs
    from embedkit.cli.inputs import files_of
    from embedkit.images.ids import check_no_image
    from embedkit.workflows.faces.parts import originals_of
    from embedkit.workflows.search import cached_index, open_index
    from embedkit.workflows.search import search as find
    from embedkit.workflows.visual import contact_sheet as sheets

    outputs = {"--cache-index": cache_index, "--draw-sheet": draw_sheet}
    check_outputs(
        outputs, {**files_of(source), **{f"the query {one!r}": one.partition("::")[0] for one in query}}
    )
    originals = originals_of(source, root)
    if draw_sheet is not None:
        sheets.check_sheet(draw_sheet)  # before the work
    if cache_index is None:
        try:
            base = open_index(source)
        except OutputError:
            _check_order(query, source)
            raise
    else:
        base, cached = cached_index(source, cache_index)
        where = (
            f"cached in {cache_index}"
            if cached
            else f"exact search is fast enough, so {cache_index} is not written"
        )
        tell(f"{base.kind} index of {len(base)} rows; {where}")
    check_no_image({"--draw-sheet": draw_sheet}, base.names, root)
    if base.recall < 1 or base.kind in ("ivf", "hnsw"):
        tell(f"approximate: {base.recall:.1%} of the true 10 nearest were found at building")
    most = len(base) - (not set(query).isdisjoint(base.names))  # a row is not its own match
    if neighbors is not None and neighbors > most > 0:
        tell(f"{source} has {most} rows to find, fewer than -k {neighbors}; all are printed")
        neighbors = most
    found = find(
        base,
        query,
        neighbors,
        encoder=with_token(encoder, token),
        device=device,
        threads=threads,
    )
    if draw_sheet is not None:
        write_sheet(draw_sheet, f"Most similar in {source}", sheets.sheet_of_matches(found), originals)
    if as_json:
        matches = [
            {
                "query": one.query,
                "is_row": one.is_row,
                "found": [{"id": hit.name, "cosine": round(hit.cosine, 6)} for hit in one.found],
            }
            for one in found
        ]
        print_json({"kind": base.kind, "recall": base.recall, "matches": matches})
    else:
        rows = ((one.query, hit.name, hit.cosine) for one in found for hit in one.found)
        print_table([Id("query"), Id("id"), Number("cosine", ".4f")], rows)


def _check_order(query: list[str], source: str) -> None:
    """Refuse embeddings among the queries: what comes last was opened as embeddings, and is none."""
    from embedkit.embeddings.formats import FORMATS

    found = next((one for one in query if any(form.recognizes(one) for form in FORMATS)), None)
    if found is not None:
        raise typer.BadParameter(f"embeddings come last: embedkit search {source} {found}")
