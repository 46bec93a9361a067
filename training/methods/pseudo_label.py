"""Pseudo-Label: the class that the network finds likeliest is the label of an unlabeled image, for this one update.

To follow its own guesses is to make them surer: the classes part where images are rare. The weight of the guesses
rises only once the labeled images have taught something.

Source: Pseudo-Label: The Simple and Efficient Semi-Supervised Learning Method for Deep Neural Networks (Lee, Workshop
on Challenges in Representation Learning, ICML 2013), equations 15 and 16. The thresholded form
(`pseudo_label:thresholded`): the baseline of the same name in google-research/mixmatch.

Differences from the source:
- Softmax and its cross-entropy for the paper's K sigmoids; no dropout, no pretraining as a denoising autoencoder.
- r10 and views for the paper's perceptron of 5,000 units on plain MNIST; a batch is 64 labeled images and 192 others
  for 32 and 256; AdamW and a one-cycle schedule for SGD with a falling rate.
- alpha rises between a tenth and six tenths of the run: the paper's epochs 100 and 600, 1 to 6 as there, as shares of
  a run whose length we do not know from it.
- Image and guess are one view, as in the re-implementation. Unlabeled images pass on their own, and only the labeled
  pass moves BatchNorm's running statistics, as there; the paper has no BatchNorm.
- The average of the weights is judged and exported, as in the re-implementation and not in the paper.
- The thresholded form counts a probability of the threshold itself as sure; the re-implementation asks for more. It
  smooths no labels.

Recipe, expected metrics, data, time and command: `embedkit.training.recipes.pseudo_label`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from embedkit.errors import ConfigError
from embedkit.training.augment import Augmentation, Compose, RandomHorizontalFlip, RandomShift
from embedkit.training.config import Facts
from embedkit.training.data import Batch
from embedkit.training.data.targets import cross_entropy
from embedkit.training.few_labels import FewLabels
from embedkit.training.method import float32_loss
from embedkit.training.models.backbones import Backbone
from embedkit.training.models.batch_norm import running_statistics_kept
from embedkit.training.schedules import linear_ramp

__all__ = ["FAMILY", "SUMMARY", "Config", "PseudoLabel", "alpha", "pseudo_label_loss"]

#: The supervision that the method learns from.
FAMILY = "few labels"
#: The sentence that the card of an entry shows.
SUMMARY = (
    "Pseudo-Label: a network learns from few labels, and takes its likeliest class of each "
    "unlabeled image for its label. The average of its weights is exported."
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Of `pseudo_label`.

    Attributes:
        ratio: Unlabeled images for each labeled one in a batch; the sampler's `ratio`.
        unlabeled_weight: alpha_f, what alpha rises to.
        start: T1, the share of the run at which alpha leaves 0.
        end: T2, the share of the run at which it arrives; above `start`.
        threshold: The probability from which a guess is a label, in [0, 1]; 0, the paper's form: all are.
        ema_decay: Of the average, in a run of 20,000 steps or more; see `decay_of_a_run`.
        supervised_only: The baseline; unlabeled images are left out.
        augment: What an image goes through.
    """

    ratio: int = 3
    unlabeled_weight: float = 3.0
    start: float = 0.1
    end: float = 0.6
    threshold: float = 0.0
    ema_decay: float = 0.999
    supervised_only: bool = False
    augment: Augmentation = Compose(steps=(RandomHorizontalFlip(), RandomShift(pixels=3, pad="reflect")))


@float32_loss
def pseudo_label_loss(logits: Tensor, threshold: float = 0.0) -> Tensor:
    """Cross-entropy of unlabeled images with their own likeliest classes (second term of equation 15).

        1 / N sum_n 1[max p_n >= threshold] * -log p_n[y'_n],   p_n = softmax(logits_n), y'_n = argmax p_n

    The mean runs over all images: one below the threshold counts as 0. y' is a constant.

    Args:
        logits: (N, K).
        threshold: In [0, 1].

    Returns:
        (2,): the loss in nats, and the share of images that were sure.
    """
    confidence, guesses = logits.detach().softmax(1).max(1)
    mask = (confidence >= threshold).to(logits.dtype)
    return torch.stack([(F.cross_entropy(logits, guesses, reduction="none") * mask).mean(), mask.mean()])


def alpha(done: float, final: float, start: float, end: float) -> float:
    """The weight of unlabeled images (equation 16): 0 up to `start`, `final` from `end` on, a line between."""
    return linear_ramp(0.0, final, done, (start, end))


class PseudoLabel(FewLabels):
    """Backbone, a linear classifier, and the moving average of both, which is exported and judged."""

    def __init__(self, backbone: Backbone, config: Config, facts: Facts) -> None:
        super().__init__(backbone, config, facts)
        if not 0 <= config.start < config.end <= 1:
            raise ConfigError(
                f"pseudo_label: expected 0 <= start < end <= 1, found {config.start} and {config.end}"
            )

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Cross-entropy of the labeled images, and of the others with the classes that they are taken for."""
        labeled, labels, unlabeled = self.parts(batch, self.config.ratio)
        student = self.student()
        logits = student(self.view(labeled, self.config.augment, generator))
        supervised = cross_entropy(logits.float(), labels)
        if self.config.supervised_only:
            return {"loss": supervised, "supervised": supervised}
        with running_statistics_kept(student):
            guessed = student(self.view(unlabeled, self.config.augment, generator))
        own, confident = pseudo_label_loss(guessed, self.config.threshold)
        weight = alpha(self.progress, self.config.unlabeled_weight, self.config.start, self.config.end)
        # a class that takes all unlabeled images is how the method fails
        largest = guessed.detach().argmax(1).bincount(minlength=guessed.shape[1]).max() / len(guessed)
        return {
            "loss": supervised + weight * own,
            "supervised": supervised,
            "unlabeled": own,
            "confident": confident.detach(),
            "largest_class": largest,
        }
