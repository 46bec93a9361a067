"""Endless batches of training images, from any batch on, for one rank of several.

In memory a batch is one gather; streamed, images are decoded by the workers of a DataLoader. Either way the order is
the sampler's matrix, so that a run can go on at any batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from embedkit.errors import ConfigError
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

    def __iter__(self) -> Iterator[Batch]:
        epoch, start = divmod(self.position(), self.steps_per_epoch)
        while True:
            rows = self._epoch(epoch)[start:, self.columns]
            yield from self._stream(rows) if self.images.streamed else map(self.images.batch, rows)
            epoch, start = epoch + 1, 0

    def _epoch(self, epoch: int) -> Tensor:
        return self.sampler.epoch(self.images, self.batch_size, self.seed, epoch)

    def _stream(self, rows: Tensor) -> Iterator[Batch]:
        loader: Any = torch.utils.data.DataLoader(
            _Decoding(self.images),
            batch_sampler=rows.tolist(),
            num_workers=self.workers,
            collate_fn=_as_it_is,
        )
        yield from loader


class _Decoding(torch.utils.data.Dataset):
    """What a DataLoader's worker decodes: whole batches."""

    def __init__(self, images: ImageSet) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> Batch:
        return self.images.batch(torch.tensor(indices))


def _as_it_is(batch: Any) -> Any:
    return batch
