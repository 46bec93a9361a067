"""Training methods: one method, one file.

A module is found by its name and holds `Config`, pure functions, and one subclass of `Method`.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil

from embedkit.errors import ConfigError
from embedkit.training.method import Method

__all__ = ["FAMILIES", "family_of", "method_class", "names"]

#: What a method learns from, and the methods.
FAMILIES = {
    "labels": ("supervised",),
    "few labels": ("fixmatch",),
    "reconstruction": ("autoencoder", "mae", "vae"),
    "an adversary": ("bigan",),
    "a pretext task": ("rotnet",),
    "views": ("simclr", "simsiam"),
    "clusters": ("deepdpm", "mixae"),
    "identities": ("sphereface",),
}


def names() -> list[str]:
    """The methods, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def family_of(name: str) -> str:
    """What the method `name` learns from; empty for one that embedkit does not train."""
    return next((family for family, methods in FAMILIES.items() if name in methods), "")


def method_class(name: str) -> type[Method]:
    """The one subclass of `Method` that the module `name` defines.

    Raises:
        ConfigError: No such method; the message names the nearest.
    """
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=3, cutoff=0.4) or names()
        raise ConfigError(f"method {name!r}: there is none of this name; the nearest are {', '.join(near)}")
    module = importlib.import_module(f"{__name__}.{name}")
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
