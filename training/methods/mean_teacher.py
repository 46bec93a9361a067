"""Mean Teacher: the student agrees with the average of its own past weights on images without a label.

Both see the same images in views of their own. The average is better than the weights of any one step, so what it
says of an unlabeled image is worth learning; it takes no gradient and moves with the student alone.

Source: Mean teachers are better role models: Weight-averaged consistency targets improve semi-supervised deep
learning results (Tarvainen and Valpola, NeurIPS 2017, arXiv 1703.01780), section 2; code CuriousAI/mean-teacher.

Differences from the source:
- Cross-entropy is the mean over the labeled images. The authors' PyTorch code divides it by all images of the batch,
  so that their weight of 100 at 31 labels in 128 is one of 413 here. Ours is 50, as in the public re-implementation
  beside MixMatch.
- As in their code, squared differences of probabilities are meaned over the K classes, labeled images count too, and
  the average is a true mean of all weights until its decay is reached. Decay is 0.999 and no more than looks back a
  twentieth of the run; theirs goes from 0.99 to 0.999.
- The teacher normalizes by the statistics of its own batch, as theirs. Its running statistics are the student's,
  where their PyTorch code lets it gather its own, so that the baseline has the same average.
- One classifier. Their PyTorch residual network has a second one for consistency, held near the first by a cost of
  logits. No dropout: student and teacher differ by views and weights.
- AdamW and a one-cycle schedule for Adam with ramps up and down; the weight of consistency rises over the first
  two fifths of the run, as in the re-implementation, for 5 of some 180 epochs. r10.
- Noise is a deviation of 0.05 in pixels of 0..1, about 0.15 of the images' own, the authors' value for images
  scaled by it. It stands in the student's, the teacher's and the baseline's views.

Recipe, expected metrics, data, time and command: `embedkit.training.recipes.mean_teacher`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from embedkit.errors import ConfigError
from embedkit.training.augment import Augmentation, Compose, GaussianNoise, RandomHorizontalFlip, RandomShift
from embedkit.training.config import Facts
from embedkit.training.data import Batch
from embedkit.training.data.targets import cross_entropy
from embedkit.training.few_labels import FewLabels
from embedkit.training.method import float32_loss
from embedkit.training.models.backbones import Backbone
from embedkit.training.schedules import sigmoid_ramp

__all__ = ["FAMILY", "SUMMARY", "Config", "MeanTeacher", "consistency_loss", "true_average"]

#: The supervision that the method learns from.
FAMILY = "few labels"
#: The sentence that the card of an entry shows.
SUMMARY = (
    "Mean Teacher: a network learns from few labels, and on unlabeled images it must agree with the "
    "average of its own past weights. The average is exported."
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Of `mean_teacher`.

    Attributes:
        ratio: Unlabeled images for each labeled one in a batch; the sampler's `ratio`.
        consistency_weight: Of the consistency once it has risen.
        ramp: Share of the run over which it rises from e^-5 of that, above 0.
        ema_decay: Of the teacher, in a run of 20,000 steps or more; see `decay_of_a_run`.
        supervised_only: The baseline; unlabeled images are left out, also from BatchNorm.
        augment: Drawn apart for student and teacher.
    """

    ratio: int = 3
    consistency_weight: float = 50.0
    ramp: float = 0.4
    ema_decay: float = 0.999
    supervised_only: bool = False
    augment: Augmentation = Compose(
        steps=(
            RandomHorizontalFlip(),
            RandomShift(pixels=3, pad="reflect"),
            GaussianNoise(sigma=(0.05, 0.05)),
        )
    )


@float32_loss
def consistency_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean over rows of (1 / K) |softmax(student) - softmax(teacher)|^2; the teacher takes no gradient.

    Args:
        student: Logits (N, K).
        teacher: Logits (N, K), row by row of the same images.

    Returns:
        A scalar in [0, 2 / K].
    """
    return (student.softmax(1) - teacher.detach().softmax(1)).square().mean()


def true_average(update: int) -> float:
    """The decay 1 - 1 / (update + 2) of update `update`, from 0: the mean of the first weights and all since."""
    return 1 - 1 / (update + 2)


class MeanTeacher(FewLabels):
    """Student: backbone and a linear classifier. Teacher: the average of both, which is exported and judged."""

    def __init__(self, backbone: Backbone, config: Config, facts: Facts) -> None:
        super().__init__(backbone, config, facts)
        if not 0 < config.ramp <= 1:
            raise ConfigError(f"mean_teacher: expected a ramp above 0 and up to 1, found {config.ramp}")

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Cross-entropy of the labeled images, and consistency with the teacher of all, the labeled too."""
        labeled, labels, _ = self.parts(batch, self.config.ratio)
        images = labeled if self.config.supervised_only else batch.images
        student = self.student()(self.view(images, self.config.augment, generator))  # (N, K)
        supervised = cross_entropy(student[: len(labels)].float(), labels)
        if self.config.supervised_only:
            return {"loss": supervised, "supervised": supervised}
        with torch.no_grad():
            teacher = self.ema(self.view(images, self.config.augment, generator))
        consistency = consistency_loss(student, teacher)
        return {
            "loss": supervised + self.consistency_weight() * consistency,
            "supervised": supervised,
            "consistency": consistency,
        }

    def consistency_weight(self) -> float:
        """Of this batch: `consistency_weight` times exp(-5 (1 - t)^2), t the share of the ramp that is done."""
        return self.config.consistency_weight * sigmoid_ramp(self.progress / self.config.ramp)

    def decay_of_update(self, update: int) -> float:
        """A true mean until that forgets less than the decay."""
        return min(self.ema_decay(), true_average(update))
