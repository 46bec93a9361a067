"""`embedkit atlas`: a map of the images, as one file for a browser."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from embedkit.cli.options import AsJson, Limit, Quiet, Root, Seed, StoredEmbeddings, choice, label, output
from embedkit.cli.output import print_json, tell, warn


def atlas(
    embeddings: StoredEmbeddings,
    output: Annotated[Path, output("ATLAS.html", "The map.")] = Path("atlas.html"),
    clusters: Annotated[
        Path | None,
        typer.Option(metavar="CLUSTERS.parquet", help="Color by what `embedkit cluster -o` wrote."),
    ] = None,
    label: Annotated[str | None, label("Color by this label.")] = None,
    root: Root = None,
    limit: Limit = 5000,
    method: Annotated[
        str, choice("auto", "umap", "pca", name="--map", help="auto: UMAP when umap-learn is installed.")
    ] = "auto",
    seed: Seed = 0,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Draw a map of the images, similar ones side by side.

    The map is one HTML file that needs no network. Zoom and move it, click an image for the most similar ones, search
    by name, color by cluster or label. Of more images than --limit an even sample is shown.

    Examples:
        embedkit atlas photos.parquet -o atlas.html
        embedkit atlas photos.parquet --clusters clusters.parquet --map pca
    """
    if clusters is not None and label is not None:
        raise typer.BadParameter("give --clusters or --label, not both")
    from embedkit._io.outputs import check_outputs
    from embedkit.cli.inputs import files_of
    from embedkit.workflows.faces.parts import originals_of
    from embedkit.workflows.visual import atlas as library
    from embedkit.workflows.visual import groups as colors

    check_outputs({"--output": output}, {**files_of(embeddings), "--clusters": clusters})
    library.check_atlas(output)
    originals = originals_of(embeddings, root)
    groups = None
    if clusters is not None:
        groups = colors.groups_of_clusters(embeddings, clusters)
    elif label is not None:
        groups = colors.groups_of_labels(embeddings, label)
    if method in ("auto", "umap") and importlib.util.find_spec("umap") is not None:
        tell("placing the images by UMAP; 5,000 take about a minute")
    done = library.write_atlas(
        embeddings, output, originals=originals, groups=groups, limit=limit, method=method, seed=seed
    )
    of = f" of {done.rows}, evenly drawn" if done.images < done.rows else ""
    how = "UMAP" if done.map == "umap" else "PCA"
    if method == "auto" and done.map == "pca":
        how += " (`pip install umap-learn` places many images better)"
    tell(f"{done.path} shows {done.images} images{of}, placed by {how}; {done.size / 1e6:.1f} MB")
    if as_json:
        print_json(dataclasses.asdict(done))
    if done.missing:
        warn(
            f"{len(done.missing)} images cannot be read (the first is "
            f"{done.missing[0]}); --root names the folder that ids are relative to"
        )
