"""RotNet: every image is rotated by 0, 90, 180 and 270 degrees, and the network predicts the rotation.

For that it must know what is upright: the object's parts and their arrangement. No label is used.

Source: Unsupervised Representation Learning by Predicting Image Rotations (Gidaris, Singh and Komodakis, ICLR 2018,
arXiv 1803.07728), equations 2 and 3.

Differences from the source:
- The classifier starts at zero, so that the first loss is ln 4 exactly and the backbone is not pushed at random.
- AdamW and a one-cycle schedule instead of SGD over 200 epochs: a run here is ten. The network is r10, theirs are a
  Network in Network for CIFAR and AlexNet.
- Views are the authors' for CIFAR scaled to 28 pixels: a shift of 3 for their 4 of 32, and flips. They come BEFORE
  the rotation, as in the authors' code. Flipped after it, a rotation by 90 degrees to the left of one image is one to
  the right of its mirror image, and images that look like their mirror image limit the accuracy to 3/4 (a public
  benchmark suite has that order).
- The last pooled features are exported. On the paper's networks earlier maps transfer better than the last ones;
  `stage` exports one of those of a ResNet.

Recipe, expected metrics, data, time and command: `embedkit.training.recipes.rotnet`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.models.resnet import ResNet
from torch import Tensor, nn

from embedkit.errors import ConfigError
from embedkit.training.augment import Augmentation, Compose, RandomHorizontalFlip, RandomShift
from embedkit.training.config import Facts
from embedkit.training.data import Batch
from embedkit.training.data.targets import accuracy
from embedkit.training.method import Method, float32_loss
from embedkit.training.models.backbones import Backbone

__all__ = ["FAMILY", "SUMMARY", "Config", "RotNet", "rotation_loss", "rotations"]

#: The supervision that the method learns from.
FAMILY = "a pretext task"
#: The sentence that the card of an entry shows.
SUMMARY = (
    "RotNet: every image is rotated by 0, 90, 180 and 270 degrees, and the network predicts the rotation."
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Of `rotnet`.

    Attributes:
        augment: What an image goes through before it is turned. A view that draws an edge of its own, such as an
            affine map with a fill that the images do not have, would tell the turn.
        stage: Which map is exported, pooled: 4 is the last, 1 the first; below 4 for timm's ResNets alone.
    """

    augment: Augmentation = Compose(steps=(RandomShift(pixels=3, pad="constant"), RandomHorizontalFlip()))
    stage: int = 4


def rotations(x: Tensor) -> tuple[Tensor, Tensor]:
    """All four quarter turns of a batch, by flips and transposition alone: no pixel is interpolated.

    Args:
        x: Square images (N, C, H, H).

    Returns:
        Images (4N, C, H, H), the k-th N of them turned k times by 90 degrees counter-clockwise, and k as labels
        int64 (4N,).

    Raises:
        ConfigError: Images that are not square, whose shape would tell the turn.
    """
    if x.shape[2] != x.shape[3]:
        raise ConfigError(f"rotnet: expected square images, found {x.shape[2]}x{x.shape[3]}; crop them")
    turned = torch.cat([torch.rot90(x, k, (2, 3)) for k in range(4)])
    labels = torch.arange(4, device=x.device).repeat_interleave(len(x))
    return turned.contiguous(memory_format=torch.channels_last), labels


@float32_loss
def rotation_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over all turned images of -log softmax(logits)_label (equations 2 and 3).

    Args:
        logits: (4N, 4).
        labels: int64 (4N,), quarter turns.

    Returns:
        A scalar, in nats; ln 4 for equal logits.
    """
    return F.cross_entropy(logits, labels)


class RotNet(Method):
    """Backbone and a linear classifier (D -> 4) on its pooled features."""

    def __init__(self, backbone: Backbone, config: Config, facts: Facts) -> None:
        super().__init__(backbone, config, facts)
        if not 1 <= config.stage <= 4 or (config.stage < 4 and not isinstance(backbone.net, ResNet)):
            raise ConfigError(
                f"rotnet: expected a stage of 1 to 4, below 4 with a ResNet, found {config.stage} "
                f"with {backbone.architecture}"
            )
        self.classifier = nn.Linear(backbone.dim, 4)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Cross-entropy over the four turns of one view of each image, and how many are told right."""
        logits, labels = self._classify(self.view(batch.images, self.config.augment, generator))
        return {"loss": rotation_loss(logits, labels), "accuracy": accuracy(logits, labels)}

    def encoder(self) -> nn.Module:
        """The backbone, or what it is up to an earlier stage, pooled."""
        return self.backbone if self.config.stage == 4 else self.backbone.until(self.config.stage)

    def pretext_metric(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Share of turns that are told right, over all four of each image as it is; 1/4 by chance."""
        return {"rotation_accuracy": accuracy(*self._classify(self.view(batch.images)))}

    def pretext_chance(self) -> dict[str, float]:
        """One of four rotations."""
        return {"rotation_accuracy": 1 / 4}

    def solved(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Each image in one of its four turns, and turned back by what the network predicts."""
        turned, _ = rotations(self.view(batch.images))  # (4N, C, H, H)
        n = len(batch.images)
        turns = torch.randint(4, (n,), generator=generator, device=generator.device)
        rows = turns * n + torch.arange(n, device=turns.device)
        pixels, predicted = (
            self.denormalize(turned[rows]),
            self.classifier(self.backbone(turned[rows])).argmax(1),
        )
        back = [torch.rot90(image, -int(k), (1, 2)) for image, k in zip(pixels, predicted, strict=True)]
        return {"rotated": pixels, "rotated back by the prediction": torch.stack(back)}

    def _classify(self, x: Tensor) -> tuple[Tensor, Tensor]:
        turned, labels = rotations(x)  # (4N, C, H, H)
        return self.classifier(self.backbone(turned)), labels
