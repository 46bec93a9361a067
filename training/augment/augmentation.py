"""What every augmentation is: parameters drawn for each image, and a pure function of images and parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from embedkit.errors import ConfigError
from embedkit.training.augment.draws import chance

#: What `draw` gives and `apply` takes: tensors by name, or those of each step of a `Compose`.
Parameters = Any


class Augmentation:
    """The base of every augmentation.

    A subclass is a frozen keyword-only dataclass with `draw` and `apply`. What is drawn does not depend on the images'
    size or device: the same parameters can be applied to two sizes of the same images, or read by a method that must
    predict them.
    """

    @torch.no_grad()
    def __call__(self, x: Tensor, generator: Generator) -> Tensor:
        """Draw parameters and apply them.

        Args:
            x: Images (N, C, H, W), floating point, in [0, 1]; never changed.
            generator: Where every random parameter comes from.

        Returns:
            (N, C, H', W'), same type and device; H' and W' are H and W unless the augmentation says otherwise. It
            may be `x` itself where nothing was to be done.

        Raises:
            ConfigError: Not a floating-point batch of images.
        """
        if x.ndim != 4 or not x.is_floating_point():
            raise ConfigError(
                f"{type(self).__name__}: expected floating-point images (N, C, H, W) in [0, 1], found "
                f"{x.dtype} {tuple(x.shape)}; divide uint8 pixels by 255"
            )
        # under autocast the matrix products of a crop would come out in bfloat16
        with torch.autocast(x.device.type, enabled=False):
            return self.apply(x, self.draw(len(x), generator))

    def draw(self, n: int, generator: Generator) -> Parameters:
        """Parameters of `n` images, on the generator's device."""
        return {}

    def apply(self, x: Tensor, parameters: Parameters) -> Tensor:
        """What the augmentation does to images (N, C, H, W) in [0, 1] with the parameters of each."""
        raise NotImplementedError

    def cut_to(self, size: tuple[int, int]) -> Augmentation | None:
        """The same augmentation, cutting results of a size out of larger images; None where it cuts nothing.

        Args:
            size: Height and width in pixels. An augmentation that was given a size of its own keeps it.
        """
        return None

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
class Compose(Augmentation):
    """One augmentation after the other; its parameters are a tuple of theirs."""

    steps: tuple[Augmentation, ...]

    def draw(self, n: int, generator: Generator) -> Parameters:
        """The parameters of every step."""
        return tuple(step.draw(n, generator) for step in self.steps)

    def apply(self, x: Tensor, parameters: Parameters) -> Tensor:
        """Every step on what the step before it gave."""
        for step, own in zip(self.steps, parameters, strict=True):
            x = step.apply(x, own)
        return x

    def cut_to(self, size: tuple[int, int]) -> Augmentation | None:
        """The first step that cuts does so; the steps before it see the larger images."""
        for place, step in enumerate(self.steps):
            cut = step.cut_to(size)
            if cut is not None:
                return Compose(steps=(*self.steps[:place], cut, *self.steps[place + 1 :]))
        return None


class OnSomeImages(Augmentation):
    """The base of augmentations that do one thing to some images: each is chosen with probability `p`."""

    p: float

    def __post_init__(self) -> None:
        self._need_chance()

    def draw(self, n: int, generator: Generator) -> Parameters:
        """Which images: bool (N,) `chosen`."""
        return {"chosen": chance(generator, n, self.p)}
