"""Targets of images, where some have none: -1 stands for a label that is missing or hidden, and never for a class.

What is written here is the only accuracy and the only mean cross-entropy of the package, so that no method counts an
image without a label as wrong, or divides by the number of images where that of labels is meant.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

__all__ = ["MISSING", "accuracy", "cross_entropy", "labeled_mean"]

MISSING = -1


def accuracy(predictions: Tensor, labels: Tensor) -> Tensor:
    """The share of labeled rows that are predicted right.

    Args:
        predictions: Classes int64 (N,), or logits (N, K), whose largest counts.
        labels: int64 (N,); rows of -1 are left out.

    Returns:
        A scalar in [0, 1]; not a number where no row is labeled (`Method` logs no such value).
    """
    if predictions.ndim == 2:
        predictions = predictions.argmax(1)
    known = labels != MISSING
    return ((predictions == labels) & known).sum() / known.sum()


def labeled_mean(values: Tensor, labels: Tensor) -> Tensor:
    """The mean of `values` over the rows that have a label; 0, with a gradient of 0, where none has.

    With several ranks, the mean over ranks (which DDP takes of gradients) is the mean over the labeled rows of all.

    Args:
        values: (N,), a loss of each row; those of rows of -1 are ignored.
        labels: int64 (N,).

    Returns:
        A scalar.
    """
    known = labels != MISSING
    count = known.sum().to(values.dtype)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(count)
        count = count / dist.get_world_size()
    return values.masked_fill(~known, 0.0).sum() / torch.where(count == 0, torch.ones_like(count), count)


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """The mean over labeled rows of -sum_k q_k log softmax(logits)_k, q = (1 - smoothing) onehot + smoothing / K.

    Args:
        logits: (N, K), in float32 or wider.
        labels: int64 (N,), classes 0..K-1; rows of -1 are left out.
        smoothing: In [0, 1).

    Returns:
        A scalar, in nats: ln K for equal logits, whatever the smoothing; 0 without any label.
    """
    values = F.cross_entropy(
        logits, labels, ignore_index=MISSING, label_smoothing=smoothing, reduction="none"
    )
    return labeled_mean(values, labels)
