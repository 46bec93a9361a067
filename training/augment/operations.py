"""Operations on images (N, C, H, W) in [0, 1], with one parameter for each image: what views are made of.

Definitions are torchvision's (`torchvision.transforms.v2`, floating-point images), and the tests hold each to it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from embedkit.errors import ConfigError

__all__ = [
    "adjust_brightness",
    "adjust_contrast",
    "adjust_hue",
    "adjust_saturation",
    "adjust_sharpness",
    "affine_matrix",
    "autocontrast",
    "box_mask",
    "equalize",
    "gaussian_blur",
    "luma",
    "posterize",
    "resize_matrix",
    "resized",
    "separable",
    "solarize",
    "warp",
]


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Images (N, C, H, W) times factors (N,), cut off at 1."""
    return (x * factor[:, None, None, None]).clamp_(0.0, 1.0)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Distances from the mean luma of each image times factors (N,), cut off at 0 and 1."""
    mean = luma(x).mean(dim=(1, 2, 3), keepdim=True)
    return torch.lerp(mean, x, factor[:, None, None, None]).clamp_(0.0, 1.0)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Distances from each pixel's luma times factors (N,), cut off at 0 and 1; one channel stays as it is."""
    return x if x.shape[1] == 1 else torch.lerp(luma(x), x, factor[:, None, None, None]).clamp_(0.0, 1.0)


def adjust_sharpness(x: Tensor, factor: Tensor) -> Tensor:
    """Distances from the smoothed image times factors (N,), cut off at 0 and 1; the border stays."""
    channels = x.shape[1]
    kernel = torch.ones(3, 3, dtype=x.dtype, device=x.device)
    kernel[1, 1] = 5.0
    kernel = (kernel / 13.0).expand(channels, 1, 3, 3)
    smooth = x.clone()
    smooth[:, :, 1:-1, 1:-1] = F.conv2d(x, kernel, groups=channels)
    return torch.lerp(smooth, x, factor[:, None, None, None]).clamp_(0.0, 1.0)


def adjust_hue(x: Tensor, turn: Tensor) -> Tensor:
    """Hue of images (N, 3, H, W) moved by turns (N,) of the color circle, in HSV."""
    value, low = x.amax(dim=1), x.amin(dim=1)  # (N, H, W)
    spread = value - low
    gray = spread == 0
    red, green, blue = x.unbind(dim=1)
    safe = spread.where(~gray, torch.ones_like(spread))
    # the hexagon's side is that of the largest channel; of equal ones the first
    hue = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2.0 + (blue - red) / safe, 4.0 + (red - green) / safe),
    )
    hue = hue + 6.0 * turn[:, None, None]
    # each channel follows one trapezoid over the circle, shifted by a third of a turn
    sides = torch.tensor([5.0, 3.0, 1.0], dtype=x.dtype, device=x.device)[None, :, None, None]
    k = torch.remainder(hue[:, None] + sides, 6.0)  # (N, 3, H, W)
    return value[:, None] - spread[:, None] * torch.minimum(k, 4.0 - k).clamp_(0.0, 1.0)


def solarize(x: Tensor, threshold: Tensor) -> Tensor:
    """Values at or above thresholds (N,) become 1 - x."""
    return torch.where(x >= threshold[:, None, None, None], 1.0 - x, x)


def posterize(x: Tensor, bits: Tensor) -> Tensor:
    """Values rounded down to 2 ** bits (N,) levels of equal width."""
    levels = torch.exp2(bits)[:, None, None, None]
    return torch.minimum((x * levels).floor_(), levels - 1.0) / levels


def autocontrast(x: Tensor) -> Tensor:
    """Each channel of each image stretched to 0..1; a constant channel stays as it is."""
    low, high = x.amin(dim=(2, 3), keepdim=True), x.amax(dim=(2, 3), keepdim=True)
    flat = low == high
    spread = (high - low).masked_fill_(flat, 1.0)
    return ((x - low.masked_fill(flat, 0.0)) / spread).clamp_(0.0, 1.0)


def equalize(x: Tensor) -> Tensor:
    """Histogram equalisation of each channel of each image on 256 levels, as Pillow does it."""
    n, channels, height, width = x.shape
    levels = (x * 255.999).long().reshape(n * channels, height * width)
    histogram = torch.zeros(n * channels, 256, dtype=torch.long, device=x.device)
    histogram.scatter_add_(1, levels, torch.ones_like(levels))
    # pixels for one step of the result, the brightest level's not counted
    step = (height * width - histogram.gather(1, levels.amax(dim=1, keepdim=True))) // 255  # (N * C, 1)
    below = histogram.cumsum(dim=1) - histogram
    table = ((below + step // 2) // step.clamp(min=1)).clamp_(0, 255)
    result = torch.where(step > 0, table.gather(1, levels), levels)
    return (result.to(x.dtype) / 255.0).reshape(x.shape)


def gaussian_blur(x: Tensor, sigma: Tensor, kernel_size: int) -> Tensor:
    """Images (N, C, H, W) blurred by normal kernels of standard deviations (N,), `kernel_size` wide."""
    n, channels, height, width = x.shape
    reach = kernel_size // 2
    offsets = torch.arange(-reach, reach + 1, device=x.device)
    weights = torch.exp(-0.5 * (offsets / sigma[:, None].float()) ** 2)
    weights = (weights / weights.sum(dim=1, keepdim=True)).to(x.dtype).repeat_interleave(channels, dim=0)
    # every channel of every image is a group of its own: one depthwise convolution along each axis
    y = F.pad(x, [reach] * 4, mode="reflect").reshape(1, n * channels, height + 2 * reach, width + 2 * reach)
    y = F.conv2d(y, weights[:, None, :, None], groups=n * channels)
    return F.conv2d(y, weights[:, None, None, :], groups=n * channels).reshape(x.shape)


def affine_matrix(*, angle: Tensor, shift_x: Tensor, shift_y: Tensor, scale: Tensor, shear: Tensor) -> Tensor:
    """Inverse affine maps about the center, from a place of the result to a place of the source, in pixels.

    Args:
        angle: (N,) radians, clockwise as it is seen.
        shift_x: (N,) pixels to the right.
        shift_y: (N,) pixels downwards.
        scale: (N,) factors.
        shear: (N,) radians along x.

    Returns:
        (N, 2, 3).
    """
    # forward: shift, then rotation @ [[1, -tan(shear)], [0, 1]] * scale; the inverse of a 2x2 matrix by hand
    cos, sin, tan = angle.cos(), angle.sin(), shear.tan()
    a, b, c, d = cos, -cos * tan - sin, sin, -sin * tan + cos
    a, b, c, d = d / scale, -b / scale, -c / scale, a / scale
    rows = (a, b, -(a * shift_x + b * shift_y), c, d, -(c * shift_x + d * shift_y))
    return torch.stack(rows, dim=1).reshape(-1, 2, 3)


def luma(x: Tensor) -> Tensor:
    """ITU-R 601 luma (N, 1, H, W) of color; one channel is its own."""
    if x.shape[1] == 1:
        return x
    if x.shape[1] != 3:
        raise ConfigError(f"color views need 1 or 3 channels, found {x.shape[1]}; leave them out")
    red, green, blue = x.unbind(dim=1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue)[:, None]


def separable(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """A_y x A_x^T of each image: x (N, C, H, W), rows (N, H', H), columns (N, W', W) -> (N, C, H', W')."""
    n, channels, height, width = x.shape
    y = torch.bmm(x.reshape(n, channels * height, width), columns.mT)  # (N, C * H, W')
    y = y.reshape(n, channels, height, -1)
    # a product for each channel: broadcast over channels, matmul would first copy `rows` (twice the time)
    return torch.stack([torch.bmm(rows, y[:, channel]) for channel in range(channels)], dim=1)


def resize_matrix(start: Tensor, length: Tensor, size: int, out: int) -> Tensor:
    """Rows of bilinear weights, antialiased, that resize `start .. start + length` of `size` pixels to `out`.

    The triangle is as wide as a pixel of the result or of the source, whichever is larger, is cut at the box and
    sums to 1.

    Args:
        start: (N,) first pixel of the box.
        length: (N,) its pixels.
        size: Pixels of the source.
        out: Pixels of the result.

    Returns:
        (N, out, size) float32.
    """
    start, length = start[:, None], length[:, None]
    step = length / out  # source pixels for a pixel of the result
    center = start + (torch.arange(out, device=start.device) + 0.5) * step - 0.5  # (N, out)
    pixel = torch.arange(size, device=start.device, dtype=torch.float32)
    outside = (pixel < start) | (pixel >= start + length)  # (N, size)
    slope = -1.0 / step.clamp(min=1.0)[..., None]
    weights = (pixel - center[..., None]).abs_().mul_(slope).add_(1.0).clamp_(min=0.0)  # (N, out, size)
    weights.masked_fill_(outside[:, None, :], 0.0)
    return weights.div_(weights.sum(dim=2, keepdim=True))


def resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Whole images (N, C, H, W) at another size (height, width), bilinear with antialiasing."""
    height, width = x.shape[2:]
    start = torch.zeros(1, device=x.device)
    rows, columns = (
        resize_matrix(start, start + side, side, out).to(x.dtype).expand(len(x), -1, -1)
        for side, out in zip((height, width), size, strict=True)
    )
    return separable(x, rows, columns)


def box_mask(top: Tensor, left: Tensor, h: Tensor | int, w: Tensor | int, height: int, width: int) -> Tensor:
    """Inside boxes (N,) of whole pixels: bool (N, 1, height, width)."""
    row = torch.arange(height, device=top.device)
    column = torch.arange(width, device=top.device)
    rows = (row >= top[:, None]) & (row < (top + h)[:, None])
    columns = (column >= left[:, None]) & (column < (left + w)[:, None])
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def warp(x: Tensor, matrix: Tensor, fill: float) -> Tensor:
    """Sample x (N, C, H, W) bilinearly through inverse maps (N, 2, 3) in pixels about the center."""
    _, _, height, width = x.shape
    column = torch.arange(width, dtype=x.dtype, device=x.device) - (width - 1) / 2
    row = torch.arange(height, dtype=x.dtype, device=x.device)[:, None] - (height - 1) / 2
    # by hand: `affine_grid` takes a matrix product of inner size 3 for it, which is eight times slower on CPU
    grid = torch.empty(len(x), height, width, 2, dtype=x.dtype, device=x.device)
    for axis, side in enumerate((width, height)):
        a, b, shift = (matrix * (2.0 / side))[:, axis, :, None, None].unbind(dim=1)  # -1..1 over a side
        grid[..., axis] = a * column + (b * row + shift)
    if fill == 0.0:
        return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    # outside counts as 0, so the image is moved to where `fill` is 0
    return F.grid_sample(x - fill, grid, mode="bilinear", padding_mode="zeros", align_corners=False) + fill
