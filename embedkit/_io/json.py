"""JSON as embedkit reads and writes it: strict, bounded, and with typed fields.

A file may be damaged, written by another program, or hostile. `JsonFormat` parses one kind of file: UTF-8, no key
twice, finite numbers, no lone surrogate, bounded in size and depth. `Fields` reads an object key by key. Every problem
is one sentence in that file's class of error: "FILE: key: expected X, found Y; next step".
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from reprlib import Repr
from typing import Any, NoReturn, TypeVar

from embedkit._io.reading import read_regular
from embedkit.errors import EmbedkitError

__all__ = ["Fields", "JsonFormat", "canonical_json", "indented_json"]

#: Digits of a number: Python's own limit for whole numbers, whose conversion takes quadratic time.
_MOST_DIGITS = 4300
#: Levels of what is written.
_DEPTH = 64
_MISSING = object()
_T = TypeVar("_T")


def canonical_json(value: object) -> bytes:
    """`value` as JSON with sorted keys and no spaces: equal values give equal bytes.

    Raises:
        ValueError: A number that is not finite, or a lone surrogate: no strict reader would take it back.
    """
    return _encoded(value, separators=(",", ":"))


def indented_json(value: object) -> bytes:
    """`value` as JSON for people: sorted keys, one a line, a line break at the end.

    Raises:
        ValueError: As for `canonical_json`.
    """
    return _encoded(value, indent=1) + b"\n"


def _encoded(value: object, **layout: Any) -> bytes:
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, allow_nan=False, **layout)
    if "\\ud" in text:  # the escape of a surrogate, of a pair or alone
        _check_values(value, _DEPTH)
    return text.encode()


@dataclass(frozen=True, kw_only=True)
class JsonFormat:
    """How one kind of file is parsed, and how messages about it end.

    Attributes:
        error: The class of its errors.
        step: What a message tells the user to do: "pull the entry again".
        limit: Greatest size in bytes. A value takes up to thirty times as much memory.
        depth: Greatest number of levels.
    """

    error: type[EmbedkitError]
    step: str
    limit: int = 16 << 20
    depth: int = _DEPTH

    def parse(self, text: bytes | str, where: str) -> Any:
        """The value of a JSON text.

        Args:
            text: UTF-8, or text.
            where: How messages name the file.

        Raises:
            EmbedkitError: Of this format's class: it is not strict JSON, or beyond `limit` or `depth`.
        """
        if len(text) > self.limit:
            raise self.error(
                f"{where}: expected at most {self.limit} bytes of JSON, found {len(text)}; {self.step}"
            )
        try:
            value = _DECODER.decode(text if isinstance(text, str) else text.decode())
            _check_values(value, self.depth)
        except RecursionError:
            reason = f"it is nested deeper than {self.depth} levels"
        except ValueError as error:
            reason = str(error)
        else:
            return value
        raise self.error(f"{where} is not JSON ({reason}); {self.step}") from None

    def fields(self, value: object, where: str) -> Fields:
        """The fields of a value that must be an object."""
        if not isinstance(value, dict):
            raise self.error(f"{where}: expected an object, found {_short(value)}; {self.step}")
        return Fields(value, where, self)

    def read(self, path: str | os.PathLike[str]) -> Fields:
        """The fields of the object that a file holds.

        Raises:
            EmbedkitError: Of this format's class: no such file, no regular file, or not such an object.
        """
        where = os.fspath(path)
        try:
            text = read_regular(path, self.limit)
        except FileNotFoundError:
            raise self.error(f"{where} does not exist; check the path") from None
        except (OSError, ValueError) as error:  # ValueError: a path with a NUL
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise self.error(f"{where} cannot be read ({reason}); {self.step}") from None
        return self.fields(self.parse(text, where), where)


class Fields:
    """An object of JSON whose values are taken by key and type.

    Every method takes a key and raises the format's error where its value is missing, of another type, or out of
    range.
    """

    def __init__(self, data: Mapping[str, Any], where: str, form: JsonFormat, path: str = ""):
        """Take an object; `where` names the file and `path` the keys that lead to the object."""
        self._data, self._where, self._form, self._path = data, where, form, path

    def __contains__(self, key: str) -> bool:
        """Whether the key is there, and not null."""
        return self._data.get(key) is not None

    def keys(self) -> list[str]:
        """The keys, in the file's order."""
        return list(self._data)

    def only(self, *keys: str) -> None:
        """Refuse keys other than these: one that is not understood might change what the others mean."""
        unknown = next((key for key in self._data if key not in keys), None)
        if unknown is not None:
            raise self._form.error(
                f"{self._where}: {self._path}{_short(unknown)}: expected no such key; {self._form.step}"
            )

    def fail(self, key: str, expected: str) -> NoReturn:
        """Refuse the value of `key`."""
        value = self._data.get(key, _MISSING)
        found = "nothing" if value is _MISSING else _short(value)
        raise self._form.error(
            f"{self._where}: {self._path}{key}: expected {expected}, found {found}; {self._form.step}"
        )

    def version(self, key: str, supported: int) -> None:
        """Refuse another version than the one that this release writes."""
        if self.whole(key) != supported:
            newer = self._data[key] > supported
            step = "upgrade embedkit" if newer else self._form.step
            raise self._form.error(
                f"{self._where}: {self._path}{key}: expected version {supported}, found {self._data[key]}; {step}"
            )

    def text(self, key: str, *, choices: Iterable[str] = (), pattern: str = "", empty: bool = False) -> str:
        """A text: one of `choices`, or one that `pattern` matches in full; empty only where `empty` says so."""
        value, names = self._data.get(key), list(choices)
        if names and value not in names:
            self.fail(key, f"one of {', '.join(names)}")
        if not isinstance(value, str) or not (value or empty):
            self.fail(key, "text")
        if pattern and not re.fullmatch(pattern, value):
            self.fail(key, f"text of the form {pattern}")
        return value

    def whole(self, key: str, low: int = 0, high: int = (1 << 63) - 1) -> int:
        """A whole number from `low` to `high`."""
        value = self._data.get(key)
        if type(value) is not int or not low <= value <= high:
            self.fail(key, f"a whole number {_range(low, high)}")
        return value

    def number(self, key: str, low: float = -math.inf, high: float = math.inf) -> float:
        """A finite number from `low` to `high`."""
        value = self._data.get(key)
        if not _is_number(value, low, high):
            self.fail(key, f"a number {_range(low, high)}".rstrip())
        return value  # type: ignore[return-value]

    def flag(self, key: str) -> bool:
        """True or false."""
        value = self._data.get(key)
        if not isinstance(value, bool):
            self.fail(key, "true or false")
        return value

    def numbers(
        self, key: str, low: float = -math.inf, high: float = math.inf, *, length: int | None = None
    ) -> list[float]:
        """A list of finite numbers from `low` to `high`; of `length` numbers, where that is given."""
        value = self._data.get(key)
        if (
            not isinstance(value, list)
            or (length is not None and len(value) != length)
            or not all(_is_number(item, low, high) for item in value)
        ):
            self.fail(
                key, f"a list of {length or ''} numbers {_range(low, high)}".replace("  ", " ").rstrip()
            )
        return value

    def rows(self, key: str, *, count: int) -> list[list[float]]:
        """A list of `count` lists of finite numbers, of any lengths."""
        value = self._data.get(key)
        if (
            not isinstance(value, list)
            or len(value) != count
            or not all(isinstance(row, list) for row in value)
            or not all(_is_number(item, -math.inf, math.inf) for row in value for item in row)
        ):
            self.fail(key, f"{count} lists of numbers")
        return value

    def wholes(self, key: str, low: int = 0, high: int = (1 << 63) - 1) -> list[int]:
        """A list of whole numbers from `low` to `high`."""
        value = self._data.get(key)
        if not isinstance(value, list) or not all(
            type(item) is int and low <= item <= high for item in value
        ):
            self.fail(key, f"a list of whole numbers {_range(low, high)}")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts, which may be empty."""
        value = self._data.get(key)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self.fail(key, "a list of texts")
        return tuple(value)

    def items(self, key: str) -> list[Any]:
        """A list of anything."""
        value = self._data.get(key)
        if not isinstance(value, list):
            self.fail(key, "a list")
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        """An object whose content is anything."""
        value = self._data.get(key)
        if not isinstance(value, dict):
            self.fail(key, "an object")
        return value

    def fields(self, key: str) -> Fields:
        """An object."""
        value = self._data.get(key)
        if not isinstance(value, dict):
            self.fail(key, "an object")
        return Fields(value, self._where, self._form, f"{self._path}{key}.")

    def each(self, key: str) -> list[Fields]:
        """A list of objects."""
        value = self.items(key)
        if not all(isinstance(item, dict) for item in value):
            self.fail(key, "a list of objects")
        return [
            Fields(item, self._where, self._form, f"{self._path}{key}[{number}].")
            for number, item in enumerate(value)
        ]

    def optional(self, key: str, read: Callable[[str], _T]) -> _T | None:
        """None where the key is missing or null, else what `read`, a method of these fields, takes from it."""
        return read(key) if key in self else None


def _is_number(value: object, low: float, high: float) -> bool:
    # a whole number of JSON may be one that no float holds
    return type(value) in (int, float) and abs(value) < 1e300 and low <= value <= high  # type: ignore[arg-type, operator]


def _range(low: float, high: float) -> str:
    bounds = (f"from {low:g}" if low > -math.inf else "", f"to {high:g}" if high < 1 << 40 else "")
    return " ".join(filter(None, bounds))


def _short(value: object) -> str:
    """A value for a message, on one line and cut."""
    shortener = Repr()
    shortener.maxlong = shortener.maxstring = 60
    shortener.maxlevel = 2
    text = shortener.repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


def _check_values(value: object, depth: int) -> None:
    """Refuse lone surrogates and more levels than `depth`, level by level, whatever the stack has room for."""
    level = [value]
    for _ in range(depth):
        below: list[object] = []
        for item in level:
            if isinstance(item, str):
                _check_text(item)
            elif isinstance(item, Mapping):
                for key in item:
                    _check_text(str(key))
                below.extend(item.values())
            elif isinstance(item, (list, tuple)):
                below.extend(item)
        if not below:
            return
        level = below
    raise ValueError(f"it is nested deeper than {depth} levels")


def _check_text(text: str) -> None:
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("a text holds a lone surrogate, which is no character")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return data


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _whole(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits; {_MOST_DIGITS} digits are the most")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits) if len(digits) <= _MOST_DIGITS else math.inf
    if not math.isfinite(value):
        raise ValueError(f"{digits[:20]} is beyond any float")
    return value


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique, parse_constant=_no_constant, parse_int=_whole, parse_float=_float
)
