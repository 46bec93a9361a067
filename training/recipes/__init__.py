"""Recipes: functions that return one complete run configuration.

A module's `recipe()` is found by the module's name, another function of it by `name:function`. A docstring says what
data, time and command belong to it; what was measured stands beside it as data, in the module's `RESULTS`: by function
the data set, `metrics` by name, and those of the same encoder at `random` initialization.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

from embedkit._io.text import did_you_mean
from embedkit.errors import ConfigError
from embedkit.training.config import RunConfig

__all__ = ["recipe", "summaries"]


def summaries() -> dict[str, str]:
    """Every recipe, variants too, by name: what it is, and what was measured of it."""
    found = {}
    for module in _modules():
        results = getattr(importlib.import_module(f"{__name__}.{module}"), "RESULTS", {})
        for key, function in sorted(_recipes(module).items(), key=lambda item: item[0] != "recipe"):
            line = (function.__doc__ or "").partition("\n")[0]
            name = module if key == "recipe" else f"{module}:{key}"
            found[name] = f"{line.removesuffix('.')}{_in_words(results.get(key, {}))}."
    return found


def _in_words(result: Mapping[str, Any]) -> str:
    """What was measured: `; on DATA NAME VALUE (random VALUE), ...`."""
    random = result.get("random", {})
    metrics = [
        f"{name} {value:g}" + (f" (random {random[name]:g})" if name in random else "")
        for name, value in result.get("metrics", {}).items()
    ]
    return f"; on {result['data']} {', '.join(metrics)}" if metrics else "; not measured yet"


def recipe(name: str) -> RunConfig:
    """The configuration that a recipe returns.

    Args:
        name: `simclr`, or `simclr:variant` for the function `variant` of that module.

    Raises:
        ConfigError: No such recipe; the message names the nearest.
    """
    module, _, variant = name.partition(":")
    if module not in _modules():
        near = did_you_mean(module, _modules(), most=3, otherwise=f"there are {', '.join(_modules())}")
        raise ConfigError(f"recipe {name!r}: there is none of this name; {near}")
    found = _recipes(module)
    if (variant or "recipe") not in found:
        near = did_you_mean(variant, found, most=3, otherwise=f"{module} has {', '.join(sorted(found))}")
        raise ConfigError(f"recipe {name!r}: there is none of this name; {near}")
    return found[variant or "recipe"]()


def _modules() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def _recipes(module: str) -> dict[str, Callable[[], RunConfig]]:
    """The public functions of a module of recipes."""
    found = importlib.import_module(f"{__name__}.{module}")
    return {key: getattr(found, key) for key in found.__all__ if callable(getattr(found, key))}
