"""In which order batches take images: matrices of indices, functions of (seed, epoch) alone.

A sampler also says which columns of a batch each rank takes, so that what belongs together (the images of an
identity, the labeled and the unlabeled part) stays whole on a rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from embedkit.errors import ConfigError
from embedkit.training.data.images import ImageSet

__all__ = ["IdentityBalanced", "Labeled", "LabeledAndUnlabeled", "Sampler", "Shuffled"]

#: Row groups of a streamed Parquet file whose images are shuffled together.
_WINDOW = 8


class Sampler(ABC):
    """Draws the batches of an epoch; a subclass is a frozen keyword-only dataclass."""

    @abstractmethod
    def epoch(self, images: ImageSet, batch_size: int, seed: int, epoch: int) -> Tensor:
        """Indices of images: int64 (batches, batch_size), a function of (seed, epoch)."""

    def columns(self, batch_size: int, rank: int, world: int) -> Tensor:
        """Which columns of the matrix `rank` takes: int64 (batch_size / world,), in the order of the matrix."""
        return torch.arange(rank, batch_size, world)


@dataclass(frozen=True, kw_only=True)
class Shuffled(Sampler):
    """Every image once an epoch, in a new order; the last, smaller batch is left out."""

    def epoch(self, images: ImageSet, batch_size: int, seed: int, epoch: int) -> Tensor:
        """int64 (batches, batch_size)."""
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(len(images))
        if images.blocks is not None:
            # Blocks in random order, images shuffled within windows of a few blocks: what is read together
            # is used together, so a reader keeps a window and not the file.
            blocks = images.blocks.numpy()
            place = rng.permutation(int(blocks.max()) + 1)
            order = order[np.argsort(place[blocks[order]] // _WINDOW, kind="stable")]
        return _matrix(order, batch_size, "batch_size")


@dataclass(frozen=True, kw_only=True)
class Labeled(Sampler):
    """Every labeled image once an epoch, in a new order; the others never: for a method that only labels teach."""

    def epoch(self, images: ImageSet, batch_size: int, seed: int, epoch: int) -> Tensor:
        """int64 (batches, batch_size)."""
        known = np.flatnonzero(images.labels.numpy() >= 0)
        return _matrix(np.random.default_rng([seed, epoch]).permutation(known), batch_size, "batch_size")


@dataclass(frozen=True, kw_only=True)
class IdentityBalanced(Sampler):
    """P identities with K images each in every batch, for losses over pairs and triplets.

    An identity with fewer than K images repeats some of them. An epoch takes the images of each identity K
    at a time; what does not fill K, and identities that do not fill a batch, wait for the next epoch's order.

    Attributes:
        images_per_identity: K; P = batch_size / K.
    """

    images_per_identity: int = 4

    def epoch(self, images: ImageSet, batch_size: int, seed: int, epoch: int) -> Tensor:
        """int64 (batches, P * K): the K images of an identity stand side by side."""
        k = self.images_per_identity
        if k < 1 or batch_size % k:
            raise ConfigError(f"images_per_identity: {k} does not divide the batch size {batch_size}")
        rng = np.random.default_rng([seed, epoch])
        labels = images.labels.numpy()
        if not (labels >= 0).any():
            raise ConfigError(
                "data.label: batches of identities need labels, and no image has one; name the column"
            )
        order = rng.permutation(np.flatnonzero(labels >= 0))
        order = order[np.argsort(labels[order], kind="stable")]
        _, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
        # (groups, K): the r-th K images of an identity, and the round r
        groups, rounds = [], []
        for start, count in zip(starts, counts, strict=True):
            own = order[start : start + count]
            full = max(1, count // k)
            groups.append(np.resize(own, max(count, k))[: full * k].reshape(full, k))
            rounds.append(np.arange(full))
        chosen, turn = np.concatenate(groups), np.concatenate(rounds)
        batches = []
        per_batch = batch_size // k
        for r in range(int(turn.max()) + 1):  # an identity stands once in a round, so once in a batch
            ids = rng.permutation(np.flatnonzero(turn == r))
            whole = len(ids) // per_batch * per_batch
            batches.append(chosen[ids[:whole]].reshape(-1, batch_size))
        rows = np.concatenate(batches)
        if not len(rows):
            raise ConfigError(
                f"batch_size: {per_batch} identities of {k} images are asked for, and the data have {len(starts)}"
            )
        return torch.from_numpy(rows[rng.permutation(len(rows))])

    def columns(self, batch_size: int, rank: int, world: int) -> Tensor:
        """Whole identities, side by side."""
        identities = batch_size // self.images_per_identity
        if identities % world:
            raise ConfigError(
                f"batch_size: {identities} identities a batch are no multiple of the {world} devices"
            )
        return torch.arange(batch_size).chunk(world)[rank]


@dataclass(frozen=True, kw_only=True)
class LabeledAndUnlabeled(Sampler):
    """Labeled images and `ratio` times as many others in every batch, the labeled first.

    An epoch is one pass over the unlabeled images. As in FixMatch, all images serve as unlabeled ones,
    the labeled too. The batch size counts both kinds.

    Attributes:
        ratio: FixMatch's mu.
    """

    ratio: int = 7

    def epoch(self, images: ImageSet, batch_size: int, seed: int, epoch: int) -> Tensor:
        """int64 (batches, batch_size): the first batch_size / (1 + ratio) columns are labeled."""
        if self.ratio < 1 or batch_size % (1 + self.ratio):
            raise ConfigError(f"batch_size: {batch_size} is not a multiple of 1 + ratio = {1 + self.ratio}")
        known = np.flatnonzero(images.labels.numpy() >= 0)
        if not len(known):
            raise ConfigError("data.label: this method needs some labeled images, and none has a label")
        rng = np.random.default_rng([seed, epoch])
        columns = batch_size // (1 + self.ratio)
        others = _matrix(rng.permutation(len(images)), batch_size - columns, "batch_size")
        need = len(others) * columns
        passes = [rng.permutation(known) for _ in range(-(-need // len(known)))]
        labeled = torch.from_numpy(np.concatenate(passes)[:need]).reshape(-1, columns)
        return torch.cat([labeled, others], dim=1)

    def columns(self, batch_size: int, rank: int, world: int) -> Tensor:
        """A share of the labeled columns, then the same share of the others: the ratio holds on every rank."""
        labeled = batch_size // (1 + self.ratio)
        if labeled % world:
            raise ConfigError(
                f"batch_size: {labeled} labeled images a batch are no multiple of the {world} devices"
            )
        own = torch.arange(batch_size)
        return torch.cat([own[:labeled][rank::world], own[labeled:][rank::world]])


def _matrix(order: np.ndarray, columns: int, field_name: str) -> Tensor:
    if len(order) < columns:
        raise ConfigError(
            f"{field_name}: {columns} images are asked for, and the training set has {len(order)} (without those "
            f"set aside by data.validation); --set {field_name}=N takes fewer"
        )
    return torch.from_numpy(order[: len(order) // columns * columns]).reshape(-1, columns)
