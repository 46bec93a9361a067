"""Views: random transforms of a whole batch, on its device, every picture with its own parameters.

A view is a pure function of a batch and a generator: floating-point pictures (N, C, H, W) in [0, 1] in, a
batch out. Parameters are drawn as batched tensors on the generator's device and moved to the batch's, so a
CPU generator gives the same views wherever the pictures are. Nothing loops over pictures; where pictures need
different operations (RandAugment), they are grouped by operation.

Definitions are torchvision's (`torchvision.transforms.v2`, floating-point pictures) unless a class says
otherwise, and the tests hold each to it. A crop is two batched matrix products, `A_y x A_x^T` with matrices of
each picture's own: about as fast on CPU as sampling a grid, and antialiased, which a sampled grid cannot be.

Longer than 400 lines because it is a catalogue of fifteen short views; what they do to pixels stands in
`embedkit.training.operations`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from embedkit.errors import ConfigError
from embedkit.training.operations import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    adjust_sharpness,
    affine_matrix,
    autocontrast,
    box_mask,
    equalize,
    gaussian_blur,
    luma,
    posterize,
    resize_matrix,
    separable,
    solarize,
    warp,
)

__all__ = [
    "TWO_VIEWS",
    "ColorJitter",
    "Compose",
    "GaussianBlur",
    "GaussianNoise",
    "RandAugment",
    "RandomAffine",
    "RandomErasing",
    "RandomGrayscale",
    "RandomHorizontalFlip",
    "RandomInvert",
    "RandomResizedCrop",
    "RandomShift",
    "RandomSolarize",
    "RandomVerticalFlip",
    "Rotate90",
    "View",
    "views_from_json",
    "views_to_json",
]

Range = tuple[float, float]


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


# ---- geometry --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RandomResizedCrop(View):
    """A box of random area and aspect ratio, resized bilinearly with antialiasing.

    Boxes are torchvision's: an area uniform in `scale` and a ratio log-uniform in `ratio`, up to ten tries,
    then the largest central box of an allowed ratio. So are the pixels (`resized_crop(..., antialias=True)`):
    the box is cut out first, what lies outside it does not bleed in.

    Attributes:
        size: Height and width of the result in pixels; `None` keeps those of the batch.
        scale: Share of the picture's area, low and high.
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

    def boxes(self, n: int, height: int, width: int, generator: Generator) -> tuple[Tensor, ...]:
        """Top, left, height and width of `n` random boxes: four float32 tensors (n,) of whole pixels."""
        w, h = _box_sides(generator, n, height * width, self.scale, self.ratio)  # (tries, n)
        place = _uniform(generator, (2, n), (0.0, 1.0))
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

    def transform(self, x: Tensor, generator: Generator) -> Tensor:
        """Cut and resize."""
        n, _, height, width = x.shape
        top, left, h, w = (box.to(x.device) for box in self.boxes(n, height, width, generator))
        out_h, out_w = self.size or (height, width)
        return separable(
            x,
            resize_matrix(top, h, height, out_h).to(x.dtype),
            resize_matrix(left, w, width, out_w).to(x.dtype),
        )


@dataclass(frozen=True, kw_only=True)
class RandomHorizontalFlip(View):
    """Left and right exchanged, with probability `p` for each picture."""

    p: float = 0.5

    def __post_init__(self) -> None:
        self._need_chance()

    def transform(self, x: Tensor, generator: Generator) -> Tensor:
        """Flip some."""
        return torch.where(_chance(generator, x, self.p), x.flip(3), x)


@dataclass(frozen=True, kw_only=True)
class RandomVerticalFlip(View):
    """Top and bottom exchanged, with probability `p` for each picture."""

    p: float = 0.5

    def __post_init__(self) -> None:
        self._need_chance()

    def transform(self, x: Tensor, generator: Generator) -> Tensor:
        """Flip some."""
        return torch.where(_chance(generator, x, self.p), x.flip(2), x)


@dataclass(frozen=True, kw_only=True)
class Rotate90(View):
    """`k` quarter turns counter-clockwise, exact: `torch.rot90(x, k, (2, 3))`, RotNet's label k."""

    k: int = 1

    def transform(self, x: Tensor, generator: Generator) -> Tensor:
        """Turn; a quarter of a picture that is not square exchanges height and width."""
        return torch.rot90(x, self.k, (2, 3)).contiguous()


@dataclass(frozen=True, kw_only=True)
class RandomShift(View):
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

    def transform(self, x: Tensor, generator: Generator) -> Tensor:
        """Shift."""
        n, _, height, width = x.shape
        if self.pad == "reflect" and self.pixels >= min(height, width):
            raise ConfigError(
                f"RandomShift.pixels: {self.pixels} cannot be reflected in {height}x{width} pixels"
            )
        places = _integers(generator, (2, n), 2 * self.pixels + 1).to(x.device)
        windows = F.pad(x, [self.pixels] * 4, mode=self.pad).unfold(2, height, 1).unfold(3, width, 1)
        return windows[torch.arange(n, device=x.device), :, places[0], places[1]]


@dataclass(frozen=True, kw_only=True)
class RandomAffine(View):
    """Turned, moved, scaled and sheared about the centre, bilinear; a sampled grid has no antialiasing.

    Attributes:
        degrees: Turned by an angle uniform in -degrees..degrees.
        translate: Moved by up to this share of the width, and of the height, rounded to whole pixels.
        scale: Scaled by a factor uniform in low..high.
        shear: Sheared along x by an angle uniform in -shear..shear degrees.
        fill: What stands where no picture is, 0..1.
        p: Probability for each picture.
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

    def transform(self, x: Tensor, generator: Generator) -> Tensor:
        """Warp."""
        n, _, height, width = x.shape
        angle, shear = _uniform(generator, (2, n), (-1.0, 1.0)).mul(math.pi / 180)
        shift_x, shift_y = _uniform(generator, (2, n), (-1.0, 1.0))
        matrix = affine_matrix(
            angle=angle * self.degrees,
            shift_x=(shift_x * self.translate[0] * width).round(),
            shift_y=(shift_y * self.translate[1] * height).round(),
            scale=_uniform(generator, (n,), self.scale),
            shear=shear * self.shear,
        )
        warped = warp(x, matrix.to(x), self.fill)
        return warped if self.p == 1.0 else torch.where(_chance(generator, x, self.p), warped, x)


@dataclass(frozen=True, kw_only=True)
class RandomErasing(View):
    """A random box overwritten (Random Erasing Data Augmentation, Zhong et al., AAAI 2020, arXiv 1708.04896).

    Boxes are torchvision's: as in `RandomResizedCrop`, but smaller than the picture on both sides, and
    nothing is erased when ten tries find none.

    Attributes:
        p: Probability for each picture.
        scale: Share of the picture's area.
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

    def transform(self, x: Tensor, generator: Generator) -> Tensor:
        """Erase."""
        n, _, height, width = x.shape
        h, w = _box_sides(generator, n, height * width, self.scale, self.ratio)  # (tries, n)
        place = _uniform(generator, (2, n), (0.0, 1.0))
        fits = (h < height) & (w < width)
        first = fits.int().argmax(dim=0, keepdim=True)
        h, w = h.gather(0, first)[0] * fits.any(dim=0), w.gather(0, first)[0] * fits.any(dim=0)
        top, left = (place[0] * (height - h + 1)).floor(), (place[1] * (width - w + 1)).floor()
        inside = box_mask(top, left, h, w, height, width).to(x.device)
        return x.masked_fill(inside & _chance(generator, x, self.p), self.value)


# ---- colour and pixels -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ColorJitter(View):
    """Brightness, contrast, saturation and hue changed by random factors.

    The order of the four is drawn once for the batch, the factors for every picture. torchvision draws an
    order for every picture too; on a batch that would cost each operation four times, and over the batches of
    a run every picture sees every order all the same. On one channel saturation and hue change nothing.

    Attributes:
        brightness: Factor uniform in max(0, 1 - brightness)..1 + brightness.
        contrast: The same, about the mean luma of the picture.
        saturation: The same, about the luma of each pixel.
        hue: Shift uniform in -hue..hue, in turns of the colour circle; at most 0.5.
        p: Probability for each picture.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    p: float = 1.0

    def __post_init__(self) -> None:
        for field in ("brightness", "contrast", "saturation"):
            self._need(getattr(self, field) >= 0.0, field, "0 or more")
        self._need(0.0 <= self.hue <= 0.5, "hue", "0 to 0.5")
        self._need_chance()

    def transform(self, x: Tensor, generator: Generator) -> Tensor:
        """Jitter; a picture that is left out gets factors of 1, which change nothing."""
        n = len(x)
        order = torch.randperm(4, generator=generator, device=generator.device).tolist()
        chosen = _chance(generator, x, self.p).flatten()
        for index in order:
            field, adjust = _JITTERS[index]
            strength = getattr(self, field)
            factor = _uniform(generator, (n,), (max(0.0, 1.0 - strength), 1.0 + strength)).to(x)
            if strength > 0.0 and adjust is not adjust_hue:
                x = adjust(x, factor.where(chosen, torch.ones_like(factor)))
            elif strength > 0.0 and x.shape[1] == 3:
                turned = adjust_hue(x, factor - 1.0)
                x = torch.where(chosen[:, None, None, None], turned, x)  # colour to HSV and back is not exact
        return x


@dataclass(frozen=True, kw_only=True)
class RandomGrayscale(View):
    """Colour replaced by luma in all three channels, with probability `p` for each picture."""

    p: float = 0.1

    def __post_init__(self) -> None:
        self._need_chance()

    def transform(self, x: Tensor, generator: Generator) -> Tensor:
        """Take the colour of some."""
        return torch.where(_chance(generator, x, self.p), luma(x), x)


@dataclass(frozen=True, kw_only=True)
class RandomInvert(View):
    """1 - x, with probability `p` for each picture."""

    p: float = 0.5

    def __post_init__(self) -> None:
        self._need_chance()

    def transform(self, x: Tensor, generator: Generator) -> Tensor:
        """Invert some."""
        return torch.where(_chance(generator, x, self.p), 1.0 - x, x)


@dataclass(frozen=True, kw_only=True)
class RandomSolarize(View):
    """Pixels at or above `threshold` inverted, with probability `p` for each picture."""

    threshold: float = 0.5
    p: float = 0.5

    def __post_init__(self) -> None:
        self._need_chance()

    def transform(self, x: Tensor, generator: Generator) -> Tensor:
        """Solarize some."""
        return torch.where(_chance(generator, x, self.p) & (x >= self.threshold), 1.0 - x, x)


@dataclass(frozen=True, kw_only=True)
class GaussianBlur(View):
    """Gaussian blur of a random width, reflected at the borders.

    Attributes:
        sigma: Standard deviation in pixels, uniform in low..high.
        kernel_size: Odd side of the kernel in pixels; `None` takes a tenth of the shorter side, as SimCLR
            does, made odd, and at least 3.
        p: Probability for each picture.
    """

    sigma: Range = (0.1, 2.0)
    kernel_size: int | None = None
    p: float = 0.5

    def __post_init__(self) -> None:
        self._need_range("sigma", 1e-3, 1e3)
        self._need(
            self.kernel_size is None or (self.kernel_size > 0 and self.kernel_size % 2 == 1),
            "kernel_size",
            "an odd number of pixels",
        )
        self._need_chance()

    def transform(self, x: Tensor, generator: Generator) -> Tensor:
        """Blur some."""
        kernel_size = self.kernel_size or max(3, min(x.shape[2:]) // 10 | 1)
        if kernel_size // 2 >= min(x.shape[2:]):
            raise ConfigError(
                f"GaussianBlur.kernel_size: {kernel_size} is too large for {x.shape[2]}x{x.shape[3]} pixels"
            )
        blurred = gaussian_blur(x, _uniform(generator, (len(x),), self.sigma).to(x.device), kernel_size)
        return torch.where(_chance(generator, x, self.p), blurred, x)


@dataclass(frozen=True, kw_only=True)
class GaussianNoise(View):
    """Independent normal noise on every value, cut off at 0 and 1.

    Attributes:
        sigma: Standard deviation in units of [0, 1], for each picture uniform in low..high.
        p: Probability for each picture.
    """

    sigma: Range = (0.0, 0.1)
    p: float = 1.0

    def __post_init__(self) -> None:
        self._need_range("sigma", 0.0, 10.0)
        self._need_chance()

    def transform(self, x: Tensor, generator: Generator) -> Tensor:
        """Add noise."""
        sigma = _uniform(generator, (len(x), 1, 1, 1), self.sigma).to(x)
        noise = torch.randn(x.shape, generator=generator, device=generator.device).to(x)
        return torch.where(_chance(generator, x, self.p), (x + noise * sigma).clamp_(0.0, 1.0), x)


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


@dataclass(frozen=True, kw_only=True)
class RandAugment(View):
    """The strong view of FixMatch: `num_ops` random operations of random magnitude, then one erased square.

    Source: FixMatch (Sohn et al., NeurIPS 2020, arXiv 2001.07685, section 2.3 and the appendix's list of
    transformations), after RandAugment (Cubuk et al., 2019, arXiv 1909.13719). Differences from the source:
    geometry is bilinear (nearest neighbour is coarse on 28 pixels), and operations work on floating-point
    pixels, `Equalize` on 256 levels of them.

    Attributes:
        num_ops: Operations for each picture, drawn with replacement.
        p: Probability that a drawn operation is applied; one half, as in the authors' code.
        magnitude: Share of each operation's range, uniform in low..high for each picture and operation;
            (0, 1) is the whole range.
        ops: Names from `RANDAUGMENT_RANGES`, each equally likely. `Color` changes nothing on one channel.
        cutout: Side of the erased square as a share of each side of the picture; 0 erases nothing. Its centre
            is uniform over the picture, and what stands out is cut off.
        cutout_value: What is written into the square, 0..1.
        fill: What stands where a turned, sheared or moved picture leaves nothing, 0..1; mid-gray in the authors'
            code, here black, the ground of pictures such as Fashion-MNIST's.
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

    def transform(self, x: Tensor, generator: Generator) -> Tensor:
        """Augment: in each round the pictures of one operation go through it together."""
        n, _, height, width = x.shape
        for _ in range(self.num_ops):
            which = _integers(generator, (n,), len(self.ops))
            which = which.where(_chance(generator, which, self.p).flatten(), -1)
            magnitude = _uniform(generator, (n,), self.magnitude)
            result = x.clone()
            for index, op in enumerate(self.ops):
                rows = (which == index).nonzero().flatten()
                if op != "Identity" and len(rows):
                    value = _magnitude_of(op, magnitude[rows]).to(x)
                    rows = rows.to(x.device)
                    result[rows] = _augment(op, x[rows], value, self.fill)
            x = result
        if self.cutout > 0.0:
            centre = _uniform(generator, (2, n), (0.0, 1.0))
            h, w = self.cutout * height, self.cutout * width
            top, left = (centre[0] * height - h / 2).round(), (centre[1] * width - w / 2).round()
            square = box_mask(top, left, round(h), round(w), height, width)
            x = x.masked_fill(square.to(x.device), self.cutout_value)
        return x


def _magnitude_of(op: str, share: Tensor) -> Tensor:
    low, high = RANDAUGMENT_RANGES[op]
    if op == "Posterize":  # whole bits, each equally likely over the whole range
        return (low + share * (high - low + 1)).floor().clamp(max=high)
    return low + share * (high - low)


def _augment(op: str, x: Tensor, value: Tensor, fill: float) -> Tensor:
    """One operation of the pool on pictures (N, C, H, W) with parameters (N,)."""
    if op in _POINTWISE:
        return _POINTWISE[op](x, value)
    if op in ("AutoContrast", "Equalize"):
        return autocontrast(x) if op == "AutoContrast" else equalize(x)
    # The rest move pixels: rows of an inverse matrix about the centre. A shear of the source keeps the top row
    # (the left column) in place, so about the centre it also shifts by half a side.
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


# ---- what they share -------------------------------------------------------------------------------------


def _uniform(generator: Generator, shape: tuple[int, ...], bounds: Range) -> Tensor:
    """Uniform float32 on the generator's device."""
    low, high = bounds
    return torch.rand(shape, generator=generator, device=generator.device).mul_(high - low).add_(low)


def _integers(generator: Generator, shape: tuple[int, ...], below: int) -> Tensor:
    return torch.randint(below, shape, generator=generator, device=generator.device)


def _box_sides(generator: Generator, n: int, pixels: int, area: Range, ratio: Range) -> tuple[Tensor, Tensor]:
    """Ten tries at sides of boxes: the first over the second is log-uniform in `ratio`. Two of (10, n)."""
    areas = _uniform(generator, (10, n), area) * pixels
    ratios = _uniform(generator, (10, n), (math.log(ratio[0]), math.log(ratio[1]))).exp()
    return (areas * ratios).sqrt().round(), (areas / ratios).sqrt().round()


def _chance(generator: Generator, x: Tensor, p: float) -> Tensor:
    """True with probability p for each picture: bool (N, 1, 1, 1) on the batch's device."""
    return (torch.rand(len(x), 1, 1, 1, generator=generator, device=generator.device) < p).to(x.device)


_JITTERS: tuple[tuple[str, Callable[[Tensor, Tensor], Tensor]], ...] = (
    ("brightness", adjust_brightness),
    ("contrast", adjust_contrast),
    ("saturation", adjust_saturation),
    ("hue", adjust_hue),
)
_POINTWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Brightness": adjust_brightness,
    "Color": adjust_saturation,
    "Contrast": adjust_contrast,
    "Posterize": posterize,
    "Sharpness": adjust_sharpness,
    "Solarize": solarize,
}


# ---- JSON ------------------------------------------------------------------------------------------------


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


#: What methods that compare two views of a small picture draw twice: crops, flips and light. On Fashion-MNIST
#: milder ones leave SimCLR near a random network.
TWO_VIEWS = Compose(
    views=(
        RandomResizedCrop(scale=(0.2, 1.0)),
        RandomHorizontalFlip(),
        ColorJitter(brightness=0.4, contrast=0.4, saturation=0.0, hue=0.0, p=0.8),
    )
)
