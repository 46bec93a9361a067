"""BiGAN: a discriminator tells pairs (image, its code) from pairs (image of a code, that code).

To fool it, encoder and generator must invert each other without ever being compared: the encoder learns the
features that the generator needs, with no loss on pixels.

Source: Adversarial Feature Learning (Donahue, Kraehenbuehl and Darrell, ICLR 2017, arXiv 1605.09782), equations 2
and 3, with the labels swapped for encoder and generator (section 3.4); code jeffdonahue/bigan.

Differences from the source:
- E is the backbone and a linear layer to z. G is upsampling and 3x3 convolutions. D is convolutions with z added
  as a bias to every layer, as in the paper's ImageNet net; the paper's MNIST nets are perceptrons.
- AdamW and a cosine, theirs is Adam with L2, a constant rate and an exponential end.
- As in their code: E(x) is squashed to z's range (unsquashed its square rose to twice z's); D has BatchNorm, real and
  generated batches apart (without it D won in a hundred steps); D's output starts at zero; beta_1 is 0.5; all three
  nets move at once. D's BatchNorm has neither scale nor shift of its own (the code's bias is
  the shift), and keeps no running statistics, since D is never used alone.
- The loss is the sum of both terms, 2 ln 2 at the start; the authors' code prints half of it.

Recipe, expected metrics, data, time and command: `embedkit.training.recipes.bigan`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from embedkit.errors import ConfigError
from embedkit.training.augment import Augmentation, Compose
from embedkit.training.config import Facts
from embedkit.training.data import Batch
from embedkit.training.method import Method, float32_loss
from embedkit.training.models.backbones import Backbone
from embedkit.training.models.heads import ConvDecoder

__all__ = [
    "FAMILY",
    "SUMMARY",
    "BiGAN",
    "Config",
    "Discriminator",
    "discriminator_loss",
    "encoder_generator_loss",
]

#: The supervision that the method learns from.
FAMILY = "an adversary"
#: The sentence that the card of an entry shows.
SUMMARY = (
    "BiGAN: a discriminator tells pairs (image, its code) from pairs (image generated from a code, "
    "that code)."
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Of `bigan`.

    Attributes:
        latent_dim: Width of z, which is uniform in -1..1.
        generator_width: Channels of G at full resolution.
        discriminator_width: Channels of D's first layer; each of the next two has twice as many.
        discriminator_lr: D's learning rate, as a multiple of the run's; below 1 where D wins.
        augment: What the images go through that D calls real.
    """

    latent_dim: int = 50
    generator_width: int = 16
    discriminator_width: int = 32
    discriminator_lr: float = 1.0
    augment: Augmentation = Compose(steps=())


@float32_loss
def discriminator_loss(real: Tensor, generated: Tensor) -> Tensor:
    """What D minimizes: -E_x log D(x, E(x)) - E_z log(1 - D(G(z), z)), minus equation 3.

    Args:
        real: Logits (N,) of pairs (x, E(x)).
        generated: Logits (N,) of pairs (G(z), z).

    Returns:
        A scalar, in nats; 2 ln 2 for logits of zero.
    """
    return F.softplus(-real).mean() + F.softplus(generated).mean()


@float32_loss
def encoder_generator_loss(real: Tensor, generated: Tensor) -> Tensor:
    """What E and G minimize: -E_x log(1 - D(x, E(x))) - E_z log D(G(z), z), D's loss with the labels swapped.

    Equation 3 itself would leave them without gradient as soon as D is right.
    """
    return discriminator_loss(generated, real)


class Discriminator(nn.Module):
    """Pairs of an image and a code -> a logit, above 0 for (x, E(x)): three convolutions of stride 2, two layers."""

    def __init__(self, in_chans: int, image_size: tuple[int, int], latent_dim: int, width: int) -> None:
        super().__init__()
        widths = (width, 2 * width, 4 * width)
        # each convolution halves a side, rounding up
        places = math.ceil(image_size[0] / 8) * math.ceil(image_size[1] / 8)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(fan_in, fan_out, 3, stride=2, padding=1, bias=False)
            for fan_in, fan_out in zip((in_chans, *widths[:-1]), widths, strict=True)
        )
        self.hidden = nn.Linear(widths[-1] * places, 8 * width, bias=False)
        self.biases = nn.ModuleList(nn.Linear(latent_dim, fan_out) for fan_out in (*widths, 8 * width))
        self.logit = nn.Linear(8 * width, 1)
        for parameter in self.logit.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Images (N, C, H, W), normalized, and codes (N, latent_dim) -> logits (N,)."""
        for index, convolution in enumerate(self.convolutions):
            x = convolution(x)
            x = _batch_norm(x) if index else x  # not of pixels, as in DCGAN
            x = F.leaky_relu(x + self.biases[index](z)[:, :, None, None], 0.2)
        x = _batch_norm(self.hidden(x.flatten(1)))
        return self.logit(F.leaky_relu(x + self.biases[-1](z), 0.2))[:, 0]


def _batch_norm(x: Tensor) -> Tensor:
    """Each channel at mean 0 and variance 1 over the batch; the shift that follows is the code's."""
    return F.batch_norm(x, None, None, training=True)


class BiGAN(Method):
    """E (backbone and linear layer), G and D; exported is what stands before E's last layer, the better features."""

    streams = ("prior",)
    stops_gradient = True
    overfits = False
    takes_weights = False
    inert = ("discriminator_lr",)

    def __init__(self, backbone: Backbone, config: Config, facts: Facts) -> None:
        super().__init__(backbone, config, facts)
        self.automatic_optimization = False
        if config.latent_dim < 1:
            raise ConfigError(f"bigan: expected a latent_dim of 1 or more, found {config.latent_dim}")
        channels, height, width = facts.image_shape
        self.to_latent = nn.Linear(backbone.dim, config.latent_dim)
        generate = ConvDecoder(
            config.latent_dim, out_chans=channels, image_size=height, width=config.generator_width
        )
        discriminator = Discriminator(
            channels, (height, width), config.latent_dim, config.discriminator_width
        )
        self.generate = generate.to(memory_format=torch.channels_last)
        self.discriminator = discriminator.to(memory_format=torch.channels_last)

    def networks(self) -> dict[str, Sequence[nn.Module]]:
        """E and G move together; D by its own loss."""
        return {
            "encoder_generator": (self.backbone, self.to_latent, self.generate),
            "discriminator": (self.discriminator,),
        }

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """One optimizer for E and G, one for D."""
        encoder_generator, discriminator = super().configure_optimizers()
        for group in discriminator.param_groups:
            group["lr_scale"] = self.config.discriminator_lr
        return [encoder_generator, discriminator]

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """All three nets move at once, from gradients at the same weights."""
        outputs = self.loss(batch, self.generator())
        optimizers = cast(list[Any], self.optimizers())
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(outputs["loss"])
        for optimizer in optimizers:
            optimizer.step()
        self.log_dict({name: value.detach() for name, value in outputs.items()})

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Both losses; their sum gives every net its own loss's gradient and no other.

        D's loss sees images and codes as constants, the other one D's weights: so one backward pass serves
        all three nets, and no gradient is computed to be thrown away.
        """
        x = self.view(batch.images, self.config.augment, generator)
        z = self._prior(len(x), self.generator("prior"))
        code, image = self._codes(x), self._images(z)
        d_loss = discriminator_loss(
            self.discriminator(x, code.detach()), self.discriminator(image.detach(), z)
        )
        constant = {name: weight.detach() for name, weight in self.discriminator.named_parameters()}
        real = functional_call(self.discriminator, constant, (x, code))
        generated = functional_call(self.discriminator, constant, (image, z))
        eg_loss = encoder_generator_loss(real, generated)
        return {
            "loss": d_loss + eg_loss,
            "discriminator_loss": d_loss,
            "encoder_generator_loss": eg_loss,
            # a D that need only look at z is no teacher: E(x) should spread as z does, whose square is 1/3
            "code_square": code.square().mean(),
        }

    def pretext_metric(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """|x - G(E(x))| over |x' - G(E(x))| of another image x', means over images: 1 where E(x) says nothing."""
        x = self.view(batch.images)
        error = x - self._images(self._codes(x))
        other = x.roll(1, dims=0) - (x - error)
        norms = [difference.float().flatten(1).norm(dim=1).mean() for difference in (error, other)]
        return {"reconstruction_ratio": norms[0] / norms[1]}

    def pretext_chance(self) -> dict[str, float]:
        """An image as near to its own reconstruction as to another's."""
        return {"reconstruction_ratio": 1.0}

    def solved(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Images of the data, G(E(x)) of each, and images that G makes of noise."""
        x = self.view(batch.images)
        images = {
            "data": x,
            "reconstructed": self._images(self._codes(x)),
            "generated": self._images(self._prior(len(x), generator)),
        }
        return {title: self.denormalize(image) for title, image in images.items()}

    def _prior(self, n: int, generator: torch.Generator) -> Tensor:
        """Codes (n, latent_dim), uniform in -1..1."""
        return torch.rand(n, self.config.latent_dim, generator=generator, device=generator.device) * 2 - 1

    def _codes(self, x: Tensor) -> Tensor:
        """E(x): a logistic of the linear layer, stretched to -1..1 (N, latent_dim)."""
        return self.to_latent(self.backbone(x)).float().sigmoid() * 2 - 1

    def _images(self, z: Tensor) -> Tensor:
        """G(z): values in [0, 1], normalized as the images of the data are (N, C, H, W)."""
        return (self.generate(z).float().sigmoid() - self.mean) / self.std
