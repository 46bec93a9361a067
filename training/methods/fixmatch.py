"""FixMatch: what the network is sure of on a weakly changed image is the label of its strongly changed copy.

A few labeled images teach the first predictions; confident ones become pseudo-labels, and every image is then
taught under distortions that no single labeled image has.

Source: FixMatch: Simplifying Semi-Supervised Learning with Consistency and Confidence (Sohn et al., NeurIPS 2020,
arXiv 2001.07685), equations 3 and 4 and algorithm 1; the 7/16 cosine and the exponential moving average (EMA) as in
its section 2.4 and the authors' code.

Differences from the source:
- Fewer steps: some 10^4 and not 2^20. `ratio` (mu) is 3 and not 7, which more than doubles the steps of a given
  time. r10 instead of a Wide ResNet.
- The average looks back 1,000 updates as in the source, but at most a twentieth of the run. Its decay starts low,
  (1 + k) / (10 + k) at update k, which also holds while a time budget is still being measured; the source's does not.
- The operations of the strong view are those which a public benchmark (USB) keeps for small gray images, without
  brightness: `Color` does nothing to one channel, and factors from 0.05 erase what stands on black. Left out of the 14
  are AutoContrast, Brightness, Color, Contrast, Posterize and Solarize. As in public
  re-implementations, the strong view starts from a weak view of its own.
- The peak learning rate is 0.1 and not 0.03, for steps that are 100 times fewer, and the classifier starts at zero.
- Images are drawn by class when labels are chosen; the authors do the same, and keep the sets in files.
- `supervised_only` is our baseline: the same labels, steps, average and both kinds of views, where the true label
  takes the place of the pseudo-label, and no unlabeled image is seen, not by BatchNorm either.

Recipe, expected metrics, data, time and command: `embedkit.training.recipes.fixmatch`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedkit.errors import ConfigError
from embedkit.training.augment import Augmentation, Compose, RandAugment, RandomHorizontalFlip, RandomShift
from embedkit.training.config import Facts
from embedkit.training.data import Batch
from embedkit.training.data.targets import accuracy, cross_entropy
from embedkit.training.method import Method, float32_loss
from embedkit.training.models.backbones import Backbone
from embedkit.training.models.ema import EMA, decay_of_a_run

__all__ = ["FAMILY", "SUMMARY", "Config", "FixMatch", "consistency_loss", "lr_factor"]

#: The supervision that the method learns from.
FAMILY = "few labels"
#: The sentence that the card of an entry shows.
SUMMARY = (
    "FixMatch: a confident prediction on a weakly augmented image is the label of its strongly "
    "augmented copy."
)

_WEAK = Compose(steps=(RandomHorizontalFlip(), RandomShift(pixels=3, pad="reflect")))
_GRAY_OPS = ("Equalize", "Identity", "Rotate", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Of `fixmatch`.

    Attributes:
        ratio: mu, unlabeled images for each labeled one in a batch; the sampler's `ratio`.
        threshold: tau, the probability from which a prediction is a pseudo-label, in [0, 1].
        unlabeled_weight: lambda_u.
        ema_decay: Of the average, in a run of 20,000 steps or more; see `decay_of_a_run`.
        supervised_only: The baseline; unlabeled images are left out, also from BatchNorm.
        weak: The view that is labeled: flips, and shifts by an eighth of the side.
        strong: The view that learns pseudo-labels.
    """

    ratio: int = 3
    threshold: float = 0.95
    unlabeled_weight: float = 1.0
    ema_decay: float = 0.999
    supervised_only: bool = False
    weak: Augmentation = _WEAK
    strong: Augmentation = Compose(steps=(_WEAK, RandAugment(ops=_GRAY_OPS)))


@float32_loss
def consistency_loss(logits_weak: Tensor, logits_strong: Tensor, threshold: float) -> Tensor:
    """Cross-entropy of the strong views with the confident predictions on the weak ones (equation 4).

        l_u = 1 / (mu B) sum_b 1[max q_b >= tau] H(argmax q_b, softmax(strong_b)),   q_b = softmax(weak_b)

    The mean runs over all images: one below the threshold counts as 0. q takes no gradient.

    Args:
        logits_weak: (mu B, K).
        logits_strong: (mu B, K), row by row of the same images.
        threshold: tau.

    Returns:
        (2,): the loss in nats, and the share of images that were confident.
    """
    confidence, pseudo_labels = logits_weak.detach().softmax(1).max(1)
    pseudo_mask = (confidence >= threshold).to(logits_strong.dtype)
    return torch.stack(
        [
            (F.cross_entropy(logits_strong, pseudo_labels, reduction="none") * pseudo_mask).mean(),
            pseudo_mask.mean(),
        ]
    )


def lr_factor(progress: float) -> float:
    """cos(7 pi k / 16 K) of step k of K, given k / K: from 1 to 0.195, so that the last steps still learn."""
    return math.cos(7 * math.pi * progress / 16)


class FixMatch(Method):
    """Backbone, a linear classifier (D -> K), and the moving average of both, which is exported and judged."""

    uses_labels = True
    inert = ("ema_decay",)

    def __init__(self, backbone: Backbone, config: Config, facts: Facts) -> None:
        super().__init__(backbone, config, facts)
        if facts.num_classes < 2:
            raise ConfigError(
                f"fixmatch: expected labels of 2 or more classes, found {facts.num_classes}; "
                "name the label column with --set data.label=COLUMN"
            )
        self.classifier = nn.Linear(backbone.dim, facts.num_classes)
        nn.init.zeros_(self.classifier.weight)  # every class as likely: no pseudo-label before the first step
        nn.init.zeros_(self.classifier.bias)
        self.ema = EMA(self._student(), config.ema_decay, buffers="copy")

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Cross-entropy of the labeled images, and of the unlabeled ones with their pseudo-labels."""
        labeled, rest = divmod(len(batch.images), 1 + self.config.ratio)
        labels, unlabeled = batch.labels[:labeled], batch.images[labeled:]
        if self.batches_seen <= 1 and (rest or bool((labels < 0).any())):
            raise ConfigError(
                f"fixmatch: the first of {1 + self.config.ratio} parts of a batch must be labeled; give "
                "data.sampler.ratio and method.ratio the same value"
            )
        weak = self.view(batch.images[:labeled], self.config.weak, generator)
        if self.config.supervised_only:
            strong = self.view(batch.images[:labeled], self.config.strong, generator)
            logits, logits_strong = self._logits(weak, strong)
            supervised = cross_entropy(logits.float(), labels)
            other = cross_entropy(logits_strong.float(), labels)
            return {"loss": supervised + self.config.unlabeled_weight * other, "supervised": supervised}
        logits, logits_weak, logits_strong = self._logits(
            weak,
            self.view(unlabeled, self.config.weak, generator),
            self.view(unlabeled, self.config.strong, generator),
        )
        supervised = cross_entropy(logits.float(), labels)
        consistency, confident = consistency_loss(logits_weak, logits_strong, self.config.threshold)
        return {
            "loss": supervised + self.config.unlabeled_weight * consistency,
            "supervised": supervised,
            "consistency": consistency,
            "confident": confident.detach(),
        }

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Let the run's learning rate fall along 7/16 of a cosine, whatever else its schedule does."""
        for group in self.trainer.optimizers[0].param_groups:
            group["lr_scale"] = lr_factor(self.progress)
        super().on_train_batch_start(batch, batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Move the average."""
        self.ema.decay = self.ema_decay()
        self.ema.update(self._student(), self.batches_seen - 1)

    def ema_decay(self) -> float:
        """The decay for the run's length."""
        if not self.total_steps:
            return self.config.ema_decay
        return decay_of_a_run(self.config.ema_decay, self.total_steps)

    def encoder(self) -> nn.Module:
        """The average of the backbone."""
        return cast(nn.Sequential, self.ema.module)[0]

    def class_head(self) -> nn.Module:
        """The average of the classifier."""
        return cast(nn.Sequential, self.ema.module)[1]

    def pretext_metric(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Accuracy of the average on labeled images as they are; 1 / K by chance."""
        return {"accuracy": accuracy(self.ema(self.view(batch.images)), batch.labels)}

    def _student(self) -> nn.Sequential:
        return nn.Sequential(self.backbone, self.classifier)

    def _logits(self, *augment: Tensor) -> tuple[Tensor, ...]:
        """The logits of several sets of images, in one pass: BatchNorm's statistics are those of all of them."""
        return self.classifier(self.backbone(torch.cat(augment))).split([len(x) for x in augment])
