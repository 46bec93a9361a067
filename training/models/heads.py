"""Heads that several methods share: an image decoder and L2 normalization.

A head that is the method itself (a projector, a margin, a mixture) stands in the method's file.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from embedkit.errors import ConfigError

__all__ = ["ConvDecoder", "l2_normalize"]


class ConvDecoder(nn.Module):
    """A code -> an image: a linear layer to a small map, then nearest upsampling and 3x3 convolutions.

    Upsampling before the convolution leaves no checkerboard (Deconvolution and Checkerboard Artifacts, Odena
    et al., Distill 2016). The map starts at 7x7 for 28 pixels and at 4x4 for 32 and 64.

    Args:
        code_dim: Width of the code.
        out_chans: Channels C of the image.
        image_size: Side in pixels: 4 to 7 times a power of 2.
        width: Channels at full resolution; twice as many at each halving, at most `max_width`.
        max_width: Upper limit of the channels.
        norm: BatchNorm after every hidden layer.
        start_at_zero: Every output is 0 at first, whatever the code: as logits gray, of a known loss.
        groups: Independent decoders side by side: the code is `groups` codes of `code_dim` one after another,
            and so are the images' channels (MIXAE's K decoders in one pass).

    Raises:
        ConfigError: A size that is not 4 to 7 times a power of 2.
    """

    def __init__(
        self,
        code_dim: int,
        *,
        out_chans: int,
        image_size: int,
        width: int = 32,
        max_width: int = 256,
        norm: bool = True,
        start_at_zero: bool = False,
        groups: int = 1,
    ) -> None:
        super().__init__()
        start, doublings = image_size, 0
        while start >= 8 and start % 2 == 0:
            start, doublings = start // 2, doublings + 1
        if not 4 <= start <= 7:
            raise ConfigError(
                f"ConvDecoder: expected image_size of 4 to 7 times a power of 2, such as 28; found {image_size}"
            )
        widths = [groups * min(width * 2**level, max_width) for level in range(doublings, -1, -1)]
        self.start, self.widths = start, widths
        # 1x1 convolutions on a 1x1 map are a linear layer that knows groups
        self.expand = nn.Conv2d(groups * code_dim, widths[0] * start * start, 1, groups=groups, bias=not norm)
        self.norm = nn.BatchNorm2d(widths[0]) if norm else nn.Identity()
        blocks: list[nn.Module] = []
        for fan_in, fan_out in zip(widths[:-1], widths[1:], strict=True):
            blocks += [
                nn.Upsample(scale_factor=2, mode="nearest"),
                nn.Conv2d(fan_in, fan_out, 3, padding=1, groups=groups, bias=not norm),
                nn.BatchNorm2d(fan_out) if norm else nn.Identity(),
                nn.ReLU(),
            ]
        self.blocks = nn.Sequential(*blocks)
        self.to_pixels = nn.Conv2d(widths[-1], groups * out_chans, 3, padding=1, groups=groups)
        if start_at_zero:
            for parameter in self.to_pixels.parameters():
                nn.init.zeros_(parameter)

    def forward(self, code: Tensor) -> Tensor:
        """Codes (N, groups * code_dim) -> images (N, groups * C, H, W), unbounded: logits or values."""
        x = self.expand(code[:, :, None, None])  # (N, widths[0] * start^2, 1, 1)
        x = x.reshape(len(code), self.widths[0], self.start, self.start)
        return self.to_pixels(self.blocks(F.relu(self.norm(x))))


def l2_normalize(x: Tensor, eps: float = 1e-12) -> Tensor:
    """Rows of `x` (..., D) at Euclidean length 1, in float32 whatever autocast made of `x`.

    bfloat16 has 8 bits of significand: cosines of rows normalized in it are off by up to 1e-2, more than the
    gaps that a temperature of 0.1 magnifies tenfold. A zero row stays zero.
    """
    return F.normalize(x.float(), dim=-1, eps=eps)
