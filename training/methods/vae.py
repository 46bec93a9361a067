"""VAE: the encoder gives a distribution over codes, and the decoder must rebuild the image from a draw of it.

The bound on log p(x) asks for images that are rebuilt and for codes that say no more than that needs: what does
not pay for its nats stays at the prior.

Source: Auto-Encoding Variational Bayes (Kingma and Welling, ICLR 2014, arXiv 1312.6114), equation 10 and appendix
B; the same bound in Stochastic Backpropagation and Approximate Inference in Deep Generative Models (Rezende, Mohamed
and Wierstra, ICML 2014, arXiv 1401.4082).

Differences from the source:
- Convolutional encoder and decoder, AdamW and one draw per image; the paper has one hidden layer and Adagrad.
- The KL term comes in linearly over the first `kl_warmup` of the run, against collapse; beta other than 1 is a
  beta-VAE (Higgins et al., ICLR 2017).
- Gray values stand in for the probabilities of the Bernoulli likelihood: the bound is then no likelihood of the
  images, and its nats compare only with runs on the same data.
- The Gaussian likelihood has a fixed sigma: a learned one makes the likelihood unbounded.
- Exported are the pooled features before the layer to mu, which separate classes better; `embedding="mu"` exports
  the code itself. Never a draw.
- log sigma^2 of the codes is kept within -10..10.

Recipe, expected metrics, data, time and command: `embedkit.training.recipes.vae`.
"""

from __future__ import annotations

import math
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

__all__ = [
    "FAMILY",
    "SUMMARY",
    "VAE",
    "Config",
    "active_units",
    "kl_divergence",
    "negative_log_likelihood",
    "reparameterize",
]

#: The supervision that the method learns from.
FAMILY = "reconstruction"
#: The sentence that the card of an entry shows.
SUMMARY = (
    "VAE: the encoder predicts a distribution over codes, and the decoder reconstructs the image "
    "from a sample of it."
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Of `vae`.

    Attributes:
        latent_dim: Width of z.
        likelihood: `bernoulli`, or `gaussian` of fixed width, per pixel in [0, 1].
        sigma: Standard deviation of `gaussian`, above 0, in units of [0, 1].
        beta: Weight of the KL term at the end; 1 is the VAE.
        kl_warmup: Share of the run over which that weight rises from 0, in [0, 1].
        decoder_width: Channels of the decoder at full resolution.
        embedding: What is exported: the pooled `features`, or the mean `mu` after them, of which the dimensions
            that the bound leaves unused say nothing. Never a draw.
        augment: What an image goes through before it is encoded; the outcome is what is rebuilt.
    """

    latent_dim: int = 32
    likelihood: Literal["bernoulli", "gaussian"] = "bernoulli"
    sigma: float = 0.1
    beta: float = 1.0
    kl_warmup: float = 0.2
    decoder_width: int = 16
    embedding: Literal["features", "mu"] = "features"
    augment: Augmentation = Compose(steps=())


@float32_loss
def kl_divergence(mu: Tensor, log_var: Tensor) -> Tensor:
    """KL(N(mu, sigma^2) || N(0, 1)) = (mu^2 + sigma^2 - 1 - log sigma^2) / 2, element by element, in nats."""
    return 0.5 * (mu.square() + torch.expm1(log_var) - log_var)


def reparameterize(mu: Tensor, log_var: Tensor, noise: Tensor) -> Tensor:
    """A draw z = mu + sigma * noise of the posterior, whose gradient reaches mu and log sigma^2."""
    return mu + (0.5 * log_var).exp() * noise


@float32_loss
def negative_log_likelihood(
    decoded: Tensor, pixels: Tensor, likelihood: str = "bernoulli", sigma: float = 1.0
) -> Tensor:
    """-log p(x|z), SUMMED over all values of an image: a mean would weigh the KL term by their number.

        bernoulli:  -sum_i [ x_i log q_i + (1 - x_i) log(1 - q_i) ],   q = 1 / (1 + exp(-decoded))
        gaussian:    sum_i [ (x_i - decoded_i)^2 / sigma^2 + log(2 pi sigma^2) ] / 2

    Args:
        decoded: (N, ...), logits or means.
        pixels: (N, ...), x; in [0, 1] for `bernoulli`.
        likelihood: Which of the two.
        sigma: Of `gaussian`.

    Returns:
        (N,), in nats.

    Raises:
        ConfigError: Another likelihood, or a sigma that is not above 0.
    """
    if likelihood == "bernoulli":
        terms = F.binary_cross_entropy_with_logits(decoded, pixels, reduction="none")
    elif likelihood == "gaussian" and sigma > 0:
        terms = 0.5 * (((pixels - decoded) / sigma).square() + math.log(2 * math.pi * sigma**2))
    else:
        raise ConfigError(
            f"likelihood: expected bernoulli, or gaussian with a sigma above 0; found {likelihood!r}, {sigma}"
        )
    return terms.flatten(1).sum(1)


def active_units(mu: Tensor) -> Tensor:
    """How many of the D columns of mu (N, D) vary over the images by more than 0.01: the others say nothing.

    The measure of Importance Weighted Autoencoders (Burda et al., ICLR 2016, arXiv 1509.00519, section 5.2).
    """
    return (mu.float().var(0, correction=0) > 0.01).sum().float()


class VAE(Method):
    """Backbone, linear layers to mu and log sigma^2, decoder."""

    streams = ("posterior",)
    inert = ("sigma",)

    def __init__(self, backbone: Backbone, config: Config, facts: Facts) -> None:
        super().__init__(backbone, config, facts)
        if config.latent_dim < 1 or not 0 <= config.kl_warmup <= 1:
            raise ConfigError(
                f"vae: expected a latent_dim of 1 or more and a kl_warmup of 0 to 1, "
                f"found {config.latent_dim} and {config.kl_warmup}"
            )
        channels, height, _ = facts.image_shape
        self.mu = nn.Linear(backbone.dim, config.latent_dim)
        self.log_var = nn.Linear(backbone.dim, config.latent_dim)
        # the first image is gray whatever z is: the first loss is known, and no draw is punished at random
        decoder = ConvDecoder(
            config.latent_dim,
            out_chans=channels,
            image_size=height,
            width=config.decoder_width,
            start_at_zero=True,
        )
        self.decoder = decoder.to(memory_format=torch.channels_last)

    @property
    def beta(self) -> float:
        """The weight of the KL term in this batch."""
        warmup = self.config.kl_warmup
        return self.config.beta * (min(1.0, self.progress / warmup) if warmup else 1.0)

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Minus the bound of one draw per image, with the KL term weighted by `beta`."""
        x = self.view(batch.images, self.config.augment, generator)
        nll, kl, mu = self._bound(x, self.generator("posterior"))
        rec, divergence = nll.mean(), kl.mean()
        return {
            "loss": rec + self.beta * divergence,
            "reconstruction": rec,
            "kl": divergence,
            "active_units": active_units(mu),
        }

    def encoder(self) -> nn.Module:
        """The backbone and the layer to mu, or the backbone alone."""
        return self.backbone if self.config.embedding == "features" else nn.Sequential(self.backbone, self.mu)

    def pretext_metric(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """The bound in nats (the VAE's, with a KL weight of 1), its KL part, and active units in this batch."""
        nll, kl, mu = self._bound(self.view(batch.images), generator)
        return {"elbo": -(nll + kl).mean(), "kl": kl.mean(), "active_units": active_units(mu)}

    def solved(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Images, the reconstructions from their mu, and the decoder's images of draws of the prior."""
        mu = self.mu(self.backbone(self.view(batch.images)))
        z = torch.randn(mu.shape, generator=generator, device=generator.device)
        reconstructed, generated = (self.decoder(code).float() for code in (mu, z))
        if self.config.likelihood == "bernoulli":
            reconstructed, generated = reconstructed.sigmoid(), generated.sigmoid()
        images = {
            "true": self.pixels(batch.images),
            "reconstructed": reconstructed,
            "generated": generated,
        }
        return {title: image.clamp(0, 1) for title, image in images.items()}

    def _bound(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """-log p(x|z) (N,) of one draw z, KL (N,) and mu (N, D) of normalized images (N, C, H, W)."""
        features = self.backbone(x)
        # the KL divergence and the draw in float32: exp and squares of 8 bits would be coarse
        mu, log_var = self.mu(features).float(), self.log_var(features).float().clamp(-10, 10)
        noise = torch.randn(mu.shape, generator=generator, device=generator.device)
        decoded = self.decoder(reparameterize(mu, log_var, noise))
        pixels = self.denormalize(x)
        nll = negative_log_likelihood(decoded, pixels, self.config.likelihood, self.config.sigma)
        return nll, kl_divergence(mu, log_var).sum(1), mu
