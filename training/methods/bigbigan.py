"""BigBiGAN: BiGAN with an encoder that draws its code, and a discriminator that also judges image and code apart.

Encoder and generator fool it on pairs, on images alone and on codes alone; features come of inverting a generator that
never sees an image.

Source: Large Scale Adversarial Representation Learning (Donahue and Simonyan, NeurIPS 2019, arXiv 1907.02544), section
2, the losses of its figure 1; spectral normalization: Miyato et al., ICLR 2018, arXiv 1802.05957.

Differences from the source:
- Small networks throughout ("BigBiGAN-small"): E is the backbone and a perceptron, G upsampling and 3x3 convolutions
  without class or skip-z, F three convolutions of stride 2, H and J residual perceptrons of two blocks each. Expect
  figures near BiGAN's, and not the paper's, whose batch is 2048 on 128 to 256 pixels.
- D and E see the same view at the same size; the paper's E sees it at twice the size, and D halved.
- Spectral norm is in D, as in the paper; `spectral_encoder` has it in E's convolutions too, and is off. The export
  divides the weights by their norm, so that the entry is a plain timm network.
- The widths, the ratio of learning rates and two steps of D for one of E and G are recalled, not checked in the paper.
  `discriminator_steps` is 1 and rates are settings of the run: `optimizers={"encoder": ...}`.
- No moving average of G, which serves its samples alone. AdamW for Adam.
- Exported are the pooled features before the code. The paper's best are BatchNorm and both signs of ReLU of these.

Recipe, expected metrics, data, time and command: `embedkit.training.recipes.bigbigan`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
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

__all__ = [
    "FAMILY",
    "SUMMARY",
    "BigBiGAN",
    "Config",
    "JointDiscriminator",
    "SpectralNorm",
    "discriminator_loss",
    "encoder_generator_loss",
    "without_spectral_norm",
]

#: The supervision that the method learns from.
FAMILY = "an adversary"
#: The sentence that the card of an entry shows.
SUMMARY = (
    "BigBiGAN: an encoder and a generator learn to fool a discriminator of images, of codes and of "
    "pairs of both. The features of the encoder before the code are exported."
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Of `bigbigan`.

    Attributes:
        latent_dim: Width of z, which is normal.
        generator_width: Channels of G at full resolution.
        discriminator_width: Channels of F's first convolution; H and J are eight times as wide.
        unary: Whether images and codes are also judged alone; without, it is BiGAN with a hinge.
        discriminator_steps: Batches for one step of E and G; D moves on each.
        spectral_encoder: Spectral norm in the backbone's convolutions.
        augment: What the images go through that D calls real, and E encodes.
    """

    latent_dim: int = 64
    generator_width: int = 16
    discriminator_width: int = 32
    unary: bool = True
    discriminator_steps: int = 1
    spectral_encoder: bool = False
    augment: Augmentation = Compose(steps=())


@float32_loss
def discriminator_loss(real: Tensor, generated: Tensor) -> Tensor:
    """What D minimizes: h(y s_x) + h(y s_z) + h(y s_xz), h(t) = max(0, 1 - t), each score hinged on its own.

    A hinge of the sum would let one sure score silence the others.

    Args:
        real: Scores (N, S) of pairs (x, E(x)), y = 1: of image, code and pair, or of the pair alone.
        generated: Scores (N, S) of pairs (G(z), z), y = -1.

    Returns:
        A scalar; 2 S for scores of zero.
    """
    return F.relu(1 - real).sum(1).mean() + F.relu(1 + generated).sum(1).mean()


@float32_loss
def encoder_generator_loss(real: Tensor, generated: Tensor) -> tuple[Tensor, Tensor]:
    """What E and what G minimize: y (s_x + s_z + s_xz), not hinged: where D is sure they still learn.

    Returns:
        E's term, of the real pairs, and G's, of the generated ones; their sum is the paper's.
    """
    return real.sum(1).mean(), -generated.sum(1).mean()


class SpectralNorm(nn.Module):
    """A layer whose weight is divided by its largest singular value, estimated by one power iteration a pass.

    torch's own is a module that is called on the weight; counting a step's operations does not go with gradients of
    single networks there.

    Args:
        layer: A linear layer or a convolution.
    """

    u: Tensor

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("u", F.normalize(torch.randn(layer.weight.shape[0]), dim=0))
        for _ in range(15):
            self._iterate()

    def forward(self, x: Tensor) -> Tensor:
        """What the layer gives with the divided weight."""
        if self.training:
            self._iterate()
        weight = self.weight()
        if isinstance(self.layer, nn.Conv2d):
            return self.layer._conv_forward(x, weight, self.layer.bias)
        return F.linear(x, weight, self.layer.bias)

    def weight(self) -> Tensor:
        """W / (u' W v), v = W' u at length 1; u and v are constants, W is not."""
        u, matrix = (
            self.u.clone(),
            self.layer.weight.flatten(1),
        )  # a later pass moves u before this one's gradient
        with torch.no_grad():
            v = F.normalize(matrix.mT @ u, dim=0)
        return self.layer.weight / (u @ (matrix @ v))

    @torch.no_grad()
    def _iterate(self) -> None:
        matrix = self.layer.weight.flatten(1)
        v = F.normalize(matrix.mT @ self.u, dim=0)
        self.u.copy_(F.normalize(matrix @ v, dim=0))


def with_spectral_norm(module: nn.Module) -> None:
    """Put every convolution of `module` behind its spectral norm, in place."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Conv2d):
            setattr(module, name, SpectralNorm(child))
        else:
            with_spectral_norm(child)


def without_spectral_norm(module: nn.Module) -> nn.Module:
    """A copy whose layers have the divided weights, and are plain again: the same function in eval mode."""
    twin = copy.deepcopy(module)
    for parent in list(twin.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, SpectralNorm):
                with torch.no_grad():
                    child.layer.weight.copy_(child.weight())
                setattr(parent, name, child.layer)
    return twin


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (SpectralNorm(nn.Linear(width, width)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(F.relu(x))))


def _perceptron(fan_in: int, width: int) -> nn.Sequential:
    """(N, fan_in) -> (N, width): a linear layer and two residual blocks."""
    return nn.Sequential(
        SpectralNorm(nn.Linear(fan_in, width)), _Residual(width), _Residual(width), nn.ReLU()
    )


class JointDiscriminator(nn.Module):
    """s_x = th_x . F(x), s_z = th_z . H(z), s_xz = th_xz . J(F(x), H(z)), every layer of spectral norm 1."""

    def __init__(
        self, in_chans: int, image_size: tuple[int, int], latent_dim: int, width: int, unary: bool
    ) -> None:
        super().__init__()
        widths = (in_chans, width, 2 * width, 4 * width)
        # each convolution halves a side, rounding up
        places = math.ceil(image_size[0] / 8) * math.ceil(image_size[1] / 8)
        layers: list[nn.Module] = []
        for fan_in, fan_out in zip(widths[:-1], widths[1:], strict=True):
            layers += [
                SpectralNorm(nn.Conv2d(fan_in, fan_out, 3, stride=2, padding=1)),
                nn.LeakyReLU(0.2),
            ]
        wide = 8 * width
        self.of_image = nn.Sequential(*layers, nn.Flatten(), _perceptron(widths[-1] * places, wide))
        self.of_code = _perceptron(latent_dim, wide)
        self.of_pair = _perceptron(2 * wide, wide)
        self.score_pair = SpectralNorm(nn.Linear(wide, 1))
        self.score_image = SpectralNorm(nn.Linear(wide, 1)) if unary else None
        self.score_code = SpectralNorm(nn.Linear(wide, 1)) if unary else None

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Images (N, C, H, W), normalized, and codes (N, latent_dim) -> scores (N, 3): x, z, xz; (N, 1): xz."""
        image, code = self.of_image(x), self.of_code(z)
        scores = [self.score_pair(self.of_pair(torch.cat([image, code], dim=1)))]
        if self.score_image is not None and self.score_code is not None:
            scores = [self.score_image(image), self.score_code(code), *scores]
        return torch.cat(scores, dim=1)


class BigBiGAN(Method):
    """E (backbone, perceptron to mean and deviation), G and D; exported is what stands before the perceptron."""

    streams = ("prior", "posterior")
    overfits = False
    takes_weights = False
    inert = ("discriminator_steps",)

    def __init__(self, backbone: Backbone, config: Config, facts: Facts) -> None:
        super().__init__(backbone, config, facts)
        self.automatic_optimization = False
        if config.latent_dim < 1 or config.discriminator_steps < 1:
            raise ConfigError(
                "bigbigan: expected a latent_dim and discriminator_steps of 1 or more, found "
                f"{config.latent_dim} and {config.discriminator_steps}"
            )
        if config.spectral_encoder:
            with_spectral_norm(self.backbone)
        channels, height, width = facts.image_shape
        self.to_latent = nn.Sequential(
            nn.Linear(backbone.dim, backbone.dim), nn.ReLU(), nn.Linear(backbone.dim, 2 * config.latent_dim)
        )
        self.generate = ConvDecoder(
            config.latent_dim, out_chans=channels, image_size=height, width=config.generator_width
        ).to(memory_format=torch.channels_last)
        self.discriminator = JointDiscriminator(
            channels, (height, width), config.latent_dim, config.discriminator_width, config.unary
        )

    def networks(self) -> dict[str, Sequence[nn.Module]]:
        """E, G and D, each by its own loss; settings of one are `RunConfig.optimizers[name]`."""
        return {
            "encoder": (self.backbone, self.to_latent),
            "generator": (self.generate,),
            "discriminator": (self.discriminator,),
        }

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """D moves on every batch, E and G on the last of `discriminator_steps`."""
        outputs = self.loss(batch, self.generator())
        losses = {"discriminator": outputs["discriminator_loss"]}
        if self.batches_seen % self.config.discriminator_steps == 0:
            losses |= {"encoder": outputs["encoder_loss"], "generator": outputs["generator_loss"]}
        self.step(losses)
        self.log_dict({name: value.detach() for name, value in outputs.items()})

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """The losses of D, E and G from one pass; `step` takes of each the gradient of its own network alone."""
        x = self.view(batch.images, self.config.augment, generator)
        z = self._normal(len(x), "prior")
        code, mean, deviation = self._codes(x, self._normal(len(x), "posterior"))
        real, generated = self.discriminator(x, code), self.discriminator(self._images(z), z)
        d_loss = discriminator_loss(real, generated)
        e_loss, g_loss = encoder_generator_loss(real, generated)
        return {
            # wherever no score is hinged the sum of the three is a constant: D's alone says how the game stands
            "loss": d_loss,
            "discriminator_loss": d_loss,
            "encoder_loss": e_loss,
            "generator_loss": g_loss,
            # an encoder that collapsed has means of no spread; E(x) should be distributed as z, of square 1
            "code_square": code.square().mean(),
            "mean_spread": mean.std(0, correction=0).mean(),
            "deviation": deviation.mean(),
        }

    def encoder(self) -> nn.Module:
        """The backbone, with its weights divided by their spectral norm where it has one."""
        return without_spectral_norm(self.backbone) if self.config.spectral_encoder else self.backbone

    def pretext_metric(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """|x - G(mean of E(x))| over |x' - G(...)| of another image x', means over images: 1 where E says nothing."""
        x = self.view(batch.images)
        mean = self._codes(x, None)[1]
        error = x - self._images(mean)
        other = x.roll(1, dims=0) - (x - error)
        norms = [difference.float().flatten(1).norm(dim=1).mean() for difference in (error, other)]
        return {"reconstruction_ratio": norms[0] / norms[1]}

    def pretext_chance(self) -> dict[str, float]:
        """An image as near to its own reconstruction as to another's."""
        return {"reconstruction_ratio": 1.0}

    def solved(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Images of the data, G(mean of E(x)) of each, and images that G makes of noise."""
        x, size = self.view(batch.images), (len(batch.images), self.config.latent_dim)
        z = torch.randn(size, generator=generator, device=generator.device)
        images = {
            "data": x,
            "reconstructed": self._images(self._codes(x, None)[1]),
            "generated": self._images(z),
        }
        return {title: self.denormalize(image) for title, image in images.items()}

    def _normal(self, n: int, purpose: str) -> Tensor:
        """Normal draws (n, latent_dim)."""
        generator = self.generator(purpose)
        return torch.randn(n, self.config.latent_dim, generator=generator, device=generator.device)

    def _codes(self, x: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """E(x): a draw, its mean and its standard deviation, each (N, latent_dim)."""
        mean, deviation = self.to_latent(self.backbone(x)).float().chunk(2, dim=1)
        deviation = F.softplus(deviation)
        return (mean if noise is None else mean + deviation * noise), mean, deviation

    def _images(self, z: Tensor) -> Tensor:
        """G(z): values in [0, 1], normalized as the images of the data are (N, C, H, W)."""
        return (self.generate(z).float().sigmoid() - self.mean) / self.std
