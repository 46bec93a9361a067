"""BatchNorm in a pass that normalizes by its own batch and leaves the running statistics as they are.

A network that is given labeled and unlabeled images in passes of their own is judged on images like the labeled ones:
the source codes of Pseudo-Label and MixMatch let only the first pass of a step move the running statistics.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["running_statistics_kept"]


@contextmanager
def running_statistics_kept(*modules: nn.Module) -> Iterator[None]:
    """Within it, no BatchNorm of `modules` moves its running mean and variance or counts a batch.

    In training mode it still normalizes by the statistics of its batch, with gradient; in eval mode by the running
    ones, as always.
    """
    layers = [
        layer
        for module in modules
        for layer in module.modules()
        if isinstance(layer, _BatchNorm) and layer.track_running_stats and layer.training
    ]
    try:
        for layer in layers:
            layer.track_running_stats = False
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
