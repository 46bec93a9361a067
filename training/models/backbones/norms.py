"""The normalization layers that a backbone can be asked for, by name."""

from __future__ import annotations

from typing import Literal

import torch
from timm.layers import GroupNorm1
from torch import Tensor, nn

from embedkit.errors import ConfigError

__all__ = ["NORMS", "ChannelAffine", "Norm", "norm_layer"]

Norm = Literal["batch", "layer", "group", "none"]


class ChannelAffine(nn.Module):
    """A learned scale and shift of each channel, with no statistics: what stands where `norm="none"`.

    Parameters have BatchNorm's names, so that residual branches can start switched off as with BatchNorm.
    """

    def __init__(self, num_features: int, **kwargs: object) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, ...) -> the same shape."""
        shape = (1, -1, *[1] * (x.ndim - 2))
        return x * self.weight.view(shape) + self.bias.view(shape)


class _GroupNorm(nn.GroupNorm):
    """Groups of 16 channels, or one group where they do not divide."""

    def __init__(self, num_features: int, **kwargs: object) -> None:
        super().__init__(num_features // 16 if num_features % 16 == 0 else 1, num_features)


#: `layer`: mean and variance over all channels and places of one image (GroupNorm with one group), as in CPC v2.
#: `group`: over 16 channels and all places. `none`: a scale and a shift alone.
NORMS: dict[str, type[nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "layer": GroupNorm1,
    "group": _GroupNorm,
    "none": ChannelAffine,
}


def norm_layer(norm: str) -> type[nn.Module]:
    """The class of a norm's name: `norm_layer(name)(channels)` on maps (N, C, H, W).

    Raises:
        ConfigError: Another name.
    """
    if norm not in NORMS:
        raise ConfigError(f"norm: expected one of {', '.join(NORMS)}, found {norm!r}")
    return NORMS[norm]
