"""Packages that import their public names at first use, from one mapping of name -> module.

Such a package costs nothing at import, however heavy the modules behind its names are. A function and its module may
have one name: the package's attribute is always the function, whichever was imported first.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any


class _LazyPackage(ModuleType):
    """A package whose public names are resolved at first use."""

    _modules: Mapping[str, str]
    _packages: tuple[str, ...]

    def __getattr__(self, name: str) -> Any:
        if name in self._packages:
            return importlib.import_module(f"{self.__name__}.{name}")
        if name not in self._modules:
            from difflib import get_close_matches

            near = [one for one in self._modules if name in one] or get_close_matches(name, self._modules)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near and name[:1] != "_" else ""
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}{hint}")
        value = getattr(importlib.import_module(f"{self.__name__}.{self._modules[name]}"), name)
        super().__setattr__(name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # The import system binds a submodule to its package. The function of the same name has precedence.
        if not (isinstance(value, ModuleType) and name in self._modules):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return [*self._modules, *(("__version__",) if "__version__" in vars(self) else ())]


def export_lazily(package: str, modules: Mapping[str, str], packages: tuple[str, ...] = ()) -> None:
    """Let a package resolve its public names at first use.

    Args:
        package: Its `__name__`.
        modules: Public name -> the module that defines it, relative to the package.
        packages: Public packages inside it, which need no import of their own.
    """
    module = sys.modules[package]
    module.__class__ = _LazyPackage
    module.__dict__.update(_modules=modules, _packages=packages)
