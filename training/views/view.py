"""What every view is: a checked pure function of a batch and a generator, and JSON by its class name."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Generator, Tensor

from embedkit.errors import ConfigError


class View:
    """The base of every view: checks the batch, records no gradient, and is found by its class name in JSON.

    A subclass is a frozen keyword-only dataclass with a `transform` that leaves its input as it is.
    """

    registry: ClassVar[dict[str, type[View]]] = {}

    def __init_subclass__(cls) -> None:
        View.registry[cls.__name__] = cls

    @torch.no_grad()
    def __call__(self, x: Tensor, generator: Generator) -> Tensor:
        """The view of a batch.

        Args:
            x: Pictures (N, C, H, W), floating point, in [0, 1]; never changed.
            generator: Where every random parameter comes from.

        Returns:
            (N, C, H', W'), same type and device; H' and W' are H and W unless the view says otherwise. It
            may be `x` itself where nothing was to be done.

        Raises:
            ConfigError: Not a floating-point batch of pictures.
        """
        if x.ndim != 4 or not x.is_floating_point():
            raise ConfigError(
                f"{type(self).__name__}: expected floating-point pictures (N, C, H, W) in [0, 1], found "
                f"{x.dtype} {tuple(x.shape)}; divide uint8 pixels by 255"
            )
        # under autocast the matrix products of a crop would come out in bfloat16
        with torch.autocast(x.device.type, enabled=False):
            return self.transform(x, generator)

    def transform(self, x: Tensor, generator: Generator) -> Tensor:
        """What the view does; `x` is checked and no gradient is recorded."""
        raise NotImplementedError

    def _need(self, ok: bool, field: str, expected: str) -> None:
        if not ok:
            raise ConfigError(
                f"{type(self).__name__}.{field}: expected {expected}, found {getattr(self, field)!r}"
            )

    def _need_chance(self, field: str = "p") -> None:
        self._need(0.0 <= getattr(self, field) <= 1.0, field, "a probability of 0 to 1")

    def _need_range(self, field: str, low: float, high: float) -> None:
        value = getattr(self, field)
        ok = len(value) == 2 and low <= value[0] <= value[1] <= high
        self._need(ok, field, f"(low, high) within {low:g} to {high:g}")


@dataclass(frozen=True, kw_only=True)
class Compose(View):
    """One view after the other."""

    views: tuple[View, ...]

    def transform(self, x: Tensor, generator: Generator) -> Tensor:
        """The last view of the view before it."""
        for view in self.views:
            x = view(x, generator)
        return x


def views_to_json(view: View) -> dict[str, Any]:
    """A view as JSON: its class name under `view`, and its fields."""

    def plain(value: Any) -> Any:
        if isinstance(value, View):
            return views_to_json(value)
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    fields = {field.name: plain(getattr(view, field.name)) for field in dataclasses.fields(cast(Any, view))}
    return {"view": type(view).__name__, **fields}


def views_from_json(value: object) -> View:
    """The view that `views_to_json` wrote.

    Raises:
        ConfigError: Not such an object, an unknown view, or a field that it does not have.
    """
    if not isinstance(value, Mapping) or not isinstance(value.get("view"), str):
        raise ConfigError(f"a view: expected an object with its class name under 'view', found {value!r}")
    name = value["view"]
    if name not in View.registry:
        near = difflib.get_close_matches(name, View.registry, n=3) or sorted(View.registry)
        raise ConfigError(f"a view: no class of the name {name!r}; the nearest are {', '.join(near)}")

    def rich(item: Any) -> Any:
        if isinstance(item, Mapping):
            return views_from_json(item)
        return tuple(rich(part) for part in item) if isinstance(item, list) else item

    try:
        return View.registry[name](**{key: rich(item) for key, item in value.items() if key != "view"})
    except TypeError as error:
        raise ConfigError(f"view {name}: {error}") from None
