"""Denoising autoencoder: parts of an image are destroyed, and the network must give back what stood there.

Copying no longer helps: what is missing has to be told from what is left, so features hold how pixels go together.

Source: Extracting and Composing Robust Features with Denoising Autoencoders (Vincent, Larochelle, Bengio and Manzagol,
ICML 2008, doi 10.1145/1390156.1390294), section 2.3. Emphasis on destroyed pixels, other kinds of noise and stacking:
Stacked Denoising Autoencoders (the same and Lajoie, JMLR 11, 2010), sections 4 and 5; neither is on arXiv.

Differences from the source:
- A convolutional encoder, the backbone, and a convolutional decoder, in place of one hidden layer with tied weights.
  `stacked` is the layer-wise form, for the backbone `mlp` alone.
- Noise is added to pixels in [0, 1], before the mean and deviation of the data are taken out: a masked pixel is black,
  in all its channels, since one channel would tell the others.
- `stacked`: hidden units are rectified and not logistic, so a layer's clean input is rebuilt by squared error; decoders
  are untied; salt and pepper has no largest value there and is refused. At last all layers are trained together on
  pixels, without labels; the source's fine-tuning is supervised.
- BatchNorm never sees a clean image while it learns. In the last part of the run (`calibration`) no weight moves, and
  clean images pass, whose statistics the exported encoder keeps. The loss is then that of clean images.
- AdamW; the sources have stochastic gradient descent.

Recipe, expected metrics, data, time and command: `embedkit.training.recipes.denoising`.
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
from embedkit.training.stages import Plan, share_steps

__all__ = ["FAMILY", "SUMMARY", "Config", "Denoising", "corrupt", "denoising_loss"]

#: The supervision that the method learns from.
FAMILY = "reconstruction"
#: The sentence that the card of an entry shows.
SUMMARY = (
    "Denoising autoencoder: parts of an image are destroyed, and a decoder must restore the clean "
    "image from the features of the encoder, which is exported."
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Of `denoising`.

    Attributes:
        noise: `masking` (pixels become 0), `salt_and_pepper` (0 or 1), or `gaussian`.
        amount: The share of pixels that is destroyed; for `gaussian` the standard deviation, in units of [0, 1].
        destroyed_weight: alpha, of the loss on destroyed pixels; `gaussian` destroys all.
        kept_weight: beta, of the loss on the others; both at 1 is the paper of 2008, 0 here leaves them out.
        reconstruction: `cross_entropy` of pixels in [0, 1], or `squared_error`.
        decoder_width: Channels of the decoder at full resolution; not of the stacked form.
        stacked: Layer after layer of a perceptron, then all.
        layer_share: Share of the run that each layer takes before that.
        calibration: Share of the run, at its end, for BatchNorm's statistics; nothing where there is no BatchNorm.
        augment: What an image goes through before it is destroyed; the outcome is what is rebuilt.
    """

    noise: Literal["masking", "salt_and_pepper", "gaussian"] = "masking"
    amount: float = 0.4
    destroyed_weight: float = 1.0
    kept_weight: float = 1.0
    reconstruction: Literal["cross_entropy", "squared_error"] = "cross_entropy"
    decoder_width: int = 16
    stacked: bool = False
    layer_share: float = 0.2
    calibration: float = 0.02
    augment: Augmentation = Compose(steps=())


def corrupt(x: Tensor, noise: str, amount: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A draw of q(x~ | x).

    Args:
        x: (N, C, H, W), in [0, 1]; a place is destroyed in all its channels.
        noise: As in `Config`, and so is `amount`.
        amount: 0 changes nothing.
        generator: Where the randomness comes from; drawn on its device.

    Returns:
        x~ (N, C, H, W), which `gaussian` does not keep within [0, 1], and bool (N, 1, H, W), what was destroyed.

    Raises:
        ConfigError: Another kind.
    """
    places = (len(x), 1, *x.shape[2:])

    def uniform() -> Tensor:
        return torch.rand(places, generator=generator, device=generator.device).to(x.device)

    if noise == "gaussian":
        draw = torch.randn(x.shape, generator=generator, device=generator.device).to(x.device)
        return x + amount * draw, torch.ones(places, dtype=torch.bool, device=x.device)
    destroyed = uniform() < amount
    if noise == "masking":
        return x.masked_fill(destroyed, 0.0), destroyed
    if noise == "salt_and_pepper":
        return torch.where(destroyed, (uniform() < 0.5).to(x.dtype), x), destroyed
    raise ConfigError(f"noise: expected masking, salt_and_pepper or gaussian, found {noise!r}")


@float32_loss
def denoising_loss(
    decoded: Tensor,
    clean: Tensor,
    destroyed: Tensor,
    destroyed_weight: float = 1.0,
    kept_weight: float = 1.0,
    kind: str = "cross_entropy",
) -> Tensor:
    """What the CLEAN image lacks, weighted by whether a value was destroyed, summed over values, meaned over the batch.

        alpha sum_{i destroyed} L(x_i, y_i) + beta sum_{i kept} L(x_i, y_i)

    with L the cross-entropy of x_i with the logistic of y_i, or (x_i - y_i)^2.

    Args:
        decoded: y (N, C, H, W), logits or values.
        clean: x (N, C, H, W), before it was destroyed; in [0, 1] for `cross_entropy`.
        destroyed: bool (N, 1, H, W).
        destroyed_weight: alpha.
        kept_weight: beta.
        kind: `cross_entropy` or `squared_error`.

    Returns:
        A scalar; at weights of 1 the loss of an autoencoder, ln 2 a value for logits of 0.

    Raises:
        ConfigError: Another kind.
    """
    if kind == "cross_entropy":
        terms = F.binary_cross_entropy_with_logits(decoded, clean, reduction="none")
    elif kind == "squared_error":
        terms = (clean - decoded).square()
    else:
        raise ConfigError(f"reconstruction: expected cross_entropy or squared_error, found {kind!r}")
    return torch.where(destroyed, destroyed_weight * terms, kept_weight * terms).sum() / len(clean)


class Denoising(Method):
    """Backbone and decoder; of the stacked form, a linear decoder for each layer."""

    streams = ("corruption",)
    inert = ("layer_share", "calibration")

    def __init__(self, backbone: Backbone, config: Config, facts: Facts) -> None:
        super().__init__(backbone, config, facts)
        self.automatic_optimization = False
        channels, height, _ = facts.image_shape
        self.layers: Sequence[Any] = ()
        if config.stacked:
            net = backbone.net
            if not isinstance(net, MLP) or config.noise == "salt_and_pepper":
                raise ConfigError(
                    "denoising: the stacked form expects the backbone mlp, and masking or gaussian noise; found "
                    f"{backbone.architecture} and {config.noise}"
                )
            self.layers = tuple(net.layers)
            dims = [layer[0].in_features for layer in self.layers] + [backbone.dim]
            self.decoder: nn.Module = nn.ModuleList(
                nn.Linear(wide, narrow) for narrow, wide in zip(dims[:-1], dims[1:], strict=True)
            )
        else:
            # logits of zero: every pixel starts at one half, and the first loss is ln 2 a pixel
            decoder = ConvDecoder(
                backbone.dim,
                out_chans=channels,
                image_size=height,
                width=config.decoder_width,
                start_at_zero=True,
            )
            self.decoder = decoder.to(memory_format=torch.channels_last)
        self.shares = [(f"layer{index}", config.layer_share) for index in range(len(self.layers))]
        normed = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in backbone.modules())
        calibration = config.calibration if normed else 0.0
        whole = 1 - calibration - sum(share for _, share in self.shares)
        if whole <= 0 or min(config.layer_share, config.calibration) < 0 or config.amount < 0:
            raise ConfigError(
                f"denoising: expected an amount of 0 or more, and shares that leave some of the run; found "
                f"{config.amount:g}, a calibration of {config.calibration:g} and {len(self.layers)} layers of "
                f"{config.layer_share:g}"
            )
        self.shares += [("whole", whole), ("calibrate", calibration)]

    def plan(self) -> Plan:
        """Each layer of the stacked form, the whole network, and BatchNorm's statistics of clean images."""
        return share_steps(self.total_steps, self.shares)

    def networks(self) -> dict[str, Sequence[nn.Module]]:
        """By stage: a layer with its decoder, or all; every stage has an optimizer of its own."""
        decoders: Any = self.decoder
        single = {f"layer{i}": (layer, decoders[i]) for i, layer in enumerate(self.layers)}
        return {**single, "whole": (self.backbone, self.decoder)}

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """A step of what the stage trains; none while statistics are taken."""
        outputs = self.loss(batch, self.generator())
        if self.stage.name != "calibrate":
            self.step({self.stage.name: outputs["loss"]})
        self.log_dict({name: value.detach() for name, value in outputs.items()})

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """The loss of the stage."""
        clean = self._pixels(batch.images, self.config.augment, generator)
        name, noise = self.stage.name, self.generator("corruption")
        if name == "calibrate":
            with torch.no_grad():
                destroyed = torch.zeros_like(clean[:, :1], dtype=torch.bool)
                return {"loss": self._loss(self._rebuild(clean), clean, destroyed)}
        if name == "whole":
            x, destroyed = corrupt(clean, self.config.noise, self.config.amount, noise)
            return {"loss": self._loss(self._rebuild(x), clean, destroyed)}
        return {"loss": self._layer_loss(int(name.removeprefix("layer")), clean, noise)}

    def pretext_metric(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """The share of the noise's squared error that is removed: 0 for an image given back as it came, 1 at best."""
        clean, x, restored = self._restored(batch, generator)
        return {"error_removed": 1 - (restored - clean).square().sum() / (x - clean).square().sum()}

    def pretext_chance(self) -> dict[str, float]:
        """The image as it came."""
        return {"error_removed": 0.0}

    def solved(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Images as they are destroyed, as they are restored, and as they were."""
        clean, x, restored = self._restored(batch, generator)
        return {"destroyed": x.clamp(0, 1), "restored": restored.clamp(0, 1), "true": clean}

    def _restored(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Clean pixels in [0, 1], a corruption of them, and what the network makes of that; each (N, C, H, W)."""
        clean = self._pixels(batch.images)
        x, _ = corrupt(clean, self.config.noise, self.config.amount, generator)
        decoded = self._rebuild(x).float()
        return clean, x, decoded if self.config.reconstruction == "squared_error" else decoded.sigmoid()

    def _pixels(
        self,
        images: Tensor,
        augment: Augmentation | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        return self.denormalize(self.view(images, augment, generator))

    def _rebuild(self, pixels: Tensor) -> Tensor:
        """Pixels (N, C, H, W), destroyed or not -> logits or values of the clean ones."""
        code, decoders = self.backbone(self.normalize(pixels)), self.decoder
        if not isinstance(decoders, nn.ModuleList):
            return decoders(code)
        for decoder in reversed(decoders[1:]):
            code = decoder(code).relu()  # of the layer before, whose units are rectified
        return decoders[0](code).reshape(pixels.shape)

    def _layer_loss(self, index: int, clean: Tensor, noise: torch.Generator) -> Tensor:
        """One layer: it sees its own input destroyed and rebuilds it clean; the layers before see clean images."""
        c, decoders = self.config, self.decoder
        assert isinstance(decoders, nn.ModuleList)
        layer, decoder = self.layers[index], decoders[index]
        if index == 0:
            x, destroyed = corrupt(clean, c.noise, c.amount, noise)
            decoded = decoder(layer(self.normalize(x).flatten(1))).reshape(clean.shape)
            return self._loss(decoded, clean, destroyed)
        with torch.no_grad():
            hidden = self.normalize(clean).flatten(1)
            for before in self.layers[:index]:
                hidden = before(hidden)
            hidden = hidden.float()[:, None, None]  # (N, 1, 1, D), each unit a place
            x, destroyed = corrupt(hidden, c.noise, c.amount, noise)
        decoded = decoder(layer(x.flatten(1)))[:, None, None]
        return denoising_loss(decoded, hidden, destroyed, c.destroyed_weight, c.kept_weight, "squared_error")

    def _loss(self, decoded: Tensor, clean: Tensor, destroyed: Tensor) -> Tensor:
        c = self.config
        return denoising_loss(decoded, clean, destroyed, c.destroyed_weight, c.kept_weight, c.reconstruction)
