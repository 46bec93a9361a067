"""Search, duplicates and clusters side by side with faiss used directly, scikit-learn and imagededup's way.

    python benchmarks/analysis.py [--rows 200000] [--parts knn duplicates ...] [--json OUT.json]    the tables
    python benchmarks/analysis.py --full                     1,000,000 rows once, embedkit alone

Every run is a fresh process that maps the rows, reads them once, and times its own job, imports left out; rounds
are interleaved and their order rotates, and medians are given. Peak memory is the process's peak resident set, rows
and imports included. Rows are float32, unit length, around 1,000 centres, and 1 in 50 is a near copy of another
one; what each contender finds is compared, so that a fast wrong answer does not count.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

K = 10
THRESHOLD = 0.97
CLUSTERS = 100

Found = dict[str, float]


# --- rows ---------------------------------------------------------------------------------------------------


def embeddings(count: int, dim: int, folder: Path) -> Path:
    """Rows as an encoder might give them, written once."""
    path = folder / f"rows-{count}x{dim}.npy"
    if path.exists():
        return path
    rng = np.random.default_rng(0)
    centres = rng.normal(0, 1, (1000, dim)).astype(np.float32)
    aside = path.with_suffix(".tmp")
    rows = np.lib.format.open_memmap(aside, "w+", np.dtype("<f4"), (count, dim))
    for start in range(0, count, 1 << 16):
        block = centres[rng.integers(0, len(centres), min(1 << 16, count - start))]
        block = block + rng.normal(0, 0.7, block.shape).astype(np.float32)
        copies = rng.choice(len(block) // 2, len(block) // 50, replace=False)
        block[len(block) - 1 - copies] = block[copies] + rng.normal(0, 0.05, (len(copies), dim))
        rows[start : start + len(block)] = block / np.linalg.norm(block, axis=1, keepdims=True)
    rows.flush()
    os.replace(aside, path)
    return path


def gaussians(folder: Path) -> Path:
    """10,000 points of 15 equal Gaussians in the plane, on a grid of 3 x 5 means; labels in the last column."""
    path = folder / "gaussians-15.npy"
    rng = np.random.default_rng(0)
    means = np.array([(x, y) for x in (-5, 0, 5) for y in (-5, -3, 0, 3, 5)], float)
    labels = rng.integers(0, 15, 10_000)
    roots = [0.5 * np.eye(2) + rng.uniform(-0.3, 0.2, (2, 2)) for _ in means]
    points = np.stack([means[label] + roots[label] @ rng.normal(0, 1, 2) for label in labels])
    np.save(path, np.concatenate([points, labels[:, None]], 1))
    return path


# --- contenders ---------------------------------------------------------------------------------------------
# Each gives a function that does the job on the rows and says what it found; what is imported before it returns
# is not timed.


def knn_embedkit() -> Callable[[np.ndarray], Found]:
    from embedkit.analysis.similarity import faiss_module, top_k

    faiss_module()
    return lambda rows: {"sum": float(top_k(rows, None, K, exclude_self=True)[0].sum(dtype=np.float64))}


def knn_faiss() -> Callable[[np.ndarray], Found]:
    import faiss

    def job(rows: np.ndarray) -> Found:
        index = faiss.IndexFlatIP(rows.shape[1])
        index.add(rows)
        cosines, _ = index.search(rows, K + 1)
        return {"sum": float(cosines[:, 1:].sum(dtype=np.float64))}

    return job


def knn_sklearn() -> Callable[[np.ndarray], Found]:
    from sklearn.neighbors import NearestNeighbors

    def job(rows: np.ndarray) -> Found:
        search = NearestNeighbors(n_neighbors=K, algorithm="brute", metric="cosine").fit(rows)
        distance, _ = search.kneighbors()
        return {"sum": float((1 - distance.astype(np.float64)).sum())}

    return job


def duplicates_embedkit() -> Callable[[np.ndarray], Found]:
    from embedkit.analysis.duplicates import find_duplicates

    def job(rows: np.ndarray) -> Found:
        found = find_duplicates(rows, THRESHOLD)
        return {"pairs": found.pairs, "groups": len(found.groups)}

    return job


def duplicates_faiss() -> Callable[[np.ndarray], Found]:
    import faiss
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    def job(rows: np.ndarray) -> Found:
        index = faiss.IndexFlatIP(rows.shape[1])
        index.add(rows)
        limits, _, other = index.range_search(rows, THRESHOLD)
        row = np.repeat(np.arange(len(rows)), np.diff(limits.astype(np.int64)))
        graph = coo_array((np.ones(len(row), bool), (row, other)), (len(rows), len(rows)))
        _, labels = connected_components(graph, directed=False)
        groups = int((np.bincount(labels) > 1).sum())
        return {"pairs": int((row < other).sum()), "groups": groups}

    return job


def duplicates_all_pairs() -> Callable[[np.ndarray], Found]:
    """The whole matrix of cosines, and a list of duplicates for each image, as imagededup goes about it."""

    def job(rows: np.ndarray) -> Found:
        cosines = rows @ rows.T
        np.fill_diagonal(cosines, 0)
        found: dict[int, list[tuple[int, float]]] = {}
        for row, line in enumerate(cosines):
            hits = np.flatnonzero(line >= THRESHOLD)
            found[row] = [(int(hit), float(line[hit])) for hit in hits]
        return {"pairs": sum(map(len, found.values())) // 2}

    return job


def kmeans_embedkit() -> Callable[[np.ndarray], Found]:
    from embedkit.analysis.clustering.cluster import cluster
    from embedkit.analysis.similarity import faiss_module

    faiss_module()
    return lambda rows: {"inertia": inertia(rows, cluster(rows, "kmeans", CLUSTERS, starts=1).labels)}


def kmeans_faiss() -> Callable[[np.ndarray], Found]:
    import faiss

    def job(rows: np.ndarray) -> Found:
        model = faiss.Kmeans(rows.shape[1], CLUSTERS, niter=25, seed=1, max_points_per_centroid=len(rows))
        model.train(rows)
        return {"inertia": inertia(rows, model.index.search(rows, 1)[1][:, 0])}

    return job


def kmeans_sklearn() -> Callable[[np.ndarray], Found]:
    from sklearn.cluster import KMeans

    return lambda rows: {
        "inertia": inertia(rows, KMeans(CLUSTERS, n_init=1, random_state=0).fit_predict(rows))
    }


def inertia(rows: np.ndarray, labels: np.ndarray) -> float:
    """The mean squared distance of a row from the mean of its cluster."""
    sums = np.zeros((int(labels.max()) + 1, rows.shape[1]))
    np.add.at(sums, labels, rows)
    counts = np.maximum(np.bincount(labels, minlength=len(sums)), 1)
    squares = float(np.einsum("nd,nd->", rows, rows, dtype=np.float64))
    return (squares - float((sums**2 / counts[:, None]).sum())) / len(rows)


def dpmm_embedkit() -> Callable[[np.ndarray], Found]:
    from embedkit.analysis.clustering.cluster import cluster

    def job(rows: np.ndarray) -> Found:
        labels = cluster(np.ascontiguousarray(rows[:, :2]), "dpmm").labels
        return {"clusters": len(np.unique(labels)), "nmi": nmi(labels, rows[:, 2])}

    return job


def dpmm_sklearn() -> Callable[[np.ndarray], Found]:
    from sklearn.mixture import BayesianGaussianMixture

    def job(rows: np.ndarray) -> Found:
        model = BayesianGaussianMixture(n_components=30, max_iter=1000, random_state=0)
        labels = model.fit_predict(rows[:, :2])
        return {"clusters": len(np.unique(labels)), "nmi": nmi(labels, rows[:, 2])}

    return job


def nmi(labels: np.ndarray, truth: np.ndarray) -> float:
    """Normalized mutual information by scikit-learn, the same judge for both."""
    from sklearn.metrics import normalized_mutual_info_score

    return float(normalized_mutual_info_score(truth, labels))


CONTENDERS: dict[str, Callable[[], Callable[[np.ndarray], Found]]] = {
    "knn embedkit": knn_embedkit,
    "knn faiss flat": knn_faiss,
    "knn scikit-learn": knn_sklearn,
    "duplicates embedkit": duplicates_embedkit,
    "duplicates faiss range search": duplicates_faiss,
    "duplicates all pairs": duplicates_all_pairs,
    "kmeans embedkit": kmeans_embedkit,
    "kmeans faiss": kmeans_faiss,
    "kmeans scikit-learn": kmeans_sklearn,
    "dpmm embedkit": dpmm_embedkit,
    "dpmm scikit-learn": dpmm_sklearn,
}


def worker(name: str, path: Path) -> None:
    """One run, in this process: prints what it took and what it found."""
    job = CONTENDERS[name]()
    rows = np.array(np.load(path, mmap_mode="r"))
    began = time.perf_counter()
    found = job(rows)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"seconds": seconds, "peak_mb": peak / 1e6, "found": found}))


# --- rounds -------------------------------------------------------------------------------------------------


def compare(names: list[str], path: Path, rounds: int) -> dict[str, dict[str, Any]]:
    """Run contenders in turns, each in a process of its own."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            command = [sys.executable, __file__, "--worker", name, "--file", str(path)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{name}: {done.stderr.strip().splitlines()[-1]}")
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    return {
        name: {
            "seconds": statistics.median(run["seconds"] for run in each),
            "range": [min(run["seconds"] for run in each), max(run["seconds"] for run in each)],
            "peak_mb": max(run["peak_mb"] for run in each),
            "found": each[0]["found"],
        }
        for name, each in runs.items()
    }


def table(title: str, figures: dict[str, dict[str, Any]]) -> str:
    """A Markdown table, embedkit first."""
    ours = next(one["seconds"] for name, one in figures.items() if name.endswith("embedkit"))
    lines = [f"\n**{title}**\n", "| contender | s | range | embedkit / it | peak MB | found |"]
    lines.append("|---|---|---|---|---|---|")
    for name, one in figures.items():
        found = ", ".join(f"{key} {value:,.6g}" for key, value in one["found"].items())
        low, high = one["range"]
        lines.append(
            f"| {name} | {one['seconds']:.2f} | {low:.2f}-{high:.2f} | {ours / one['seconds']:.2f} "
            f"| {one['peak_mb']:.0f} | {found} |"
        )
    return "\n".join(lines)


def neighbors_and_duplicates(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """10-NN and duplicates against faiss at `--rows`, scikit-learn at half of it, all pairs at a tenth."""
    found = {}
    sizes = (
        ("knn", args.rows, ["knn embedkit", "knn faiss flat"]),
        ("knn", args.rows // 2, ["knn embedkit", "knn scikit-learn"]),
        ("duplicates", args.rows, ["duplicates embedkit", "duplicates faiss range search"]),
        ("duplicates", args.rows // 10, ["duplicates embedkit", "duplicates all pairs"]),
    )
    for part, count, names in sizes:
        if part in args.parts:
            title = f"{part}, {count:,} x {args.dim}"
            found[title] = compare(names, embeddings(count, args.dim, folder), args.rounds)
            print(table(title, found[title]), flush=True)
    return found


def clusters(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """k-means of a quarter of `--rows` against faiss and scikit-learn; dpmm on the 15 Gaussians."""
    found = {}
    if "kmeans" in args.parts:
        title = f"k-means, {args.rows // 4:,} x {args.dim}, K = {CLUSTERS}"
        names = ["kmeans embedkit", "kmeans faiss", "kmeans scikit-learn"]
        found[title] = compare(names, embeddings(args.rows // 4, args.dim, folder), args.rounds)
        print(table(title, found[title]), flush=True)
    if "dpmm" in args.parts:
        title = "the number of clusters found, 15 Gaussians, 10,000 x 2"
        found[title] = compare(["dpmm embedkit", "dpmm scikit-learn"], gaussians(folder), args.rounds)
        print(table(title, found[title]), flush=True)
    return found


def full(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Five times `--rows`, once: does it end, and in what memory?"""
    count = 5 * args.rows
    title = f"duplicates, {count:,} x {args.dim}, once"
    found = {title: compare(["duplicates embedkit"], embeddings(count, args.dim, folder), 1)}
    print(table(title, found[title]), flush=True)
    return found


def machine() -> dict[str, str]:
    """When, where and with which versions the figures came about."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    cpu = next((line for line in lines if line.startswith("model name")), f":{platform.processor()}")
    packages = ("embedkit", "numpy", "faiss-cpu", "scikit-learn", "scipy")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{cpu.partition(':')[2].strip()}, {os.cpu_count()} cores, {platform.platform()}",
        "versions": f"Python {platform.python_version()}, {versions}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parts = ("knn", "duplicates", "kmeans", "dpmm")
    parser.add_argument("--parts", nargs="*", choices=parts, default=list(parts))
    parser.add_argument("--full", action="store_true", help="five times the rows, once, embedkit alone")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir(), "embedkit-benchmark"))
    parser.add_argument("--json", type=Path, help="write every figure here")
    parser.add_argument("--worker", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.file)
        return
    args.work.mkdir(parents=True, exist_ok=True)
    if args.full:
        found = full(args, args.work)
    else:
        found = neighbors_and_duplicates(args, args.work) | clusters(args, args.work)
    facts = machine()
    print("\n" + "\n".join(f"- {key}: {value}" for key, value in facts.items()))
    if args.json:
        args.json.write_text(json.dumps(facts | {"parts": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
