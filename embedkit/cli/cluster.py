"""`embedkit cluster`: clusters of embeddings."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embedkit._io.text import safe_for_terminal
from embedkit.cli.options import AsJson, Root, StoredEmbeddings
from embedkit.cli.sheet import write_sheet
from embedkit.cli.terminal import tell
from embedkit.errors import OutputError

if TYPE_CHECKING:
    from embedkit.analysis.clustering.cluster import Clustering
    from embedkit.analysis.clustering.scores import ClusteringScores
    from embedkit.model.mixture import GaussianMixture


def cluster(
    embeddings: StoredEmbeddings,
    method: Annotated[
        str, typer.Option(help="kmeans, spherical_kmeans, hdbscan or dpmm; the last two infer K.")
    ] = "kmeans",
    k: Annotated[
        int | None,
        typer.Option("-k", help="Clusters of k-means.", show_default="by the largest mean silhouette"),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="CLUSTERS.parquet", help="Write the clusters.")
    ] = None,
    reduce: Annotated[
        str | None, typer.Option(metavar="pca:N|whiten:N", help="Fewer dimensions first.")
    ] = None,
    labels: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="LabeledImages classes: print ACC, NMI and ARI.")
    ] = None,
    min_cluster_size: Annotated[int, typer.Option(min=2, help="Of hdbscan.")] = 5,
    mixture: Annotated[
        str | None,
        typer.Option(help="For dpmm: a zoo entry, or a mixture.safetensors, whose clusters are used."),
    ] = None,
    init_k: Annotated[
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
    sheet: Annotated[
        Path | None,
        typer.Option(metavar="OUT.html|OUT.png", help="Draw a contact sheet: some images of each cluster."),
    ] = None,
    root: Root = None,
    seed: Annotated[int, typer.Option(help="Of starts, samples and chains.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Cluster embeddings, and print each cluster's size and the ids nearest to its mean.

    Images can be copied or linked into one folder per cluster; the originals are not changed.
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
    outputs = {"--output": output, "--copy-into": copy_into, "--link-into": link_into, "--sheet": sheet}
    check_outputs(outputs, {**files_of(embeddings), "--mixture": mixture})
    into = copy_into or link_into
    for option in ("--output", "--sheet"):
        path = outputs[option]
        if into is not None and path is not None and into.resolve() in path.resolve().parents:
            raise OutputError(f"{option}: {path} is in {into}, which holds only images; choose another name")
    config: dpmm.DPMMConfig | None = None
    if init_k is not None or alpha is not None:
        usual = dpmm.DPMMConfig()
        config = dpmm.DPMMConfig(
            init_k=usual.init_k if init_k is None else init_k,
            alpha=usual.alpha if alpha is None else alpha,
        )
    if into is not None:
        check_free(into)  # before the work
    if sheet is not None:
        from embedkit.images.originals import Originals
        from embedkit.workflows.visual import contact_sheet as sheets

        sheets.check_sheet(sheet)
        originals = Originals(root)
    rows = Embeddings.load(embeddings)
    check_no_image(outputs, rows.ids, root)
    classes = rows.label(labels) if labels is not None else None
    found = clustering.cluster(
        rows,
        method,
        k,
        reduce=reduce,
        min_cluster_size=min_cluster_size,
        dpmm=config,
        mixture=_mixture(mixture) if mixture is not None else None,
        seed=seed,
    )
    scores = found.scores(classes) if classes is not None else None
    # Files first: the reader of the table may stop early, as `head` does.
    if output is not None:
        found.save(output)
        tell(f"the clusters of {len(found.ids)} rows are in {output}")
    if into is not None:
        done = cluster_folders(found, into, link=link_into is not None, root=root)
        what = "links" if link_into is not None else "copies"
        tell(f"{done.images} {what} in {done.folder}")
        if done.missing:
            tell(
                f"warning: {len(done.missing)} images no longer exist or cannot be read "
                f"(the first is {done.missing[0]})"
            )
        if done.outside:
            base = "the working folder" if root is None else root
            tell(
                f"warning: {len(done.outside)} images outside {base} were skipped (the first is "
                f"{done.outside[0]}); name the folder that holds all of them with --root"
            )
    if sheet is not None:
        title = f"{len(found)} clusters of {embeddings} by {method}"
        write_sheet(sheet, title, sheets.sheet_of_clusters(found, seed=seed), originals)
    if as_json:
        print(json.dumps(_facts(found, scores), indent=1))
    else:
        _print_table(found, scores)


def _mixture(name: str) -> GaussianMixture:
    from embedkit.model.mixture import GaussianMixture

    if name.endswith(".safetensors"):
        return GaussianMixture.load(name)
    from embedkit.hub.resolve import find_entry

    return GaussianMixture._of_entry(find_entry(name))


def _facts(found: Clustering, scores: ClusteringScores | None) -> dict[str, Any]:
    return {
        "method": found.method,
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
    rows = len(found.ids)
    print(f"{'cluster':>7}  {'size':>9}  {'share':>6}  nearest to its mean")
    for number, size in enumerate(found.sizes):
        names = ", ".join(map(safe_for_terminal, found.exemplar_ids(number)))
        print(f"{number:>7}  {size:>9}  {size / rows:>6.1%}  {names}")
    if found.noise:
        print(f"{'noise':>7}  {found.noise:>9}  {found.noise / rows:>6.1%}")
    if scores is not None:
        print(
            f"ACC {scores.acc:.4f}  NMI {scores.nmi:.4f}  ARI {scores.ari:.4f}  "
            f"({scores.classes} classes, {scores.rows} labeled rows)"
        )
