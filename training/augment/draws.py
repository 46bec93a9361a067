"""What views draw: parameters of every picture, as batched tensors on the generator's device."""

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


def box_sides(generator: Generator, n: int, pixels: int, area: Range, ratio: Range) -> tuple[Tensor, Tensor]:
    """Ten tries at sides of boxes: the first over the second is log-uniform in `ratio`. Two of (10, n)."""
    areas = uniform(generator, (10, n), area) * pixels
    ratios = uniform(generator, (10, n), (math.log(ratio[0]), math.log(ratio[1]))).exp()
    return (areas * ratios).sqrt().round(), (areas / ratios).sqrt().round()


def chance(generator: Generator, x: Tensor, p: float) -> Tensor:
    """True with probability p for each picture: bool (N, 1, 1, 1) on the batch's device."""
    return (torch.rand(len(x), 1, 1, 1, generator=generator, device=generator.device) < p).to(x.device)
