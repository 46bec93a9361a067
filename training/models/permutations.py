"""Sets of permutations that are far apart: which orders a puzzle of tiles may be shown in.

Two orders that agree on many tiles can hardly be told apart, so a set is judged by its smallest Hamming distance, the
number of places in which two of its members differ. No set of permutations of n items with smallest distance d has more
than n! / (d - 1)! members, since no two may agree on the same n - d + 1 places. For nine tiles two groups reach it.

Sources: greedy sets, Unsupervised Learning of Visual Representations by Solving Jigsaw Puzzles (Noroozi and Favaro,
ECCV 2016, arXiv 1603.09246), algorithm 1; sharply transitive groups, Permutation Groups (Dixon and Mortimer, Springer
1996), section 7.6. The authors' greedy files keep the mean distance large (about 8) and the smallest small (2 or 3);
the greedy sets here look at the smallest first.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from embedkit.errors import ConfigError

__all__ = ["PermutationSet", "hamming_distances", "reorder"]


@dataclass(frozen=True, kw_only=True)
class PermutationSet:
    """Which permutations, in an order that does not depend on the machine: their numbers are labels.

    Attributes:
        kind: `pgl`: the 504 Moebius maps of the projective line over 8 elements, 9 items, distance 7. `agl`: the 72
            affine maps of the field of 9 elements, 9 items, distance 8. `even`: the even ones, distance 3. `all`:
            distance 2. `greedy`: one after the other the permutation whose smallest distance to those before it is
            largest, and among such the one whose mean distance is.
        count: Members of a greedy set.
        seed: Of the first member of a greedy set.
    """

    kind: Literal["pgl", "agl", "even", "all", "greedy"] = "pgl"
    count: int = 64
    seed: int = 0

    def build(self, items: int) -> Tensor:
        """The permutations: int64 (K, items), each row holds 0..items - 1.

        Raises:
            ConfigError: A kind that there is not for so many items, or a greedy set without members.
        """
        if self.kind not in ("pgl", "agl", "even", "all", "greedy"):
            raise ConfigError(
                f"permutations.kind: expected pgl, agl, even, all or greedy, found {self.kind!r}"
            )
        if self.kind in ("pgl", "agl") and items != 9:
            raise ConfigError(
                f"permutations.kind: {self.kind} permutes 9 tiles, and there are {items}; take even or greedy"
            )
        if not 2 <= items <= 9:  # 10! rows would not fit
            raise ConfigError(f"permutations: expected 2 to 9 tiles, found {items}")
        whole = _all(items)
        if self.kind == "greedy" and not 2 <= self.count <= len(whole):
            raise ConfigError(f"permutations.count: expected 2 to {len(whole)}, found {self.count}")
        make: Callable[[], np.ndarray] = {
            "pgl": _pgl,
            "agl": _agl,
            "even": lambda: whole[_parity(whole) == 0],
            "all": lambda: whole,
            "greedy": lambda: _greedy(items, self.count, self.seed),
        }[self.kind]
        return torch.from_numpy(make().astype(np.int64))


def hamming_distances(permutations: Tensor) -> Tensor:
    """Permutations (K, n) -> in how many places each two differ: int64 (K, K)."""
    return (permutations[:, None] != permutations[None]).sum(-1)


def reorder(items: Tensor, permutations: Tensor) -> Tensor:
    """Items (N, T, ...) in another order: place j holds item `permutations[:, j]`, int64 (N, T).

    With `permutations.argsort(1)` in the place of `permutations` the items come back.
    """
    return items[torch.arange(len(items), device=items.device)[:, None], permutations]


@lru_cache(maxsize=2)
def _all(items: int) -> np.ndarray:
    return np.array(list(itertools.permutations(range(items))), dtype=np.int8)


def _parity(permutations: np.ndarray) -> np.ndarray:
    """0 for even ones: the inversions, modulo 2."""
    first, second = np.triu_indices(permutations.shape[1], 1)
    inverted = permutations[:, first] > permutations[:, second]  # (K, n (n - 1) / 2)
    return inverted.sum(axis=1) % 2


@lru_cache(maxsize=8)
def _greedy(items: int, count: int, seed: int) -> np.ndarray:
    whole = _all(items)
    chosen = int(np.random.default_rng(seed).integers(len(whole)))
    smallest, total, found = np.full(len(whole), items, np.int32), np.zeros(len(whole), np.int32), []
    for _ in range(count):
        found.append(chosen)
        distance = (whole != whole[chosen]).sum(1, dtype=np.int32)
        smallest, total = np.minimum(smallest, distance), total + distance
        chosen = int((smallest * (items * count + 1) + total).argmax())  # the mean decides between equals
    return whole[found]


def _gf8_product(a: int, b: int) -> int:
    """In the field of 8 elements: polynomials over two elements modulo x^3 + x + 1, as bits."""
    product = 0
    for bit in range(3):
        if b >> bit & 1:
            product ^= a << bit
    for bit in (4, 3):
        if product >> bit & 1:
            product ^= 0b1011 << (bit - 3)
    return product


def _pgl() -> np.ndarray:
    """All z -> (a z + b) / (c z + d) with a d != b c; the point at infinity is number 8."""
    inverse = {a: b for a in range(1, 8) for b in range(1, 8) if _gf8_product(a, b) == 1}

    def image(a: int, b: int, c: int, d: int, z: int) -> int:
        top, bottom = (a, c) if z == 8 else (_gf8_product(a, z) ^ b, _gf8_product(c, z) ^ d)
        return 8 if bottom == 0 else _gf8_product(top, inverse[bottom])

    maps = {
        tuple(image(a, b, c, d, z) for z in range(9))
        for a, b, c, d in itertools.product(range(8), repeat=4)
        if _gf8_product(a, d) != _gf8_product(b, c)
    }
    return np.array(sorted(maps))


def _agl() -> np.ndarray:
    """All z -> a z + b, a != 0, over the 9 numbers x + y i with x, y modulo 3 and i i = -1."""

    def image(a: int, b: int, z: int) -> int:
        (x, y), (u, v), (s, t) = divmod(a, 3), divmod(z, 3), divmod(b, 3)
        return (x * u - y * v + s) % 3 * 3 + (x * v + y * u + t) % 3

    return np.array(sorted({tuple(image(a, b, z) for z in range(9)) for a in range(1, 9) for b in range(9)}))
