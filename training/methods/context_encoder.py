"""Context encoder: part of an image is cut out, and the network must paint what was there from what is around it.

To fill more than an edge it has to know what the image shows. Only the hole is judged.

Source: Context Encoders: Feature Learning by Inpainting (Pathak, Krahenbuhl, Donahue, Darrell and Efros, CVPR 2016,
arXiv 1604.07379), equations 1 to 3; the channel-wise layer of section 3.2, the holes of section 3.4; authors' code
pathak22/context-encoder. The weights of its feature model came from the reconstruction loss alone, and so do ours.

Differences from the source:
- `blocks` are squares that may overlap, thrown until 20 % of the image or more is hidden (at most 27 %, squares having
  a quarter of its side); the code cuts regions of any shape with 20 to 30 %, one for a whole batch. Each image of ours
  has a hole of its own.
- As in the code, `center` hides half of each side, and a band within the hole's edge (4 of 128 pixels there,
  `overlap` here) stays visible and has ten times the weight. `blocks` have no such band; the sources name none.
- The mean over the hole is taken image by image.
- A hole is filled with the mean of the data, which is 0 to the network. Values have mean and deviation of the data,
  with no bound on what is painted; the authors' lie in -1..1, and end in tanh.
- The channel-wise layer has a bias, and a 1x1 convolution behind it; the decoder is upsampling and 3x3 convolutions.
- `adversarial_weight` is 0; the paper's 0.001 for inpainting is the recipe `adversarial`, with the reconstruction at
  1, not 0.999. D sees the hole alone, with the mean of the data around it; the code's, for centers, sees a crop of it.
  D and the encoder move at once.
- A backbone of our own and AdamW; the paper has AlexNet and Adam. The encoder never saw a whole image in training.

Recipe, expected metrics, data, time and command: `embedkit.training.recipes.context_encoder`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedkit.errors import ConfigError
from embedkit.training.augment import Augmentation, Compose, RandomHorizontalFlip
from embedkit.training.config import Facts
from embedkit.training.data import Batch
from embedkit.training.method import Method, float32_loss
from embedkit.training.models.backbones import Backbone, create_backbone

__all__ = [
    "FAMILY",
    "SUMMARY",
    "ChannelWise",
    "Config",
    "ContextEncoder",
    "adversarial_losses",
    "center_hole",
    "inpainting_loss",
    "random_blocks",
]

#: The supervision that the method learns from.
FAMILY = "reconstruction"
#: The sentence that the card of an entry shows.
SUMMARY = (
    "Context encoder: part of an image is cut out, and a decoder must paint it from the features of "
    "the rest. The encoder is exported."
)

#: Squares that are thrown at most: four cover a quarter if none overlaps, and so many always reach a fifth.
_THROWS = 32


@dataclass(frozen=True, kw_only=True)
class Config:
    """Of `context_encoder`.

    Attributes:
        hole: `blocks`, at random places, or `center`.
        hidden_share: Of `blocks`: squares are thrown until so much of the image is hidden.
        overlap: Of `center`: pixels within the hole's edge that stay visible.
        overlap_weight: Of the loss on those.
        adversarial_weight: Of the adversarial loss; 0 leaves the discriminator out.
        decoder_width: Channels of the decoder at full resolution.
        augment: What an image goes through before its hole is cut; the outcome is what is painted.
    """

    hole: Literal["blocks", "center"] = "blocks"
    hidden_share: float = 0.2
    overlap: int = 2
    overlap_weight: float = 10.0
    adversarial_weight: float = 0.0
    decoder_width: int = 16
    augment: Augmentation = Compose(steps=(RandomHorizontalFlip(),))


def center_hole(height: int, width: int, overlap: int, overlap_weight: float) -> tuple[Tensor, Tensor]:
    """The hole of half of each side, in the middle.

    Returns:
        bool (1, 1, H, W), what is hidden; and float32 (1, 1, H, W), the weight of each pixel: 0 around the hole, 1 in
        it, `overlap_weight` in the band within its edge, which is not hidden.
    """
    weight, hidden = torch.zeros(1, 1, height, width), torch.zeros(1, 1, height, width, dtype=torch.bool)
    top, left = height // 4, width // 4
    bottom, right = top + height // 2, left + width // 2
    weight[..., top:bottom, left:right] = overlap_weight
    hidden[..., top + overlap : bottom - overlap, left + overlap : right - overlap] = True
    return hidden, weight.masked_fill(hidden, 1.0)


def random_blocks(n: int, height: int, width: int, share: float, generator: torch.Generator) -> Tensor:
    """Squares of a quarter of the shorter side, thrown until `share` of an image is hidden, each image its own.

    Returns:
        bool (n, 1, H, W) on the generator's device; the hidden share is at least `share` (but for one image in very
        many), and below `share` plus a square's.
    """
    side, device = max(1, min(height, width) // 4), generator.device
    top = torch.randint(height - side + 1, (_THROWS, n, 1, 1, 1), generator=generator, device=device)
    left = torch.randint(width - side + 1, (_THROWS, n, 1, 1, 1), generator=generator, device=device)
    rows = torch.arange(height, device=device)[:, None]
    columns = torch.arange(width, device=device)
    hidden = torch.zeros(n, 1, height, width, dtype=torch.bool, device=device)
    for y, x in zip(top, left, strict=True):
        square = (rows >= y) & (rows < y + side) & (columns >= x) & (columns < x + side)
        open_ = hidden.float().mean((1, 2, 3), keepdim=True) < share
        hidden = hidden | (square & open_)
    return hidden


@float32_loss
def inpainting_loss(painted: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The weighted squared error in the hole, |M * (x - F((1 - M) * x))|^2, a pixel and channel (equation 1).

    Args:
        painted: (N, C, H, W).
        x: (N, C, H, W), the whole image.
        weight: (N or 1, 1, H, W), 0 outside the hole.

    Returns:
        A scalar: the mean over images of the mean over the pixels of their hole (those of a weight above 0).
    """
    errors = (weight * (x - painted).square()).mean(1, keepdim=True).sum((1, 2, 3))  # (N,)
    return (errors / (weight > 0).sum((1, 2, 3))).mean()


@float32_loss
def adversarial_losses(real: Tensor, painted: Tensor) -> Tensor:
    """Of D, -E log D(x) - E log(1 - D(F)) (minus equation 2), and of the painter, -E log D(F).

    Args:
        real: Logits (N,) of the holes of images.
        painted: Logits (N,) of what is painted there.

    Returns:
        (2,), in nats: 2 ln 2 and ln 2 for logits of zero.
    """
    d_loss = F.softplus(-real).mean() + F.softplus(painted).mean()
    return torch.stack([d_loss, F.softplus(-painted).mean()])


class ChannelWise(nn.Module):
    """A fully connected layer within each channel of a map (N, C, h, w): C * (h * w)^2 weights, and a bias."""

    def __init__(self, channels: int, places: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, places, places) * (2 / places) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Every place of a channel from every other place of it, and from no other channel."""
        y = torch.einsum("ncp,cqp->ncq", x.flatten(2), self.weight) + self.bias
        return y.reshape(x.shape)


class ContextEncoder(Method):
    """Backbone up to its last map, channel-wise layer, decoder; and a discriminator where it is asked for."""

    streams = ("hole",)
    inert = ("overlap", "overlap_weight", "adversarial_weight")

    def __init__(self, backbone: Backbone, config: Config, facts: Facts) -> None:
        super().__init__(backbone, config, facts)
        channels, height, width = facts.image_shape
        if config.hole not in ("blocks", "center"):
            raise ConfigError(f"hole: expected blocks or center, found {config.hole!r}")
        if not 0 < config.hidden_share < 0.9 or not 0 <= config.overlap < min(height, width) // 4:
            raise ConfigError(
                f"context_encoder: expected a hidden_share above 0 and below 0.9, and an overlap of 0 to below "
                f"{min(height, width) // 4} pixels; found {config.hidden_share:g} and {config.overlap}"
            )
        if config.overlap_weight <= 0 or config.adversarial_weight < 0:
            raise ConfigError(
                "context_encoder: expected an overlap_weight above 0 and an adversarial_weight of 0 or more, found "
                f"{config.overlap_weight:g} and {config.adversarial_weight:g}"
            )
        with torch.no_grad():
            last = backbone.eval().forward_features(torch.zeros(1, backbone.in_chans, height, width))
        backbone.train()
        if last.ndim != 4:
            raise ConfigError(
                f"context_encoder: {backbone.architecture} has no last map; take a convolutional backbone"
            )
        decoder = _decoder(
            last.shape[1], tuple(last.shape[2:]), channels, (height, width), config.decoder_width
        )
        self.paint = nn.Sequential(ChannelWise(last.shape[1], last.shape[2] * last.shape[3]), decoder)
        if config.adversarial_weight:
            self.automatic_optimization = False
            plan = tuple((False, ((width, 5, 2),)) for width in (32, 64, 128))
            critic = create_backbone(
                "alexnet_bn", in_chans=channels, image_size=(height, width), plan=plan, activation_slope=0.2
            )
            self.discriminator = nn.Sequential(critic, nn.Linear(critic.dim, 1), nn.Flatten(0))

    def networks(self) -> dict[str, Sequence[nn.Module]]:
        """The painter, and the discriminator where there is one."""
        if not self.config.adversarial_weight:
            return super().networks()
        return {"painter": (self.backbone, self.paint), "discriminator": (self.discriminator,)}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """With a discriminator both move at once, each by its own loss alone."""
        if self.automatic_optimization:
            return super().training_step(batch, batch_idx)
        outputs = self.loss(batch, self.generator())
        self.step({"painter": outputs["painter_loss"], "discriminator": outputs["discriminator_loss"]})
        self.log_dict({name: value.detach() for name, value in outputs.items()})
        return None

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """The error in the hole, and with a discriminator both adversarial losses."""
        x = self.view(batch.images, self.config.augment, generator)
        hidden, weight = self._hole(len(x), self.generator("hole"))
        painted = self._painted(x, hidden)
        reconstruction = inpainting_loss(painted, x, weight)
        if not self.config.adversarial_weight:
            return {"loss": reconstruction}
        hole = weight > 0
        # apart, since BatchNorm would mix them
        d_loss, fooled = adversarial_losses(*(self.discriminator(images * hole) for images in (x, painted)))
        painter = reconstruction + self.config.adversarial_weight * fooled
        return {
            "loss": painter + d_loss,
            "painter_loss": painter,
            "discriminator_loss": d_loss,
            "reconstruction": reconstruction,
        }

    def pretext_metric(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """The share of what the hole hides that is painted right: 0 for the mean of the data, 1 at best."""
        x = self.view(batch.images)
        hidden, _ = self._hole(len(x), generator)
        painted, weight = self._painted(x, hidden), hidden.float()
        filled = inpainting_loss(torch.zeros_like(x), x, weight)
        return {"hole_explained": 1 - inpainting_loss(painted, x, weight) / filled}

    def pretext_chance(self) -> dict[str, float]:
        """The mean of the data in the hole."""
        return {"hole_explained": 0.0}

    def solved(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Images with a hole, the hole as painted, and the images themselves."""
        x = self.view(batch.images)
        hidden, _ = self._hole(len(x), generator)
        painted = torch.where(hidden, self._painted(x, hidden), x)
        images = {"hole": x.masked_fill(hidden, 0.0), "painted": painted, "true": x}
        return {title: self.denormalize(image) for title, image in images.items()}

    def _hole(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """What is hidden, and the weight of each pixel in the loss."""
        _, height, width = self.facts.image_shape
        if self.config.hole == "blocks":
            hidden = random_blocks(n, height, width, self.config.hidden_share, generator)
            return hidden.to(self.device), hidden.to(self.device, torch.float32)
        hidden, weight = center_hole(height, width, self.config.overlap, self.config.overlap_weight)
        return hidden.to(self.device), weight.to(self.device)

    def _painted(self, x: Tensor, hidden: Tensor) -> Tensor:
        """Normalized images (N, C, H, W) -> what is painted from what is not hidden, everywhere (N, C, H, W)."""
        return self.paint(self.backbone.forward_features(x.masked_fill(hidden, 0.0))).float()


def _decoder(
    channels: int, start: tuple[int, ...], out_chans: int, size: tuple[int, int], width: int
) -> nn.Sequential:
    """A map -> an image: a 1x1 convolution, then upsampling and 3x3 convolutions to `size`."""
    doublings = 0
    while start[0] * 2 ** (doublings + 1) <= size[0]:
        doublings += 1
    widths = [min(width * 2**level, channels) for level in range(doublings, -1, -1)]
    layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 1), nn.ReLU()]
    for index, (fan_in, fan_out) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        last = index == doublings - 1
        layers += [
            nn.Upsample(size=size) if last else nn.Upsample(scale_factor=2),
            nn.Conv2d(fan_in, fan_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(fan_out),
            nn.ReLU(),
        ]
    if not doublings:
        layers.append(nn.Upsample(size=size))
    layers.append(nn.Conv2d(widths[-1], out_chans, 3, padding=1))
    nn.init.zeros_(layers[-1].weight)  # type: ignore[arg-type]
    nn.init.zeros_(layers[-1].bias)  # type: ignore[arg-type]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
