"""The pretext metrics of a method on held-out images, with their intervals and their levels by chance."""

from __future__ import annotations

import math
import statistics

import torch

from embedkit.model.config import BY_CHANCE
from embedkit.training.data import ImageSet
from embedkit.training.data.targets import MISSING
from embedkit.training.method import Method

__all__ = ["pretext_intervals", "pretext_on"]

_MOST_IMAGES, _BATCH = 2048, 256
#: Groups of images of an interval, and the 97.5 % point of Student's t for that many less one.
_GROUPS, _T = 16, 2.131


def pretext_on(
    method: Method, images: ImageSet, generator: torch.Generator | None = None
) -> dict[str, float]:
    """The pretext metrics on up to 2,048 images, means over batches of up to 256; {} where there are none.

    Args:
        method: Left in eval mode.
        images: Held-out ones.
        generator: One for all batches; when None every batch begins with the same one.

    Returns:
        The metrics by name, and `<name>_by_chance` of those whose level without learning is known.
    """
    if not len(images):
        return {}
    values = _by_batch(method, images, min(_BATCH, len(images)), generator)
    found = {name: sum(each) / len(each) for name, each in values.items()}
    chance = {f"{name}{BY_CHANCE}": level for name, level in method.pretext_chance().items() if name in found}
    return {**found, **chance}


def pretext_intervals(method: Method, images: ImageSet) -> dict[str, tuple[float, float]]:
    """95 % intervals of what `pretext_on` gives on the same images.

    The images (up to 2,048) are divided into 16 groups; half of an interval is Student's t times the standard error
    of the groups' mean. For a metric that compares the images of a batch, such as whose neighbor is nearest, a group is
    an easier batch: its spread is taken, and the value that it is laid around is that of whole batches.

    Args:
        method: Left in eval mode.
        images: Held-out ones.

    Returns:
        By name of the metric; {} for fewer than 64 images, and no metric that a group lacks, for want of labels.
    """
    size = min(_MOST_IMAGES, len(images)) // _GROUPS
    if size < 4:
        return {}
    groups, found = _by_batch(method, images, size, method.generator("validation")), {}
    for name, value in pretext_on(method, images).items():
        each = groups.get(name, [])
        if len(each) == _GROUPS and not name.endswith(BY_CHANCE):
            half = _T * statistics.stdev(each) / math.sqrt(_GROUPS)
            found[name] = (value - half, value + half)
    return found


def _by_batch(
    method: Method, images: ImageSet, size: int, generator: torch.Generator | None
) -> dict[str, list[float]]:
    """The metrics of each whole batch of `size`, without those that are no number in it."""
    values: dict[str, list[float]] = {}
    method.eval()
    with torch.no_grad():
        for rows in torch.arange(min(_MOST_IMAGES, len(images)) // size * size).split(size):
            batch = images.batch(rows).to(method.device)
            if method.facts.num_classes:  # a class that was held out whole has no place among the method's
                unseen = batch.labels >= method.facts.num_classes
                batch = batch._replace(labels=batch.labels.masked_fill(unseen, MISSING))
            draws = generator or method.generator("validation")
            for name, value in method.pretext_metric(batch, draws).items():
                if not math.isnan(float(value)):  # of a batch without any label
                    values.setdefault(name, []).append(float(value))
    return values
