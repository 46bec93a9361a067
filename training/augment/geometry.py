"""Views that move pixels, or cover some of them.

A crop is two batched matrix products, `A_y x A_x^T` with matrices of each image's own: about as fast on CPU as
sampling a grid, and antialiased, which a sampled grid cannot be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from embedkit.errors import ConfigError
from embedkit.training.augment.augmentation import Augmentation, OnSomeImages, Parameters
from embedkit.training.augment.draws import Range, box_sides, box_tries, chance, each, integers, uniform
from embedkit.training.augment.operations import affine_matrix, box_mask, resize_matrix, separable, warp


@dataclass(frozen=True, kw_only=True)
class RandomResizedCrop(Augmentation):
    """A box of random area and aspect ratio, resized bilinearly with antialiasing.

    Boxes are torchvision's: an area uniform in `scale` and a ratio log-uniform in `ratio`, up to ten tries,
    then the largest central box of an allowed ratio. So are the pixels (`resized_crop(..., antialias=True)`):
    the box is cut out first, what lies outside it does not bleed in.

    Attributes:
        size: Height and width of the result in pixels; `None` keeps those of the batch, or cuts images of the run's
            size out of larger stored ones (`data.load_size`).
        scale: Share of the image's area, low and high.
        ratio: Width over height, low and high.
    """

    size: tuple[int, int] | None = None
    scale: Range = (0.08, 1.0)
    ratio: Range = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        self._need_range("scale", 1e-6, 1.0)
        self._need_range("ratio", 1e-3, 1e3)
        self._need(
            self.size is None or (len(self.size) == 2 and min(self.size) >= 1), "size", "(height, width)"
        )

    def cut_to(self, size: tuple[int, int]) -> Augmentation:
        """The same boxes, resized to `size`."""
        return self if self.size is not None else replace(self, size=size)

    def draw(self, n: int, generator: Generator) -> Parameters:
        """Ten tries at a box."""
        return box_tries(generator, n, self.scale, self.ratio)

    def boxes(self, parameters: Parameters, height: int, width: int) -> tuple[Tensor, ...]:
        """Top, left, height and width of the boxes in images of a size: four float32 tensors (n,) of whole pixels."""
        w, h = box_sides(parameters, height * width)  # (tries, n)
        place = parameters["place"]
        fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
        first = fits.int().argmax(dim=0, keepdim=True)  # of equal values, the first
        w, h, found = w.gather(0, first)[0], h.gather(0, first)[0], fits.any(dim=0)
        top = (place[0] * (height - h + 1)).floor()
        left = (place[1] * (width - w + 1)).floor()

        last_w, last_h = width, height
        if width / height < self.ratio[0]:
            last_h = round(width / self.ratio[0])
        elif width / height > self.ratio[1]:
            last_w = round(height * self.ratio[1])
        return (
            torch.where(found, top, float((height - last_h) // 2)),
            torch.where(found, left, float((width - last_w) // 2)),
            torch.where(found, h, float(last_h)),
            torch.where(found, w, float(last_w)),
        )

    def apply(self, x: Tensor, parameters: Parameters) -> Tensor:
        """Cut and resize."""
        _, _, height, width = x.shape
        top, left, h, w = (box.to(x.device) for box in self.boxes(parameters, height, width))
        out_h, out_w = self.size or (height, width)
        return separable(
            x,
            resize_matrix(top, h, height, out_h).to(x.dtype),
            resize_matrix(left, w, width, out_w).to(x.dtype),
        )


@dataclass(frozen=True, kw_only=True)
class RandomHorizontalFlip(OnSomeImages):
    """Left and right exchanged, with probability `p` for each image."""

    p: float = 0.5

    def apply(self, x: Tensor, parameters: Parameters) -> Tensor:
        """Flip some."""
        return torch.where(each(parameters["chosen"], x), x.flip(3), x)


@dataclass(frozen=True, kw_only=True)
class RandomVerticalFlip(OnSomeImages):
    """Top and bottom exchanged, with probability `p` for each image."""

    p: float = 0.5

    def apply(self, x: Tensor, parameters: Parameters) -> Tensor:
        """Flip some."""
        return torch.where(each(parameters["chosen"], x), x.flip(2), x)


@dataclass(frozen=True, kw_only=True)
class Rotate90(Augmentation):
    """`k` quarter turns counter-clockwise, exact: `torch.rot90(x, k, (2, 3))`, RotNet's label k."""

    k: int = 1

    def apply(self, x: Tensor, parameters: Parameters) -> Tensor:
        """Turn; a quarter of an image that is not square exchanges height and width."""
        return torch.rot90(x, self.k, (2, 3)).contiguous()


@dataclass(frozen=True, kw_only=True)
class RandomShift(Augmentation):
    """Moved by whole pixels: padded on every side, then cut out at a random place.

    Attributes:
        pixels: Largest shift to either side; every shift is equally likely.
        pad: `reflect` (FixMatch's weak view), `replicate` (the border's pixels) or `constant` (black).
    """

    pixels: int
    pad: Literal["reflect", "replicate", "constant"] = "reflect"

    def __post_init__(self) -> None:
        self._need(self.pixels >= 0, "pixels", "0 or more")
        self._need(
            self.pad in ("reflect", "replicate", "constant"), "pad", "'reflect', 'replicate' or 'constant'"
        )

    def draw(self, n: int, generator: Generator) -> Parameters:
        """The first row and column of the cut, in the padded image."""
        return {"places": integers(generator, (2, n), 2 * self.pixels + 1)}

    def apply(self, x: Tensor, parameters: Parameters) -> Tensor:
        """Shift."""
        n, _, height, width = x.shape
        if self.pad == "reflect" and self.pixels >= min(height, width):
            raise ConfigError(
                f"RandomShift.pixels: {self.pixels} cannot be reflected in {height}x{width} pixels"
            )
        places = parameters["places"].to(x.device)
        windows = F.pad(x, [self.pixels] * 4, mode=self.pad).unfold(2, height, 1).unfold(3, width, 1)
        return windows[torch.arange(n, device=x.device), :, places[0], places[1]]


@dataclass(frozen=True, kw_only=True)
class RandomAffine(Augmentation):
    """Turned, moved, scaled and sheared about the center, bilinear; a sampled grid has no antialiasing.

    Attributes:
        degrees: Turned by an angle uniform in -degrees..degrees.
        translate: Moved by up to this share of the width, and of the height, rounded to whole pixels.
        scale: Scaled by a factor uniform in low..high.
        shear: Sheared along x by an angle uniform in -shear..shear degrees.
        fill: What stands where no image is, 0..1.
        p: Probability for each image.
    """

    degrees: float = 0.0
    translate: tuple[float, float] = (0.0, 0.0)
    scale: Range = (1.0, 1.0)
    shear: float = 0.0
    fill: float = 0.0
    p: float = 1.0

    def __post_init__(self) -> None:
        self._need(0.0 <= self.degrees <= 180.0, "degrees", "0 to 180")
        self._need(
            len(self.translate) == 2 and 0.0 <= min(self.translate) and max(self.translate) <= 1.0,
            "translate",
            "shares of width and height of 0 to 1",
        )
        self._need_range("scale", 1e-3, 1e3)
        self._need(0.0 <= self.shear < 90.0, "shear", "0 to below 90 degrees")
        self._need_chance()

    def draw(self, n: int, generator: Generator) -> Parameters:
        """`angle` and `shear` in radians, `shift_x` and `shift_y` in shares of width and height, `scale`."""
        angle, shear = uniform(generator, (2, n), (-1.0, 1.0)).mul(math.pi / 180)
        shift_x, shift_y = uniform(generator, (2, n), (-1.0, 1.0))
        return {
            "angle": angle * self.degrees,
            "shift_x": shift_x * self.translate[0],
            "shift_y": shift_y * self.translate[1],
            "scale": uniform(generator, (n,), self.scale),
            "shear": shear * self.shear,
            **({} if self.p == 1.0 else {"chosen": chance(generator, n, self.p)}),
        }

    def apply(self, x: Tensor, parameters: Parameters) -> Tensor:
        """Warp."""
        _, _, height, width = x.shape
        matrix = affine_matrix(
            angle=parameters["angle"],
            shift_x=(parameters["shift_x"] * width).round(),
            shift_y=(parameters["shift_y"] * height).round(),
            scale=parameters["scale"],
            shear=parameters["shear"],
        )
        warped = warp(x, matrix.to(x), self.fill)
        return warped if self.p == 1.0 else torch.where(each(parameters["chosen"], x), warped, x)


@dataclass(frozen=True, kw_only=True)
class RandomErasing(Augmentation):
    """A random box overwritten (Random Erasing Data Augmentation, Zhong et al., AAAI 2020, arXiv 1708.04896).

    Boxes are torchvision's: as in `RandomResizedCrop`, but smaller than the image on both sides, and
    nothing is erased when ten tries find none.

    Attributes:
        p: Probability for each image.
        scale: Share of the image's area.
        ratio: Height over width.
        value: What is written, 0..1.
    """

    p: float = 0.5
    scale: Range = (0.02, 0.33)
    ratio: Range = (0.3, 3.3)
    value: float = 0.0

    def __post_init__(self) -> None:
        self._need_chance()
        self._need_range("scale", 1e-6, 1.0)
        self._need_range("ratio", 1e-3, 1e3)

    def draw(self, n: int, generator: Generator) -> Parameters:
        """Ten tries at a box, and which images."""
        return {**box_tries(generator, n, self.scale, self.ratio), "chosen": chance(generator, n, self.p)}

    def apply(self, x: Tensor, parameters: Parameters) -> Tensor:
        """Erase."""
        _, _, height, width = x.shape
        h, w = box_sides(parameters, height * width)  # (tries, n)
        place = parameters["place"]
        fits = (h < height) & (w < width)
        first = fits.int().argmax(dim=0, keepdim=True)
        h, w = h.gather(0, first)[0] * fits.any(dim=0), w.gather(0, first)[0] * fits.any(dim=0)
        top, left = (place[0] * (height - h + 1)).floor(), (place[1] * (width - w + 1)).floor()
        inside = box_mask(top, left, h, w, height, width).to(x.device)
        return x.masked_fill(inside & each(parameters["chosen"], x), self.value)
