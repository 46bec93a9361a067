"""What the methods of few labels share: a classifier, its moving average, and batches with a labeled part.

A batch is the labeled images, then `ratio` times as many others (`data.LabeledAndUnlabeled`). The average of backbone
and classifier is what is judged and exported. How unlabeled images teach is each method's own.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from embedkit.errors import ConfigError
from embedkit.training.config import Facts
from embedkit.training.data import Batch
from embedkit.training.data.targets import accuracy
from embedkit.training.method import Method
from embedkit.training.models.backbones import Backbone
from embedkit.training.models.ema import EMA, decay_of_a_run

__all__ = ["FewLabels"]


class FewLabels(Method):
    """Backbone, a linear classifier (D -> K), and the moving average of both, which is exported and judged.

    The method's Config has a field `ema_decay`: of the average, in a run of 20,000 steps or more (`decay_of_a_run`).
    """

    uses_labels = True
    inert = ("ema_decay",)

    def __init__(self, backbone: Backbone, config: Any, facts: Facts) -> None:
        super().__init__(backbone, config, facts)
        if facts.num_classes < 2:
            raise ConfigError(
                f"{self._name()}: expected labels of 2 or more classes, found {facts.num_classes}; "
                "name the label column with --set data.label=COLUMN"
            )
        self.classifier = nn.Linear(backbone.dim, facts.num_classes)
        nn.init.zeros_(
            self.classifier.weight
        )  # every class as likely: nothing is believed before the first step
        nn.init.zeros_(self.classifier.bias)
        self.ema = EMA(self.student(), config.ema_decay, buffers="copy")

    def student(self) -> nn.Sequential:
        """Normalized images (N, C, H, W) -> logits (N, K)."""
        return nn.Sequential(self.backbone, self.classifier)

    def parts(self, batch: Batch, ratio: int) -> tuple[Tensor, Tensor, Tensor]:
        """The labeled images (B, C, H, W) of a batch, their labels (B,), and the others (ratio B, C, H, W).

        Raises:
            ConfigError: At the first batch of a run: the first part is not all labeled, or no whole part.
        """
        labeled, rest = divmod(len(batch.images), 1 + ratio)
        labels = batch.labels[:labeled]
        if self.batches_seen <= 1 and (rest or bool((labels < 0).any())):
            raise ConfigError(
                f"{self._name()}: the first of {1 + ratio} parts of a batch must be labeled; let data.sampler be "
                f"LabeledAndUnlabeled of ratio {ratio}"
                if ratio
                else f"{self._name()}: all images of a batch must be labeled; let data.sampler be Labeled"
            )
        return batch.images[:labeled], labels, batch.images[labeled:]

    def ema_decay(self) -> float:
        """The decay for the run's length."""
        if not self.total_steps:
            return self.config.ema_decay
        return decay_of_a_run(self.config.ema_decay, self.total_steps)

    def decay_of_update(self, update: int) -> float:
        """The decay of one update, counted from 0: lower at first, (1 + update) / (10 + update)."""
        return min(self.ema_decay(), (1 + update) / (10 + update))

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Move the average."""
        self.ema.decay = self.decay_of_update(self.batches_seen - 1)
        self.ema.update(self.student())

    def encoder(self) -> nn.Module:
        """The average of the backbone."""
        return cast(nn.Sequential, self.ema.module)[0]

    def class_head(self) -> nn.Module:
        """The average of the classifier."""
        return cast(nn.Sequential, self.ema.module)[1]

    def pretext_metric(self, batch: Batch, generator: Any) -> dict[str, Tensor]:
        """Accuracy of the average on labeled images as they are; 1 / K by chance."""
        return {"accuracy": accuracy(self.ema(self.view(batch.images)), batch.labels)}

    def _name(self) -> str:
        return type(self).__module__.rpartition(".")[2]
