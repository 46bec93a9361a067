"""Endless batches of training images, from any batch on, for one rank of several.

In memory a batch is one gather; streamed, images are decoded by the workers of a DataLoader. Either way the order is
the sampler's matrix, so that a run can go on at any batch.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from embedkit.errors import ConfigError, SourceError
from embedkit.training.data.images import Batch, ImageSet
from embedkit.training.data.samplers import Sampler

__all__ = ["Loader"]


class Loader:
    """Endless batches, from any batch on.

    Args:
        images: The training set.
        sampler: Makes the matrix of an epoch.
        batch_size: Of all ranks together.
        seed: Of the order.
        position: Asked at each `iter()`: how many batches were seen before.
        rank: Which columns of the matrix are taken: those that the sampler gives it, groups whole.
        world: Processes that train together; the batch size is a multiple of it.
        workers: Processes that decode streamed images.
    """

    def __init__(
        self,
        images: ImageSet,
        sampler: Sampler,
        *,
        batch_size: int,
        seed: int,
        position: Callable[[], int] = lambda: 0,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
    ) -> None:
        if batch_size < 1 or batch_size % world:
            raise ConfigError(f"batch_size: expected a multiple of the {world} devices, found {batch_size}")
        self.images, self.sampler, self.batch_size, self.seed = images, sampler, batch_size, seed
        self.position, self.rank, self.world, self.workers = position, rank, world, workers
        self.columns = sampler.columns(batch_size, rank, world)
        self.steps_per_epoch = len(self._epoch(0))
        self._waited = self._begun = 0.0

    def __iter__(self) -> Iterator[Batch]:
        """Batches from `position` on; a new pass of the workers, which then live as long as it does."""
        orders = self._orders()
        batches = self._decoded(orders) if self.images.streamed else map(self.images.batch, orders)
        self._waited, self._begun = 0.0, time.monotonic()
        while True:
            asked = time.monotonic()
            batch = next(batches)
            self._waited += time.monotonic() - asked
            yield batch

    @property
    def wait(self) -> float:
        """The share of the time since the first batch was asked for in which training waited for a batch, 0 to 1."""
        passed = time.monotonic() - self._begun
        return min(1.0, self._waited / passed) if self._begun and passed > 0 else 0.0

    def say(self) -> None:
        """Say on stderr, of a streamed run, the share of waiting and how many images could not be read."""
        if self.images.streamed:
            print(f"embedkit: {self.wait:.0%} of the time went to waiting for images", file=sys.stderr)
        if self.images.tried is not None:
            self.images.tried.say("replaced by others of their batch")

    def _epoch(self, epoch: int) -> Tensor:
        return self.sampler.epoch(self.images, self.batch_size, self.seed, epoch)

    def _orders(self) -> Iterator[Tensor]:
        """The indices of every batch, without end."""
        epoch, start = divmod(self.position(), self.steps_per_epoch)
        while True:
            yield from self._epoch(epoch)[start:, self.columns]
            epoch, start = epoch + 1, 0

    def _decoded(self, orders: Iterator[Tensor]) -> Iterator[Batch]:
        # one DataLoader over all epochs: starting workers, and filling their queue, would cost each of them seconds
        loader: Any = torch.utils.data.DataLoader(
            _Decoding(self.images),
            batch_sampler=_Lists(orders),
            num_workers=self.workers,
            collate_fn=_as_it_is,
        )
        for found in loader:
            if isinstance(
                found, SourceError
            ):  # raised in a worker it would bring the worker's traceback along
                raise found
            batch, indices, unreadable = found
            self.images.count(indices, unreadable)
            yield batch


class _Lists:
    """The batches of one pass as a DataLoader takes them."""

    def __init__(self, orders: Iterator[Tensor]) -> None:
        self._orders = orders

    def __iter__(self) -> Iterator[list[int]]:
        return (order.tolist() for order in self._orders)


class _Decoding(torch.utils.data.Dataset):
    """What a DataLoader's worker decodes: whole batches, with what could not be read."""

    def __init__(self, images: ImageSet) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> tuple[Batch, Tensor, dict[int, str]] | SourceError:
        asked = torch.tensor(indices)
        try:
            batch, unreadable = self.images.read(asked)
        except SourceError as error:
            return error
        return batch, asked, unreadable


def _as_it_is(batch: Any) -> Any:
    return batch
