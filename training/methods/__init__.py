"""Training methods: one method, one file.

A module (or package) is found by its name and holds `FAMILY` (its supervision), `SUMMARY` (the
sentence that the card of an entry shows), `Config`, pure functions, and one subclass of `Method`.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from embedkit._io.text import did_you_mean
from embedkit.errors import ConfigError
from embedkit.training.method import Method

__all__ = ["families", "family_of", "method_class", "names", "summary_of"]


def names() -> list[str]:
    """The methods, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def family_of(name: str) -> str:
    """The supervision of the method `name`, the `FAMILY` of its module; empty for one that embedkit does not train."""
    return str(_module(name).FAMILY) if name in names() else ""


def summary_of(name: str) -> str:
    """The sentence or two that cards show of the method `name`: the `SUMMARY` of its module."""
    return str(_module(name).SUMMARY)


def families() -> dict[str, tuple[str, ...]]:
    """The methods of each family."""
    found: dict[str, list[str]] = {}
    for name in names():
        found.setdefault(family_of(name), []).append(name)
    return {family: tuple(members) for family, members in sorted(found.items())}


def method_class(name: str) -> type[Method]:
    """The one subclass of `Method` that the module `name` defines.

    Raises:
        ConfigError: No such method; the message names the nearest.
    """
    if name not in names():
        near = did_you_mean(name, names(), most=3, otherwise=f"there are {', '.join(names())}")
        raise ConfigError(f"method {name!r}: there is none of this name; {near}")
    module = _module(name)
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Method)
        and f"{value.__module__}.".startswith(f"{module.__name__}.")
    ]
    if len(found) != 1:
        raise TypeError(f"{module.__name__} must define one subclass of Method, and defines {len(found)}")
    return found[0]


def _module(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name}")
