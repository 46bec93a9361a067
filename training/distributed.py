"""Rows of every rank side by side, with gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["gather", "mean_over_ranks", "rank", "world"]


def rank() -> int:
    """This process's number among those that train together; 0 for one alone."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean over all ranks, without gradient; `value` itself for one process alone."""
    if world() == 1:
        return value
    value = value.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(value)
    return value / world()


def gather(z: Tensor) -> Tensor:
    """The rows of every rank, in the order of ranks.

    A loss whose terms are means over the local anchors, against all gathered rows, has the gradient of the
    union batch once it is averaged over ranks, as DDP does.

    Args:
        z: (N, ...), the same shape on every rank.

    Returns:
        (world * N, ...); the gradient reaches the rows of every rank. `z` itself for one process alone.
    """
    if world() == 1:
        return z
    return _Gather.apply(z)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.rows = len(z)
        parts = [torch.empty_like(z) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, z.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # every rank's loss depends on these rows, so their gradients add up
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad[rank() * ctx.rows :][: ctx.rows]
