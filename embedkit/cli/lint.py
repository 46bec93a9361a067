"""`embedkit lint`: checks of a file of embeddings."""

from __future__ import annotations

from typing import Annotated

import typer

from embedkit.cli.options import AsJson, Neighbors, Quiet, Seed, StoredEmbeddings, Threshold
from embedkit.cli.output import print_json, print_table, tell


def lint(
    embeddings: StoredEmbeddings,
    neighbors: Neighbors = 10,
    threshold: Threshold = 0.99,
    seed: Seed = 0,
    fail_on_warning: Annotated[
        bool, typer.Option("--fail-on-warning", help="Exit with status 3 when there is a warning.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Check embeddings without labels.

    The checks are effective rank, collapse, uniformity, hubs, dead dimensions and near-duplicates.

    Examples:
        embedkit lint photos.parquet
        embedkit lint photos.parquet --fail-on-warning --json > lint.json
    """
    from embedkit.analysis.lint import lint as run

    found = run(embeddings, neighbors=neighbors, threshold=threshold, seed=seed)
    if as_json:
        print_json(found.to_json())
    else:
        rows = (
            ("ok" if check.ok else "WARNING", check.name.replace("_", " "), check.words)
            for check in found.checks
        )
        print_table(["result", "check", "found"], rows)
    tell(f"{found.rows} rows of {found.dim}; metrics of {found.sample}")
    if fail_on_warning and found.warnings:
        raise typer.Exit(3)
