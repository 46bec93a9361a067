"""Egomotion: from two views of an image by a camera that has moved, the network says how it moved.

Still images have no camera: both views are warps of one image, and the motion between them is the label. To read it,
the encoder must find the same parts in both views.

Sources: Learning to See by Moving (Agrawal, Carreira and Malik, ICCV 2015, arXiv 1505.01596), section 3.4.1, its
experiment on MNIST; as a second loss, Learning image representations tied to ego-motion (Jayaraman and Grauman, ICCV
2015, arXiv 1505.02206), equations 5 and 6, with the contrastive loss of DrLIM (Hadsell et al., CVPR 2006).

Differences from the source:
- BOTH views are warped, once each, and cut to their interior. In the paper's experiment the first view is the image
  itself: black corners and blur then tell the second one's turn without the first.
- The base pose of a pair is turned by an angle uniform over `base_degrees` to either side. At 180 the turn of one view
  alone is independent of the label, whatever is seen at its border. A bounded shift cannot be hidden so: where the
  object's place is known, the best guess from one view is right in 1 + shift / (2 base_shift) times the chance.
- Motions are read in the frame half way between the views, where the inverse of (turn, shift) is (-turn, -shift). In
  the frame of the first view the shift of the inverse would also be turned, and bins would not mirror each other.
- Pairs come in random order, and the label with them; a public re-implementation exchanges the images and keeps it.
- The first network is the backbone, in place of two convolutions with local response normalization, and AdamW in
  place of SGD. The second sees both last maps, not pooled, which would drop shifts; its output starts at zero.
- Jayaraman's motions are clusters of a vehicle's; here they are classes of equal width of the turn alone. Their
  pairs of other motions are those of the same image: M_g of another motion must miss by the margin. The motion's
  classification stands where theirs has a classification of labeled images.

Recipe, expected metrics, data, time and command: `embedkit.training.recipes.egomotion`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from embedkit.errors import ConfigError
from embedkit.training.augment import Augmentation, Compose, RandomHorizontalFlip
from embedkit.training.augment.operations import affine_matrix, warp
from embedkit.training.config import Facts
from embedkit.training.data import Batch
from embedkit.training.data.targets import accuracy
from embedkit.training.method import Method, float32_loss
from embedkit.training.models.backbones import Backbone, BackboneRequest

__all__ = ["FAMILY", "SUMMARY", "Config", "Egomotion", "Motion", "equivariance_loss", "motion_loss"]

#: The supervision that the method learns from.
FAMILY = "a pretext task"
#: The sentence that the card of an entry shows.
SUMMARY = (
    "Egomotion: from two views of an image, as of a camera that moved, the network predicts the "
    "motion. The network of one view is exported."
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Of `egomotion`.

    Attributes:
        shift: Largest shift to either side, in pixels; each whole number of them is a class, of rows and of columns.
        degrees: Largest turn to either side.
        bins: Classes of the turn, all of one width.
        base_degrees: Largest turn of the pair as a whole; 180 leaves nothing for a single view to tell.
        base_shift: Largest shift of the pair as a whole, in pixels.
        crop: Side of the interior that is kept of each view, in pixels.
        hidden_dim: Width of the hidden layer of the network that compares.
        equivariance: Weight of Jayaraman's loss; 0 leaves it and its maps out.
        motions: Classes of the turn that have a map M_g each.
        margin: By which M_g of another motion must miss, in units of the features.
        augment: Before the warps, for both views the same.
    """

    shift: int = 3
    degrees: float = 30.0
    bins: int = 20
    base_degrees: float = 180.0
    base_shift: float = 3.0
    crop: int = 20
    hidden_dim: int = 512
    equivariance: float = 0.0
    motions: int = 6
    margin: float = 1.0
    augment: Augmentation = Compose(steps=(RandomHorizontalFlip(),))


class Motion(NamedTuple):
    """Poses of n pairs of views, and which view comes first.

    Attributes:
        turn: (n,) radians, from the first view to the second.
        shift: (n, 2) pixels along x and y in the frame half way, from the first view to the second.
        base_turn: (n,) radians, of the frame half way.
        base_shift: (n, 2) pixels.
    """

    turn: Tensor
    shift: Tensor
    base_turn: Tensor
    base_shift: Tensor

    @classmethod
    def draw(cls, n: int, config: Config, generator: Generator) -> Motion:
        """Every class of turn and shift is equally likely, and in both orders."""
        device = generator.device
        uniform = torch.rand(4, n, generator=generator, device=device)
        width = 2 * config.degrees / config.bins
        turn_class = torch.randint(config.bins, (n,), generator=generator, device=device)
        turn = (turn_class + uniform[0]) * width - config.degrees
        shift = torch.randint(2 * config.shift + 1, (n, 2), generator=generator, device=device) - config.shift
        base_turn = (2 * uniform[1] - 1) * config.base_degrees
        motion = cls(
            turn * math.pi / 180,
            shift.to(turn.dtype),
            base_turn * math.pi / 180,
            (2 * uniform[2:].T - 1) * config.base_shift,
        )
        order = torch.rand(n, generator=generator, device=device) < 0.5
        return motion.swapped(order)

    def swapped(self, chosen: Tensor) -> Motion:
        """The same poses, with the views exchanged where `chosen` (n,) is true: the motion is its inverse."""
        sign = 1.0 - 2.0 * chosen.to(self.turn.dtype)
        return self._replace(turn=self.turn * sign, shift=self.shift * sign[:, None])

    def matrices(self, view: int) -> Tensor:
        """Inverse maps (n, 2, 3) of the first (0) or second (1) view, as `augment.operations.warp` takes them.

        The frame half way lies at the base pose, and the views half the motion before and behind it:
        turn_k = base_turn -+ turn / 2, place_k = R(-+ turn / 2)(base_shift -+ shift / 2).
        """
        side = (-0.5, 0.5)[view]
        x, y = (self.base_shift + side * self.shift).unbind(1)
        cos, sin = (side * self.turn).cos(), (side * self.turn).sin()
        zero = torch.zeros_like(self.turn)
        return affine_matrix(
            angle=self.base_turn + side * self.turn,
            shift_x=cos * x - sin * y,
            shift_y=sin * x + cos * y,
            scale=zero + 1,
            shear=zero,
        )

    def turn_classes(self, degrees: float, bins: int) -> Tensor:
        """Which of `bins` classes of equal width over -degrees..degrees the turns lie in, int64 (n,)."""
        share = self.turn * (180 / math.pi / degrees)  # -1..1
        return ((share + 1) / 2 * bins).floor().long().clamp(0, bins - 1)

    def moved_by(self, shift_x: Tensor, shift_y: Tensor, turn: Tensor, config: Config) -> Motion:
        """The same first view, and the motion in the middle of these classes, each int64 (n,): of `labels`."""
        angle = ((turn + 0.5) / config.bins * 2 - 1) * config.degrees * math.pi / 180
        shift = (torch.stack([shift_x, shift_y], dim=1) - config.shift).to(angle.dtype)
        # the first pose, base_turn - turn / 2 and R(-turn / 2)(base_shift - shift / 2), in the new frame half way
        half = (angle - self.turn) / 2
        x, y = (self.base_shift - self.shift / 2).unbind(1)
        cos, sin = half.cos(), half.sin()
        place = torch.stack([cos * x - sin * y, sin * x + cos * y], dim=1)
        return Motion(angle, shift, self.base_turn + half, place + shift / 2)

    def labels(self, config: Config) -> tuple[Tensor, Tensor, Tensor]:
        """Classes int64 (n,) of the shift along x, of that along y, and of the turn; K - 1 - k of the inverse."""
        x, y = (self.shift.round().long() + config.shift).unbind(1)
        return x, y, self.turn_classes(config.degrees, config.bins)


@float32_loss
def motion_loss(shift_x: Tensor, shift_y: Tensor, turn: Tensor, labels: Tensor) -> Tensor:
    """The sum over the axes of motion of the mean cross-entropy.

    Args:
        shift_x: Logits (N, 2 shift + 1).
        shift_y: Logits (N, 2 shift + 1).
        turn: Logits (N, bins).
        labels: int64 (3, N), in the same order.

    Returns:
        A scalar, in nats; 2 ln 7 + ln 20 for equal logits of the paper's classes.
    """
    axes = (shift_x, shift_y, turn)
    return torch.stack([F.cross_entropy(x, label) for x, label in zip(axes, labels, strict=True)]).sum()


@float32_loss
def equivariance_loss(mapped: Tensor, second: Tensor, motions: Tensor, margin: float) -> Tensor:
    """Each map M_g carries the features over a motion g, and over no other (DrLIM's loss).

        mean_i ( 1/2 d(g_i)^2 + 1 / (G - 1) sum_{h != g_i} 1/2 max(0, margin - d(h))^2 ),  d(h) = |M_h z1_i - z2_i|

    Args:
        mapped: M_h z1 for every motion h, (N, G, D), G of 2 or more.
        second: z2 (N, D).
        motions: g, int64 (N,), classes 0..G-1.
        margin: Above 0, in the unit of the features.

    Returns:
        A scalar.
    """
    square = (mapped - second[:, None]).square().sum(2)  # (N, G)
    # the root of 0 has no gradient
    distance = square.clamp(min=1e-12).sqrt()
    own = F.one_hot(motions, mapped.shape[1]).to(square.dtype)
    others = (1 - own) * F.relu(margin - distance).square() / (mapped.shape[1] - 1)
    return 0.5 * (own * square + others).sum(1).mean()


class Egomotion(Method):
    """Backbone on either view, a perceptron on both last maps with a classifier for each axis, and maps M_g."""

    streams = ("motion",)

    @classmethod
    def build_backbone(cls, request: BackboneRequest, config: Config, facts: Facts) -> nn.Module:
        """A network for the interior of a view; on whole images it works as well, where it is convolutional."""
        return request(image_size=config.crop)

    def __init__(self, backbone: Backbone, config: Config, facts: Facts) -> None:
        super().__init__(backbone, config, facts)
        side = min(facts.image_shape[1:])
        if not 1 <= config.crop <= side:
            raise ConfigError(f"egomotion: expected a crop of 1 to {side} pixels, found {config.crop}")
        if config.shift < 1 or config.bins < 2 or config.motions < 2 or not 0 < config.degrees <= 180:
            raise ConfigError(
                "egomotion: expected a shift of 1 or more, degrees above 0 and at most 180, bins and motions of 2 or "
                f"more; found {config.shift}, {config.degrees:g}, {config.bins} and {config.motions}"
            )
        with torch.no_grad():
            example = torch.zeros(1, backbone.in_chans, config.crop, config.crop)
            features = backbone.eval().forward_features(example)
            backbone.train()
        self.classes = (2 * config.shift + 1, 2 * config.shift + 1, config.bins)
        self.compare = nn.Sequential(
            nn.Linear(2 * features.numel(), config.hidden_dim, bias=False),
            nn.BatchNorm1d(config.hidden_dim),
            nn.ReLU(),
            nn.Linear(config.hidden_dim, sum(self.classes)),
        )
        nn.init.zeros_(self.compare[-1].weight)
        nn.init.zeros_(self.compare[-1].bias)
        if config.equivariance:
            # no motion to begin with: every map is the identity
            self.maps = nn.Parameter(torch.eye(backbone.dim).repeat(config.motions, 1, 1))

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """The cross-entropies of the motion of one pair of each image, and the loss of equivariance."""
        motion = Motion.draw(len(batch.images), self.config, self.generator("motion"))
        first, second = self._views(batch.images, motion, self.config.augment, generator)
        features = self.backbone.forward_features(torch.cat([first, second]))
        logits, labels = self._compare(features), torch.stack(motion.labels(self.config))
        outputs = {"loss": motion_loss(*logits, labels)}
        if self.config.equivariance:
            mapped, z2 = self._mapped(features)
            motions = motion.turn_classes(self.config.degrees, self.config.motions)
            equivariance = equivariance_loss(mapped, z2, motions, self.config.margin)
            outputs["equivariance"] = equivariance
            outputs["loss"] = outputs["loss"] + self.config.equivariance * equivariance
        outputs["turn_accuracy"] = accuracy(logits[2], labels[2])
        return outputs

    def pretext_metric(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Shares of shifts and turns that are told right, by chance 1 / (2 shift + 1) and 1 / bins.

        `single_view_turn_accuracy` is the ablation: the second view in both places, which must stay at chance.
        `equivariance_ratio` is |M_g z1 - z2| over |z1 - z2|, below 1 where the maps carry the features.
        """
        motion = Motion.draw(len(batch.images), self.config, generator)
        first, second = self._views(batch.images, motion, None, generator)
        features = self.backbone.forward_features(torch.cat([first, second]))
        labels = motion.labels(self.config)
        x, y, turn = (accuracy(z, k) for z, k in zip(self._compare(features), labels, strict=True))
        single = self._compare(features.chunk(2)[1].repeat(2, *[1] * (features.ndim - 1)))
        found = {
            "shift_accuracy": (x + y) / 2,
            "turn_accuracy": turn,
            "single_view_turn_accuracy": accuracy(single[2], labels[2]),
        }
        if self.config.equivariance:
            mapped, z2 = self._mapped(features)
            motions = motion.turn_classes(self.config.degrees, self.config.motions)
            rows = torch.arange(len(z2), device=z2.device)
            moved = (mapped[rows, motions] - z2).norm(dim=1).mean()
            z1 = self.backbone.pool(features).float().chunk(2)[0]
            found["equivariance_ratio"] = moved / (z1 - z2).norm(dim=1).mean()
        return found

    def pretext_chance(self) -> dict[str, float]:
        """Every class is as likely."""
        return {
            "shift_accuracy": 1 / (2 * self.config.shift + 1),
            "turn_accuracy": 1 / self.config.bins,
            "single_view_turn_accuracy": 1 / self.config.bins,
        }

    def solved(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Both views of each image, and the view after the motion that the network predicts, from the first pose."""
        motion = Motion.draw(len(batch.images), self.config, generator)
        first, second = self._views(batch.images, motion, None, generator)
        features = self.backbone.forward_features(torch.cat([first, second]))
        x, y, turn = (logits.argmax(1) for logits in self._compare(features))
        told = motion.moved_by(x, y, turn, self.config)
        predicted = self._views(batch.images, told, None, generator)[1]
        views = {"first view": first, "second view": second, "predicted second view": predicted}
        return {title: self.denormalize(view) for title, view in views.items()}

    def _views(
        self, images: Tensor, motion: Motion, augment: Augmentation | None, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """The interiors of both views, normalized (N, C, crop, crop); each is sampled once, from the image itself."""
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            x = self.pixels(images, augment, generator)
            top, left = ((side - self.config.crop) // 2 for side in x.shape[2:])
            inside = (..., slice(top, top + self.config.crop), slice(left, left + self.config.crop))
            first, second = (self.normalize(warp(x, motion.matrices(view), 0.0)[inside]) for view in range(2))
        return first, second

    def _compare(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Last maps (2N, ...) of first and second views -> logits of each axis, (N, classes)."""
        pairs = torch.cat([half.flatten(1) for half in features.chunk(2)], dim=1)
        x, y, turn = self.compare(pairs).split(self.classes, dim=1)
        return x, y, turn

    def _mapped(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Last maps (2N, ...) -> M_g z1 for every g (N, G, D), and z2 (N, D)."""
        with torch.autocast(features.device.type, enabled=False):
            z1, z2 = self.backbone.pool(features).float().chunk(2)
            return torch.einsum("gij,nj->ngi", self.maps, z1), z2
