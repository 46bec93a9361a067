"""MAE: three quarters of an image's patches are masked, the encoder sees the rest, a small decoder predicts the masked.

A masked patch cannot be copied from its neighbors, so the encoder must know what the whole image shows; it never sees a
mask token, which makes a step cheap and the encoder fit for whole images.

Source: Masked Autoencoders Are Scalable Vision Learners (He, Chen, Xie, Li, Dollar and Girshick, CVPR 2022, arXiv
2111.06377), section 3; code facebookresearch/mae.

Differences from the source:
- A small ViT and decoder for images of 28 to 64 pixels in patches of 4 (the paper: ViT-B to ViT-H of patch 14 or
  16, decoder of width 512 and 8 blocks).
- Crops are resized bilinearly (bicubically there). The recipe has 20 epochs in batches of 512 at a learning rate of
  5e-4 for every 256 of a batch; theirs are 800 or 1,600 epochs, 4,096 and 1.5e-4.
- `norm_pix_eps` is a setting: with their 1e-6 a nearly constant patch, as in backgrounds, amplifies noise.

As there, the position embedding is the fixed table of sines and cosines, written into timm's `pos_embed` and not
trained (timm's own is learned), and layers start Xavier-uniform.

Exported is the encoder on the whole image, no patch hidden; the embedding is the mean of its patch tokens after
the last LayerNorm. The paper's fine-tuning pools before that norm; here it is trained, and loaded by timm as it is.

Recipe, expected metrics, data, time and command: `embedkit.training.recipes.mae`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from embedkit.errors import ConfigError
from embedkit.training.augment import Augmentation, Compose, RandomHorizontalFlip, RandomResizedCrop
from embedkit.training.config import Facts
from embedkit.training.data import Batch
from embedkit.training.method import Method, float32_loss
from embedkit.training.models.backbones import Backbone
from embedkit.training.models.masking import patchify, random_masking, unpatchify

__all__ = ["FAMILY", "SUMMARY", "MAE", "Config", "masked_loss", "patch_targets", "sincos_table"]

#: The supervision that the method learns from.
FAMILY = "reconstruction"
#: The sentence that the card of an entry shows.
SUMMARY = (
    "MAE: three quarters of an image's patches are masked, the encoder sees the rest, a small "
    "decoder reconstructs the masked ones."
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Of `mae`.

    Attributes:
        mask_ratio: Share of the patches that is hidden, above 0 and below 1; drawn again for every image.
        norm_pix_loss: Whether every patch of the target is brought to mean 0 and variance 1.
        norm_pix_eps: Added to that variance, in units of the variance of the data's pixels.
        decoder_dim: Width of the decoder, a multiple of 4 and of its heads.
        decoder_depth: Blocks of the decoder.
        decoder_heads: Heads of each of them.
        augment: What an image goes through before it is cut into patches.
    """

    mask_ratio: float = 0.75
    norm_pix_loss: bool = True
    norm_pix_eps: float = 1e-6
    decoder_dim: int = 128
    decoder_depth: int = 2
    decoder_heads: int = 4
    augment: Augmentation = Compose(steps=(RandomResizedCrop(scale=(0.2, 1.0)), RandomHorizontalFlip()))


def patch_targets(x: Tensor, patch_size: int, norm_pix: bool = True, eps: float = 1e-6) -> Tensor:
    """What the decoder is to say of each patch: its pixels, or (t - mean) / sqrt(var + eps), var unbiased.

    Args:
        x: Images (N, C, H, W), normalized.
        patch_size: Side p in pixels.
        norm_pix: Which of the two.
        eps: 0 or more.

    Returns:
        (N, L, p * p * C).
    """
    target = patchify(x, patch_size)
    if not norm_pix:
        return target
    mean, variance = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
    return (target - mean) / (variance + eps).sqrt()


@float32_loss
def masked_loss(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error of each patch, meaned over the hidden patches alone.

    Args:
        pred: (N, L, P).
        target: (N, L, P).
        mask: (N, L), 1 where a patch was hidden, else 0; at least one is 1.
    """
    return ((pred - target).square().mean(-1) * mask).sum() / mask.sum()


def sincos_table(dim: int, rows: int, columns: int) -> Tensor:
    """The fixed position embedding (1, 1 + rows * columns, dim): zeros for the class token, then row by row.

    The first half of the width tells the column, the second the row (the order of the authors' code); each half is
    the sines, then the cosines, of the coordinate times 10000^(-4i / dim), i = 0..dim / 4 - 1.

    Raises:
        ConfigError: A width that is not a multiple of 4.
    """
    if dim % 4:
        raise ConfigError(f"mae: expected widths of a multiple of 4, found {dim}")
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = [place.reshape(-1, 1) * omega for place in (x, y)]  # (L, dim / 4) each
    table = torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1).float()
    return F.pad(table, (0, 0, 1, 0))[None]


class MAE(Method):
    """A ViT that sees the patches that are left, and a decoder that sees all places."""

    streams = ("masks",)

    decoder_pos_embed: Tensor

    def __init__(self, backbone: Backbone, config: Config, facts: Facts) -> None:
        super().__init__(backbone, config, facts)
        vit = backbone.net
        if not isinstance(vit, VisionTransformer) or vit.cls_token is None or vit.pos_embed is None:
            raise ConfigError(
                f"mae: expected a ViT with a class token, found {backbone.architecture}; take vit_t4"
            )
        grid, dim = vit.patch_embed.grid_size, config.decoder_dim
        self.patch_size: int = vit.patch_embed.patch_size[0]
        self.decoder_embed = nn.Linear(vit.embed_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.decoder_blocks = nn.Sequential(
            *(Block(dim, config.decoder_heads, qkv_bias=True) for _ in range(config.decoder_depth))
        )
        self.decoder_norm = nn.LayerNorm(dim, eps=1e-6)
        self.to_patch = nn.Linear(dim, self.patch_size**2 * facts.image_shape[0])
        self.register_buffer("decoder_pos_embed", sincos_table(dim, *grid), persistent=False)

        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        projection = (
            vit.patch_embed.proj.weight
        )  # (D, C, p, p), in channels-last memory, which has no flat view
        with torch.no_grad():
            projection.copy_(nn.init.xavier_uniform_(projection.flatten(1).clone()).view_as(projection))
            vit.pos_embed.copy_(sincos_table(vit.embed_dim, *grid))
        vit.pos_embed.requires_grad_(False)
        for token in (vit.cls_token, self.mask_token):
            nn.init.normal_(token, std=0.02)

    def on_fit_start(self) -> None:
        """On a CPU, attention as plain products: torch's fused kernel takes twice the time of a block (50 tokens)."""
        if self.device.type == "cpu":
            for module in self.modules():
                if isinstance(module, Attention):
                    module.fused_attn = False  # type: ignore[misc]

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """The masked loss of one view of each image; masks have randomness of their own."""
        x = self.view(batch.images, self.config.augment, generator)
        pred, target, mask = self._predict(x, self.generator("masks"))
        return {"loss": masked_loss(pred, target, mask)}

    def pretext_metric(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """The loss, and the share of the hidden targets' energy that is predicted (0: the mean everywhere)."""
        pred, target, mask = self._predict(self.view(batch.images), generator)
        loss = masked_loss(pred, target, mask)
        energy = masked_loss(torch.zeros_like(target), target, mask)
        return {"masked_loss": loss, "explained_energy": 1 - loss / energy}

    def pretext_chance(self) -> dict[str, float]:
        """The mean everywhere."""
        return {"explained_energy": 0.0}

    def solved(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Images with hidden patches, the hidden ones as predicted, and the images themselves.

        With `norm_pix_loss` a predicted patch has the mean and variance of the true one, which are not predicted.
        """
        x = self.view(batch.images)
        pred, _, mask = self._predict(x, generator)
        patches = patchify(x, self.patch_size)
        if self.config.norm_pix_loss:
            mean, variance = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
            pred = pred * (variance + self.config.norm_pix_eps).sqrt() + mean
        hidden = mask[:, :, None].bool()
        drawn = {
            "given": patches.masked_fill(hidden, 0.0),
            "predicted": torch.where(hidden, pred.float(), patches),
            "true": patches,
        }
        size = (x.shape[2], x.shape[3])
        return {
            title: self.denormalize(unpatchify(p, self.patch_size, image_size=size))
            for title, p in drawn.items()
        }

    def forward_encoder(
        self, x: Tensor, mask_ratio: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Images (N, C, H, W) -> latents (N, 1 + K, D) of class token and patches that stay, mask, ids_restore."""
        vit: Any = self.backbone.net
        tokens = vit.patch_embed(x) + vit.pos_embed[:, 1:]  # places are added before any patch goes
        kept, mask, ids_restore = random_masking(tokens, mask_ratio, generator)
        first = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(x), -1, -1)
        return vit.norm(vit.blocks(vit.norm_pre(torch.cat([first, kept], dim=1)))), mask, ids_restore

    def forward_decoder(self, latent: Tensor, ids_restore: Tensor) -> Tensor:
        """Latents (N, 1 + K, D) -> a prediction for every patch (N, L, p * p * C), in the image's order."""
        tokens = self.decoder_embed(latent)  # (N, 1 + K, decoder_dim)
        n, places = ids_restore.shape
        hidden = self.mask_token.to(tokens.dtype).expand(n, places + 1 - tokens.shape[1], -1)
        shuffled = torch.cat([tokens[:, 1:], hidden], dim=1)  # (N, L, decoder_dim)
        restored = shuffled.gather(1, ids_restore[:, :, None].expand(-1, -1, shuffled.shape[2]))
        x = torch.cat([tokens[:, :1], restored], dim=1) + self.decoder_pos_embed
        return self.to_patch(self.decoder_norm(self.decoder_blocks(x)))[:, 1:]

    def _predict(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Prediction, target (N, L, p * p * C) and mask (N, L) of normalized images."""
        config = self.config
        latent, mask, ids_restore = self.forward_encoder(x, config.mask_ratio, generator)
        target = patch_targets(x, self.patch_size, config.norm_pix_loss, config.norm_pix_eps)
        return self.forward_decoder(latent, ids_restore), target, mask
