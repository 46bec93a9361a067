"""Views that change what pixels say and leave them where they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from embedkit.errors import ConfigError
from embedkit.training.augment.augmentation import Augmentation, OnSomeImages, Parameters
from embedkit.training.augment.draws import Range, chance, each, integers, uniform
from embedkit.training.augment.operations import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    gaussian_blur,
    luma,
)

_JITTERS: tuple[tuple[str, Callable[[Tensor, Tensor], Tensor]], ...] = (
    ("brightness", adjust_brightness),
    ("contrast", adjust_contrast),
    ("saturation", adjust_saturation),
    ("hue", adjust_hue),
)


@dataclass(frozen=True, kw_only=True)
class ColorJitter(Augmentation):
    """Brightness, contrast, saturation and hue changed by random factors.

    The order of the four is drawn once for the batch, the factors for every image. torchvision draws an
    order for every image too; on a batch that would cost each operation four times, and over the batches of
    a run every image sees every order all the same. On one channel saturation and hue change nothing.

    Attributes:
        brightness: Factor uniform in max(0, 1 - brightness)..1 + brightness.
        contrast: The same, about the mean luma of the image.
        saturation: The same, about the luma of each pixel.
        hue: Shift uniform in -hue..hue, in turns of the color circle; at most 0.5.
        p: Probability for each image.
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

    def draw(self, n: int, generator: Generator) -> Parameters:
        """`order` of the four, the same for all images; which are `chosen`; the factors (hue: plus 1)."""
        order = torch.randperm(4, generator=generator, device=generator.device)
        parameters = {"order": order, "chosen": chance(generator, n, self.p)}
        for index in order.tolist():
            field, _ = _JITTERS[index]
            strength = getattr(self, field)
            parameters[field] = uniform(generator, (n,), (max(0.0, 1.0 - strength), 1.0 + strength))
        return parameters

    def apply(self, x: Tensor, parameters: Parameters) -> Tensor:
        """Jitter; an image that is left out gets factors of 1, which change nothing."""
        chosen = parameters["chosen"].to(x.device)
        for index in parameters["order"].tolist():
            field, adjust = _JITTERS[index]
            strength = getattr(self, field)
            factor = parameters[field].to(x)
            if strength > 0.0 and adjust is not adjust_hue:
                x = adjust(x, factor.where(chosen, torch.ones_like(factor)))
            elif strength > 0.0 and x.shape[1] == 3:
                turned = adjust_hue(x, factor - 1.0)
                x = torch.where(chosen[:, None, None, None], turned, x)  # color to HSV and back is not exact
        return x


@dataclass(frozen=True, kw_only=True)
class RandomGrayscale(OnSomeImages):
    """Color replaced by luma in all three channels, with probability `p` for each image."""

    p: float = 0.1

    def apply(self, x: Tensor, parameters: Parameters) -> Tensor:
        """Take the color of some."""
        return torch.where(each(parameters["chosen"], x), luma(x), x)


@dataclass(frozen=True, kw_only=True)
class RandomInvert(OnSomeImages):
    """1 - x, with probability `p` for each image."""

    p: float = 0.5

    def apply(self, x: Tensor, parameters: Parameters) -> Tensor:
        """Invert some."""
        return torch.where(each(parameters["chosen"], x), 1.0 - x, x)


@dataclass(frozen=True, kw_only=True)
class RandomSolarize(OnSomeImages):
    """Pixels at or above `threshold` inverted, with probability `p` for each image."""

    threshold: float = 0.5
    p: float = 0.5

    def apply(self, x: Tensor, parameters: Parameters) -> Tensor:
        """Solarize some."""
        return torch.where(each(parameters["chosen"], x) & (x >= self.threshold), 1.0 - x, x)


@dataclass(frozen=True, kw_only=True)
class GaussianBlur(Augmentation):
    """Gaussian blur of a random width, reflected at the borders.

    Attributes:
        sigma: Standard deviation in pixels, uniform in low..high.
        kernel_size: Odd side of the kernel in pixels; `None` takes a tenth of the shorter side, as SimCLR
            does, made odd, and at least 3.
        p: Probability for each image.
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

    def draw(self, n: int, generator: Generator) -> Parameters:
        """Widths, and which images."""
        return {"sigma": uniform(generator, (n,), self.sigma), "chosen": chance(generator, n, self.p)}

    def apply(self, x: Tensor, parameters: Parameters) -> Tensor:
        """Blur some."""
        kernel_size = self.kernel_size or max(3, min(x.shape[2:]) // 10 | 1)
        if kernel_size // 2 >= min(x.shape[2:]):
            raise ConfigError(
                f"GaussianBlur.kernel_size: {kernel_size} is too large for {x.shape[2]}x{x.shape[3]} pixels"
            )
        blurred = gaussian_blur(x, parameters["sigma"].to(x.device), kernel_size)
        return torch.where(each(parameters["chosen"], x), blurred, x)


@dataclass(frozen=True, kw_only=True)
class GaussianNoise(Augmentation):
    """Independent normal noise on every value, cut off at 0 and 1.

    Attributes:
        sigma: Standard deviation in units of [0, 1], for each image uniform in low..high.
        p: Probability for each image.
    """

    sigma: Range = (0.0, 0.1)
    p: float = 1.0

    def __post_init__(self) -> None:
        self._need_range("sigma", 0.0, 10.0)
        self._need_chance()

    def draw(self, n: int, generator: Generator) -> Parameters:
        """Standard deviations, the seed of the noise of all images of any size, and which images."""
        return {
            "sigma": uniform(generator, (n,), self.sigma),
            "seed": integers(generator, (1,), 2**62),
            "chosen": chance(generator, n, self.p),
        }

    def apply(self, x: Tensor, parameters: Parameters) -> Tensor:
        """Add noise."""
        seed = parameters["seed"]
        own = Generator(seed.device).manual_seed(int(seed))
        noise = torch.randn(x.shape, generator=own, device=seed.device).to(x)
        sigma = each(parameters["sigma"], x).to(x)
        return torch.where(each(parameters["chosen"], x), (x + noise * sigma).clamp_(0.0, 1.0), x)
