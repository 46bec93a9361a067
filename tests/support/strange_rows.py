"""Strange rows, and every function that takes rows: a child process tries one with all, whatever folder it runs in."""

import warnings

import numpy as np

from embedkit.analysis.clustering.cluster import cluster
from embedkit.analysis.clustering.dpmm import DPMMConfig
from embedkit.analysis.clustering.reduction import fit_reduction
from embedkit.analysis.duplicates import find_duplicates
from embedkit.analysis.leaks import find_leaks
from embedkit.analysis.lint import lint
from embedkit.analysis.matching.calibrate import calibrate
from embedkit.analysis.matching.calibration import verify_vectors
from embedkit.analysis.neighbors import SearchIndex
from embedkit.analysis.similarity import pair_similarity, similarity, top_k
from embedkit.errors import EmbedkitError
from embedkit.model.mixture import GaussianMixture

MIXTURE = GaussianMixture(np.ones(1), np.zeros((1, 2)), np.eye(2)[None], np.zeros(8), np.ones((8, 2)))


def changed(rows, at, value):
    rows = rows.copy()
    rows[at] = value
    return rows


ROWS = {
    "NaN": lambda x: changed(x, (3, 1), np.nan),
    "infinity": lambda x: changed(x, (3, 1), -np.inf),
    "a row of zeros": lambda x: changed(x, 3, 0),
    "all zeros": lambda x: x * 0,
    "huge": lambda x: x * np.float32(1e19),
    "the largest": lambda x: np.full_like(x, np.finfo(np.float32).max) * np.sign(x),
    "one huge row": lambda x: changed(x, 3, 1e30),
    "tiny": lambda x: x * np.float32(1e-30),
    "subnormal": lambda x: x * np.float32(1e-41),
    "beyond float32": lambda x: x.astype(np.float64) * 1e200,
    "below float32": lambda x: x.astype(np.float64) * 1e-200,
    "half": lambda x: x.astype(np.float16),
    "large halves": lambda x: (x * 1e4).astype(np.float16),
    "infinite halves": lambda x: np.full(x.shape, np.inf, np.float16),
    "no row": lambda x: x[:0],
    "one row": lambda x: x[:1],
    "two rows": lambda x: x[:2],
    "no column": lambda x: x[:, :0],
    "one column": lambda x: x[:, :1],
    "one axis": lambda x: x[0],
    "three axes": lambda x: x[None],
    "objects": lambda x: x.astype(object),
    "complex": lambda x: x.astype(np.complex64),
    "booleans": lambda x: x > 0,
    "texts": lambda x: x.astype(str),
    "equal": lambda x: np.ones_like(x),
    "long doubles": lambda x: x.astype(np.longdouble),
    "big-endian": lambda x: x.astype(">f4"),
    "strided": lambda x: np.asfortranarray(x)[::2],
    "read-only": lambda x: np.broadcast_to(x[0], x.shape),
    "large integers": lambda x: (np.clip(x, -1, 1) * 2.0**62).astype(np.int64),
    "the least integer": lambda x: changed(x.astype(np.int64), (3, 1), np.iinfo(np.int64).min),
    "unsigned": lambda x: (np.clip(np.abs(x), 0, 1) * 2.0**62).astype(np.uint64),
    "far from the origin": lambda x: x + np.float32(1e8),
    "None": lambda x: None,
    "a list": lambda x: x.tolist(),
    "unequal lists": lambda x: [[1.0, 2.0], [1.0]],
}


def many(x):
    return np.concatenate([x] * 4) if isinstance(x, np.ndarray) and x.ndim else x


ACTS = {
    "kmeans": lambda x: cluster(x, "kmeans", 2),
    "kmeans, any K": lambda x: cluster(x, "kmeans"),
    "kmeans, too many": lambda x: cluster(x, "kmeans", 10**9),
    "kmeans, every row": lambda x: cluster(x, "kmeans", 300),
    "spherical": lambda x: cluster(x, "spherical_kmeans", 2),
    "hdbscan": lambda x: cluster(x, "hdbscan"),
    "dpmm": lambda x: cluster(x, "dpmm", dpmm=DPMMConfig(iterations=5)),
    "pca": lambda x: cluster(x, "kmeans", 2, reduce="pca:1"),
    "whiten": lambda x: cluster(x, "kmeans", 2, reduce="whiten:1"),
    "reduction": lambda x: fit_reduction(x, "pca", 1),
    "mixture": lambda x: MIXTURE.assign(x),
    "a mixture's clusters": lambda x: cluster(x, "dpmm", mixture=MIXTURE),
    "similarity": similarity,
    "top_k": lambda x: top_k(x, None, 1),
    "pairs": lambda x: pair_similarity(x, np.array([0]), np.array([1])),
    "pairs of no row": lambda x: pair_similarity(x, np.array([0]), np.array([10**9])),
    "flat": lambda x: SearchIndex.build(x).search(x, 1),
    "ivf": lambda x: SearchIndex.build(many(x), "ivf").search(x, 3),
    "hnsw": lambda x: SearchIndex.build(many(x), "hnsw").search(x, 3),
    "duplicates": lambda x: find_duplicates(x, 0.9),
    "leaks": lambda x: find_leaks(x, x, 0.9),
    "lint": lint,
    "verify": lambda x: verify_vectors(x, x, threshold=0.5),
    "calibrate": lambda x: calibrate(x, np.arange(2400).reshape(300, 8) % 2 == 0, 0.1, replicates=2),
    "calibrate scores": lambda x: calibrate(
        x if isinstance(x, list) else np.ravel(x), np.arange(getattr(x, "size", 1)) % 2 == 0, 0.1, replicates=2
    ),
}  # fmt: skip


def attempt(act, pipe):
    warnings.simplefilter("error")
    rows = np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32)
    faults = []
    for name, make in ROWS.items():
        pipe.send(name)
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            given = make(rows)
        try:
            ACTS[act](given)
        except EmbedkitError as error:
            if "\n" in str(error):
                faults.append(f"{name}: {error}")
        except BaseException as error:
            faults.append(f"{name}: {type(error).__name__}: {error}")
    pipe.send(faults)
