"""Recipes: functions that return one complete run configuration.

A module's `recipe()` is found by the module's name, another function of it by `name:function`. What a recipe
promises (figure, data, time, command) stands in its docstring.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil

from embedkit.errors import ConfigError
from embedkit.training.config import RunConfig

__all__ = ["names", "recipe"]


def names() -> list[str]:
    """The modules that hold recipes, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def recipe(name: str) -> RunConfig:
    """The configuration that a recipe returns.

    Args:
        name: `simclr`, or `simclr:variant` for the function `variant` of that module.

    Raises:
        ConfigError: No such recipe; the message names the nearest.
    """
    module_name, _, variant = name.partition(":")
    if module_name not in names():
        near = difflib.get_close_matches(module_name, names(), n=3, cutoff=0.4) or names()
        raise ConfigError(f"recipe {name!r}: there is none of this name; the nearest are {', '.join(near)}")
    module = importlib.import_module(f"{__name__}.{module_name}")
    public = [key for key in module.__all__ if callable(getattr(module, key))]
    if (variant or "recipe") not in public:
        near = difflib.get_close_matches(variant, public, n=3, cutoff=0.4) or public
        raise ConfigError(f"recipe {name!r}: {module_name} has {', '.join(near)}")
    return getattr(module, variant or "recipe")()
