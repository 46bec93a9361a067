"""mixup: between two images the network is to answer with the same mixture of their labels.

It learns to be linear between examples, and so to be unsure where it has seen none. Where images have no labels, the
answers of its own average take their place: interpolation consistency training (ICT).

Sources: mixup: Beyond Empirical Risk Minimization (Zhang, Cisse, Dauphin and Lopez-Paz, ICLR 2018, arXiv 1710.09412),
equation 2; code facebookresearch/mixup-cifar10. With `ratio` above 0: Interpolation Consistency Training for
Semi-Supervised Learning (Verma et al., IJCAI 2019, arXiv 1903.03825), algorithm 1; code vikasverma1077/ICT.

Differences from the sources:
- lambda is one number a batch, as in both codes; the papers draw pairs, and leave it open. ICT draws another one for
  the unlabeled part.
- The average of the weights is judged and exported, in the labels-only form too, so that both forms have one
  baseline (alpha and ratio 0); mixup's authors take the last weights. It is a true mean at first, as ICT's.
- r10, AdamW and a one-cycle schedule for SGD in three steps (mixup) or along a cosine (ICT); reflected shifts by 3
  pixels of 28 for theirs by 4 of 32.
- ICT: labeled images are mixed too, an option of its code that its algorithm 1 leaves out. What is mixed of the
  teacher's answers is probabilities, as in the paper and a public re-implementation; its code mixes logits. Weight
  50, rising over the first two fifths of the run, as in the re-implementation; its code has 100. As in its code,
  squares are meaned over the K classes.
- ICT: both mixed parts pass the student at once, so that BatchNorm sees mixtures of both kinds. The authors pass them
  one by one, and images that are not mixed as well, whose outputs they do not use.

Recipe, expected metrics, data, time and command: `embedkit.training.recipes.mixup`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from embedkit.errors import ConfigError
from embedkit.training.augment import Augmentation, Compose, RandomHorizontalFlip, RandomShift
from embedkit.training.config import Facts
from embedkit.training.data import Batch
from embedkit.training.data.targets import cross_entropy
from embedkit.training.few_labels import FewLabels
from embedkit.training.method import float32_loss
from embedkit.training.methods.mean_teacher import true_average
from embedkit.training.models.backbones import Backbone
from embedkit.training.schedules import sigmoid_ramp

__all__ = ["FAMILY", "SUMMARY", "Config", "MixUp", "draw_lambdas", "interpolation_loss", "mix", "mixup_loss"]

#: The supervision that the method learns from.
FAMILY = "few labels"
#: The sentence that the card of an entry shows.
SUMMARY = (
    "mixup: a network learns to give the mixture of two images the same mixture of their labels. "
    "The average of its weights is exported."
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Of `mixup`.

    Attributes:
        alpha: lambda is drawn from Beta(alpha, alpha), uniform at 1; 0: no image is mixed.
        ratio: Unlabeled images for each labeled one in a batch, the sampler's `ratio`; 0: labels alone.
        consistency_weight: Of the unlabeled part once it has risen.
        ramp: Share of the run over which it rises from e^-5 of that, above 0.
        ema_decay: Of the average, in a run of 20,000 steps or more; see `decay_of_a_run`.
        augment: What an image goes through before it is mixed.
    """

    alpha: float = 1.0
    ratio: int = 0
    consistency_weight: float = 50.0
    ramp: float = 0.4
    ema_decay: float = 0.999
    augment: Augmentation = Compose(steps=(RandomHorizontalFlip(), RandomShift(pixels=3, pad="reflect")))


def draw_lambdas(alpha: float, n: int, generator: torch.Generator) -> Tensor:
    """float32 (n,) draws from Beta(alpha, alpha), of variance 1 / (4 (2 alpha + 1)); 1 throughout for an alpha of 0."""
    if alpha == 0:
        return torch.ones(n, device=generator.device)
    # torch has no draw from a Beta that takes a generator
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    return torch.from_numpy(np.random.default_rng(seed).beta(alpha, alpha, n)).float().to(generator.device)


def mix(a: Tensor, b: Tensor, lambdas: Tensor) -> Tensor:
    """Row by row, lambda a + (1 - lambda) b.

    Args:
        a: (N, ...).
        b: (N, ...).
        lambdas: (N,), or (1,) for one that holds for all rows.
    """
    weights = lambdas.reshape(-1, *[1] * (a.ndim - 1)).to(a.dtype)
    return weights * a + (1 - weights) * b


@float32_loss
def mixup_loss(logits: Tensor, labels: Tensor, partners: Tensor, lambdas: Tensor) -> Tensor:
    """Cross-entropy with the mixed one-hot labels: lambda H(labels, p) + (1 - lambda) H(partners, p).

    Args:
        logits: (N, K), of mixed images.
        labels: int64 (N,), of the first images.
        partners: int64 (N,), of the second images.
        lambdas: (1,), the weight of the first.

    Returns:
        A scalar, in nats; the plain cross-entropy bit for bit where lambda is 1 or 0.
    """
    weight = lambdas[0]
    return weight * cross_entropy(logits, labels) + (1 - weight) * cross_entropy(logits, partners)


@float32_loss
def interpolation_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean over rows of (1 / K) |softmax(logits) - targets|^2; the targets take no gradient.

    Args:
        logits: (N, K), of mixed unlabeled images.
        targets: (N, K), the teacher's probabilities, mixed alike.

    Returns:
        A scalar in [0, 2 / K].
    """
    return (logits.softmax(1) - targets.detach()).square().mean()


class MixUp(FewLabels):
    """Backbone, a linear classifier, and the average of both: it is ICT's teacher, and is exported and judged."""

    streams = ("mixup",)

    def __init__(self, backbone: Backbone, config: Config, facts: Facts) -> None:
        super().__init__(backbone, config, facts)
        if config.alpha < 0 or not 0 < config.ramp <= 1:
            raise ConfigError(
                "mixup: expected an alpha of 0 or more and a ramp above 0 and up to 1, "
                f"found {config.alpha} and {config.ramp}"
            )

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Cross-entropy of mixed labeled images; in ICT also what mixed unlabeled ones differ from mixed answers."""
        labeled, labels, unlabeled = self.parts(batch, self.config.ratio)
        draws = self.generator("mixup")
        x, partners, lambdas = self._mixed(self.view(labeled, self.config.augment, generator), draws)
        if not self.config.ratio:
            loss = mixup_loss(self.student()(x), labels, labels[partners], lambdas)
            return {"loss": loss}
        u = self.view(unlabeled, self.config.augment, generator)
        with torch.no_grad():
            answers = self.ema(u).float().softmax(1)  # (ratio B, K)
        mixed, others, unlabeled_lambdas = self._mixed(u, draws)
        logits, logits_mixed = self.student()(torch.cat([x, mixed])).split([len(x), len(mixed)])
        supervised = mixup_loss(logits, labels, labels[partners], lambdas)
        consistency = interpolation_loss(logits_mixed, mix(answers, answers[others], unlabeled_lambdas))
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

    def _mixed(self, x: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """The images mixed with others of theirs, which ones, and the one lambda (1,)."""
        lambdas = draw_lambdas(self.config.alpha, 1, draws)
        partners = torch.randperm(len(x), generator=draws, device=draws.device)
        return mix(x, x[partners], lambdas), partners, lambdas
