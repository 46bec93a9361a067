"""The strong view of FixMatch: random operations from a pool, then one erased square."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from embedkit.training.augment.augmentation import Augmentation, Parameters
from embedkit.training.augment.draws import Range, chance, integers, uniform
from embedkit.training.augment.operations import (
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
    adjust_sharpness,
    autocontrast,
    box_mask,
    equalize,
    posterize,
    solarize,
    warp,
)

#: FixMatch's pool: operation -> range of its parameter (factors, bits, degrees, shares, thresholds).
RANDAUGMENT_RANGES: dict[str, Range] = {
    "AutoContrast": (0.0, 0.0),
    "Brightness": (0.05, 0.95),
    "Color": (0.05, 0.95),
    "Contrast": (0.05, 0.95),
    "Equalize": (0.0, 0.0),
    "Identity": (0.0, 0.0),
    "Posterize": (4.0, 8.0),
    "Rotate": (-30.0, 30.0),
    "Sharpness": (0.05, 0.95),
    "ShearX": (-0.3, 0.3),
    "ShearY": (-0.3, 0.3),
    "Solarize": (0.0, 1.0),
    "TranslateX": (-0.3, 0.3),
    "TranslateY": (-0.3, 0.3),
}
_POINTWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Brightness": adjust_brightness,
    "Color": adjust_saturation,
    "Contrast": adjust_contrast,
    "Posterize": posterize,
    "Sharpness": adjust_sharpness,
    "Solarize": solarize,
}


@dataclass(frozen=True, kw_only=True)
class RandAugment(Augmentation):
    """The strong view of FixMatch: `num_ops` random operations of random magnitude, then one erased square.

    Source: FixMatch (Sohn et al., NeurIPS 2020, arXiv 2001.07685, section 2.3 and the appendix's list of
    transformations), after RandAugment (Cubuk et al., 2019, arXiv 1909.13719). Differences from the source:
    geometry is bilinear (nearest neighbor is coarse on 28 pixels), and operations work on floating-point
    pixels, `Equalize` on 256 levels of them.

    Attributes:
        num_ops: Operations for each image, drawn with replacement.
        p: Probability that a drawn operation is applied; one half, as in the authors' code.
        magnitude: Share of each operation's range, uniform in low..high for each image and operation;
            (0, 1) is the whole range.
        ops: Names from `RANDAUGMENT_RANGES`, each equally likely. `Color` changes nothing on one channel.
        cutout: Side of the erased square as a share of each side of the image; 0 erases nothing. Its center
            is uniform over the image, and what stands out is cut off.
        cutout_value: What is written into the square, 0..1.
        fill: What stands where a turned, sheared or moved image leaves nothing, 0..1; mid-gray in the authors'
            code, here black, the ground of images such as Fashion-MNIST's.
    """

    num_ops: int = 2
    p: float = 0.5
    magnitude: Range = (0.0, 1.0)
    ops: tuple[str, ...] = tuple(RANDAUGMENT_RANGES)
    cutout: float = 0.5
    cutout_value: float = 0.5
    fill: float = 0.0

    def __post_init__(self) -> None:
        unknown = [op for op in self.ops if op not in RANDAUGMENT_RANGES]
        self._need(bool(self.ops) and not unknown, "ops", f"names from {', '.join(RANDAUGMENT_RANGES)}")
        self._need(self.num_ops >= 0, "num_ops", "0 or more")
        self._need_range("magnitude", 0.0, 1.0)
        self._need_chance()
        self._need_chance("cutout")

    def draw(self, n: int, generator: Generator) -> Parameters:
        """Of each round `ops` (rounds, n), -1 for none, and `magnitudes` (rounds, n); `center` (2, n) of the square."""
        rounds = []
        for _ in range(self.num_ops):
            which = integers(generator, (n,), len(self.ops))
            applied = chance(generator, n, self.p)
            rounds.append((which.where(applied, -1), uniform(generator, (n,), self.magnitude)))
        parameters = {
            "ops": torch.stack([which for which, _ in rounds]) if rounds else None,
            "magnitudes": torch.stack([share for _, share in rounds]) if rounds else None,
        }
        if self.cutout > 0.0:
            parameters["center"] = uniform(generator, (2, n), (0.0, 1.0))
        return parameters

    def apply(self, x: Tensor, parameters: Parameters) -> Tensor:
        """Augment: in each round the images of one operation go through it together."""
        _, _, height, width = x.shape
        for index in range(self.num_ops):
            which, magnitude = parameters["ops"][index], parameters["magnitudes"][index]
            result = x.clone()
            for number, op in enumerate(self.ops):
                rows = (which == number).nonzero().flatten()
                if op != "Identity" and len(rows):
                    value = _magnitude_of(op, magnitude[rows]).to(x)
                    rows = rows.to(x.device)
                    result[rows] = _augment(op, x[rows], value, self.fill)
            x = result
        if self.cutout > 0.0:
            center = parameters["center"]
            h, w = self.cutout * height, self.cutout * width
            top, left = (center[0] * height - h / 2).round(), (center[1] * width - w / 2).round()
            square = box_mask(top, left, round(h), round(w), height, width)
            x = x.masked_fill(square.to(x.device), self.cutout_value)
        return x


def _magnitude_of(op: str, share: Tensor) -> Tensor:
    low, high = RANDAUGMENT_RANGES[op]
    if op == "Posterize":  # whole bits, each equally likely over the whole range
        return (low + share * (high - low + 1)).floor().clamp(max=high)
    return low + share * (high - low)


def _augment(op: str, x: Tensor, value: Tensor, fill: float) -> Tensor:
    """One operation of the pool on images (N, C, H, W) with parameters (N,)."""
    if op in _POINTWISE:
        return _POINTWISE[op](x, value)
    if op in ("AutoContrast", "Equalize"):
        return autocontrast(x) if op == "AutoContrast" else equalize(x)
    # The rest move pixels: rows of an inverse matrix about the center. A shear of the source keeps the top row
    # (the left column) in place, so about the center it also shifts by half a side.
    _, _, height, width = x.shape
    one, zero = torch.ones_like(value), torch.zeros_like(value)
    if op == "Rotate":
        cos, sin = (value * (math.pi / 180)).cos(), (value * (math.pi / 180)).sin()
        rows = (cos, -sin, zero, sin, cos, zero)
    elif op == "ShearX":
        rows = (one, value, value * (height / 2), zero, one, zero)
    elif op == "ShearY":
        rows = (one, zero, zero, value, one, value * (width / 2))
    elif op == "TranslateX":
        rows = (one, zero, value * width, zero, one, zero)
    else:
        rows = (one, zero, zero, zero, one, value * height)
    return warp(x, torch.stack(rows, dim=1).reshape(-1, 2, 3), fill)
