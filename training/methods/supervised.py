"""Supervised classification: a linear classifier on pooled features, trained with the network.

It is the yardstick of all other methods: what the same backbone learns in the same steps when it is told the
labels.

Source: cross-entropy with smoothed labels, Rethinking the Inception Architecture for Computer Vision (Szegedy
et al., CVPR 2016, arXiv 1512.00567, section 7).

Differences from the source: none in the loss; views and optimizer are ours, for images of 28 to 64 pixels. The networks
of 2012 to 2014 (`supervised:alexnet`, `vgg11`, `gru`) have BatchNorm, half of their width and mean pooling where their
authors have local response normalization or none, layers of 4096 and dropout; the GRU reads rows of pixels.

Recipe, expected metrics, data, time and command: `embedkit.training.recipes.supervised`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from embedkit.errors import ConfigError
from embedkit.training.augment import Augmentation, Compose, RandomHorizontalFlip, RandomShift
from embedkit.training.config import Facts
from embedkit.training.data import Batch
from embedkit.training.data.targets import accuracy, cross_entropy
from embedkit.training.method import Method, float32_loss
from embedkit.training.models.backbones import Backbone

__all__ = ["FAMILY", "SUMMARY", "Config", "Supervised", "smoothed_cross_entropy"]

#: The supervision that the method learns from.
FAMILY = "labels"
#: The sentence that the card of an entry shows.
SUMMARY = "Supervised classification: a linear classifier on pooled features, trained with the network."


@dataclass(frozen=True, kw_only=True)
class Config:
    """Of `supervised`.

    Attributes:
        label_smoothing: Share of the target that is spread evenly over all classes, in [0, 1).
        augment: What an image goes through; flips suit clothes and photographs, not digits or letters.
    """

    label_smoothing: float = 0.1
    augment: Augmentation = Compose(steps=(RandomShift(pixels=2), RandomHorizontalFlip()))


@float32_loss
def smoothed_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """The mean over rows of -sum_k q_k log softmax(logits)_k, q = (1 - smoothing) onehot + smoothing / K.

    Args:
        logits: (N, K).
        labels: int64 (N,), classes 0..K-1; rows of label -1 are left out.
        smoothing: In [0, 1).

    Returns:
        A scalar, in nats; ln K for equal logits, whatever the smoothing; 0 without any label.
    """
    return cross_entropy(logits, labels, smoothing)


class Supervised(Method):
    """Backbone and a linear classifier (D -> K) that starts at zero."""

    uses_labels = True

    def __init__(self, backbone: Backbone, config: Config, facts: Facts) -> None:
        super().__init__(backbone, config, facts)
        if facts.num_classes < 2:
            raise ConfigError(
                f"supervised: expected labels of 2 or more classes, found {facts.num_classes}; "
                "name the label column with --set data.label=COLUMN"
            )
        self.classifier = nn.Linear(backbone.dim, facts.num_classes)
        # at zero every class is as likely: the first loss is ln K, and the backbone is not pushed at random
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Cross-entropy of one view of each image, and the share of views that are classified right."""
        logits = self.classifier(
            self.backbone(self.view(batch.images, self.config.augment, generator))
        )  # (N, K)
        loss = smoothed_cross_entropy(logits, batch.labels, self.config.label_smoothing)
        return {"loss": loss, "accuracy": accuracy(logits, batch.labels)}

    def class_head(self) -> nn.Module:
        """The classifier."""
        return self.classifier

    def pretext_metric(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Accuracy on images as they are; 1 / K by chance."""
        return {"accuracy": accuracy(self.classifier(self.backbone(self.view(batch.images))), batch.labels)}
