"""Autoencoder: an image goes through a narrow code and is rebuilt from it, so the code must hold what varies.

With linear layers and squared error the codes span the principal components; depth bends that subspace. The recipe
`hinton2006` is the paper's network: a perceptron of logistic units, pretrained layer by layer.

Source: Reducing the Dimensionality of Data with Neural Networks (Hinton and Salakhutdinov, Science 313, 2006, doi
10.1126/science.1127647; not on arXiv), the fine-tuning objective: cross-entropy of pixels in [0, 1]; the pretraining by
restricted Boltzmann machines of its figure 1 is in `embedkit.training.models.rbm`.

Differences from the source:
- By default no pretraining. It was there since deep nets of logistic units stay at the mean image when they start from
  small random weights; residual blocks with BatchNorm under AdamW do not.
- By default a convolutional encoder, the backbone, pooled and followed by the paper's linear code; a convolutional
  decoder with weights of its own from the start, where the paper's begin as the encoder's transposed.
- `pretraining="rbm"` is the paper's form. Each machine is trained for some epochs in place of 50, with a Nesterov
  momentum of 0.9 from the start (0.5 at first there), and AdamW fine-tunes in place of conjugate gradients. As in the
  public code: weights from N(0, 0.1^2), batches of 100, rates of 0.1 (0.001 for linear units), a decay of 2e-4.
- `squared_error` takes the decoder's outputs as they are (no logistic), which is PCA when all layers are linear.

Recipe, expected metrics, data, time and command: `embedkit.training.recipes.autoencoder`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedkit.errors import ConfigError
from embedkit.training.augment import Augmentation, Compose
from embedkit.training.config import Facts
from embedkit.training.data import Batch
from embedkit.training.method import Method, float32_loss
from embedkit.training.models.backbones import MLP, Backbone
from embedkit.training.models.heads import ConvDecoder
from embedkit.training.models.moments import Moments
from embedkit.training.models.rbm import RBM, contrastive_divergence
from embedkit.training.stages import Plan, Stage, share_steps

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
        decoder_width: Channels of the convolutional decoder at full resolution.
        pretraining: `none`, or `rbm`: a restricted Boltzmann machine for each layer of the backbone `mlp` with logistic
            units and for the code, whose units are linear; then encoder and decoder begin as these machines.
        layer_share: Share of the run for each of them.
        embedding: What is exported: the linear `code`, as in the paper, or the pooled `features` before it.
        augment: What an image goes through before it is encoded; the outcome is what is rebuilt.
    """

    code_dim: int = 32
    reconstruction: Literal["cross_entropy", "squared_error"] = "cross_entropy"
    decoder_width: int = 16
    pretraining: Literal["none", "rbm"] = "none"
    layer_share: float = 0.1
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
    """Backbone, linear code, decoder; and a machine for each layer where they are pretrained."""

    inert = ("layer_share",)

    def __init__(self, backbone: Backbone, config: Config, facts: Facts) -> None:
        super().__init__(backbone, config, facts)
        channels, height, width = facts.image_shape
        if not 1 <= config.code_dim < channels * height * width:
            raise ConfigError(
                f"autoencoder: expected a code_dim of 1 to below the {channels * height * width} values of a "
                f"image, found {config.code_dim}; without a bottleneck nothing is learned"
            )
        self.code = nn.Linear(backbone.dim, config.code_dim)
        self.machines: Any = nn.ModuleList()
        if config.pretraining == "rbm":
            self._stack(backbone, config)
            return
        if config.pretraining != "none":
            raise ConfigError(f"pretraining: expected none or rbm, found {config.pretraining!r}")
        # logits of zero: every pixel starts at one half, and the first loss is ln 2 a pixel
        decoder = ConvDecoder(
            config.code_dim,
            out_chans=channels,
            image_size=height,
            width=config.decoder_width,
            start_at_zero=True,
        )
        self.decoder: nn.Module = decoder.to(memory_format=torch.channels_last)

    def _stack(self, backbone: Backbone, config: Config) -> None:
        """The perceptron's form: a machine for each layer, and a decoder that mirrors the encoder."""
        net = backbone.net
        if not isinstance(net, MLP) or not all(isinstance(layer[2], nn.Sigmoid) for layer in net.layers):
            raise ConfigError(
                'autoencoder: pretraining "rbm" expects the backbone mlp with backbone_args.activation sigmoid, found '
                f"{backbone.architecture}"
            )
        if any(not isinstance(layer[1], nn.Identity) for layer in net.layers):
            raise ConfigError('autoencoder: pretraining "rbm" expects backbone_args.norm none')
        self.automatic_optimization = False
        self.streams = ("hidden",)
        widths = [
            net.layers[0][0].in_features,
            *(layer[0].out_features for layer in net.layers),
            config.code_dim,
        ]
        pairs = list(zip(widths[:-1], widths[1:], strict=True))
        if config.layer_share <= 0 or config.layer_share * len(pairs) >= 1:
            raise ConfigError(
                f"autoencoder: expected a layer_share above 0 that leaves some of the run to {len(pairs)} layers, "
                f"found {config.layer_share:g}"
            )
        self.machines = nn.ModuleList(
            RBM(visible, hidden, linear=index == len(pairs) - 1)
            for index, (visible, hidden) in enumerate(pairs)
        )
        layers: list[nn.Module] = []
        for visible, hidden in reversed(pairs):
            layers += [nn.Linear(hidden, visible), nn.Sigmoid()]
        self.decoder = nn.Sequential(*layers[:-1], nn.Unflatten(1, self.facts.image_shape))  # pixels: logits
        self.moments = Moments(widths[0])  # of the images, for the principal components beside the code

    def plan(self) -> Plan:
        """A machine after another, then the whole; one stage without pretraining."""
        if not self.machines:
            return super().plan()
        share, count = self.config.layer_share, len(self.machines)
        machines = [(f"rbm{index}", share) for index in range(count)]
        return share_steps(self.total_steps, [*machines, ("unrolled", 1 - count * share)])

    def networks(self) -> dict[str, Sequence[nn.Module]]:
        """By stage, each with an optimizer of its own; all together without pretraining."""
        if not self.machines:
            return super().networks()
        machines: dict[str, Sequence[nn.Module]] = {f"rbm{i}": (rbm,) for i, rbm in enumerate(self.machines)}
        return {**machines, "unrolled": (self.backbone, self.code, self.decoder)}

    def begin_stage(self, stage: Stage) -> None:
        """Unroll the machines before they are trained together: what goes up through them goes down again."""
        if stage.name == "unrolled":
            self.unroll()

    @torch.no_grad()
    def unroll(self) -> None:
        """Copy each machine into its layer of the encoder, and transposed into that of the decoder.

        The first layer sees normalized pixels, and the first machine plain ones: its layer takes over the difference.
        """
        up = [*(layer[0] for layer in self.backbone.net.layers), self.code]
        down = [layer for layer in self.decoder.modules() if isinstance(layer, nn.Linear)]
        for rbm, encode, decode in zip(self.machines, up, reversed(down), strict=True):
            encode.weight.copy_(rbm.weight)
            encode.bias.copy_(rbm.hidden_bias)
            decode.weight.copy_(rbm.weight.mT)
            decode.bias.copy_(rbm.visible_bias)
        std, mean = (values.expand(1, *self.facts.image_shape).flatten() for values in (self.std, self.mean))
        up[0].bias.add_(up[0].weight @ mean)
        up[0].weight.mul_(std)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """A step of what the stage trains."""
        if not self.machines:
            return super().training_step(batch, batch_idx)
        outputs = self.loss(batch, self.generator())
        self.step({self.stage.name: outputs["loss"]})
        self.log_dict({name: value.detach() for name, value in outputs.items()})
        return None

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Reconstruction of one view of each image, and its squared error an image (the paper's figure).

        While a machine is trained, its contrastive divergence and the squared error of one step of its chain.
        """
        name = self.stage.name
        if name.startswith("rbm"):
            index = int(name.removeprefix("rbm"))
            v = self._below(index, self.view(batch.images, self.config.augment, generator))
            loss, chain = contrastive_divergence(self.machines[index], v, self.generator("hidden"))
            return {"loss": loss, "squared_error": (chain - v).square().sum(1).mean()}
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
        """Squared error an image, and the share of the pixels' variance that is explained (0: the mean image).

        Beside a code of the paper's form, the error of as many principal components of the training images.
        """
        pixels, decoded = self._rebuild(batch.images, None, generator)
        error = reconstruction_loss(self._values(decoded), pixels, "squared_error")
        variance = reconstruction_loss(pixels.mean(0).expand_as(pixels), pixels, "squared_error")
        found = {"squared_error": error, "explained_variance": 1 - error / variance}
        if self.machines:
            found["pca_squared_error"] = reconstruction_loss(self._by_pca(pixels), pixels, "squared_error")
        return found

    def pretext_chance(self) -> dict[str, float]:
        """The mean image."""
        return {"explained_variance": 0.0}

    def solved(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Images, and what the decoder makes of their codes."""
        pixels, decoded = self._rebuild(batch.images, None, generator)
        found = {"true": pixels, "reconstructed": self._values(decoded).clamp(0, 1)}
        if self.machines:
            found[f"by {self.config.code_dim} principal components"] = self._by_pca(pixels).clamp(0, 1)
        return found

    def _by_pca(self, pixels: Tensor) -> Tensor:
        """Images (N, C, H, W), reconstructed from as many principal components as the code has values."""
        return self.moments.project(pixels.flatten(1), self.config.code_dim).reshape(pixels.shape)

    @torch.no_grad()
    def _below(self, index: int, x: Tensor) -> Tensor:
        """What machine `index` is trained on: pixels in [0, 1], or what the machines below expect of their units."""
        with torch.autocast(x.device.type, enabled=False):
            v = self.denormalize(x).flatten(1)
            if index == 0:
                self.moments.update(v)
            for rbm in self.machines[:index]:
                v = rbm.up(v)
        return v

    def _rebuild(
        self, images: Tensor, augment: Augmentation | None, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Pixels in [0, 1] and what the decoder makes of their code, both (N, C, H, W)."""
        x = self.view(images, augment, generator)
        pixels = self.denormalize(x)
        return pixels, self.decoder(self.code(self.backbone(x)))

    def _values(self, decoded: Tensor) -> Tensor:
        return decoded if self.config.reconstruction == "squared_error" else decoded.sigmoid()
