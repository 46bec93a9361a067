"""The pretext metrics of a method on held-out images."""

from __future__ import annotations

import math

import torch

from embedkit.training.data import ImageSet
from embedkit.training.data.targets import MISSING
from embedkit.training.method import Method

__all__ = ["pretext_on"]


def pretext_on(
    method: Method, images: ImageSet, generator: torch.Generator | None = None
) -> dict[str, float]:
    """The pretext metrics on up to 2,048 images, means over batches of up to 256; {} where there are none.

    Args:
        method: Left in eval mode.
        images: Held-out ones.
        generator: One for all batches; when None every batch begins with the same one.
    """
    if not len(images):
        return {}
    size = min(256, len(images))
    sums: dict[str, list[float]] = {}
    method.eval()
    with torch.no_grad():
        for rows in torch.arange(min(2048, len(images)) // size * size).split(size):
            batch = images.batch(rows).to(method.device)
            if method.facts.num_classes:  # a class that was held out whole has no place among the method's
                unseen = batch.labels >= method.facts.num_classes
                batch = batch._replace(labels=batch.labels.masked_fill(unseen, MISSING))
            draws = generator or method.generator("validation")
            for name, value in method.pretext_metric(batch, draws).items():
                if not math.isnan(float(value)):  # of a batch without any label
                    sums.setdefault(name, []).append(float(value))
    return {name: sum(values) / len(values) for name, values in sums.items()}
