"""Autoencoder: an image goes through a narrow code and is rebuilt from it, so the code must hold what varies.

With linear layers and squared error the codes span the principal components; depth bends that subspace.

Source: Reducing the Dimensionality of Data with Neural Networks (Hinton and Salakhutdinov, Science 313, 2006, doi
10.1126/science.1127647; not on arXiv), the fine-tuning objective: cross-entropy of pixels in [0, 1].

Differences from the source:
- No pretraining by restricted Boltzmann machines. It was there since deep nets of logistic units stay at the mean
  image when they start from small random weights; residual blocks with BatchNorm under AdamW do not.
- A convolutional encoder, the backbone, pooled and followed by the paper's linear code; a convolutional decoder
  with weights of its own from the start, where the paper's begin as the encoder's transposed.
- `squared_error` takes the decoder's outputs as they are (no logistic), which is PCA when all layers are linear.

Recipe, expected metrics, data, time and command: `embedkit.training.recipes.autoencoder`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedkit.errors import ConfigError
from embedkit.training.augment import Augmentation, Compose
from embedkit.training.config import Facts
from embedkit.training.data import Batch
from embedkit.training.method import Method, float32_loss
from embedkit.training.models.backbones import Backbone
from embedkit.training.models.heads import ConvDecoder

__all__ = ["FAMILY", "SUMMARY", "Autoencoder", "Config", "reconstruction_loss"]

#: The supervision that the method learns from.
FAMILY = "reconstruction"
#: The sentence that the card of an entry shows.
SUMMARY = (
    "Autoencoder: an image is encoded into a narrow code and reconstructed from it, so the code "
    "must hold what varies."
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Of `autoencoder`.

    Attributes:
        code_dim: Width of the code, below the number of pixels: a code as wide as the image may copy it.
        reconstruction: `cross_entropy` of pixels in [0, 1], the paper's; or `squared_error`.
        decoder_width: Channels of the decoder at full resolution.
        embedding: What is exported: the linear `code`, as in the paper, or the pooled `features` before it.
        augment: What an image goes through before it is encoded; the outcome is what is rebuilt.
    """

    code_dim: int = 32
    reconstruction: Literal["cross_entropy", "squared_error"] = "cross_entropy"
    decoder_width: int = 16
    embedding: Literal["code", "features"] = "code"
    augment: Augmentation = Compose(steps=())


@float32_loss
def reconstruction_loss(decoded: Tensor, pixels: Tensor, kind: str = "cross_entropy") -> Tensor:
    """What an image lacks, summed over its pixels and meaned over the batch.

        cross_entropy:  -sum_i [ p_i log q_i + (1 - p_i) log(1 - q_i) ],   q = 1 / (1 + exp(-decoded))
        squared_error:   sum_i (p_i - decoded_i)^2

    Args:
        decoded: (N, C, H, W), logits or values.
        pixels: (N, C, H, W), p in [0, 1].
        kind: Which of the two.

    Returns:
        A scalar; `cross_entropy` is in nats, ln 2 a pixel for logits of zero, and at least the entropy of p.

    Raises:
        ConfigError: Another kind.
    """
    if kind == "cross_entropy":
        terms = F.binary_cross_entropy_with_logits(decoded, pixels, reduction="none")
    elif kind == "squared_error":
        terms = (pixels - decoded).square()
    else:
        raise ConfigError(f"reconstruction: expected cross_entropy or squared_error, found {kind!r}")
    return terms.sum() / len(pixels)


class Autoencoder(Method):
    """Backbone, linear code, decoder."""

    def __init__(self, backbone: Backbone, config: Config, facts: Facts) -> None:
        super().__init__(backbone, config, facts)
        channels, height, width = facts.image_shape
        if not 1 <= config.code_dim < channels * height * width:
            raise ConfigError(
                f"autoencoder: expected a code_dim of 1 to below the {channels * height * width} values of a "
                f"image, found {config.code_dim}; without a bottleneck nothing is learned"
            )
        self.code = nn.Linear(backbone.dim, config.code_dim)
        # logits of zero: every pixel starts at one half, and the first loss is ln 2 a pixel
        decoder = ConvDecoder(
            config.code_dim,
            out_chans=channels,
            image_size=height,
            width=config.decoder_width,
            start_at_zero=True,
        )
        self.decoder = decoder.to(memory_format=torch.channels_last)

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Reconstruction of one view of each image, and its squared error an image (the paper's figure)."""
        pixels, decoded = self._rebuild(batch.images, self.config.augment, generator)
        loss = reconstruction_loss(decoded, pixels, self.config.reconstruction)
        error = reconstruction_loss(self._values(decoded.detach()), pixels, "squared_error")
        return {"loss": loss, "squared_error": error}

    def encoder(self) -> nn.Module:
        """The backbone and the linear code, or the backbone alone."""
        return (
            self.backbone if self.config.embedding == "features" else nn.Sequential(self.backbone, self.code)
        )

    def pretext_metric(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Squared error an image, and the share of the pixels' variance that is explained (0: the mean image)."""
        pixels, decoded = self._rebuild(batch.images, None, generator)
        error = reconstruction_loss(self._values(decoded), pixels, "squared_error")
        variance = reconstruction_loss(pixels.mean(0).expand_as(pixels), pixels, "squared_error")
        return {"squared_error": error, "explained_variance": 1 - error / variance}

    def solved(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Images, and what the decoder makes of their codes."""
        pixels, decoded = self._rebuild(batch.images, None, generator)
        return {"true": pixels, "reconstructed": self._values(decoded).clamp(0, 1)}

    def _rebuild(
        self, images: Tensor, augment: Augmentation | None, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Pixels in [0, 1] and what the decoder makes of their code, both (N, C, H, W)."""
        x = self.view(images, augment, generator)
        pixels = self.pixels(x)
        return pixels, self.decoder(self.code(self.backbone(x)))

    def _values(self, decoded: Tensor) -> Tensor:
        return decoded if self.config.reconstruction == "squared_error" else decoded.sigmoid()
