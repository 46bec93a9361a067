"""ViT-VQGAN: an image becomes a grid of code numbers, from which a decoder draws it again.

A transformer encodes patches, each is replaced by the nearest vector of a codebook, and an adversary judges what the
decoder makes of them. It is the first stage of image modeling (`vim` is the second).

Source: Vector-quantized Image Modeling with Improved VQGAN (Yu et al., ICLR 2022, arXiv 2110.04627), section 3; the
straight-through gradient and both terms of the codebook: Neural Discrete Representation Learning (van den Oord et al.,
NIPS 2017, arXiv 1711.00937), equation 3.

Differences from the source:
- vit_t4 and a decoder of four blocks for 28 pixels, 49 tokens; theirs have 12 blocks or more and 1,024 tokens.
- No perceptual loss: it has a network trained on labels. No logit-Laplace loss either, whose weight we could not check
  (a public re-implementation has 0). L2 has weight 1 and the adversary 0.1, as there.
- The discriminator is a small PatchGAN of three convolutions with a hinge, in place of StyleGAN2's; it begins after
  `adversarial_start` of the run, when there is something to judge.
- Squares of the codebook's terms are meaned over a code's values, as in that re-implementation; the equation sums them.
- The projections to code and back are linear; the paper's have none, or a hidden layer of tanh in the encoder's blocks.
- Codes that were not used for `restart_after` batches are put where encodings of the last batch lie. The paper needs no
  restart at its size. `codebook_used` and `perplexity` are logged.
- Exported is E alone, its patch tokens meaned: its features are continuous, so no code number depends on rounding.

Recipe, expected metrics, data, time and command: `embedkit.training.recipes.vqgan`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from embedkit.errors import ConfigError
from embedkit.training.augment import Augmentation, Compose, RandomHorizontalFlip
from embedkit.training.config import Facts
from embedkit.training.data import Batch
from embedkit.training.distributed import gather, mean_over_ranks
from embedkit.training.method import Method, float32_loss
from embedkit.training.models.backbones import Backbone
from embedkit.training.models.heads import l2_normalize
from embedkit.training.models.masking import unpatchify

__all__ = ["FAMILY", "SUMMARY", "VQGAN", "Config", "Quantizer", "TokenDecoder", "codebook_loss", "perplexity"]

#: The supervision that the method learns from.
FAMILY = "reconstruction"
#: The sentence that the card of an entry shows.
SUMMARY = (
    "ViT-VQGAN: an image is encoded as a grid of code numbers, and a decoder reconstructs it with "
    "the help of an adversary. The mean of the encoder's patch features is exported."
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Of `vqgan`.

    Attributes:
        codes: K, vectors of the codebook.
        code_dim: Their width; that of the tokens is projected to it ("factorized codes").
        commitment: beta, the weight of the term that moves the encoder.
        decoder_depth: Blocks of the decoder, as wide as the encoder's.
        adversarial: Weight of the adversary's judgment; 0 leaves it out.
        adversarial_start: Share of the run (of the stage) after which it begins.
        discriminator_width: Channels of its first convolution.
        restart_after: Batches after which an unused code is put elsewhere; 0 for never.
        augment: What the images go through.
    """

    codes: int = 512
    code_dim: int = 16
    commitment: float = 0.25
    decoder_depth: int = 4
    adversarial: float = 0.1
    adversarial_start: float = 0.3
    discriminator_width: int = 32
    restart_after: int = 100
    augment: Augmentation = Compose(steps=(RandomHorizontalFlip(),))


@float32_loss
def codebook_loss(z: Tensor, e: Tensor, commitment: float) -> Tensor:
    """|sg[z] - e|^2 + beta |z - sg[e]|^2, meaned over tokens and values: the first term moves codes, the second E.

    Args:
        z: Encodings (..., code_dim), of length 1.
        e: Their codes, same shape.
        commitment: beta.

    Returns:
        A scalar; 0 where every encoding is its code.
    """
    return F.mse_loss(e, z.detach()) + commitment * F.mse_loss(z, e.detach())


def perplexity(indices: Tensor, codes: int) -> Tensor:
    """How many codes are used, as exp(entropy): 1 for one code alone, K for all equally often."""
    shares = torch.bincount(indices.flatten(), minlength=codes).float() / indices.numel()
    return torch.special.entr(shares).sum().exp()


class Quantizer(nn.Module):
    """Encodings -> codes: both at length 1, so that the nearest code is that of the largest cosine.

    Args:
        codes: K.
        dim: Width of a code.
    """

    def __init__(self, codes: int, dim: int) -> None:
        super().__init__()
        self.codebook = nn.Parameter(l2_normalize(torch.randn(codes, dim)))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Encodings (..., dim) of any length.

        Returns:
            quantized: (..., dim), of the codes' values and the encodings' gradient (straight-through).
            indices: int64 (...).
            z: The encodings at length 1.
            e: The codes at length 1, with the codebook's gradient.
        """
        z = l2_normalize(z)
        indices = self.nearest(z)
        e = self.lookup(indices)
        return z + (e - z).detach(), indices, z, e

    def nearest(self, z: Tensor) -> Tensor:
        """The number of the code of the largest cosine, int64 (...); the first of equal ones."""
        return self.cosines(z).argmax(-1)

    def cosines(self, z: Tensor) -> Tensor:
        """Of encodings at length 1 with every code, (..., K)."""
        with torch.autocast(z.device.type, enabled=False):  # bfloat16 would confuse near codes
            return z.detach().float() @ l2_normalize(self.codebook.detach()).mT

    def lookup(self, indices: Tensor) -> Tensor:
        """Codes at length 1 (..., dim) of their numbers."""
        return l2_normalize(F.embedding(indices, self.codebook))


class TokenDecoder(nn.Module):
    """Codes (N, L, code_dim) of a grid -> an image (N, C, H, W), by transformer blocks.

    Args:
        code_dim: Width of the codes.
        vit: The encoder, whose width, heads, patch and grid it has.
        out_chans: Channels C.
        depth: Blocks.
    """

    def __init__(self, code_dim: int, vit: VisionTransformer, out_chans: int, depth: int) -> None:
        super().__init__()
        dim, heads = vit.embed_dim, vit.blocks[0].attn.num_heads
        self.patch, self.size = vit.patch_embed.patch_size[0], vit.patch_embed.img_size
        self.expand = nn.Linear(code_dim, dim)
        self.position = nn.Parameter(0.02 * torch.randn(1, vit.patch_embed.num_patches, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads, qkv_bias=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.to_pixels = nn.Linear(dim, self.patch**2 * out_chans)

    def forward(self, codes: Tensor) -> Tensor:
        """Decode."""
        x = self.norm(self.blocks(self.expand(codes) + self.position))
        return unpatchify(self.to_pixels(x), self.patch, image_size=self.size)


class VQGAN(Method):
    """E (the backbone), a projection, the codebook, a decoder and an adversary; exported is E."""

    stops_gradient = True
    overfits = False
    inert = ("adversarial_start", "restart_after")

    unused: Tensor

    def __init__(self, backbone: Backbone, config: Config, facts: Facts) -> None:
        super().__init__(backbone, config, facts)
        self.automatic_optimization = False
        vit, channels = backbone.net, facts.image_shape[0]
        if not isinstance(vit, VisionTransformer):
            raise ConfigError(
                f"vqgan: expected a ViT, found {backbone.architecture}; take vit_t4 or another ViT"
            )
        if config.codes < 2 or config.code_dim < 1 or config.decoder_depth < 1 or config.restart_after < 0:
            raise ConfigError(
                "vqgan: expected 2 codes or more, a code_dim and decoder_depth of 1 or more and restart_after of 0 "
                f"or more; found {config.codes}, {config.code_dim}, {config.decoder_depth}, {config.restart_after}"
            )
        self.to_code = nn.Linear(vit.embed_dim, config.code_dim)
        self.quantizer = Quantizer(config.codes, config.code_dim)
        self.decode = TokenDecoder(config.code_dim, vit, channels, config.decoder_depth)
        width = config.discriminator_width
        self.discriminator = nn.Sequential(
            nn.Conv2d(channels, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 1, 3, padding=1),
        ).to(memory_format=torch.channels_last)
        #: Batches since each code was last used.
        self.register_buffer("unused", torch.zeros(config.codes))
        self._last: tuple[Tensor, Tensor] | None = None

    def networks(self) -> dict[str, Sequence[nn.Module]]:
        """The codec, and its adversary."""
        codec = (self.backbone, self.to_code, self.quantizer, self.decode)
        return {"codec": codec, "discriminator": (self.discriminator,)}

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Both move at once; the adversary not before it judges."""
        outputs = self.loss(batch, self.generator())
        losses = {"codec": outputs["codec_loss"]}
        if "discriminator_loss" in outputs:
            losses["discriminator"] = outputs["discriminator_loss"]
        self.step(losses)
        self.log_dict({name: value.detach() for name, value in outputs.items()})

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Put codes that were long unused where encodings lie."""
        if self._last is None or not self.config.restart_after:
            return
        (z, indices), self._last = self._last, None
        counts = torch.bincount(indices.flatten(), minlength=self.config.codes).float()
        self.unused = torch.where(mean_over_ranks(counts) > 0, 0, self.unused + 1)
        dead = self.unused >= self.config.restart_after
        if dead.any():
            candidates = gather(z.flatten(0, -2))  # the same on every rank
            places = torch.linspace(0, len(candidates) - 1, int(dead.sum()), device=z.device).long()
            with torch.no_grad():
                self.quantizer.codebook[dead] = candidates[places].to(self.quantizer.codebook.dtype)
            self.unused = torch.where(dead, 0, self.unused)

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """L2, the codebook's terms and the adversary's judgment; and the adversary's own loss."""
        return self._codec_losses(self.view(batch.images, self.config.augment, generator))

    def pretext_metric(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """How well images are drawn from their codes, and how many codes that takes.

        `unexplained` is the squared error over that of every image's mean pixel value: 1 where nothing is drawn.
        `narrow_margins` is the share of tokens whose two nearest codes differ by less than 1e-5 in cosine: theirs are
        the numbers that may differ between runtimes.
        """
        x = self.view(batch.images)
        z = self._encode(x)
        quantized, indices, z, _ = self.quantizer(z)
        flat = x - x.mean((1, 2, 3), keepdim=True)
        best = self.quantizer.cosines(z).topk(2, dim=-1).values
        return {
            "unexplained": (self.decode(quantized) - x).square().mean() / flat.square().mean(),
            "perplexity": perplexity(indices, self.config.codes),
            "codebook_used": torch.bincount(indices.flatten(), minlength=self.config.codes)
            .gt(0)
            .float()
            .mean(),
            "narrow_margins": (best[..., 0] - best[..., 1] < 1e-5).float().mean(),
        }

    def pretext_chance(self) -> dict[str, float]:
        """The mean value of each image."""
        return {"unexplained": 1.0}

    def solved(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Images, the codes of their patches (one color a code), and what the decoder draws from these codes."""
        x = self.view(batch.images)
        quantized, indices, _, _ = self.quantizer(self._encode(x))
        colors = torch.rand(self.config.codes, 3, generator=torch.Generator().manual_seed(0)).to(x.device)
        codes = colors[indices].mT.unflatten(
            2, self.backbone.net.patch_embed.grid_size
        )  # (N, 3, rows, columns)
        return {
            "true": self.denormalize(x),
            "codes": codes,
            "reconstructed": self.denormalize(self.decode(quantized)),
        }

    def decode_indices(self, indices: Tensor) -> Tensor:
        """Code numbers (N, L), row by row -> images, normalized (N, C, H, W)."""
        return self.decode(self.quantizer.lookup(indices))

    def _encode(self, x: Tensor) -> Tensor:
        """Images, normalized -> encodings (N, L, code_dim), of any length."""
        tokens = self.backbone.forward_features(x)
        return self.to_code(tokens[:, self.backbone.net.num_prefix_tokens :])

    def _codec_losses(self, x: Tensor) -> dict[str, Tensor]:
        quantized, indices, z, e = self.quantizer(self._encode(x))
        self._last = (z.detach(), indices)
        drawn = self.decode(quantized).float()
        reconstruction = F.mse_loss(drawn, x)
        codebook = codebook_loss(z, e, self.config.commitment)
        codec_loss = reconstruction + codebook
        found = {
            "reconstruction": reconstruction,
            "codebook": codebook,
            "perplexity": perplexity(indices, self.config.codes),
        }
        if self.config.adversarial and self.stage.progress >= self.config.adversarial_start:
            codec_loss = codec_loss - self.config.adversarial * self.discriminator(drawn).mean()
            real, generated = self.discriminator(x), self.discriminator(drawn.detach())
            found["discriminator_loss"] = F.relu(1 - real).mean() + F.relu(1 + generated).mean()
        loss = codec_loss + found.get("discriminator_loss", torch.zeros_like(codec_loss))
        return {"loss": loss, "codec_loss": codec_loss, **found}
