"""A map of embeddings as one HTML file that opens from the disk, without a network.

Rows are placed in the plane by UMAP (Uniform Manifold Approximation and Projection, McInnes, Healy and Melville 2018,
arXiv 1802.03426) on 50 principal components of the unit vectors if umap-learn is installed, else by the first two
principal components. Neighbors are exact, by cosine in the full space, since distances on a map can mislead.

The page is `assets/atlas.*` with d3 (7.9.2, ISC license, unchanged) for pan, zoom and look-up, and a plain canvas.
Every atlas contains its library: d3 takes 281 kB, pixi.js (8.22) 841 kB and deck.gl (9.4) 2.1 MB; regl-scatterplot
(1.16) takes 111 kB and draws points, not images. These three also need WebGL; a 2-D canvas draws the few hundred
images that fit, or 5,000 points, in 16 to 18 ms without a GPU.
"""

from __future__ import annotations

import base64
import hashlib
import html
import importlib.resources
import io
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from embedkit._io.atomic import replacing
from embedkit._io.optional import requires
from embedkit._io.outputs import check_outputs
from embedkit.analysis.clustering.reduction import fit_reduction
from embedkit.analysis.similarity import SMALL, top_k, without_own
from embedkit.analysis.vectors import Rows
from embedkit.embeddings.table import Embeddings
from embedkit.errors import ConfigError, MissingDependencyError, OutputError
from embedkit.images.ids import check_no_image
from embedkit.images.originals import Originals, nothing_readable
from embedkit.workflows.visual.contact_sheet import common_folder, visible
from embedkit.workflows.visual.groups import Groups
from embedkit.workflows.visual.thumbnails import thumbnails

__all__ = ["MAPS", "Atlas", "check_atlas", "project", "write_atlas"]

MAPS = ("auto", "umap", "pca")
#: Default number of images on an atlas.
MOST = 5000
#: The longer side of a thumbnail in pixels, by how many there are at most: 5,000 photographs take about 15 MB.
EDGES = ((1000, 128), (6000, 96), (15_000, 64), (50_000, 48))
#: Thumbnails in a row and in a column of one sheet.
ACROSS = 16
#: Neighbors of each image.
DEPTH = 12
#: Number of components for UMAP.
COMPONENTS = 50
#: Greatest length of a group's name; longer ones are truncated.
LONGEST = 60


@dataclass(frozen=True)
class Atlas:
    """The atlas that was written.

    Attributes:
        path: The file.
        images: Number of images on it.
        rows: Number of rows of the embeddings.
        map: `umap` or `pca`.
        size: Bytes of the file.
        missing: Names of the images that could not be read.
    """

    path: Path
    images: int
    rows: int
    map: str
    size: int
    missing: list[str] = field(default_factory=list)


def check_atlas(path: str | os.PathLike[str]) -> None:
    """Refuse an output that cannot be written, before the work starts.

    Raises:
        ConfigError: The name does not end in .html.
        OutputError: Its folder does not exist, or it is a folder itself.
    """
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"output: expected a name that ends in .html, found {str(path)!r}")
    if os.path.isdir(path):
        raise OutputError(f"{path} is a folder; give the name of a file in it")
    if not os.path.isdir(path.absolute().parent):
        raise OutputError(f"the folder {path.absolute().parent} does not exist; create it first")


def write_atlas(
    source: str | os.PathLike[str] | Embeddings,
    path: str | os.PathLike[str],
    *,
    originals: Originals | None = None,
    groups: Groups | None = None,
    limit: int = MOST,
    method: str = "auto",
    title: str | None = None,
    seed: int = 0,
    threads: int | None = None,
) -> Atlas:
    """Write an atlas atomically.

    Args:
        source: A file or a folder of embeddings.
        path: `X.html`.
        originals: Where the images come from; ids as paths from the working folder when None.
        groups: The groups that color the images; none when None.
        limit: Greatest number of images; more are sampled by the seed.
        method: `umap`, `pca`, or `auto`: UMAP when it is installed.
        title: Of the page; the source's name when None.
        seed: Of the sample and of UMAP.
        threads: Number of threads for thumbnails; all cores when None.

    Raises:
        ConfigError: No row, an unknown method, or more than 50,000 images.
        SourceError: None of the images can be read.
        OutputError: The file cannot be written, is one of the images, or the embeddings cannot be read.
        MissingDependencyError: `umap` is requested and not installed.

    Examples:
        >>> atlas = embedkit.write_atlas("samples.parquet", "samples.html", method="pca")
        >>> atlas.images, atlas.missing
        (10, [])
    """
    check_atlas(path)
    path = Path(path)
    if not 1 <= limit <= EDGES[-1][0]:
        raise ConfigError(f"limit: expected 1 to {EDGES[-1][0]:,} images, found {limit:,}")
    _check_map(method)
    originals = originals or Originals()
    if isinstance(source, (str, os.PathLike)):
        check_outputs({"the atlas": path}, {"the embeddings": source})
    rows = Rows(source)
    names, total = rows.names(), len(rows)
    check_no_image({"the atlas": path}, names, originals.root)
    chosen = np.arange(total)
    if total > limit:
        chosen = np.sort(np.random.default_rng(seed).choice(total, limit, replace=False))
        names = [names[row] for row in chosen.tolist()]
    vectors = rows.take(chosen)
    points, used = project(vectors, method, seed=seed)
    count = len(names)
    edge = next(edge for limit, edge in EDGES if count <= limit)
    near, cosines = _neighbors(vectors, min(DEPTH, count - 1))
    if title is None:
        title = Path(source).name if isinstance(source, (str, os.PathLike)) else "Atlas"
    entry = f" of {rows.metadata.entry}" if rows.metadata else ""
    prefix = common_folder(names)
    shown = f"{count:,} of {total:,} images, uniformly drawn" if count < total else f"{count:,} images"
    how = "UMAP" if used == "umap" else "their first two principal components"
    data = {
        "facts": f"{shown}; embeddings{entry}, placed by {how}. Similar images are found by cosine, not by the map."
        + (f" Names are relative to {visible(prefix)}" if prefix else ""),
        "names": [visible(name.removeprefix(prefix)) for name in names],
        **{axis: _base64(column, "<u2") for axis, column in zip("xy", _on_grid(points).T, strict=True)},
        "neighbors": _base64(near, "<u4"),
        "cosines": _base64(np.round(cosines * 10_000), "<i2"),
        "depth": near.shape[1],
        "edge": edge,
        "across": ACROSS,
        **_grouped(groups, names),
    }
    missing: list[str] = []
    sizes = np.zeros((count, 2), np.uint8)

    def sheets() -> Iterator[str]:
        small = thumbnails(names, originals, edge=edge, threads=threads)
        reason = ""
        for first in range(0, count, ACROSS * ACROSS):
            sheet = Image.new("RGB", (ACROSS * edge, ACROSS * edge), "white")
            for cell, one in enumerate(islice(small, ACROSS * ACROSS)):
                sheet.paste(one.image, (cell % ACROSS * edge, cell // ACROSS * edge))
                sizes[first + cell] = one.image.size
                if one.fault:
                    missing.append(one.name)
                    reason = reason or one.fault
            if len(missing) == count:
                raise nothing_readable(count, missing[0], reason)
            file = io.BytesIO()
            sheet.crop((0, 0, ACROSS * edge, -(-min(count - first, ACROSS**2) // ACROSS) * edge)).save(
                file, "WEBP", quality=75, method=2
            )
            yield f'<img alt="" src="data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}">\n'

    with replacing(path) as page:

        def write(text: str) -> None:
            page.write(text.encode())

        for kind, text in _pieces():
            if kind == "title":
                write(html.escape(visible(title)))
            elif kind == "sheets":
                for sheet in sheets():
                    write(sheet)
            elif kind == "data":  # the sizes are known once the sheets are written
                write(_json({**data, "sizes": _base64(sizes, "u1")}))
            else:
                write(text)
    return Atlas(path, count, total, used, path.stat().st_size, missing)


def project(vectors: np.ndarray, method: str = "auto", *, seed: int = 0) -> tuple[np.ndarray, str]:
    """Project unit vectors to the plane.

    Args:
        vectors: float32 (N, D), of length 1.
        method: `umap`, `pca`, or `auto`: UMAP when it is installed and there are enough rows.
        seed: Of UMAP.

    Returns:
        float64 (N, 2), and what was used: `umap` or `pca`.

    Raises:
        ConfigError: Another method.
        MissingDependencyError: `umap` is requested and not installed.
    """
    _check_map(method)
    count, width = vectors.shape
    if count < 3 or width < 2 or np.array_equal(vectors, np.broadcast_to(vectors[0], vectors.shape)):
        return np.column_stack(
            [np.arange(count), np.zeros(count)]
        ), "pca"  # nothing to project: place them side by side
    umap = None if method == "pca" or (method == "auto" and count < 20) else _umap(method)
    if umap is None:
        return fit_reduction(vectors, "pca", 2).apply(vectors).astype(np.float64), "pca"
    points = vectors
    if COMPONENTS < min(width, count - 1):
        points = fit_reduction(vectors, "pca", COMPONENTS).apply(vectors)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about threads, versions, isolated rows: users cannot act on them
        model = umap.UMAP(n_neighbors=min(15, count - 1), min_dist=0.15, random_state=seed, n_jobs=1)
        placed = np.asarray(model.fit_transform(points), np.float64)
    # UMAP does not place a row without connections; put it beside the others.
    lost = ~np.isfinite(placed).all(1)
    placed[lost] = placed[~lost].min(0) if (~lost).any() else 0
    return _spread(placed), "umap"


def _check_map(method: str) -> None:
    if method not in MAPS:
        raise ConfigError(f"map: expected one of {', '.join(MAPS)}, found {method!r}")


def _spread(points: np.ndarray) -> np.ndarray:
    """The mean of the points and their ranks on each axis, in [0, 1].

    UMAP's distances between groups mean little, and a few distant groups would push all others into a corner.
    """
    low, high = points.min(0), points.max(0)
    share = (points - low) / np.where(high > low, high - low, 1)
    ranks = points.argsort(0, kind="stable").argsort(0, kind="stable") / max(1, len(points) - 1)
    result: np.ndarray = (share + ranks) / 2
    return result


def _umap(method: str) -> Any:
    try:
        with warnings.catch_warnings(), requires("map='umap'", package="umap-learn"):
            warnings.simplefilter("ignore")
            import umap
    except MissingDependencyError:
        if method == "auto":
            return None
        raise
    return umap


def _neighbors(vectors: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows int64 (N, depth) and cosines float32 (N, depth) of the nearest, exactly."""
    count = len(vectors)
    if not depth:
        return np.zeros((count, 0), np.int64), np.zeros((count, 0), np.float32)
    base = Rows(vectors)
    size = max(1, SMALL // count)  # small enough for numpy
    near, found = [], []
    for start in range(0, count, size):
        own = np.arange(start, min(start + size, count))
        cosines, rows = without_own(*top_k(base.unit(start, start + size), base, depth + 1), own)
        near.append(rows)
        found.append(cosines)
    return np.concatenate(near), np.concatenate(found)


def _on_grid(points: np.ndarray) -> np.ndarray:
    """Points in whole numbers of 0..65535, both axes at one scale."""
    low = points.min(0)
    span = float((points.max(0) - low).max())
    result: np.ndarray = np.round((points - low) * (65_535 / span if span > 0 else 0))
    return result


def _grouped(groups: Groups | None, names: Sequence[str]) -> dict[str, Any]:
    """The groups of the shown rows, the largest first, rows without a group last."""
    if groups is None:
        return {"grouping": "", "groups": [], "group": _base64(np.zeros(len(names)), "<u2")}
    mine = [groups.of.get(name) for name in names]
    sizes = Counter(value for value in mine if value is not None)
    whole = Counter(groups.of.values())  # the order must not depend on the sample
    if len(sizes) > 1000:
        raise ConfigError(
            f"{groups.title}: {len(sizes):,} different values are too many colors; use clusters, or a "
            "column of at most 1,000"
        )
    ordered = sorted(sizes, key=lambda value: (-whole[value], value))
    number: dict[str | None, int] = {value: at for at, value in enumerate(ordered)}
    number[None] = len(ordered)
    listed = [{"name": visible(value[:LONGEST]), "size": sizes[value], "plain": False} for value in ordered]
    if none := mine.count(None):
        listed.append({"name": groups.none, "size": none, "plain": True})
    codes = np.array([number[value] for value in mine])
    return {"grouping": visible(groups.title), "groups": listed, "group": _base64(codes, "<u2")}


def _base64(values: np.ndarray, kind: str) -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype=kind).tobytes()).decode()


def _json(value: object) -> str:
    """JSON that cannot close the script element around it."""
    return json.dumps(value).replace("<", "\\u003c")


def _pieces() -> Iterator[tuple[str, str]]:
    """The page in pieces: (kind, text); a piece that the caller fills in has no text.

    The policy allows only these scripts and this style, by their hashes. The template is split at its placeholders
    once, so inserted text is never taken for a placeholder.
    """
    assets = importlib.resources.files("embedkit.workflows.visual") / "assets"
    texts = {
        "style": (assets / "atlas.css").read_text("utf-8"),
        "library": (assets / "d3.min.js").read_text("utf-8"),
        "script": (assets / "atlas.js").read_text("utf-8"),
    }
    hashes = {
        kind: f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for kind, text in texts.items()
    }
    texts["policy"] = (
        f"default-src 'none'; img-src data:; style-src {hashes['style']}; "
        f"script-src {hashes['library']} {hashes['script']}"
    )
    parts = re.split(r"\{\{(\w+)\}\}", (assets / "atlas.html").read_text("utf-8"))
    for at, part in enumerate(parts):
        yield ("text", part) if at % 2 == 0 else (part, texts.get(part, ""))
