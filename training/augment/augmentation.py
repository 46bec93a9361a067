"""What every view is: a checked pure function of a batch and a generator."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from embedkit.errors import ConfigError


class View:
    """The base of every view: checks the batch and records no gradient.

    A subclass is a frozen keyword-only dataclass with a `transform` that leaves its input as it is.
    """

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
