"""CIE L*a*b* on the device and in the exported graph, its ab plane in bins, and the rebalancing of rare colors.

Sources: CIE 15 (L*a*b*, D65, 2 degrees), IEC 61966-2-1 (sRGB); Colorful Image Colorization (Zhang, Isola and Efros,
ECCV 2016, arXiv 1603.08511), section 2.2 and equations 1 to 4. The bins are those whose center some sRGB color of
lightness 1 to 99 comes near, computed here; the authors' file lists 313 at a grid of 10.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedkit.errors import ConfigError

__all__ = ["ABBins", "LabInput", "class_weights", "is_gray", "lab_to_rgb", "rgb_to_lab"]

_TO_XYZ = (
    (0.412453, 0.357580, 0.180423),
    (0.212671, 0.715160, 0.072169),
    (0.019334, 0.119193, 0.950227),
)
_WHITE = (0.95047, 1.0, 1.08883)
_DELTA = 6 / 29


def rgb_to_lab(rgb: Tensor) -> Tensor:
    """SRGB (N, 3, H, W) in [0, 1] -> L in [0, 100], a and b in about [-128, 127]; no op that ONNX lacks."""
    linear = torch.where(rgb > 0.04045, ((rgb.clamp(min=0.04045) + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    white = torch.tensor(_WHITE, dtype=rgb.dtype, device=rgb.device).view(1, 3, 1, 1)
    matrix = torch.tensor(_TO_XYZ, dtype=rgb.dtype, device=rgb.device)
    xyz = F.conv2d(linear, matrix[:, :, None, None]) / white
    root = xyz.clamp(min=_DELTA**3) ** (1 / 3)
    f = torch.where(xyz > _DELTA**3, root, xyz / (3 * _DELTA**2) + 4 / 29)
    x, y, z = f[:, :1], f[:, 1:2], f[:, 2:]
    return torch.cat([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)


def lab_to_rgb(lab: Tensor) -> Tensor:
    """The inverse of `rgb_to_lab`, not cut at 0 and 1: colors outside sRGB come out outside [0, 1]."""
    y = (lab[:, :1] + 16) / 116
    f = torch.cat([y + lab[:, 1:2] / 500, y, y - lab[:, 2:] / 200], dim=1)
    xyz = torch.where(f > _DELTA, f**3, 3 * _DELTA**2 * (f - 4 / 29))
    xyz = xyz * torch.tensor(_WHITE, dtype=lab.dtype, device=lab.device).view(1, 3, 1, 1)
    matrix = torch.linalg.inv(torch.tensor(_TO_XYZ, dtype=torch.float64)).to(xyz)
    linear = F.conv2d(xyz, matrix[:, :, None, None])
    root = linear.clamp(min=0.0031308) ** (1 / 2.4)
    return torch.where(linear > 0.0031308, 1.055 * root - 0.055, 12.92 * linear)


def is_gray(lab: Tensor, limit: float = 5.0) -> Tensor:
    """Images whose |a| and |b| are nowhere above `limit`: bool (N,). They say nothing about color."""
    return (lab[:, 1:].abs() <= limit).flatten(1).all(1)


class LabInput(nn.Module):
    """What an encoder of L, ab or Lab begins with: normalized RGB -> scaled channels, inside the exported graph.

    L becomes (L - 50) / 50, a and b are divided by 110.

    Args:
        mean: Of the contract, per channel of RGB.
        std: Likewise.
        channels: `l`, `ab` or `lab`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], channels: str = "l") -> None:
        super().__init__()
        if channels not in ("l", "ab", "lab"):
            raise ConfigError(f"LabInput: expected l, ab or lab, found {channels!r}")
        if len(mean) != 3:
            raise ConfigError(
                f"color: this method learns from colors, and the images have {len(mean)} channel; "
                "take color images with --set data.color=rgb"
            )
        self.channels = channels
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def lab(self, x: Tensor) -> Tensor:
        """Normalized RGB (N, 3, H, W) -> L, a, b in their own units, in float32."""
        with torch.autocast(x.device.type, enabled=False):
            return rgb_to_lab((x.float() * self.std + self.mean).clamp(0, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Normalized RGB (N, 3, H, W) -> (N, 1, 2 or 3, H, W), in about [-1, 1]."""
        lab = self.lab(x)
        lightness, ab = (lab[:, :1] - 50) / 50, lab[:, 1:] / 110
        return {"l": lightness, "ab": ab, "lab": torch.cat([lightness, ab], dim=1)}[self.channels]


@lru_cache(maxsize=8)
def _in_gamut(grid: int) -> tuple[tuple[float, float], ...]:
    """Centers of the bins that an sRGB color of lightness 1 to 99 falls into."""
    levels = torch.linspace(0, 1, 52)
    rgb = torch.cartesian_prod(levels, levels, levels).T.reshape(1, 3, -1, 1)
    lab = rgb_to_lab(rgb)[0, :, :, 0]
    lab = lab[:, (lab[0] >= 1) & (lab[0] <= 99)]
    found = (lab[1:].T / grid).round().unique(dim=0) * grid  # (Q, 2), sorted
    return tuple((float(a), float(b)) for a, b in found)


class ABBins(nn.Module):
    """The bins of the ab plane that sRGB reaches: Q classes of color.

    Args:
        grid: Distance between two centers; the paper's is 10, and 15 to 25 suit small images.

    Attributes:
        centers: (Q, 2), a and b.
    """

    centers: Tensor

    def __init__(self, grid: int = 10) -> None:
        super().__init__()
        if grid < 1:
            raise ConfigError(f"grid: expected 1 or more, found {grid}")
        self.grid = grid
        self.register_buffer("centers", torch.tensor(_in_gamut(grid)), persistent=False)

    def __len__(self) -> int:
        return len(self.centers)

    def nearest(self, ab: Tensor) -> Tensor:
        """A and b (N, 2, H, W) -> the class of each pixel: int64 (N, H, W)."""
        return self._distances(ab).argmin(-1)

    def soft(self, ab: Tensor, neighbors: int = 5, sigma: float = 5.0) -> Tensor:
        """A and b (N, 2, H, W) -> (N, Q, H, W), a Gaussian of `sigma` over the nearest bins, which sums to 1."""
        distances, which = self._distances(ab).topk(min(neighbors, len(self)), largest=False)
        weights = torch.softmax(-distances.square() / (2 * sigma**2), dim=-1)
        soft = torch.zeros(*which.shape[:-1], len(self), dtype=weights.dtype, device=ab.device)
        return soft.scatter(-1, which, weights).movedim(-1, 1)

    def decode(self, logits: Tensor, temperature: float = 0.38) -> Tensor:
        """Logits (N, Q, H, W) -> a and b (N, 2, H, W), the annealed mean (equation 5)."""
        weights = (logits.float() / temperature).softmax(1)
        return torch.einsum("nqhw,qc->nchw", weights, self.centers)

    def _distances(self, ab: Tensor) -> Tensor:
        return torch.cdist(ab.movedim(1, -1).float(), self.centers[None, None])  # (N, H, W, Q)


def class_weights(prior: Tensor, mix: float = 0.5) -> Tensor:
    """Rebalancing of rare classes: w ~ ((1 - mix) p + mix / Q)^-1, scaled so that sum_q p_q w_q = 1 (equation 4).

    Args:
        prior: p (Q,), how often each class occurs in the training images; smoothed, if it is to be.
        mix: The paper's lambda: 1 makes all weights 1.
    """
    prior = prior / prior.sum()
    weights = 1 / ((1 - mix) * prior + mix / len(prior))
    return weights / (prior * weights).sum()
