"""Pictures for training: where they come from, how they are split, and in which order batches take them.

In memory, pictures are one uint8 tensor and a batch is one gather; streamed, they are decoded by the workers of
a DataLoader. Either way the order is a matrix of indices (batches, batch size) computed from (seed, epoch)
alone, so that a run can go on at any batch, and every rank takes its columns of the same matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from embedkit.errors import ConfigError
from embedkit.model.preprocess import Preprocess
from embedkit.training.datasets import Source, open_source

__all__ = [
    "Batch",
    "DataConfig",
    "IdentityBalanced",
    "LabelledAndUnlabelled",
    "Loader",
    "Pictures",
    "Shuffled",
    "keep_labels",
    "load_pictures",
    "split_validation",
]

#: Row groups of a streamed Parquet file whose pictures are shuffled together.
_WINDOW = 8


class Batch(NamedTuple):
    """One step's pictures.

    Attributes:
        images: uint8 (N, C, H, W).
        labels: int64 (N,), a class 0..K-1, or -1 where there is no label or it is hidden.
        indices: int64 (N,), which pictures these are.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor


@dataclass(frozen=True)
class Pictures:
    """A set of pictures of one size.

    Attributes:
        images: uint8 (N, C, H, W) in memory, or the source that they are decoded from, batch by batch.
        labels: int64 (N,), -1 where there is none.
        classes: Names of the labels 0..K-1.
        rows: int64 (N,), which rows of `images` these pictures are.
        preprocess: How a picture of the source is brought to size; None in memory.
    """

    images: Tensor | Source
    labels: Tensor
    classes: tuple[str, ...]
    rows: Tensor
    preprocess: Preprocess | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def streamed(self) -> bool:
        """Whether pictures are decoded when a batch asks for them."""
        return self.preprocess is not None

    @property
    def blocks(self) -> Tensor | None:
        """int64 (N,), the block (row group) that each picture is read with; None where any order is as fast."""
        blocks = None if isinstance(self.images, Tensor) else self.images.blocks
        return None if blocks is None else torch.from_numpy(blocks)[self.rows]

    def batch(self, indices: Tensor) -> Batch:
        """The pictures `indices` (N,), each in 0..len(self)-1."""
        rows = self.rows[indices]
        if isinstance(self.images, Tensor):
            images = self.images[rows]
        else:
            images = self.images.decode(rows.numpy(), self._contract())
        return Batch(images, self.labels[indices], indices)

    def subset(self, indices: Tensor) -> Pictures:
        """The pictures `indices` (M,) alone; pixels are not copied."""
        return Pictures(self.images, self.labels[indices], self.classes, self.rows[indices], self.preprocess)

    def statistics(self, most: int = 4096) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation per channel, in units of [0, 1], over `most` evenly spread pictures."""
        images = self.batch(torch.linspace(0, len(self) - 1, min(most, len(self))).long()).images
        values = images.movedim(1, 0).flatten(1).double() / 255  # (C, pixels)
        mean, std = values.mean(1), values.std(1, correction=0).clamp(min=1 / 255)
        return tuple(round(v, 5) for v in mean.tolist()), tuple(round(v, 5) for v in std.tolist())

    def _contract(self) -> Preprocess:
        if self.preprocess is None:
            raise ConfigError("pictures in memory need no preprocessing")
        return self.preprocess


@dataclass(frozen=True, kw_only=True)
class Shuffled:
    """Every picture once an epoch, in a new order; the last, smaller batch is left out."""

    def epoch(self, pictures: Pictures, batch_size: int, seed: int, epoch: int) -> Tensor:
        """int64 (batches, batch_size)."""
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(len(pictures))
        if pictures.blocks is not None:
            # Blocks in random order, pictures shuffled within windows of a few blocks: what is read together
            # is used together, so a reader keeps a window and not the file.
            blocks = pictures.blocks.numpy()
            place = rng.permutation(int(blocks.max()) + 1)
            order = order[np.argsort(place[blocks[order]] // _WINDOW, kind="stable")]
        return _matrix(order, batch_size, "batch_size")


@dataclass(frozen=True, kw_only=True)
class IdentityBalanced:
    """P identities with K pictures each in every batch, for losses over pairs and triplets.

    An identity with fewer than K pictures repeats some of them. An epoch takes the pictures of each identity K
    at a time; what does not fill K, and identities that do not fill a batch, wait for the next epoch's order.

    Attributes:
        pictures_per_identity: K; P = batch_size / K.
    """

    pictures_per_identity: int = 4

    def epoch(self, pictures: Pictures, batch_size: int, seed: int, epoch: int) -> Tensor:
        """int64 (batches, P * K): the K pictures of an identity stand side by side."""
        k = self.pictures_per_identity
        if k < 1 or batch_size % k:
            raise ConfigError(f"pictures_per_identity: {k} does not divide the batch size {batch_size}")
        rng = np.random.default_rng([seed, epoch])
        labels = pictures.labels.numpy()
        if not (labels >= 0).any():
            raise ConfigError(
                "data.label: batches of identities need labels, and no picture has one; name the column"
            )
        order = rng.permutation(np.flatnonzero(labels >= 0))
        order = order[np.argsort(labels[order], kind="stable")]
        _, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
        # (groups, K): the r-th K pictures of an identity, and the round r
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
                f"batch_size: {per_batch} identities of {k} pictures are asked for, and the data have {len(starts)}"
            )
        return torch.from_numpy(rows[rng.permutation(len(rows))])


@dataclass(frozen=True, kw_only=True)
class LabelledAndUnlabelled:
    """Labelled pictures and `ratio` times as many others in every batch, the labelled first.

    An epoch is one pass over the unlabelled pictures. As in FixMatch, all pictures serve as unlabelled ones,
    the labelled too. The batch size counts both kinds.

    Attributes:
        ratio: FixMatch's mu.
    """

    ratio: int = 7

    def epoch(self, pictures: Pictures, batch_size: int, seed: int, epoch: int) -> Tensor:
        """int64 (batches, batch_size): the first batch_size / (1 + ratio) columns are labelled."""
        if self.ratio < 1 or batch_size % (1 + self.ratio):
            raise ConfigError(f"batch_size: {batch_size} is not a multiple of 1 + ratio = {1 + self.ratio}")
        known = np.flatnonzero(pictures.labels.numpy() >= 0)
        if not len(known):
            raise ConfigError("data.label: this method needs some labelled pictures, and none has a label")
        rng = np.random.default_rng([seed, epoch])
        columns = batch_size // (1 + self.ratio)
        others = _matrix(rng.permutation(len(pictures)), batch_size - columns, "batch_size")
        need = len(others) * columns
        passes = [rng.permutation(known) for _ in range(-(-need // len(known)))]
        labelled = torch.from_numpy(np.concatenate(passes)[:need]).reshape(-1, columns)
        return torch.cat([labelled, others], dim=1)


Sampler = Shuffled | IdentityBalanced | LabelledAndUnlabelled


def _matrix(order: np.ndarray, columns: int, field_name: str) -> Tensor:
    if len(order) < columns:
        raise ConfigError(
            f"{field_name}: {columns} pictures are asked for, and the training set has {len(order)} (without those "
            f"set aside by data.validation); --set {field_name}=N takes fewer"
        )
    return torch.from_numpy(order[: len(order) // columns * columns]).reshape(-1, columns)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where pictures come from and how they are brought to size.

    Attributes:
        path: A folder with the IDX files of MNIST or Fashion-MNIST, a Parquet file or a folder of them with an
            image column, a folder of class folders, `sklearn:digits`, or `synthetic:N` (N seeded pictures).
        label: Column of a Parquet file; where there is no such column the pictures have no labels.
        color: `gray`, `rgb` or `lab_l`.
        image_size: Side in pixels: the shorter side is brought to it, the middle kept.
        validation: Share of the training pictures that is set aside, by class; 0 for none.
        labels_per_class: Labels that are kept; 0 for all.
        stream: Decode batch by batch, for data larger than memory.
        workers: Processes that decode when streaming.
        sampler: How batches are drawn.
    """

    path: str = ""
    label: str = "label"
    color: Literal["gray", "rgb", "lab_l"] = "gray"
    image_size: int = 28
    validation: float = 0.1
    labels_per_class: int = 0
    stream: bool = False
    workers: int = 2
    sampler: Sampler = field(default_factory=Shuffled)

    def preprocess(self, mean: tuple[float, ...], std: tuple[float, ...]) -> Preprocess:
        """The contract that an encoder of these pictures is exported with."""
        return Preprocess(
            color=self.color,
            size=(self.image_size, self.image_size),
            resize_size=self.image_size,
            mean=mean,
            std=std,
        )


def load_pictures(config: DataConfig, split: Literal["train", "test"] = "train") -> Pictures:
    """Open a data set.

    Args:
        config: `path`, `label`, `color`, `image_size` and `stream` are used.
        split: `test` is for reporting alone; choices are made on a part of `train`.

    Returns:
        All pictures of the split; labels are numbered by the sorted names that the split holds.

    Raises:
        ConfigError: No path, or nothing there that is understood.
        SourceError: A file that cannot be read.
    """
    source = open_source(config.path, split, label=config.label)
    channels = 3 if config.color == "rgb" else 1
    preprocess = config.preprocess((0.0,) * channels, (1.0,) * channels)
    labels, rows = torch.from_numpy(source.labels), torch.arange(len(source))
    if config.stream:
        return Pictures(source, labels, source.classes, rows, preprocess)
    return Pictures(source.decode(rows.numpy(), preprocess), labels, source.classes, rows)


def split_validation(pictures: Pictures, share: float, seed: int) -> tuple[Pictures, Pictures]:
    """Training and validation part: `share` of every class, drawn by `seed`, goes to the second."""
    if not 0 <= share < 1:
        raise ConfigError(f"data.validation: expected a share of 0 to below 1, found {share}")
    held_out = _first_per_class(pictures.labels, seed, lambda count: round(count * share))
    return pictures.subset(torch.nonzero(~held_out)[:, 0]), pictures.subset(torch.nonzero(held_out)[:, 0])


def keep_labels(pictures: Pictures, per_class: int, seed: int) -> Pictures:
    """The same pictures with `per_class` labels of each class, drawn by `seed`; the others become -1.

    Raises:
        ConfigError: A class has fewer pictures.
    """
    counts = torch.bincount(pictures.labels[pictures.labels >= 0], minlength=len(pictures.classes))
    if per_class < 1 or not len(counts) or int(counts.min()) < per_class:
        fewest = int(counts.min()) if len(counts) else 0
        raise ConfigError(
            f"data.labels_per_class: expected 1 to {fewest}, the smallest class; found {per_class}"
        )
    kept = _first_per_class(pictures.labels, seed, lambda count: per_class)
    labels = torch.where(kept, pictures.labels, -1)
    return Pictures(pictures.images, labels, pictures.classes, pictures.rows, pictures.preprocess)


def _first_per_class(labels: Tensor, seed: int, how_many: Callable[[int], int]) -> Tensor:
    """Mask (N,): of each class the first `how_many(count)` of a random order."""
    order = np.random.default_rng(seed).permutation(len(labels))
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        own = order[labels.numpy()[order] == int(label)]
        chosen[torch.from_numpy(own[: how_many(len(own))])] = True
    return chosen


class Loader:
    """Endless batches, from any batch on.

    Args:
        pictures: The training set.
        sampler: Makes the matrix of an epoch.
        batch_size: Of all ranks together.
        seed: Of the order.
        position: Asked at each `iter()`: how many batches were seen before.
        rank: Which columns of the matrix are taken: rank, rank + world, ...
        world: Processes that train together; the batch size is a multiple of it.
        workers: Processes that decode streamed pictures.
    """

    def __init__(
        self,
        pictures: Pictures,
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
        self.pictures, self.sampler, self.batch_size, self.seed = pictures, sampler, batch_size, seed
        self.position, self.rank, self.world, self.workers = position, rank, world, workers
        self.steps_per_epoch = len(self._epoch(0))

    def __iter__(self) -> Iterator[Batch]:
        epoch, start = divmod(self.position(), self.steps_per_epoch)
        while True:
            rows = self._epoch(epoch)[start:, self.rank :: self.world]
            yield from self._stream(rows) if self.pictures.streamed else map(self.pictures.batch, rows)
            epoch, start = epoch + 1, 0

    def _epoch(self, epoch: int) -> Tensor:
        return self.sampler.epoch(self.pictures, self.batch_size, self.seed, epoch)

    def _stream(self, rows: Tensor) -> Iterator[Batch]:
        loader: Any = torch.utils.data.DataLoader(
            _Decoding(self.pictures),
            batch_sampler=rows.tolist(),
            num_workers=self.workers,
            collate_fn=_as_it_is,
        )
        yield from loader


class _Decoding(torch.utils.data.Dataset):
    """What a DataLoader's worker decodes: whole batches."""

    def __init__(self, pictures: Pictures) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitems__(self, indices: list[int]) -> Batch:
        return self.pictures.batch(torch.tensor(indices))


def _as_it_is(batch: Any) -> Any:
    return batch
