"""How far two results may be apart by rounding alone: from the arithmetic, never from what one machine showed.

A kernel of another processor adds the same numbers in another order. u = eps / 2 is the unit roundoff, and the
computed dot product of n terms is within n u |x| |y| of the exact one in whatever order it is summed (Higham, Accuracy
and Stability of Numerical Algorithms, 2nd ed., section 3.1; terms of u^2 are left out). Two computed ones are within
twice that, n eps |x| |y|, of each other.
"""

import numpy as np


def eps(dtype=np.float32) -> float:
    return float(np.finfo(dtype).eps)


def cosine(dim: int, dtype=np.float32) -> float:
    """Of two cosines of rows of width `dim`: n eps for their sums, and 2 eps for unit rows that were rounded."""
    return (dim + 2) * eps(dtype)


def mean_cosine(rows: int) -> float:
    """Of two means over all pairs, from a float64 sum of N unit rows: its terms are within N eps of 1, and unit
    rows in float32 within eps."""
    return 4 * rows * eps(np.float64) + 2 * eps(np.float32)


def log_potential(dim: int) -> float:
    """Of two logs of the mean of exp(4 cos - 4): 4 times that of a cosine; and in exp's argument, of magnitude up to
    8, two operations of u, and exp itself, 4 u: relative errors of the mean are absolute ones of its log."""
    return 4 * cosine(dim) + (8 + 4) * eps()


def effective_rank(rows: int, dim: int) -> float:
    """Relative, of two ranks of well-conditioned rows: the Gram matrix and its eigenvalues are within (N + D) eps
    in float64, the entropy sums D of them."""
    return dim * (rows + dim) * eps(np.float64)


def gaps_are_wide(cosines: np.ndarray, k: int, dim: int) -> bool:
    """Whether the k largest of each row are the same whatever the rounding: nothing lies that close to the k-th."""
    ordered = -np.sort(-cosines, axis=1)
    return bool((ordered[:, k - 1] - ordered[:, k]).min() > 2 * cosine(dim))
