"""MixMatch: guesses for unlabeled images, meaned over views and sharpened, are mixed with labeled images and learned.

It joins three ideas: views agree (the mean), classes part where images are rare (sharpening), and between images the
network is linear (mixup).

Source: MixMatch: A Holistic Approach to Semi-Supervised Learning (Berthelot et al., NeurIPS 2019, arXiv 1905.02249),
equations 2 to 14 and algorithm 1; code google-research/mixmatch.

Differences from the source:
- Fewer steps: some 10^4 and not 2^20. r10 and ReLU for a Wide ResNet with leaky ones. A run starts its average
  low, at (1 + k) / (10 + k) of update k, and looks back a twentieth of its length at most.
- The weight of unlabeled images rises over the whole run. The source's code takes the first 2^20 images, a 64th of its
  run, which is more than the whole of ours. Where it rises before the labeled images have taught anything, all guesses
  become one class: so in 150 steps of digits with a rise of 60. Weight 75 and alpha 0.75 are the paper's for
  CIFAR-10; the code's defaults are 100 and 0.5.
- AdamW and a one-cycle schedule; the source has Adam at a constant rate and decays kernels by hand. Biases of
  BatchNorm and of the classifier decay in neither.
- lambda is drawn for each image, as in the code; some re-implementations draw one a batch.
- Guesses are made in training mode, each view normalized by its own batch; of all passes only that of the first
  sub-batch, in which labeled and unlabeled images are interleaved, moves BatchNorm's running statistics. Both are as in
  the code. The average takes over those statistics.
- Reflected shifts by 3 pixels of 28 for 4 of 32.

Recipe, expected metrics, data, time and command: `embedkit.training.recipes.mixmatch`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedkit.errors import ConfigError
from embedkit.training.augment import Augmentation, Compose, RandomHorizontalFlip, RandomShift
from embedkit.training.config import Facts
from embedkit.training.data import Batch
from embedkit.training.data.targets import cross_entropy
from embedkit.training.few_labels import FewLabels
from embedkit.training.method import float32_loss
from embedkit.training.methods.mixup import draw_lambdas, mix
from embedkit.training.models.backbones import Backbone
from embedkit.training.models.batch_norm import running_statistics_kept
from embedkit.training.schedules import linear_ramp

__all__ = [
    "FAMILY",
    "SUMMARY",
    "Config",
    "MixMatch",
    "guess_labels",
    "interleave",
    "larger_parts",
    "mixed_loss",
    "sharpen",
]

#: The supervision that the method learns from.
FAMILY = "few labels"
#: The sentence that the card of an entry shows.
SUMMARY = (
    "MixMatch: a network learns from few labels and from sharpened guesses for unlabeled images, "
    "all mixed with one another. The average of its weights is exported."
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Of `mixmatch`.

    Attributes:
        guesses: K, the views over which a guess is meaned.
        temperature: T, by which it is sharpened, in (0, 1]; at 1 it stays as it is.
        alpha: lambda is drawn from Beta(alpha, alpha); above 0.
        unlabeled_weight: lambda_u once it has risen.
        ramp: Share of the run over which it rises from 0; 0: it does not.
        ema_decay: Of the average, in a run of 20,000 steps or more; see `decay_of_a_run`.
        supervised_only: The baseline; unlabeled images are left out and none is mixed.
        augment: What an image goes through; drawn K times for an unlabeled one.
    """

    guesses: int = 2
    temperature: float = 0.5
    alpha: float = 0.75
    unlabeled_weight: float = 75.0
    ramp: float = 1.0
    ema_decay: float = 0.999
    supervised_only: bool = False
    augment: Augmentation = Compose(steps=(RandomHorizontalFlip(), RandomShift(pixels=3, pad="reflect")))


def sharpen(p: Tensor, temperature: float) -> Tensor:
    """Row by row, p^(1/T) / sum p^(1/T) (equation 7): (N, C) -> (N, C)."""
    powers = p ** (1 / temperature)
    return powers / powers.sum(1, keepdim=True)


@float32_loss
def guess_labels(logits: Tensor, temperature: float) -> Tensor:
    """The mean of a network's probabilities over views (equation 6), sharpened; a constant.

    Args:
        logits: (K, N, C), of K views of N images.
        temperature: T.

    Returns:
        (N, C), rows that sum to 1, without gradient.
    """
    return sharpen(logits.detach().softmax(2).mean(0), temperature)


def larger_parts(lambdas: Tensor) -> Tensor:
    """The larger part, lambda' = max(lambda, 1 - lambda) (equation 9): a mixture stays nearer to its first image."""
    return torch.maximum(lambdas, 1 - lambdas)


@float32_loss
def mixed_loss(logits: Tensor, targets: Tensor, labeled: int) -> Tensor:
    """Cross-entropy of the labeled part, and squared differences of the other (equations 3 and 4).

        L_X = -1/B sum_b sum_c t_bc log p_bc,   L_U = 1 / (C N) sum_n sum_c (t_nc - p_nc)^2,   p = softmax(logits)

    Args:
        logits: (B + N, C), the B first of images that were labeled before they were mixed.
        targets: (B + N, C), mixed labels and guesses; rows sum to 1.
        labeled: B.

    Returns:
        (2,): L_X in nats, and L_U in [0, 2 / C].
    """
    supervised = F.cross_entropy(logits[:labeled], targets[:labeled])
    return torch.stack([supervised, (logits[labeled:].softmax(1) - targets[labeled:]).square().mean()])


def interleave(parts: Sequence[Tensor]) -> list[Tensor]:
    """Exchange the i-th piece of the first part with the i-th piece of part i, for i from 1; its own inverse.

    Each of P parts of equal length is cut into P pieces. Then every part holds images of the first one.
    """
    pieces = [list(part.tensor_split(len(parts))) for part in parts]
    for i in range(1, len(parts)):
        pieces[0][i], pieces[i][i] = pieces[i][i], pieces[0][i]
    return [torch.cat(own) for own in pieces]


class MixMatch(FewLabels):
    """Backbone, a linear classifier, and the moving average of both, which is exported and judged."""

    streams = ("mixup",)
    stops_gradient = True

    def __init__(self, backbone: Backbone, config: Config, facts: Facts) -> None:
        super().__init__(backbone, config, facts)
        if config.guesses < 1 or not 0 < config.temperature <= 1 or config.alpha <= 0:
            raise ConfigError(
                "mixmatch: expected 1 or more guesses, a temperature above 0 and up to 1 and an alpha above 0, "
                f"found {config.guesses}, {config.temperature} and {config.alpha}"
            )

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Both terms on mixtures of labeled images and of K views of as many unlabeled ones."""
        images, labels, unlabeled = self.parts(batch, 1)
        student, x = self.student(), self.view(images, self.config.augment, generator)
        if self.config.supervised_only:
            supervised = cross_entropy(student(x).float(), labels)
            return {"loss": supervised, "supervised": supervised}
        views = [self.view(unlabeled, self.config.augment, generator) for _ in range(self.config.guesses)]
        with torch.no_grad(), running_statistics_kept(student):
            guesses = guess_labels(torch.stack([student(u) for u in views]), self.config.temperature)
        known = F.one_hot(labels, guesses.shape[1]).to(guesses.dtype)
        inputs, targets = torch.cat([x, *views]), torch.cat([known, *[guesses] * len(views)])
        draws = self.generator("mixup")
        lambdas = larger_parts(draw_lambdas(self.config.alpha, len(inputs), draws))
        partners = torch.randperm(len(inputs), generator=draws, device=draws.device)  # W, of both kinds
        logits = self._interleaved(student, mix(inputs, inputs[partners], lambdas), len(x))
        supervised, consistency = mixed_loss(logits, mix(targets, targets[partners], lambdas), len(x))
        return {
            "loss": supervised + self.unlabeled_weight() * consistency,
            "supervised": supervised,
            "unlabeled": consistency,
            "confidence": guesses.amax(1).mean(),
        }

    def unlabeled_weight(self) -> float:
        """lambda_u of this batch: along a line from 0, over the first `ramp` of the run."""
        return linear_ramp(0.0, self.config.unlabeled_weight, self.progress, (0.0, self.config.ramp))

    def _interleaved(self, student: nn.Module, x: Tensor, size: int) -> Tensor:
        """Logits of sub-batches of `size`, each normalized apart; the first alone moves running statistics."""
        first, *others = interleave(x.split(size))
        logits = [student(first)]
        with running_statistics_kept(student):
            logits += [student(other) for other in others]
        return torch.cat(interleave(logits))
