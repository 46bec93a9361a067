"""`embedkit cluster`: clusters of embeddings."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embedkit.cli.inputs import with_token
from embedkit.cli.options import (
    AsJson,
    LocalFilesOnly,
    LookIn,
    Quiet,
    Root,
    Seed,
    Sheet,
    StoredEmbeddings,
    Token,
    choice,
    label,
    output,
)
from embedkit.cli.output import Id, Number, print_json, print_line, print_table, tell, warn
from embedkit.cli.sheet import write_sheet
from embedkit.errors import OutputError

if TYPE_CHECKING:
    from embedkit.analysis.clustering.cluster import Clustering
    from embedkit.analysis.clustering.scores import ClusteringScores
    from embedkit.model.mixture import GaussianMixture


def cluster(
    embeddings: StoredEmbeddings,
    algorithm: Annotated[
        str,
        choice(
            "kmeans", "spherical_kmeans", "hdbscan", "dpmm", help="The last two infer the number of clusters."
        ),
    ] = "kmeans",
    n_clusters: Annotated[
        int | None,
        typer.Option(
            "--n-clusters", "-n", help="Clusters of k-means.", show_default="by the largest mean silhouette"
        ),
    ] = None,
    output: Annotated[Path | None, output("CLUSTERS.parquet", "The cluster of each row.")] = None,
    reduce: Annotated[
        str | None, typer.Option(metavar="pca:N|whiten:N", help="Fewer dimensions first.")
    ] = None,
    label: Annotated[str | None, label("Classes: print ACC, NMI and ARI of the clusters.")] = None,
    min_cluster_size: Annotated[int, typer.Option(min=2, help="Of hdbscan.")] = 5,
    mixture: Annotated[
        str | None,
        typer.Option(help="For dpmm: a zoo entry, or a mixture.safetensors, whose clusters are used."),
    ] = None,
    init_clusters: Annotated[
        int | None, typer.Option(min=1, help="For dpmm: clusters to start from.", show_default="1")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="For dpmm: how readily clusters split.", show_default="10")
    ] = None,
    copy_into: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Copy the images, a folder for each cluster.")
    ] = None,
    link_into: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Link to the images, a folder for each cluster.")
    ] = None,
    draw_sheet: Sheet = None,
    root: Root = None,
    zoo: LookIn = None,
    token: Token = None,
    local_files_only: LocalFilesOnly = False,
    seed: Seed = 0,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Cluster embeddings.

    Prints each cluster's size and the ids nearest to its mean. Images can be copied or linked into one folder per
    cluster; the originals are not changed. In --json, `exemplars` are the ids nearest to the mean, and `noise` counts
    the rows of no cluster.

    Examples:
        embedkit cluster photos.parquet -n 4 -o clusters.parquet
        embedkit cluster photos.parquet --algorithm dpmm --reduce pca:16 --copy-into sorted/
    """
    from embedkit._io.outputs import check_outputs
    from embedkit.analysis.clustering import cluster as clustering
    from embedkit.analysis.clustering import dpmm
    from embedkit.cli.inputs import files_of
    from embedkit.embeddings.table import Embeddings
    from embedkit.images.ids import check_no_image
    from embedkit.workflows.cluster_folders import check_free, cluster_folders

    if copy_into is not None and link_into is not None:
        raise typer.BadParameter("give --copy-into or --link-into, not both")
    outputs = {
        "--output": output,
        "--copy-into": copy_into,
        "--link-into": link_into,
        "--draw-sheet": draw_sheet,
    }
    check_outputs(outputs, {**files_of(embeddings), "--mixture": mixture})
    into = copy_into or link_into
    for option in ("--output", "--draw-sheet"):
        path = outputs[option]
        if into is None or path is None:
            continue
        if Path(os.path.realpath(into)) in Path(os.path.realpath(path)).parents:
            raise OutputError(f"{option}: {path} is in {into}, which holds only images; choose another name")
    config: dpmm.DPMMConfig | None = None
    if init_clusters is not None or alpha is not None:
        usual = dpmm.DPMMConfig()
        config = dpmm.DPMMConfig(
            init_k=usual.init_k if init_clusters is None else init_clusters,
            alpha=usual.alpha if alpha is None else alpha,
        )
    if into is not None:
        check_free(into)  # before the work
    if draw_sheet is not None:
        from embedkit.workflows.faces.parts import originals_of
        from embedkit.workflows.visual import contact_sheet as sheets

        sheets.check_sheet(draw_sheet)
        originals = originals_of(embeddings, root)
    rows = Embeddings.load(embeddings)
    check_no_image(outputs, rows.ids, root)
    classes = rows.label(label) if label is not None else None
    found = clustering.cluster(
        rows,
        algorithm,
        n_clusters,
        reduce=reduce,
        min_cluster_size=min_cluster_size,
        dpmm=config,
        mixture=_mixture(mixture, token) if mixture is not None else None,
        seed=seed,
    )
    scores = found.scores(classes) if classes is not None else None
    if output is not None:
        found.save(output)
        tell(f"the clusters of {len(found.ids)} rows are in {output}")
    if into is not None:
        done = cluster_folders(found, into, link=link_into is not None, root=root)
        what = "links" if link_into is not None else "copies"
        tell(f"{done.images} {what} in {done.folder}")
        if done.missing:
            warn(
                f"{len(done.missing)} images no longer exist or cannot be read "
                f"(the first is {done.missing[0]})"
            )
        if done.outside:
            base = "the working folder" if root is None else root
            warn(
                f"{len(done.outside)} images outside {base} were skipped (the first is "
                f"{done.outside[0]}); name the folder that holds all of them with --root"
            )
    if draw_sheet is not None:
        title = f"{len(found)} clusters of {embeddings} by {algorithm}"
        write_sheet(draw_sheet, title, sheets.sheet_of_clusters(found, seed=seed), originals)
    if as_json:
        print_json(_facts(found, scores))
    else:
        _print_table(found, scores)


def _mixture(name: str, token: str | None) -> GaussianMixture:
    from embedkit.model.mixture import GaussianMixture

    if name.endswith(".safetensors"):
        return GaussianMixture.load(name)
    from embedkit.hub.resolve import find_entry

    return GaussianMixture._of_entry(find_entry(with_token(name, token)))


def _facts(found: Clustering, scores: ClusteringScores | None) -> dict[str, Any]:
    return {
        "algorithm": found.algorithm,
        "parameters": found.parameters,
        "rows": len(found.ids),
        "clusters": [
            {"cluster": number, "size": int(size), "exemplars": found.exemplar_ids(number)}
            for number, size in enumerate(found.sizes)
        ],
        "noise": found.noise,
        "scores": dataclasses.asdict(scores) if scores else None,
    }


def _print_table(found: Clustering, scores: ClusteringScores | None) -> None:
    rows: list[tuple[object, ...]] = [
        (number, int(size), size / len(found.ids), ", ".join(found.exemplar_ids(number)))
        for number, size in enumerate(found.sizes)
    ]
    if found.noise:
        rows.append(("noise", found.noise, found.noise / len(found.ids), None))
    print_table([Number("cluster"), Number("rows"), Number("share", ".1%"), Id("nearest to its mean")], rows)
    if scores is not None:
        print_line("")
        print_table(
            ["score", Number("value", ".4f")], [("ACC", scores.acc), ("NMI", scores.nmi), ("ARI", scores.ari)]
        )
        tell(f"the scores are of {scores.classes} classes and {scores.rows} labeled rows")
