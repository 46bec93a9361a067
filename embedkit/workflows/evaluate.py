"""Evaluation of encoders, which needs PyTorch: loaded when it is called, and not before."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from embedkit._io.optional import requires

if TYPE_CHECKING:
    from embedkit.training.evaluation.protocol import Evaluation

__all__ = ["evaluate"]


def evaluate(
    source: str | os.PathLike[str],
    *,
    data: str,
    labels: Sequence[str] = ("label",),
    baselines: bool = True,
    limit: int = 0,
    notify: Callable[[str], None] = lambda message: None,
) -> Evaluation:
    """Evaluate an entry or a run by kNN, a linear probe, retrieval, clustering, verification and effective rank.

    Everything is fitted on the training part of the data and measured on its test part. A second call gives equal
    metrics.

    Args:
        source: An entry by name or folder, as `load_encoder` takes it, or a run's folder.
        data: IDX files, Parquet files or class folders with a training and a test part, or `sklearn:digits`.
        labels: Columns of Parquet files; other data have one, whatever its name.
        baselines: Whether the same network at random initialization, raw pixels and their principal components are
            evaluated too.
        limit: At most so many evenly spread images of each part; 0 for all.
        notify: Told what was done, with the seconds that it took.

    Returns:
        The metrics, by model and label column.

    Raises:
        MissingDependencyError: PyTorch is not installed; the message holds the pip line.
        ConfigError: Data without a test part or without labels.
        EntryNotFoundError: No such entry.
        OutputError: A run's folder without a checkpoint.
        SourceError: An image that cannot be read.
        EntryError: Not an entry, or features that are not finite.

    Examples:
        >>> found = embedkit.evaluate("simclr-r10", data="sklearn:digits", limit=100, baselines=False)
        >>> found.results[0].model, found.results[0].label, "knn_top1" in found.results[0].metrics
        ('encoder', 'label', True)
    """
    with requires("evaluation", "train,cpu"):
        from embedkit.training.evaluation import protocol
    return protocol.evaluate(
        source, data=data, labels=labels, baselines=baselines, limit=limit, notify=notify
    )
