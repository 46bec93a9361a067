"""One embed job: what remains to be done, the batches, the shards, and the output at the end.

Images are embedded in source order in batches of one fixed size, the last one padded, and an image that fails
keeps its place in its batch. So what a run computes depends only on the list of images that remain, and a run
that was killed and started again gives the same bytes as one that was not.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import PIL
import pyarrow as pa

import embedkit
from embedkit.embeddings import lance as lancetable
from embedkit.embeddings.metadata import Metadata, Run
from embedkit.embeddings.npy import write_npy
from embedkit.embeddings.parquet_write import write_rows
from embedkit.embeddings.schema import conform, label_column, schema_of
from embedkit.encoder import Encoder, reason_of
from embedkit.errors import EmbedkitError, ImageError, OutputError, SourceError
from embedkit.images.sources import Item, Listing
from embedkit.model.layout import sha256_hex
from embedkit.model.providers import onnxruntime
from embedkit.pipeline.checkpoint import Failure, ShardStore, write_failures
from embedkit.pipeline.finished import Finished, Known
from embedkit.pipeline.scope import Scope
from embedkit.pipeline.target import Target

#: A shard is committed after this many rows or seconds, whichever comes first.
SHARD_ROWS = 512
SHARD_SECONDS = 20.0


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a job did.

    Attributes:
        output: The file or folder that holds the rows.
        images: Images embedded by this run.
        kept: Rows that were there already and still hold.
        removed: Rows of changed or vanished images that went away.
        gone: Kept rows whose image has no file any more.
        failed: Images that could not be read; they stand in `errors`.
        seconds: Wall time of the job without loading the encoder.
        provider: What ran, by ONNX Runtime's name.
        dim: Width D.
        errors: The table of failures (`id`, `error`, `reason`), None when there is none.
        notes: What the user should know, one sentence each.
    """

    output: str
    images: int
    kept: int
    removed: int
    failed: int
    seconds: float
    provider: str
    dim: int
    errors: str | None
    gone: int = 0
    notes: tuple[str, ...] = ()

    @property
    def images_per_second(self) -> float:
        """Images embedded by this run a second."""
        return self.images / self.seconds if self.seconds > 0 else 0.0


class Progress:
    """What a job tells while it runs; this one stays silent."""

    def start(self, total: int) -> None:
        """`total` images are about to be embedded."""

    def advance(self, images: int, failed: int) -> None:
        """So many more images were embedded, and so many failed."""


class Job:
    """One job: what remains, the batches, the shards, and the file at the end."""

    def __init__(
        self,
        *,
        target: Target,
        store: ShardStore,
        encoder: Encoder,
        listing: Listing,
        scope: Scope,
        batch_size: int,
        decode: str,
        max_pixels: int | None,
        normalize: bool,
        prune: bool,
        verify_content: bool,
        old: Finished | None,
        metadata: Metadata | None,
    ):
        """Settle the space and the schema.

        Args:
            target: Where rows go.
            store: This job's shards.
            encoder: What embeds.
            listing: All images of the sources.
            scope: What the sources cover.
            batch_size: Images in one batch.
            decode: `auto` or `exact`.
            max_pixels: Greatest number of pixels of an image file.
            normalize: Whether rows have Euclidean length 1.
            prune: Whether rows are dropped whose images are gone, or lie in the sources and are not listed.
            verify_content: Whether an image is known by its sha256.
            old: The finished output that this job extends.
            metadata: That of the unfinished job that this one goes on with.
        """
        self.target, self.store, self.encoder, self.listing = target, store, encoder, listing
        self.batch_size, self.decode, self.normalize = batch_size, decode, normalize
        self.max_pixels = max_pixels
        self.prune, self.verify_content, self.old = prune, verify_content, old
        self.scope = scope
        self.resumed = metadata is not None
        self.items: list[Item] = [
            item
            for item in listing.items
            if target.parts == 1 or part_of(item.id, target.parts) == target.part
        ]
        self.current: dict[str, Item] = {item.id: item for item in self.items}
        mine = Metadata(
            entry=encoder.name,
            manifest_sha256=encoder.revision,
            fingerprint=encoder.space(normalized=normalize),
            dim=encoder.dim,
            normalized=normalize,
        )
        if metadata is not None:
            metadata.check_same_space(mine, f"the unfinished job {store.folder}")
        if old is not None:
            old.metadata.check_same_space(mine, str(target.path))
        self.metadata: Metadata = metadata or (old.metadata if old is not None else mine)
        self.labels = {label_column(name): kind for name, kind in listing.label_schema.items()}
        for name, kind in old.labels.items() if old is not None else ():
            if self.labels.setdefault(name, kind) != kind:
                raise OutputError(
                    f"{target.path}: its column {name!r} is {kind}, the source's is {self.labels[name]}; "
                    "write to another file"
                )
        self._set_schema()

    def _set_schema(self) -> None:
        sha256 = self.verify_content or (self.old is not None and self.old.has_sha256)
        self.schema = schema_of(self.metadata, self.labels, sha256=sha256)

    def run(self, on_error: str, progress: Progress, started: float) -> Report:
        """Embed what remains, then put the output together."""
        folder = self.target.kind == "folder"
        if self.prune and not self.current:
            raise SourceError("no image was found, so --prune would drop every row; check the source")
        shard_rows, earlier = self.store.known(self.metadata)
        self._check_uncertain()
        old_rows = self.old.known if self.old is not None else {}
        keep_old = {name for name, known in old_rows.items() if self._holds(name, known)}
        keep_new = {
            name for name, known in shard_rows.items() if name not in keep_old and self._holds(name, known)
        }
        # An image that failed keeps its place until the job is done, so that the batches stay the same; a
        # later job tries it again.
        failures = {f[0]: f for f in earlier if f[0] in self.current} if self.resumed else {}
        todo = [
            item for item in self.items
            if item.id not in keep_old and item.id not in keep_new and item.id not in failures
        ]  # fmt: skip
        outdated = shard_rows.keys() - keep_new
        stale = outdated if folder else old_rows.keys() - keep_old
        changed = bool(todo or stale)
        images = 0
        try:
            if changed:
                self.store.done.unlink(missing_ok=True)
            if outdated:
                self.store.drop(outdated)
            if todo:
                self._begin()
                progress.start(len(todo))
                images, fresh = self._embed(todo, on_error, progress)
                failures.update((failure[0], failure) for failure in fresh)
            order = {name: index for index, name in enumerate(self.current)}
            errors = sorted(failures.values(), key=lambda failure: order[failure[0]])
            if self.target.part == 1:
                errors += self.listing.errors
            kept = len(keep_old) + len(keep_new)
            if not folder:
                write_failures(errors, self.target.errors(self.store))
            if errors and not kept and not images:
                self._none_read(errors)
            if folder:
                if changed or not self.store.done.exists():
                    self.store.finish(self.metadata, kept + images, errors)
            else:
                if changed or keep_new or self.old is None:
                    self._assemble(keep_old)
                self.store.clear()
        except (OSError, OutputError) as error:
            raise self._stopped(error) from None
        notes = [*self.listing.notes]
        if self.encoder.note:
            notes.append(self.encoder.note)
        if self.encoder.config.takes_aligned_faces:
            notes.append(
                f"{self.encoder.name} takes aligned faces, and of whole photographs it says nothing; "
                "`embedkit verify`, `identify` and `calibrate` find the faces of photographs with --faces"
            )
        if self.resumed:
            notes.append(f"went on with an unfinished job: {len(keep_new)} images were done")
        if self.old is not None and self.old.uncertain:
            notes.append(
                f"{self.target.path} and the files beside it did not belong together; all images were embedded again"
            )
        if not self.store.has_lock:
            notes.append(
                f"the file system of {self.store.folder} has no locks; do not start another run on this output "
                "at the same time"
            )
        elsewhere, gone = self._outside(keep_old | keep_new)
        if elsewhere:
            notes.append(
                f"{self.target.path} also holds {elsewhere} rows of images outside these sources, from earlier runs"
            )
        if gone:
            notes.append(f"{gone} of the kept rows have no file any more; --prune drops them")
        return Report(
            output=str(self.target.path) + ("/" if folder else ""),
            images=images,
            kept=kept,
            removed=len(stale),
            gone=gone,
            failed=len(errors),
            seconds=time.perf_counter() - started,
            provider=self.encoder.provider,
            dim=self.encoder.dim,
            errors=str(self.target.errors(self.store)) if errors else None,
            notes=tuple(notes),
        )

    def _check_uncertain(self) -> None:
        """Rows whose vectors cannot be told are embedded again; those of other sources could only be dropped."""
        if self.old is None or not self.old.uncertain:
            return
        lost = [name for name in self.old.uncertain if name not in self.current]
        if lost and not self.prune:
            raise OutputError(
                f"{self.target.path}: the files beside it do not belong to it, so its rows have to be embedded again, "
                f"and {len(lost)} of them, {lost[0]!r} among them, are not in these sources; name their sources too, "
                "or drop them with --prune"
            )

    def _outside(self, kept: set[str]) -> tuple[int, int]:
        """How many kept rows are of images that the sources do not cover, and of images that have no file."""
        unlisted = [name for name in kept if name not in self.current]
        gone = sum(not self.scope.has_file(name) for name in unlisted)
        return sum(not self.scope.covers(name) for name in unlisted), gone

    def _stopped(self, error: OSError | OutputError) -> OutputError:
        """What is said when the output cannot be written, and whether anything is kept."""
        cause = error.__context__ if isinstance(error, OutputError) else error
        if not isinstance(cause, OSError) or isinstance(cause, EmbedkitError):
            assert isinstance(error, OutputError)
            return error
        full = cause.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
        reason = "the disk is full" if full else cause.strerror or str(cause)
        kept = ": what is embedded so far is kept" if self.store.shards() else ""
        return OutputError(
            f"{self.target.path} cannot be written ({reason}); solve that and run the same command again{kept}"
        )

    def _none_read(self, errors: list[Failure]) -> None:
        """Refuse to leave an output without rows; the reasons stay."""
        where = self.target.errors(self.store)
        if self.target.kind == "folder":
            self.store.clear()
            write_failures(errors, where)
        else:
            self.store.clear()
        name, _, reason = errors[0]
        raise SourceError(
            f"none of the {len(errors)} images could be read; {where} says why, the first: {name}: {reason}"
        )

    def _begin(self) -> None:
        """Record what this job chose, so that the same call after a kill chooses the same."""
        self.metadata = self.metadata.with_run(
            Run(
                provider=self.encoder.provider,
                precision=self.encoder.precision,
                decode=self.decode,
                threads=self.encoder.threads,
                batch_size=self.batch_size,
                versions=versions(),
            )
        )
        self._set_schema()
        self.store.write_job(
            {
                "metadata": self.metadata.to_json(),
                "batch_size": self.batch_size,
                "decode": self.decode,
                "threads": self.encoder.threads,
                "verify_content": self.verify_content,
            }
        )

    def _embed(self, todo: list[Item], on_error: str, progress: Progress) -> tuple[int, list[Failure]]:
        """Run the batches and commit shards; on a stop or an interrupt, commit what is whole first."""
        digests: dict[str, str] = {}
        images, position = 0, 0
        done: list[Item] = []
        blocks: list[np.ndarray] = []
        pending: list[Failure] = []
        failures: list[Failure] = []
        last = time.monotonic()

        def commit() -> None:
            nonlocal last
            if blocks or pending:
                self.store.append(self._table(done, blocks, digests), pending)
            failures.extend(pending)
            for committed in (done, blocks, pending):
                committed.clear()
            last = time.monotonic()

        batches = self._batches(todo, digests)
        flow = self.encoder.flow(
            batches,
            normalize=self.normalize,
            decode=self.decode,
            max_pixels=self.max_pixels,
            pad_to=self.batch_size,
        )
        try:
            for block, faults in flow:
                batch = todo[position : position + self.batch_size]
                if faults and on_error == "stop":
                    first = min(faults)
                    raise ImageError(
                        f"{batch[first].id}: {reason_of(faults[first])}; the {position} images before its batch "
                        "are kept, and --on-error skip goes on past it"
                    )
                position += len(batch)
                good = [index for index in range(len(batch)) if index not in faults]
                images += len(good)
                done += [batch[index] for index in good]
                blocks.append(block if len(good) == len(batch) else block[good])
                pending += [
                    (batch[index].id, type(fault).__name__, reason_of(fault))
                    for index, fault in sorted(faults.items())
                ]
                progress.advance(len(good), len(faults))
                if len(done) >= SHARD_ROWS or time.monotonic() - last > SHARD_SECONDS:
                    commit()
        except (KeyboardInterrupt, ImageError):
            commit()
            raise
        finally:
            flow.close()
        commit()
        return images, failures

    def _batches(self, todo: list[Item], digests: dict[str, str]) -> Iterator[list[Callable[[], bytes]]]:
        def hashing(item: Item) -> Callable[[], bytes]:
            def read() -> bytes:
                data = item.read()
                digests[item.id] = sha256_hex(data)
                return data

            return read

        items = iter(todo)
        while chunk := list(islice(items, self.batch_size)):
            yield [hashing(item) if self.verify_content else item.read for item in chunk]

    def _table(self, items: list[Item], blocks: list[np.ndarray], digests: dict[str, str]) -> pa.Table:
        flat = np.concatenate(blocks or [np.empty((0, self.encoder.dim), np.float32)]).reshape(-1)
        columns: dict[str, list] = {
            "id": [item.id for item in items],
            "part": [0] * len(items),
            "size": [item.size for item in items],
            "mtime_ns": [item.mtime_ns for item in items],
            "sha256": [digests.pop(item.id, None) for item in items],
        }
        for name in self.listing.label_schema:
            columns[label_column(name)] = [item.labels.get(name) for item in items]
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(flat, pa.float32()), self.encoder.dim)
        absent = [None] * len(items)
        arrays = [
            vectors if field.name == "embedding" else pa.array(columns.get(field.name, absent), field.type)
            for field in self.schema
        ]
        return pa.Table.from_arrays(arrays, schema=self.schema)

    def _holds(self, name: str, known: Known) -> bool:
        """Whether the row of an image is still the image's."""
        item = self.current.get(name)
        if item is None:
            return not self.prune or (self.scope.has_file(name) and not self.scope.covers(name))
        if not self.verify_content:
            return (known.size, known.mtime_ns) == (item.size, item.mtime_ns)
        try:
            return known.sha256 is not None and known.sha256 == sha256_hex(item.read())
        except (OSError, EmbedkitError):
            return False

    def _assemble(self, keep_old: set[str]) -> None:
        """Old rows that hold, in their order, then this job's rows, in source order."""

        def tables() -> Iterator[pa.Table]:
            for table in self.old.tables() if self.old is not None else ():
                keep = pa.array([name in keep_old for name in table["id"].to_pylist()], pa.bool_())
                yield conform(table.filter(keep), self.schema)
            for table in self.store.tables():
                yield conform(table, self.schema)

        if self.target.kind == "parquet":
            write_rows(tables(), self.target.path, self.schema)
        elif self.target.kind == "lance":
            lancetable.write(tables(), self.target.path, self.schema)
        else:
            write_npy(tables(), self.target.path, self.metadata, sum(table.num_rows for table in tables()))


def part_of(name: str, parts: int) -> int:
    """Which of `parts` parts, counted from 1, an image belongs to: a function of its id alone."""
    return int(sha256_hex(name.encode("utf-8", "surrogateescape"))[:15], 16) % parts + 1


def versions() -> dict[str, str]:
    """The versions of what computes rows."""
    return {
        "embedkit": embedkit.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "onnxruntime": onnxruntime().__version__,
    }
