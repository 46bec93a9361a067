"""GAN: a generator makes images from noise, and a discriminator learns to tell them from those of the data.

What the discriminator has to see for that, strokes, parts and how they fit, is exported: its pooled features.

Source: Generative Adversarial Nets (Goodfellow et al., NIPS 2014, arXiv 1406.2661), equation 1, with the generator's
loss of its section 3, which does not saturate. Features of the discriminator, and how both nets are built: Unsupervised
Representation Learning with Deep Convolutional Generative Adversarial Networks (DCGAN: Radford, Metz and Chintala,
ICLR 2016, arXiv 1511.06434), sections 3 and 5.1.

Differences from the source:
- Any backbone is the discriminator; the recipe `dcgan` has convolutions of stride 2 with LeakyReLU, as DCGAN, with
  BatchNorm after the first too. The generator is upsampling and 3x3 convolutions in place of transposed ones. Weights
  begin as the house's layers do, not at N(0, 0.02^2); the logit begins at 0.
- Both nets move at once, from gradients at the same weights; in the sources the discriminator moves first.
- Real and generated images pass BatchNorm apart, as in DCGAN's public code, and only real ones leave their statistics.
- Real images are dequantized: U[0, 1) is added to gray values of 0 to 255. A generator never meets 0 exactly, which
  would give it away on black backgrounds. Exported features are those of images as they are.
- Values lie in [0, 1] by a logistic, then mean and deviation are taken out of both kinds; DCGAN has tanh.
- Exported is the mean over the last map, one vector. DCGAN puts all layers side by side, pooled to 4x4 (28,672 values).

Recipe, expected metrics, data, time and command: `embedkit.training.recipes.gan`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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

__all__ = ["FAMILY", "SUMMARY", "GAN", "Config", "discriminator_loss", "generator_loss"]

#: The supervision that the method learns from.
FAMILY = "an adversary"
#: The sentence that the card of an entry shows.
SUMMARY = (
    "GAN: a generator makes images from noise, and a discriminator learns to tell them from images "
    "of the data. The pooled features of the discriminator are exported."
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Of `gan`.

    Attributes:
        latent_dim: Width of z, which is uniform in -1..1.
        generator_width: Channels of the generator at full resolution.
        dequantize: Whether real gray values are made continuous.
        augment: What the images go through that the discriminator calls real.
    """

    latent_dim: int = 100
    generator_width: int = 16
    dequantize: bool = True
    augment: Augmentation = Compose(steps=())


@float32_loss
def discriminator_loss(real: Tensor, generated: Tensor) -> Tensor:
    """What D minimizes: -E_x log D(x) - E_z log(1 - D(G(z))), minus equation 1.

    Args:
        real: Logits (N,) of images of the data; D is their logistic.
        generated: Logits (N,) of generated ones.

    Returns:
        A scalar, in nats; 2 ln 2 for logits of zero. The best D is p / (p + g) for densities p and g.
    """
    return F.softplus(-real).mean() + F.softplus(generated).mean()


@float32_loss
def generator_loss(generated: Tensor) -> Tensor:
    """What G minimizes: -E_z log D(G(z)), which teaches most where D is right; ln 2 for logits (N,) of zero."""
    return F.softplus(-generated).mean()


@contextlib.contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """BatchNorm takes a batch's own statistics, and leaves the running ones as they are."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [norm.track_running_stats for norm in norms]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm, tracked in zip(norms, before, strict=True):
            norm.track_running_stats = tracked


class GAN(Method):
    """The discriminator, which is the backbone and a linear logit, and the generator."""

    streams = ("prior", "dequantization")
    overfits = False
    takes_weights = False

    def __init__(self, backbone: Backbone, config: Config, facts: Facts) -> None:
        super().__init__(backbone, config, facts)
        self.automatic_optimization = False
        if config.latent_dim < 1:
            raise ConfigError(f"gan: expected a latent_dim of 1 or more, found {config.latent_dim}")
        channels, height, _ = facts.image_shape
        self.logit = nn.Linear(backbone.dim, 1)
        for parameter in self.logit.parameters():
            nn.init.zeros_(parameter)
        generate = ConvDecoder(
            config.latent_dim, out_chans=channels, image_size=height, width=config.generator_width
        )
        self.generate = generate.to(memory_format=torch.channels_last)

    def networks(self) -> dict[str, Sequence[nn.Module]]:
        """Each by its own loss."""
        return {"discriminator": (self.backbone, self.logit), "generator": (self.generate,)}

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Both nets move at once, each by the gradient of its own loss alone."""
        outputs = self.loss(batch, self.generator())
        self.step({"discriminator": outputs["discriminator_loss"], "generator": outputs["generator_loss"]})
        self.log_dict({name: value.detach() for name, value in outputs.items()})

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Both losses and the share of images that are told apart; generated images pass D once, for both losses."""
        real = self._logits(self._real(batch.images, generator))
        z = self._prior(len(batch.images), self.generator("prior"))
        images = self._images(z)
        with _statistics_kept(self.backbone):
            generated = self._logits(images)
        d_loss, g_loss = discriminator_loss(real, generated), generator_loss(generated)
        told_apart = ((real > 0).float().mean() + (generated < 0).float().mean()) / 2
        return {
            "loss": d_loss + g_loss,
            "discriminator_loss": d_loss,
            "generator_loss": g_loss,
            "told_apart": told_apart,
        }

    def pretext_metric(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Share of held-out images that are taken for real; it falls as D learns the training images by heart."""
        return {"taken_for_real": (self._logits(self.view(batch.images)) > 0).float().mean()}

    def solved(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Images of the data, and images that G makes of noise."""
        generated = self._images(self._prior(len(batch.images), generator))
        return {"data": self.pixels(batch.images), "generated": self.denormalize(generated)}

    def _real(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Views of images uint8 (N, C, H, W), normalized; gray value v becomes uniform in v / 256..(v + 1) / 256."""
        x = self.view(images, self.config.augment, generator)
        if not self.config.dequantize:
            return x
        noise = self.generator("dequantization")
        draw = torch.rand(x.shape, generator=noise, device=noise.device)
        return self.normalize(((x * self.std + self.mean) * 255 + draw) / 256)

    def _prior(self, n: int, generator: torch.Generator) -> Tensor:
        """Codes (n, latent_dim), uniform in -1..1."""
        return torch.rand(n, self.config.latent_dim, generator=generator, device=generator.device) * 2 - 1

    def _images(self, z: Tensor) -> Tensor:
        """G(z): values in [0, 1], normalized as the images of the data are (N, C, H, W)."""
        return self.normalize(self.generate(z).float().sigmoid())

    def _logits(self, x: Tensor) -> Tensor:
        return self.logit(self.backbone(x))[:, 0].float()  # (N,)
