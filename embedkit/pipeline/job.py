"""One embed job: which images remain, their rows as shards, and the output at the end.

Images are embedded in source order in batches of one fixed size, the last one padded, and an image that fails
keeps its place in its batch. So what a run computes depends only on the list of images that remain, and a run
that was killed and started again gives the same bytes as one that was not.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL
import pyarrow as pa

import embedkit
from embedkit.embeddings.earlier import EarlierRows, Record
from embedkit.embeddings.metadata import Metadata, Run, check_same_space
from embedkit.embeddings.schema import conform, label_column, schema_of
from embedkit.encoder import Encoder
from embedkit.errors import EmbedkitError, OutputError, SourceError, TooManyFailuresError
from embedkit.images.sources import Item, Listing
from embedkit.model.layout import sha256_hex
from embedkit.model.providers import onnxruntime
from embedkit.pipeline.batches import BatchRun
from embedkit.pipeline.checkpoint import START_AGAIN, Failure, JobRecord, ShardStore, write_failures
from embedkit.pipeline.options import EmbedOptions
from embedkit.pipeline.report import EmbedReport, Progress
from embedkit.pipeline.scope import Scope
from embedkit.pipeline.target import Target

__all__ = ["Job"]

_LOGGER = logging.getLogger(__name__)


class Job:
    """One job: which images remain, their rows as shards, and the output at the end."""

    def __init__(
        self,
        options: EmbedOptions,
        *,
        target: Target,
        store: ShardStore,
        encoder: Encoder,
        listing: Listing,
        scope: Scope,
        earlier: EarlierRows | None,
        unfinished: Metadata | None,
    ):
        """Settle the space and the schema.

        Args:
            options: What to do; batch size, decode mode and `verify_content` are those of the unfinished job.
            target: Where rows go.
            store: This job's shards.
            encoder: What embeds.
            listing: All images of the sources.
            scope: What the sources cover.
            earlier: The output of an earlier job, which this one extends.
            unfinished: The metadata of the unfinished job that this one continues.

        Raises:
            SpaceMismatchError: One of the two is of another space.
            OutputError: A label column has another type than in the earlier output.
        """
        self.options = options
        self.target, self.store, self.encoder, self.listing = target, store, encoder, listing
        self.scope, self.earlier = scope, earlier
        self.resumed = unfinished is not None
        self.current: dict[str, Item] = {
            item.id: item
            for item in listing.items
            if target.parts == 1 or part_of(item.id, target.parts) == target.part
        }
        mine = replace(encoder.metadata(normalize=options.normalize), dtype=options.dtype or Metadata.dtype)
        check_same_space(unfinished, mine, f"the unfinished job {store.folder}", "this job", START_AGAIN)
        if earlier is not None:
            check_same_space(earlier.metadata, mine, str(target.path), "this job", START_AGAIN)
        self.metadata: Metadata = unfinished or (earlier.metadata if earlier is not None else mine)
        self.labels = {label_column(name): kind for name, kind in listing.label_schema.items()}
        if options.parts is not None:
            self.labels |= options.parts.columns
            if earlier is not None and not options.parts.columns.keys() <= earlier.labels.keys():
                raise OutputError(
                    f"{target.path} holds rows of whole images, not one for each {options.parts.name}; {START_AGAIN}"
                )
        for name, kind in earlier.labels.items() if earlier is not None else ():
            if self.labels.setdefault(name, kind) != kind:
                raise OutputError(
                    f"{target.path}: its column {name!r} is {kind}, the source's is {self.labels[name]}; "
                    "write to another file"
                )

    @property
    def schema(self) -> pa.Schema:
        """The columns of the output, with the metadata as it is now."""
        sha256 = self.options.verify_content or (self.earlier is not None and self.earlier.has_sha256)
        return schema_of(self.metadata, self.labels, sha256=sha256)

    def run(self, progress: Progress, started: float) -> EmbedReport:
        """Embed the images that remain, then complete the output.

        Args:
            progress: Told how the job goes.
            started: `time.perf_counter()` when the job began.
        """
        sharded = self.target.format.sharded
        if self.options.prune and not self.current:
            raise SourceError("no image was found, so --prune would drop every row; check the source")
        shard_rows, failed_before = self.store.records(self.metadata)
        self._check_uncertain()
        old_rows = self.earlier.records if self.earlier is not None else {}
        keep_old = {name for name, record in old_rows.items() if self._is_valid(name, record)}
        keep_new = {
            name
            for name, record in shard_rows.items()
            if name not in keep_old and self._is_valid(name, record)
        }
        # An image that failed keeps its place until the job is done, so that the batches stay the same; a
        # later job tries it again.
        failures = {f[0]: f for f in failed_before if f[0] in self.current} if self.resumed else {}
        listed = self.listing.errors if self.target.part == 1 else []
        allowed = self.options.failures_allowed(len(self.current) + len(listed))
        todo = [
            item for name, item in self.current.items()
            if name not in keep_old and name not in keep_new and name not in failures
        ]  # fmt: skip
        outdated = shard_rows.keys() - keep_new
        removed = outdated if sharded else old_rows.keys() - keep_old
        changed = bool(todo or removed)
        kept = keep_old | keep_new
        images = without = 0
        try:
            if changed:
                self.store.done.unlink(missing_ok=True)
            if outdated:
                self.store.drop(outdated)
            if todo:
                self._begin()
                if self.resumed:
                    _LOGGER.info(
                        "continuing the unfinished job of %s: %d images were done", self.target, len(keep_new)
                    )
                _LOGGER.info("embedding %d of %d images into %s", len(todo), len(self.current), self.target)
                progress.start(len(todo))
                batches = BatchRun(self.encoder, self.store, self.schema, self.options)
                most = None if allowed is None else allowed - len(failures) - len(listed)
                images = batches.run(todo, progress, most=most)
                without = batches.without
                failures.update((failure[0], failure) for failure in batches.failures)
            order = {name: index for index, name in enumerate(self.current)}
            errors = sorted(failures.values(), key=lambda failure: order[failure[0]]) + listed
            if allowed is not None and len(errors) > allowed:
                self._refuse_failures(errors, allowed)
            if not sharded:
                write_failures(errors, self.target.errors(self.store))
            if errors and not kept and not images:
                self._refuse_no_rows(errors)
            if sharded:
                if changed or not os.path.exists(self.store.done):
                    self.store.finish(self.metadata, len(kept) + images, errors)
            else:
                if changed or keep_new or self.earlier is None:
                    self._assemble(keep_old)
                self.store.clear()
        except (OSError, OutputError) as error:
            raise self._stopped(error) from None
        elsewhere, gone, unlisted = self._outside(kept)
        notes = list(
            self._notes(images=images, without=without, elsewhere=elsewhere, gone=gone, unlisted=unlisted)
        )
        for note in notes:
            _LOGGER.warning("%s", note)
        if self.resumed:
            notes.append(f"continued an unfinished job: {len(keep_new)} images were done")
        report = EmbedReport(
            output=str(self.target),
            images=images,
            kept=len(kept),
            removed=len(removed),
            gone=gone,
            failed=len(errors),
            seconds=time.perf_counter() - started,
            provider=self.encoder.provider,
            dim=self.encoder.dim,
            errors=str(self.target.errors(self.store)) if errors else None,
            notes=tuple(notes),
        )
        _LOGGER.info("%s", report)
        return report

    def _notes(self, *, images: int, without: int, elsewhere: int, gone: int, unlisted: int) -> Iterator[str]:
        """What the user should know, one sentence each."""
        yield from self.listing.notes
        if without and self.options.parts is not None:
            some = "1 image has" if without == 1 else f"{without} images have"
            yield f"{some} no {self.options.parts.name}; the next run looks at them again"
        if self.encoder.config.takes_aligned_faces and self.options.parts is None:
            yield (
                f"{self.encoder.name} takes aligned faces; its embeddings of whole photographs are meaningless. "
                "`embedkit embed`, `verify`, `identify` and `calibrate` find the faces of photographs with --faces"
            )
        if self.earlier is not None and self.earlier.uncertain:
            yield (
                f"{self.target.path} and the files beside it did not belong together; all images were embedded again"
            )
        given = {label_column(name) for name in self.listing.label_schema}
        absent = [name for name in self.labels if name not in given]
        if images and absent:
            rows = "1 new row has" if images == 1 else f"{images} new rows have"
            hint = "; --label-from-folder gives one" if "label" in absent else ""
            yield f"{rows} no {', '.join(map(repr, absent))}, which rows of earlier runs have{hint}"
        if not self.store.has_lock:
            yield (
                f"the file system of {self.store.folder} has no locks; do not start another run on this output "
                "at the same time"
            )
        if elsewhere:
            yield f"{self.target.path} also holds {elsewhere} rows of images outside these sources, from earlier runs"
        if gone:
            yield f"{gone} of the kept rows have no file any more; --prune drops them"
        if unlisted:
            yield (
                f"{unlisted} of the kept rows are of images in the sources that are left out now, by --exclude for "
                "one; --prune drops them"
            )

    def _is_valid(self, name: str, record: Record) -> bool:
        """Whether the row of an image is still the image's."""
        item = self.current.get(name)
        if item is None:
            return not self.options.prune or (self.scope.has_file(name) and not self.scope.covers(name))
        if not self.options.verify_content:
            return (record.size, record.mtime_ns) == (item.size, item.mtime_ns)
        try:
            return record.sha256 is not None and record.sha256 == sha256_hex(item.read())
        except (OSError, EmbedkitError):
            return False

    def _check_uncertain(self) -> None:
        """Refuse to lose uncertain rows of other sources: they would have to be embedded again, too."""
        if self.earlier is None or not self.earlier.uncertain:
            return
        lost = [name for name in self.earlier.uncertain if name not in self.current]
        if lost and not self.options.prune:
            raise OutputError(
                f"{self.target.path}: the files beside it do not belong to it, so its rows have to be embedded again, "
                f"and {len(lost)} of them, {lost[0]!r} among them, are not in these sources; name their sources too, "
                "or drop them with --prune"
            )

    def _outside(self, kept: set[str]) -> tuple[int, int, int]:
        """How many kept rows are of images that the sources do not cover, that have no file, and that are left out."""
        failed = {name for name, *_ in self.listing.errors}
        unlisted = [name for name in kept if name not in self.current]
        gone = {name for name in unlisted if not self.scope.has_file(name)}
        covered = {name for name in unlisted if self.scope.covers(name)}
        return len(unlisted) - len(covered), len(gone), len(covered - gone - failed)

    def _stopped(self, error: OSError | OutputError) -> OutputError:
        """The error for an output that cannot be written: it says whether finished work is kept."""
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

    def _refuse_no_rows(self, errors: list[Failure]) -> None:
        """Refuse an output without rows; the table of failures stays.

        Raises:
            SourceError: Always.
        """
        where = self.target.errors(self.store)
        self.store.clear()
        write_failures(errors, where)
        name, _, reason = errors[0]
        raise SourceError(
            f"none of the {len(errors)} images could be read; {where} lists the reasons, the first: {name}: {reason}"
        )

    def _refuse_failures(self, errors: list[Failure], allowed: int) -> None:
        """Stop an unfinished job; its rows stay, and the next run tries the failed images again.

        Raises:
            TooManyFailuresError: Always.
        """
        where = str(self.target.errors(self.store))
        write_failures(errors, Path(where))
        self.store.forget_failures()
        name, _, reason = errors[0]
        failed = "1 image" if len(errors) == 1 else f"{len(errors)} images"
        raise TooManyFailuresError(
            f"{failed} failed, and {allowed} may; {where} lists the reasons, the first: {name}: {reason}; the job "
            "stopped early, so there may be more; what is embedded is kept: solve that, or allow more, and run the "
            "same command again",
            len(errors),
            allowed,
            where,
        )

    def _begin(self) -> None:
        """Record what this job chose, so that the same call after a kill chooses the same."""
        batch_size = self.options.batch_size or self.encoder.default_batch_size
        decode = self.options.decode or "auto"
        self.metadata = self.metadata.with_run(
            Run(
                provider=self.encoder.provider,
                precision=self.encoder.precision,
                decode=decode,
                threads=self.encoder.threads,
                batch_size=batch_size,
                versions=versions(),
            )
        )
        self.store.write_job(
            JobRecord(
                metadata=self.metadata,
                batch_size=batch_size,
                decode=decode,
                threads=self.encoder.threads,
                verify_content=self.options.verify_content,
                exclude=tuple(self.options.exclude or ()),
                label_from_folder=self.options.label_from_folder,
            )
        )

    def _assemble(self, keep_old: set[str]) -> None:
        """Write the earlier rows that are valid, in their order, then this job's rows, in source order."""
        schema = self.schema

        def tables() -> Iterator[pa.Table]:
            for table in self.earlier.tables() if self.earlier is not None else ():
                keep = pa.array([name in keep_old for name in table["id"].to_pylist()], pa.bool_())
                yield conform(table.filter(keep), schema)
            for table in self.store.tables():
                yield conform(table, schema)

        self.target.format.write(tables, self.target.path, schema)


def part_of(name: str, parts: int) -> int:
    """Which of `parts` parts, counted from 1, an image belongs to: a function of its id alone."""
    return int(sha256_hex(name.encode("utf-8", "surrogateescape"))[:15], 16) % parts + 1


def versions() -> dict[str, str]:
    """The versions of the packages that compute rows."""
    return {
        "embedkit": embedkit.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "onnxruntime": onnxruntime().__version__,
    }
