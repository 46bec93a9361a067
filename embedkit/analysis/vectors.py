"""Rows of embeddings, checked, as unit vectors, from memory or in blocks from their file.

Comparisons take embeddings as directions, through `Rows`: a row without a direction (NaN, infinity, zeros) is named and
refused, rows of two spaces are never compared, and a file larger than memory is read one range at a time. Code that
takes rows unscaled checks them with `as_numbers` and `check_rows`, so that native code gets no number that it cannot
hold.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import numpy as np

from embedkit.embeddings.base import StoredRows
from embedkit.embeddings.formats import open_rows
from embedkit.embeddings.metadata import Metadata, check_same_space
from embedkit.embeddings.table import Embeddings
from embedkit.errors import ConfigError, EmbedkitError

__all__ = [
    "Rows",
    "Source",
    "as_count",
    "as_numbers",
    "check_comparable",
    "check_rows",
    "magnitudes",
    "row_names",
]

#: Greatest size of rows in memory, in bytes; a larger file is read again for every block.
HELD = 2 << 30
#: Rows that are checked or read at a time.
BLOCK = 1 << 14
#: Rounding error of the length of a float32 unit vector.
ROUNDING = 1e-6
#: What float32 holds, and the lengths that a row of it may have.
LARGEST = float(np.finfo(np.float32).max)
SMALLEST = float(np.finfo(np.float32).smallest_subnormal)
#: Magnitudes whose squares float32 holds and can sum over a million columns: squared distances stay finite.
LARGEST_SQUARED, SMALLEST_SQUARED = 1e15, 1e-9


class Rows:
    """Rows of one space as unit vectors, a range at a time, from memory or from their file.

    Attributes:
        where: Their name in messages.
        dim: Width D.
        metadata: Their metadata; None for a plain array.
    """

    def __init__(
        self, source: Embeddings | np.ndarray | str | os.PathLike[str] | StoredRows, where: str = "embeddings"
    ):
        """Open rows; those that fit into `HELD` bytes are read and checked at once.

        Args:
            source: Embeddings, a float array (N, D), or what `open_rows` opens or has opened.
            where: Name in messages of a source without a file name.

        Raises:
            ConfigError: No row, a row with NaN or infinity, or a row of zeros.
            OutputError: Not a file of embeddings.
        """
        if isinstance(source, (str, os.PathLike)):
            source = open_rows(source)
        self.where = source.where if isinstance(source, StoredRows) else where
        self.dim: int = 0
        self.metadata: Metadata | None = None
        self._count = 0
        self._read: Callable[[int, int], np.ndarray]
        self._keys: Callable[[], tuple[list[str], np.ndarray]]
        self._held: np.ndarray | None = None
        self._stored = source if isinstance(source, StoredRows) else None
        array = self._open(source)
        if not self._count or not self.dim:
            raise ConfigError(
                f"{self.where}: expected embeddings, found no {'column' if self._count else 'row'}"
            )
        if self._count * self.dim * 4 <= HELD:
            self._held = self._hold(array)

    @classmethod
    def of(cls, source: Source, where: str = "embeddings") -> Rows:
        """Open `source`; return it unchanged if it is open already."""
        return source if isinstance(source, Rows) else cls(source, where)

    def __len__(self) -> int:
        return self._count

    @property
    def in_memory(self) -> bool:
        """Whether the rows are in memory; else they are read again for every block."""
        return self._held is not None

    def names(self) -> list[str]:
        """One name per row: its id, or `id#part` for the further parts of an image; the index for an array.

        Raises:
            ConfigError: Two rows have the same name.
        """
        return row_names(*self._keys(), self.where)

    def has_parts(self) -> bool:
        """Whether some rows are further parts of images, such as faces, crops or frames."""
        return bool(self._keys()[1].any())

    def recorded(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Sizes in bytes and modification times in ns of the images at embedding, int64 (N,) each.

        None for rows in memory, and for files that do not record them for every row.
        """
        if self._stored is None:
            return None
        try:
            size, time = (np.array(self._stored.column(name), np.int64) for name in ("size", "mtime_ns"))
        except (EmbedkitError, KeyError, TypeError, ValueError, OverflowError):
            return None
        return size, time

    def unit(self, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` at length 1, float32 (n, D); do not modify it."""
        if self._held is not None:
            return self._held[start:stop]
        block = self._read(start, stop)
        return _scaled(block, self._lengths(block, start))

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The unit vectors of these rows, int64 (n,), in this order, float32 (n, D)."""
        if self._held is not None:
            result: np.ndarray = self._held[rows]
            return result
        found = np.empty((len(rows), self.dim), np.float32)
        for start in np.unique(rows // BLOCK) * BLOCK:
            stop = min(start + BLOCK, self._count)
            here = (rows >= start) & (rows < stop)
            found[here] = self.unit(start, stop)[rows[here] - start]
        return found

    def chunks(self, start: int = 0, *, share: int = 4) -> Iterator[tuple[int, np.ndarray]]:
        """All rows from `start` on: one chunk if they are in memory, else chunks of 1/`share` of `HELD` bytes."""
        size = self._count if self.in_memory else max(BLOCK, HELD // (share * 4 * self.dim))
        for at in range(start, self._count, size):
            yield at, self.unit(at, min(at + size, self._count))

    def _open(self, source: Embeddings | np.ndarray | StoredRows) -> np.ndarray | None:
        """Set the readers of rows and names; return the array if it is in memory or memory-mapped."""
        if isinstance(source, StoredRows):
            self._count, self.dim, self.metadata = len(source), source.metadata.dim, source.metadata
            self._read, self._keys = source.vectors, source.keys
            if source.mapped is None:
                return None
            array = source.mapped
        elif isinstance(source, Embeddings):
            array, self.metadata = source.vectors, source.metadata
            self._keys = lambda: (source.ids, source.parts)
        else:
            array = source
            self._keys = lambda: (list(map(str, range(self._count))), np.zeros(self._count, np.int32))
        array = as_numbers(array, self.where)
        self._count, self.dim = array.shape
        self._read = lambda start, stop: array[start:stop]
        return array

    def _hold(self, array: np.ndarray | None) -> np.ndarray:
        """All rows scaled to length 1; unit vectors that are already in memory are not copied."""
        ranges = [(at, min(at + BLOCK, self._count)) for at in range(0, self._count, BLOCK)]
        if array is not None and array.dtype == np.float32 and array.flags.c_contiguous:
            lengths = np.concatenate([self._lengths(array[start:stop], start) for start, stop in ranges])
            if np.abs(lengths - 1).max() <= ROUNDING:
                return np.asarray(array)
        held = np.empty((self._count, self.dim), np.float32)
        for start, stop in ranges:
            block = self._read(start, stop)
            held[start:stop] = _scaled(block, self._lengths(block, start))
        return held

    def _lengths(self, block: np.ndarray, start: int) -> np.ndarray:
        """Euclidean lengths, float64 (n,), all above 0."""
        with np.errstate(all="ignore"):
            lengths: np.ndarray = np.sqrt(np.einsum("nd,nd->n", block, block, dtype=np.float64))
        bad = np.flatnonzero(~((lengths >= SMALLEST) & (np.isfinite(lengths))))
        if len(bad):
            row = int(bad[0])
            raise _refusal(block[row], start + row, lambda at: self.names()[at], self.where)
        return lengths


Source: TypeAlias = Embeddings | np.ndarray | str | os.PathLike[str] | StoredRows | Rows


def _scaled(block: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    result: np.ndarray = (block / lengths[:, None]).astype(np.float32)
    return result


def as_numbers(source: object, where: str) -> np.ndarray:
    """An array (N, D) of integers or floating-point numbers of at most 64 bits.

    Raises:
        ConfigError: Anything else: texts, objects, complex numbers, another number of axes, rows of unequal width.
    """
    try:
        array = np.asarray(source)
    except ValueError:
        raise ConfigError(f"{where}: expected numbers (N, D), found rows of unequal width") from None
    if array.ndim != 2 or array.dtype.kind not in "fiu" or array.dtype.itemsize > 8:
        raise ConfigError(f"{where}: expected numbers (N, D), found {array.dtype} of shape {array.shape}")
    return array


def magnitudes(block: np.ndarray) -> np.ndarray:
    """The largest magnitude in each row, float64 (n,), without a copy of the rows; NaN where a row holds one.

    Args:
        block: float or int (n, D), D of 1 or more.
    """
    result: np.ndarray = np.maximum(block.max(1).astype(np.float64), -block.min(1).astype(np.float64))
    return result


def check_rows(
    block: np.ndarray,
    start: int,
    name: Callable[[int], str],
    where: str,
    *,
    zeros: bool = True,
    largest: float = LARGEST,
) -> np.ndarray:
    """Refuse rows that hold NaN, infinity or a number above `largest`.

    Args:
        block: float or int (n, D), D of 1 or more.
        start: The number of its first row.
        name: Function from the number of a row to its name.
        where: Name of the embeddings in messages.
        zeros: Whether a row may be all zeros.
        largest: The largest magnitude that is allowed.

    Returns:
        The largest magnitude of each row, float64 (n,).

    Raises:
        ConfigError: There is one; the message names the first.
    """
    found = magnitudes(block)
    bad = ~(found <= largest)
    if not zeros:
        bad |= found == 0
    if bad.any():
        row = int(bad.argmax())
        raise _refusal(block[row], start + row, name, where, largest)
    return found


def _refusal(
    row: np.ndarray, number: int, name: Callable[[int], str], where: str, largest: float = LARGEST
) -> ConfigError:
    """The error of one unusable row."""
    most = magnitudes(row[None])[0]
    step = "embed that image again, or leave the row out"
    if not np.isfinite(most):
        fault = "holds NaN or infinity"
    elif most == 0:
        fault = "is all zeros and has no direction"
    elif most > largest:
        fault, step = f"holds {most:.3g}, and {largest:.3g} is the most", "scale all rows down"
    else:
        fault, step = f"holds {most:.3g} at most, which float32 takes for zero", "scale all rows up"
    return ConfigError(f"{where}: row {number} ({name(number)}) {fault}; {step}")


def as_count(value: object, what: str) -> int:
    """A whole number of Python or numpy, checked before it reaches native code.

    Raises:
        ConfigError: Not a whole number.
    """
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise ConfigError(f"{what}: expected a whole number, found {value!r}")
    return int(value)


def row_names(ids: Sequence[str], parts: np.ndarray, where: str) -> list[str]:
    """One name per row: the id, with `#part` for the further parts of an image.

    Args:
        ids: One per row.
        parts: int32 (N,).
        where: Name of the embeddings in messages.

    Raises:
        ConfigError: Two rows have the same name.
    """
    names = [f"{name}#{part}" if part else name for name, part in zip(ids, parts.tolist(), strict=True)]
    if len(set(names)) < len(names):
        seen: set[str] = set()
        twice = next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ConfigError(f"{where}: the id {twice!r} occurs twice; ids must be unique")
    return names


def check_comparable(a: Rows, b: Rows) -> None:
    """Refuse rows of two spaces, or of two widths."""
    check_same_space(a.metadata, b.metadata, a.where, b.where)
    if a.dim != b.dim:
        raise ConfigError(f"{a.where} has {a.dim} columns and {b.where} has {b.dim}: not one space")
