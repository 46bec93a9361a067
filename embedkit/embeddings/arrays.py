"""Python values as Arrow columns, and the rows that an index names."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from embedkit._io.text import one_line
from embedkit.embeddings.schema import RESERVED
from embedkit.errors import ConfigError

__all__ = ["as_list", "key_array", "label_array", "row_numbers"]


def row_numbers(rows: Any, count: int) -> npt.NDArray[np.intp]:
    """The rows that an index names, int (n,).

    Raises:
        ConfigError: As for `Embeddings.__getitem__`.
    """
    if isinstance(rows, slice):
        try:
            return np.arange(count)[rows]
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"expected a slice of whole numbers, found {rows} ({one_line(error)})"
            ) from None
    try:
        array = np.asarray(rows)
    except ValueError:  # rows of different lengths
        array = np.empty((0, 0))
    if array.ndim != 1:
        raise ConfigError(
            f"expected a mask, numbers of rows or a slice, found {array.dtype} of shape {array.shape}; for one row "
            "write table[[3]]"
        )
    if array.dtype == bool:
        if len(array) != count:
            raise ConfigError(f"expected a mask of {count} rows, found one of {len(array)}")
        return np.flatnonzero(array)
    if not len(array):
        return np.empty(0, np.intp)
    if array.dtype.kind not in "iu":
        raise ConfigError(f"expected a mask or whole numbers without gaps, found {array.dtype}")
    if (array < -count).any() or (array >= count).any():
        raise ConfigError(
            f"expected numbers of rows from {-count} to {count - 1}, found {array.min()} to {array.max()}"
        )
    array = array.astype(np.intp) % count
    if len(np.unique(array)) < len(array):
        raise ConfigError("a row is named twice; ids must be unique")
    return array


def as_list(name: str, values: Any) -> list[Any]:
    """A column as a list: of an array, a sequence or an iterator.

    Raises:
        ConfigError: One value instead of one for each row; a text is one value.
    """
    try:
        if not isinstance(values, (str, bytes)):
            return list(values)
    except TypeError:
        pass
    raise ConfigError(f"column {name!r}: expected a list of values, one a row; found {type(values).__name__}")


def key_array(name: str, values: list[Any], kind: pa.DataType) -> pa.Array:
    """A column of ours as Arrow has it.

    Raises:
        ConfigError: A value of another type; Arrow would cut 0.5 to 0.
    """
    if pa.types.is_integer(kind):
        wrong = next((one for one in values if not isinstance(one, (int, np.integer))), None)
        if wrong is not None:
            raise ConfigError(f"column {name!r}: expected whole numbers, found {wrong!r}")
    try:
        return pa.array(values, kind)
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
        raise ConfigError(f"column {name!r}: expected {kind} ({one_line(error)})") from None


def label_array(name: str, values: list[Any], kind: pa.DataType | None = None) -> pa.Array:
    """A label column as Arrow has it, of its former type if its values are still of that.

    Raises:
        ConfigError: A reserved name, one that is no text, or values of several types.
    """
    if not isinstance(name, str) or not name.isascii() and any("\ud800" <= one <= "\udfff" for one in name):
        raise ConfigError(f"label column {name!r}: expected a text as its name")
    if name in RESERVED:
        raise ConfigError(f"label column {name!r}: the name is reserved; choose another one")
    faults = (pa.ArrowException, ValueError, TypeError, OverflowError)
    if kind is not None and not pa.types.is_null(kind):
        try:
            return pa.array(values, kind)
        except faults:
            pass
    try:
        return pa.array(values)
    except faults as error:
        raise ConfigError(f"label column {name!r}: expected values of one type ({one_line(error)})") from None
