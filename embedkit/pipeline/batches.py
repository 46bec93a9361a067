"""Embed the images that remain, in batches of one fixed size, and commit their rows as shards."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from itertools import islice
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from embedkit.embeddings.metadata import Metadata
from embedkit.embeddings.schema import label_column, vector_array
from embedkit.encoder import Encoder, reason_of
from embedkit.errors import ConfigError, EmbedkitError, ImageError
from embedkit.images.sources import Item
from embedkit.model.layout import sha256_hex
from embedkit.pipeline.checkpoint import Failure, ShardStore
from embedkit.pipeline.options import EmbedOptions
from embedkit.pipeline.parts import PartFinder
from embedkit.pipeline.report import Progress

__all__ = ["BatchRun"]

#: A shard is committed after this many rows or seconds, whichever comes first.
SHARD_ROWS = 512
SHARD_SECONDS = 20.0


class _Row(NamedTuple):
    """One row: the image, which part of it, and the values of label columns."""

    item: Item
    part: int
    labels: Mapping[str, object]


#: The rows of one batch of images, their vectors (n, D), and the errors by image.
_Block: TypeAlias = tuple[list[_Row], npt.NDArray[np.float32], Mapping[int, EmbedkitError | OSError]]


class BatchRun:
    """One run over images. A failed image keeps its place in its batch, so that the batches never shift."""

    def __init__(self, encoder: Encoder, store: ShardStore, schema: pa.Schema, options: EmbedOptions):
        """Prepare a run.

        Args:
            encoder: What embeds.
            store: Where shards are committed.
            schema: The columns of the rows.
            options: The job's options; batch size and decode mode are settled.
        """
        self._encoder, self._store, self._schema, self._options = encoder, store, schema, options
        self._size = options.batch_size or encoder.default_batch_size
        self._digests: dict[str, str] = {}
        self._done: list[_Row] = []
        self._blocks: list[npt.NDArray[np.float32]] = []
        self._pending: list[Failure] = []
        self._last = 0.0
        self.failures: list[Failure] = []
        self.without = 0  # images that have none of the parts that are looked for

    def run(self, todo: list[Item], progress: Progress, *, most: int | None = None) -> int:
        """Embed images and commit shards; on a stop or an interrupt, commit the finished batches first.

        Args:
            todo: The images, in source order.
            progress: Told of every batch.
            most: How many of them may fail; after the batch that exceeds it, the run ends. Any number when None.

        Returns:
            The number of images embedded; those that failed are in `failures`.

        Raises:
            ImageError: An image cannot be read, and the job stops at the first.
        """
        self._last = time.monotonic()
        images, position = 0, 0
        options = self._options
        flow = self._whole_images(todo) if options.parts is None else self._parts(todo, options.parts)
        with closing(flow):
            try:
                for rows, block, faults in flow:
                    batch = todo[position : position + self._size]
                    if faults and options.on_error == "stop":
                        first = min(faults)
                        raise ImageError(
                            f"{batch[first].id}: {reason_of(faults[first])}; the {position} images before its batch "
                            "are kept, and --on-error skip continues past it"
                        )
                    position += len(batch)
                    good = len({row.item.id for row in rows})
                    images += good
                    self._done += rows
                    self._blocks.append(block)
                    if options.parts is not None:
                        self.without += len(batch) - len(faults) - good
                    self._pending += [
                        (batch[index].id, type(fault).__name__, reason_of(fault))
                        for index, fault in sorted(faults.items())
                    ]
                    progress.advance(len(batch) - len(faults), len(faults))
                    if most is not None and len(self.failures) + len(self._pending) > most:
                        break
                    if len(self._done) >= SHARD_ROWS or time.monotonic() - self._last > SHARD_SECONDS:
                        self._commit()
            except (KeyboardInterrupt, ImageError):
                self._commit()
                raise
        self._commit()
        return images

    def _whole_images(self, todo: list[Item]) -> Generator[_Block, None, None]:
        """A row for each image."""
        flow = self._encoder._flow(
            self._batches(todo),
            normalize=self._options.normalize,
            decode=self._options.decode or "auto",
            max_pixels=self._options.max_pixels,
            pad_to=self._size,
        )
        position = 0
        with closing(flow):
            for block, faults in flow:
                batch = todo[position : position + self._size]
                position += len(batch)
                good = [index for index in range(len(batch)) if index not in faults]
                rows = [_Row(batch[index], 0, batch[index].labels) for index in good]
                yield rows, block if len(good) == len(batch) else block[good], faults

    def _parts(self, todo: list[Item], finder: PartFinder) -> Generator[_Block, None, None]:
        """A row for each part of each image."""
        position = 0
        for readers in self._batches(todo):
            batch = todo[position : position + self._size]
            position += len(batch)
            rows: list[_Row] = []
            pixels: list[npt.NDArray[np.uint8]] = []
            faults: dict[int, EmbedkitError | OSError] = {}
            for index, (item, read) in enumerate(zip(batch, readers, strict=True)):
                try:
                    found = finder.find(read())
                except ConfigError:
                    raise
                except (EmbedkitError, OSError) as fault:
                    faults[index] = fault
                    continue
                rows += [_Row(item, part, {**item.labels, **one.labels}) for part, one in enumerate(found)]
                pixels += [one.pixels for one in found]
            # Batches of one size again: what is computed does not depend on how many parts an image has.
            chunks = [pixels[at : at + self._size] for at in range(0, len(pixels), self._size)]
            flow = self._encoder._flow(
                chunks, normalize=self._options.normalize, decode="exact", pad_to=self._size
            )
            with closing(flow):
                blocks = [block for block, _ in flow]
            yield rows, np.concatenate([np.empty((0, self._encoder.dim), np.float32), *blocks]), faults

    def _commit(self) -> None:
        """Write what is done as one shard."""
        if self._blocks or self._pending:
            self._store.append(self._table(), self._pending)
        self.failures += self._pending
        self._done, self._blocks, self._pending = [], [], []
        self._last = time.monotonic()

    def _batches(self, todo: list[Item]) -> Iterator[list[Callable[[], bytes]]]:
        def hashing(item: Item) -> Callable[[], bytes]:
            def read() -> bytes:
                data = item.read()
                self._digests[item.id] = sha256_hex(data)
                return data

            return read

        items = iter(todo)
        while chunk := list(islice(items, self._size)):
            yield [hashing(item) if self._options.verify_content else item.read for item in chunk]

    def _table(self) -> pa.Table:
        """The rows that are done."""
        rows, dim = self._done, self._encoder.dim
        vectors = np.concatenate(self._blocks or [np.empty((0, dim), np.float32)])
        columns: dict[str, list[Any]] = {
            "id": [row.item.id for row in rows],
            "part": [row.part for row in rows],
            "size": [row.item.size for row in rows],
            "mtime_ns": [row.item.mtime_ns for row in rows],
            "sha256": [self._digests.get(row.item.id) for row in rows],
        }
        for row in rows:
            self._digests.pop(row.item.id, None)
        for name in dict.fromkeys(name for row in rows for name in row.labels):
            columns[label_column(name)] = [row.labels.get(name) for row in rows]
        column = vector_array(vectors, self._options.dtype or Metadata.dtype)
        absent = [None] * len(rows)
        arrays = [
            column if field.name == "embedding" else pa.array(columns.get(field.name, absent), field.type)
            for field in self._schema
        ]
        return pa.Table.from_arrays(arrays, schema=self._schema)
