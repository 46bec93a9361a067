"""Patches and random masks of them, as in MAE.

Source: Masked Autoencoders Are Scalable Vision Learners (He et al., CVPR 2022, arXiv 2111.06377), section 3.
The pixels of a patch stand in the order row, column, channel, as in the authors' code, so that targets
compare.
"""

from __future__ import annotations

import torch
from torch import Tensor

from embedkit.errors import ConfigError

__all__ = ["patchify", "random_masking", "unpatchify"]


def patchify(x: Tensor, patch_size: int) -> Tensor:
    """Images (N, C, H, W) -> patches (N, L, p * p * C), row by row; a patch holds row, column, channel.

    Args:
        x: Images.
        patch_size: Side p in pixels.

    Raises:
        ConfigError: Patches that do not tile the image.
    """
    n, c, h, w = x.shape
    if patch_size < 1 or h % patch_size or w % patch_size:
        raise ConfigError(f"patchify: patches of {patch_size} pixels do not tile an image of {h}x{w}")
    rows, columns = h // patch_size, w // patch_size
    x = x.reshape(n, c, rows, patch_size, columns, patch_size)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(n, rows * columns, patch_size * patch_size * c)


def unpatchify(patches: Tensor, patch_size: int, *, image_size: int | tuple[int, int]) -> Tensor:
    """Patches (N, L, p * p * C) -> images (N, C, H, W): the inverse of `patchify`.

    Args:
        patches: As `patchify` makes them.
        patch_size: Side p in pixels.
        image_size: Side, or (height, width), of the image in pixels.

    Raises:
        ConfigError: A number or width of patches that cannot be such an image.
    """
    h, w = (image_size, image_size) if isinstance(image_size, int) else image_size
    n, tokens, width = patches.shape
    rows, columns = h // patch_size, w // patch_size
    if (
        (rows * patch_size, columns * patch_size) != (h, w)
        or tokens != rows * columns
        or width % patch_size**2
    ):
        raise ConfigError(
            f"unpatchify: {tokens} patches of {width} values are not an image of {h}x{w} "
            f"in patches of {patch_size} pixels"
        )
    x = patches.reshape(n, rows, columns, patch_size, patch_size, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(n, -1, h, w)


def random_masking(x: Tensor, mask_ratio: float, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Keep a uniformly random set of tokens of every row, each row its own.

    Args:
        x: Tokens (N, L, D).
        mask_ratio: Share that is removed, in [0, 1); int(L * (1 - mask_ratio)) tokens stay.
        generator: Where the randomness comes from; drawn on its device.

    Returns:
        kept: (N, K, D), the tokens that stay, in shuffled order.
        mask: float32 (N, L), 0 where a token stays and 1 where it was removed.
        ids_restore: int64 (N, L), the place of token l in the row of kept and then removed tokens:
            `torch.gather(shuffled, 1, ids_restore[..., None].expand(-1, -1, D))` restores the order.

    Raises:
        ConfigError: A ratio outside [0, 1), or one that leaves no token.
    """
    n, tokens, dim = x.shape
    keep = int(tokens * (1 - mask_ratio))
    if not 0 <= mask_ratio < 1 or keep < 1:
        raise ConfigError(
            f"mask_ratio: expected 0 to below 1, with one of {tokens} tokens left or more; found {mask_ratio}"
        )
    noise = torch.rand(n, tokens, generator=generator, device=generator.device).to(x.device)
    ids_shuffle = noise.argsort(dim=1)
    ids_restore = ids_shuffle.argsort(dim=1)
    kept = x.gather(1, ids_shuffle[:, :keep, None].expand(-1, -1, dim))  # (N, K, D)
    mask = (ids_restore >= keep).float()
    return kept, mask, ids_restore
