"""`embedkit lint`: checks of a file of embeddings."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from embedkit._io.text import safe_for_terminal
from embedkit.cli.options import AsJson, StoredEmbeddings
from embedkit.cli.terminal import tell


def lint(
    embeddings: StoredEmbeddings,
    k: Annotated[int, typer.Option("-k", min=1, help="Neighbors whose occurrences are counted.")] = 10,
    near_duplicate: Annotated[
        float, typer.Option(min=-1.0, max=1.0, help="Cosine from which on rows are near-duplicates.")
    ] = 0.99,
    seed: Annotated[int, typer.Option(help="Of the samples of a large file.")] = 0,
    fail_on_warning: Annotated[
        bool, typer.Option("--fail-on-warning", help="Exit with status 3 when there is a warning.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check embeddings without labels: effective rank, collapse, uniformity, hubs, dead dimensions, duplicates."""
    from embedkit.analysis.lint import lint as run

    found = run(embeddings, k=k, near_duplicate=near_duplicate, seed=seed)
    if as_json:
        print(json.dumps(found.to_json(), indent=1))
    else:
        for check in found.checks:
            verdict = "ok" if check.ok else "WARNING"
            print(f"{verdict:<7}  {check.name.replace('_', ' '):<15}  {safe_for_terminal(check.words)}")
        tell(f"{found.rows} rows of {found.dim}; metrics of {found.sample}")
    if fail_on_warning and found.warnings:
        raise typer.Exit(3)
