"""`embedkit atlas`: a map of the images, as one file for a browser."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from embedkit.cli.options import Root, StoredEmbeddings
from embedkit.cli.terminal import tell


def atlas(
    embeddings: StoredEmbeddings,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="ATLAS.html", help="The file to write.")
    ] = Path("atlas.html"),
    clusters: Annotated[
        Path | None,
        typer.Option(metavar="CLUSTERS.parquet", help="Color by what `embedkit cluster -o` wrote."),
    ] = None,
    label: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Color by a label column of the embeddings.")
    ] = None,
    root: Root = None,
    most: Annotated[int, typer.Option(min=1, help="Images that are shown; of more, an even sample.")] = 5000,
    method: Annotated[
        str, typer.Option("--map", help="umap, pca, or auto: UMAP when umap-learn is installed.")
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Of the sample and of UMAP.")] = 0,
) -> None:
    """Draw a map of the images, similar ones side by side, as one HTML file that needs no network.

    Zoom and move it, click an image for the most similar ones, search by name, color by cluster or label.
    """
    if clusters is not None and label is not None:
        raise typer.BadParameter("give --clusters or --label, not both")
    from embedkit._io.outputs import check_outputs
    from embedkit.cli.inputs import files_of
    from embedkit.images.originals import Originals
    from embedkit.workflows.visual import atlas as library
    from embedkit.workflows.visual import groups as colors

    check_outputs({"--output": output}, {**files_of(embeddings), "--clusters": clusters})
    library.check_atlas(output)
    originals = Originals(root)
    groups = None
    if clusters is not None:
        groups = colors.groups_of_clusters(embeddings, clusters)
    elif label is not None:
        groups = colors.groups_of_labels(embeddings, label)
    if method != "pca" and importlib.util.find_spec("umap") is not None:
        tell("placing the images by UMAP; 5,000 take about a minute")
    done = library.write_atlas(
        embeddings, output, originals=originals, groups=groups, most=most, method=method, seed=seed
    )
    of = f" of {done.rows}, evenly drawn" if done.images < done.rows else ""
    how = "UMAP" if done.map == "umap" else "PCA"
    if method == "auto" and done.map == "pca":
        how += " (`pip install umap-learn` places many images better)"
    tell(f"{done.path} shows {done.images} images{of}, placed by {how}; {done.size / 1e6:.1f} MB")
    if done.missing:
        tell(
            f"warning: {len(done.missing)} images cannot be read (the first is "
            f"{done.missing[0]}); --root names the folder that ids are relative to"
        )
