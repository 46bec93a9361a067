"""Mean and second moments of vectors that go by, and their principal components."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from embedkit.training.distributed import mean_over_ranks

__all__ = ["Moments"]


class Moments(nn.Module):
    """The means of x and of x x' over all batches (of one size) so far; they stand in the checkpoint.

    Args:
        dim: Width P of the vectors.
    """

    count: Tensor
    mean: Tensor
    second: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("second", torch.zeros(dim, dim))

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Take in a batch (N, P), of all ranks."""
        self.count += 1
        self.mean.lerp_(mean_over_ranks(x.mean(0)), 1 / self.count)
        self.second.lerp_(mean_over_ranks(x.mT @ x / len(x)), 1 / self.count)

    def project(self, x: Tensor, components: int) -> Tensor:
        """Vectors (N, P) -> the nearest ones (N, P) of the plane of the largest principal components."""
        mean = self.mean.double()
        covariance = self.second.double() - torch.outer(mean, mean)
        axes = torch.linalg.eigh(covariance)[1][:, -components:]  # (P, components)
        return ((x.double() - mean) @ axes @ axes.mT + mean).to(x.dtype)
