"""What augmentations draw: parameters of every image, as batched tensors on the generator's device."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

Range = tuple[float, float]


def uniform(generator: Generator, shape: tuple[int, ...], bounds: Range) -> Tensor:
    """Uniform float32 on the generator's device."""
    low, high = bounds
    return torch.rand(shape, generator=generator, device=generator.device).mul_(high - low).add_(low)


def integers(generator: Generator, shape: tuple[int, ...], below: int) -> Tensor:
    """Uniform int64 in 0..below - 1 on the generator's device."""
    return torch.randint(below, shape, generator=generator, device=generator.device)


def box_tries(generator: Generator, n: int, area: Range, ratio: Range) -> dict[str, Tensor]:
    """Ten tries at boxes: `area` (10, n), uniform shares of an image, `ratio` (10, n), log-uniform, and `place`.

    `place` (2, n) says where a box of any size goes: from top and left (0) to bottom and right (1).
    """
    areas = uniform(generator, (10, n), area)
    ratios = uniform(generator, (10, n), (math.log(ratio[0]), math.log(ratio[1]))).exp()
    return {"area": areas, "ratio": ratios, "place": uniform(generator, (2, n), (0.0, 1.0))}


def box_sides(tries: dict[str, Tensor], pixels: int) -> tuple[Tensor, Tensor]:
    """The sides (10, n) of those boxes in an image of so many pixels; the first over the second is the ratio."""
    areas = tries["area"] * pixels
    return (areas * tries["ratio"]).sqrt().round(), (areas / tries["ratio"]).sqrt().round()


def chance(generator: Generator, n: int, p: float) -> Tensor:
    """True with probability p for each image: bool (n,)."""
    return torch.rand(n, 1, 1, 1, generator=generator, device=generator.device).flatten() < p


def each(value: Tensor, x: Tensor) -> Tensor:
    """A parameter (N,) on the device of images (N, C, H, W), as (N, 1, 1, 1)."""
    return value.to(x.device)[:, None, None, None]
