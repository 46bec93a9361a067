"""Reduction of dimensions before clustering: principal components, optionally whitened.

Source: On lines and planes of closest fit (Pearson, Philosophical Magazine 2, 1901); whitening divides each
component by its standard deviation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from embedkit.analysis.vectors import LARGEST_SQUARED, as_count, as_numbers, check_rows
from embedkit.errors import ConfigError

__all__ = ["METHODS", "Reduction", "fit_reduction", "parse_reduction"]

METHODS = ("pca", "whiten")
#: Rows of one block.
_BLOCK = 1 << 14
#: Greatest number of rows in the fit; more are sampled by the seed.
MOST_ROWS = 1 << 18


@dataclass(frozen=True, eq=False)
class Reduction:
    """A linear map, y = (x - center) @ components.

    Attributes:
        method: `pca` or `whiten`.
        center: float64 (D,).
        components: float64 (D, d), the widest first; columns of length 1, or 1 / standard deviation for `whiten`.
        explained: Share of the variance that is kept, in [0, 1].
        rows: Number of rows in the fit.
        seed: The seed of their sample.
    """

    method: str
    center: np.ndarray
    components: np.ndarray
    explained: float
    rows: int
    seed: int

    @property
    def dim(self) -> int:
        """d, the width of the reduced rows."""
        return int(self.components.shape[1])

    def apply(self, points: np.ndarray) -> np.ndarray:
        """Project rows (N, D), block by block: float32 (N, d)."""
        reduced = np.empty((len(points), self.dim), np.float32)
        for start in range(0, len(points), _BLOCK):
            block = points[start : start + _BLOCK].astype(np.float64)
            reduced[start : start + _BLOCK] = (block - self.center) @ self.components
        return reduced

    def to_json(self) -> dict[str, Any]:
        """The record of the reduction in a file of clusters."""
        return {
            "method": self.method,
            "dim": self.dim,
            "from_dim": len(self.center),
            "explained_variance": round(self.explained, 6),
            "rows": self.rows,
            "seed": self.seed,
        }


def parse_reduction(text: str) -> tuple[str, int]:
    """`pca:32` or `whiten:32` as (method, dim).

    Raises:
        ConfigError: Neither.
    """
    method, _, dim = text.partition(":")
    if method not in METHODS or not dim.isdecimal() or int(dim) < 1:
        raise ConfigError(f"reduce: expected pca:N or whiten:N, for example pca:32, found {text!r}")
    return method, int(dim)


def fit_reduction(points: np.ndarray, method: str, dim: int, *, seed: int = 0) -> Reduction:
    """Fit principal components.

    Args:
        points: float (N, D), finite; a sample of `MOST_ROWS` where N is larger.
        method: `pca` or `whiten`.
        dim: d, at most D and N - 1.
        seed: Of the sample.

    Raises:
        ConfigError: No such method, too many dimensions, rows that are all equal, or
            rows with NaN, infinity or numbers whose squares float32 cannot hold.
    """
    if method not in METHODS:
        raise ConfigError(f"reduce: expected {' or '.join(METHODS)}, found {method!r}")
    points = as_numbers(points, "reduce")
    rows, width = points.shape
    dim = as_count(dim, "reduce")
    most = min(width, rows - 1)
    if not 1 <= dim <= most:
        raise ConfigError(
            f"reduce: expected 1 to {most} dimensions, for there are {rows} rows of {width}, found {dim}"
        )
    if rows > MOST_ROWS:
        points = points[np.sort(np.random.default_rng(seed).choice(rows, MOST_ROWS, replace=False))]
    for start in range(0, len(points), _BLOCK):
        check_rows(points[start : start + _BLOCK], start, str, "reduce", largest=LARGEST_SQUARED)
    center: np.ndarray = np.asarray(np.mean(points, axis=0, dtype=np.float64))
    cov = np.zeros((width, width))
    for start in range(0, len(points), _BLOCK):
        block = points[start : start + _BLOCK] - center
        cov += block.T @ block
    cov /= len(points) - 1
    values, axes = np.linalg.eigh(cov)
    values, axes = np.maximum(values[::-1], 0), axes[:, ::-1]  # the widest first
    rank = int((values > 1e-10 * values[0]).sum())
    if not rank:
        raise ConfigError("reduce: all rows are equal, so there is nothing to reduce")
    if method == "whiten" and dim > rank:
        raise ConfigError(
            f"reduce: the rows differ along {rank} dimensions only, and whitening would divide by zero; "
            f"take whiten:{rank} or less"
        )
    components = axes[:, :dim].copy()
    # the sign of an axis is arbitrary: the largest entry is made positive
    largest = np.abs(components).argmax(0)
    components *= np.sign(components[largest, np.arange(dim)])
    if method == "whiten":
        components /= np.sqrt(values[:dim])
    return Reduction(method, center, components, float(values[:dim].sum() / values.sum()), len(points), seed)
