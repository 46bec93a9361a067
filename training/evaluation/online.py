"""Evaluation while training: kNN and MAP@R of held-out training images, cheap enough for every hundred steps.

The test part of the data is never read here, so that what is chosen by these metrics can be reported on it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from embedkit.errors import ConfigError
from embedkit.training.config import Evaluation
from embedkit.training.data import ImageSet
from embedkit.training.evaluation import metrics
from embedkit.training.method import Method

__all__ = ["HeldOut", "held_out"]

#: Images that the encoder sees at once.
_BATCH = 256


@dataclass(frozen=True)
class HeldOut:
    """Held-out images, and the training images that kNN searches.

    Attributes:
        bank: Labeled training images; None where the classes of the held-out images are not among theirs.
        queries: Labeled held-out images.
        metric: Which metric chooses.
    """

    bank: ImageSet | None
    queries: ImageSet
    metric: str

    def evaluate(self, method: Method) -> dict[str, float]:
        """`knn_top1` (with a bank), `map_at_r` and `p_at_1` of the encoder as it is now, each in [0, 1].

        Example:
            held_out(Evaluation(every=100), *open_data(config)).evaluate(method)["knn_top1"]

        The method is left as it was: modes, gradients and torch's own generator. Features that are not finite give
        metrics that are not a number.

        Returns:
            By name; without retrieval where no class has two held-out images.
        """
        with _encoding(method) as encoder:
            queries = _features(method, encoder, self.queries)
            bank = None if self.bank is None else _features(method, encoder, self.bank)
        found: dict[str, float] = {}
        if self.bank is not None and bank is not None:
            classes = len(self.bank.classes)
            voted = metrics.knn_predict(bank, self.bank.labels, queries, num_classes=classes)
            found["knn_top1"] = float((voted == self.queries.labels).double().mean())
        ranked = metrics.retrieval(queries, self.queries.labels)
        if len(ranked.queries):
            found["map_at_r"] = float(ranked.map_at_r.mean())
            found["p_at_1"] = float(ranked.p_at_1.mean())
        finite = torch.isfinite(queries).all() and (bank is None or torch.isfinite(bank).all())
        return found if finite else dict.fromkeys(found, float("nan"))


def held_out(evaluation: Evaluation, train: ImageSet, validation: ImageSet) -> HeldOut:
    """What a run evaluates on: a part of `validation`, and a part of `train` to search.

    Held-out images are seen as the exported encoder will see them; training images that are stored larger, whole.

    Example:
        held_out(Evaluation(every=100), train, validation).metric  # "knn_top1"

    Args:
        evaluation: How many images, and which metric.
        train: The training images.
        validation: The held-out ones; classes that are not trained on have numbers above the training part's.

    Raises:
        ConfigError: Nothing is held out, or it has no labels, or the metric cannot be computed.
    """
    labeled = torch.nonzero(validation.labels >= 0)[:, 0]
    if not len(labeled):
        lacking = "has a label" if len(validation) else "is held out"
        raise ConfigError(
            f"evaluation.every: no image {lacking}; set data.label and data.validation, or evaluation.every=0"
        )
    unseen = bool((validation.labels >= len(train.classes)).all())
    queries = validation.subset(_some(validation.labels, evaluation.images, whole_classes=unseen))
    known = torch.nonzero(train.labels >= 0)[:, 0]
    bank = None
    if not unseen and len(known):
        bank = train.subset(_some(train.labels, evaluation.images))
    metric = evaluation.metric
    if metric == "auto":
        metric = "map_at_r" if bank is None else "knn_top1"
    if metric == "knn_top1" and bank is None:
        raise ConfigError(
            "evaluation.metric: kNN needs labeled training images of the held-out classes; take map_at_r"
        )
    if metric == "map_at_r" and int(torch.bincount(queries.labels).max()) < 2:
        raise ConfigError(
            "evaluation.metric: no class has two held-out images, so MAP@R has no meaning; raise data.validation, or "
            "set data.validation_of=classes"
        )
    return HeldOut(bank, queries, metric)


def _some(labels: Tensor, most: int, *, whole_classes: bool = False) -> Tensor:
    """Rows of labeled images, about `most`, evenly spread over the images, or over the classes, which stay whole."""
    rows = torch.nonzero(labels >= 0)[:, 0]
    if len(rows) <= most:
        return rows
    if not whole_classes:
        return rows[torch.linspace(0, len(rows) - 1, most).long()]
    classes = labels[rows].unique()
    taken = max(1, most * len(classes) // len(rows))
    chosen = classes[torch.linspace(0, len(classes) - 1, taken).long()]
    return rows[torch.isin(labels[rows], chosen)]


@contextlib.contextmanager
def _encoding(method: Method) -> Iterator[nn.Module]:
    """The method's encoder in eval mode, without gradient; afterwards every module has its own mode again."""
    modes = [(module, module.training) for module in method.modules()]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield method.encoder().eval()
    finally:
        for module, mode in modes:
            module.training = mode


def _features(method: Method, encoder: nn.Module, images: ImageSet) -> Tensor:
    """float32 (N, D)."""
    blocks = []
    for rows in torch.arange(len(images)).split(_BATCH):
        batch = images.batch(rows).to(method.device)
        blocks.append(encoder(method.view(batch.images)).float().cpu())
    return torch.cat(blocks)
