"""The shards of one job, its checkpoint: written aside and renamed, so that a kill loses at most one shard.

A job with one output file holds its shards in `OUT.partial/` until the file is assembled; for a job that writes a
folder they are the output. A shard carries the images that failed beside its rows, so that one rename commits both.
The folder may hold files of other workers and of the user: only this part's own files are deleted.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from embedkit._io import atomic
from embedkit._io.json import Fields, JsonFormat, indented_json
from embedkit._io.locks import LockedError, locked
from embedkit._io.outputs import check_ours
from embedkit.embeddings.earlier import Record
from embedkit.embeddings.metadata import Metadata, check_same_space
from embedkit.embeddings.parquet import read_metadata, read_records, write_table
from embedkit.embeddings.parquet_file import opened
from embedkit.embeddings.shards import done_name, errors_name, shard_name, write_done
from embedkit.errors import ConfigError, OutputError

__all__ = ["START_AGAIN", "Failure", "JobRecord", "ShardStore", "is_table_of_failures", "write_failures"]

_ERRORS_KEY = b"embedkit.errors"
_FORMAT = JsonFormat(error=ConfigError, step="start again with --overwrite")
#: What to do where an output holds another space.
START_AGAIN = "write to another file, or start this one again with --overwrite"

#: id, error class, reason: a row of the error table.
Failure = tuple[str, str, str]


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """What an unfinished job chose, and what the run that continues it must choose again.

    Attributes:
        metadata: The metadata of its rows.
        batch_size: Images in one batch.
        decode: `auto` or `exact`.
        threads: Number of cores in use.
        verify_content: Whether changed images are found by their sha256.
        exclude: The patterns of images that were left out, as given.
        label_from_folder: Whether rows have the label of their folder.
    """

    metadata: Metadata
    batch_size: int
    decode: str
    threads: int
    verify_content: bool
    exclude: tuple[str, ...]
    label_from_folder: bool

    @classmethod
    def of(cls, fields: Fields, where: str) -> JobRecord:
        """The record that a file holds; `where` names the job for messages about its metadata."""
        return cls(
            metadata=Metadata.from_json(fields.text("metadata"), where),
            batch_size=fields.whole("batch_size", 1),
            decode=fields.text("decode"),
            threads=fields.whole("threads"),
            verify_content=fields.flag("verify_content"),
            exclude=fields.texts("exclude"),
            label_from_folder=fields.flag("label_from_folder"),
        )

    def to_json(self) -> bytes:
        """The record as a file holds it."""
        return indented_json({**vars(self), "metadata": self.metadata.to_json()})


class ShardStore:
    """The shards of one part of one job in a folder, under a lock."""

    def __init__(self, folder: Path, part: int = 1, parts: int = 1, *, scratch: bool = False):
        """Create the folder if need be and lock this part.

        Args:
            folder: Where the shards lie.
            part: Which part, counted from 1.
            parts: Of how many.
            scratch: Whether the folder is the job's own, which is removed when it is empty.

        Raises:
            OutputError: The folder cannot be written, or another process works on the same part.
        """
        self.folder, self.part, self.parts = folder, part, parts
        self._job = folder / f"_job-{part:05d}-of-{parts:05d}.json"
        self.done = folder / done_name(part, parts)
        self.errors = folder / errors_name(part, parts)
        self._lock_file = folder / f"_lock-{part:05d}-of-{parts:05d}"
        self._temporary = scratch
        self._holding = contextlib.ExitStack()
        self.has_lock = True
        try:
            self.has_lock = self._lock()
        except OSError as error:
            self._release()
            if isinstance(error, LockedError):
                raise OutputError(
                    f"another process is writing {folder}; wait for it, or stop it first"
                ) from None
            raise atomic.refusal(folder, error) from None
        try:
            for left in folder.glob(f".*-{part:05d}-of-{parts:05d}*.partial"):
                atomic.clear_leftovers(folder / left.name[1:].rsplit(".", 2)[0])
            self._next = max((int(path.stem.rsplit("-", 1)[1]) for path in self.shards()), default=-1) + 1
        except BaseException:
            self._release()
            raise

    def _lock(self) -> bool:
        """Take this part's lock in the folder, which another worker may delete, as it is empty, at any moment."""
        while True:
            if not os.path.isdir(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                self._temporary = True
            with contextlib.suppress(FileNotFoundError):
                return self._holding.enter_context(locked(self._lock_file, wait=False, remove=True))

    def close(self) -> None:
        """Release the lock; a folder that this store made is removed if it is empty."""
        if not self.shards() and not os.path.exists(self.done):
            with contextlib.suppress(OSError):
                self._job.unlink(missing_ok=True)
        self._release()

    def _release(self) -> None:
        self._holding.close()
        with contextlib.suppress(OSError):
            if not self.has_lock:
                self._lock_file.unlink(missing_ok=True)  # it locks no other process out
            if self._temporary:
                self.folder.rmdir()  # fails where it holds anything, of another worker or of the user

    def clear(self) -> None:
        """Delete this part's files, under the lock: its shards, job and marks.

        Raises:
            OutputError: A shard that embedkit did not write.
        """
        for path in self.shards():
            check_ours(path, lambda shard: bool(read_metadata(shard)), "rows")
        check_ours(self.errors, is_table_of_failures, "a table of failures")
        for path in (*self.shards(), self._job, self.done, self.errors):
            path.unlink(missing_ok=True)
        self._next = 0

    def shards(self) -> list[Path]:
        """This part's shards, in order."""
        pattern = shard_name(self.part, self.parts, 0).replace("000000.parquet", "*.parquet")
        return sorted(path for path in self.folder.glob(pattern) if path.stem.rsplit("-", 1)[1].isdecimal())

    def read_job(self) -> JobRecord | None:
        """What an earlier run of this job chose, None when there was none.

        Raises:
            ConfigError: The record is damaged.
        """
        if not os.path.exists(self._job):
            return None
        return JobRecord.of(_FORMAT.read(self._job), str(self.folder))

    def write_job(self, record: JobRecord) -> None:
        """Record what this run chose."""
        atomic.write_file(self._job, record.to_json())

    def append(self, table: pa.Table, failures: list[Failure]) -> None:
        """Commit rows and failures as one shard."""
        metadata = {**(table.schema.metadata or {}), _ERRORS_KEY: json.dumps(failures).encode()}
        write_table(
            table.replace_schema_metadata(metadata),
            self.folder / shard_name(self.part, self.parts, self._next),
        )
        self._next += 1

    def records(self, metadata: Metadata) -> tuple[dict[str, Record], list[Failure]]:
        """What the shards hold: the records of rows by id, and failures.

        Raises:
            SpaceMismatchError: They are of another space than `metadata`.
            OutputError: A shard is damaged, or embedkit did not write it.
        """
        rows: dict[str, Record] = {}
        failures: list[Failure] = []
        for path in self.shards():
            check_same_space(read_metadata(path), metadata, str(self.folder), "this job", START_AGAIN)
            records, schema = read_records(path, metadata)
            rows.update(records)
            try:
                failures += [
                    (str(name), str(error), str(reason))
                    for name, error, reason in json.loads(schema.metadata.get(_ERRORS_KEY, b"[]"))
                ]
            except (ValueError, TypeError, RecursionError):
                raise OutputError(
                    f"{path}: its list of failures is damaged; start again with --overwrite"
                ) from None
        return rows, failures

    def first(self) -> tuple[Metadata, set[str]] | None:
        """The metadata and the columns of the first shard; None where there is none.

        Raises:
            OutputError: It is damaged, or embedkit did not write it.
        """
        for path in self.shards():
            metadata = read_metadata(path)
            with opened(path) as file:
                return metadata, set(file.schema_arrow.names)
        return None

    def forget_failures(self) -> None:
        """Remove all failures from the shards, so that the next run tries those images again."""
        for path in self.shards():
            table = self._read(path)
            if not table.num_rows:
                path.unlink()
            elif table.schema.metadata.get(_ERRORS_KEY, b"[]") != b"[]":
                metadata = {**table.schema.metadata, _ERRORS_KEY: b"[]"}
                write_table(table.replace_schema_metadata(metadata), path)

    def drop(self, ids: Collection[str]) -> None:
        """Remove rows from the shards that hold them; one rename replaces a shard."""
        gone = pa.array(sorted(ids), pa.string())
        for path in self.shards():
            table = self._read(path)
            keep = pc.invert(pc.is_in(table["id"], gone))
            if not pc.all(keep).as_py():
                write_table(table.filter(keep), path)

    def tables(self) -> Iterator[pa.Table]:
        """The shards' rows, one shard at a time."""
        for path in self.shards():
            yield self._read(path).replace_schema_metadata(None)

    def _read(self, path: Path) -> pa.Table:
        with opened(path) as file:
            return file.read()

    def finish(self, metadata: Metadata, rows: int, failures: list[Failure]) -> None:
        """Mark this part of a folder of shards as complete."""
        write_failures(failures, self.errors)
        write_done(self.done, metadata, rows, failed=len(failures))
        self._job.unlink(missing_ok=True)


def write_failures(failures: list[Failure], path: Path) -> None:
    """Write the table of failures: `id`, `error`, `reason`. Without failures there is no file.

    Raises:
        OutputError: A file of this name that embedkit did not write.
    """
    check_ours(path, is_table_of_failures, "a table of failures")
    if not failures:
        path.unlink(missing_ok=True)
        return
    ids, errors, reasons = zip(*failures, strict=True)
    write_table(pa.table({"id": ids, "error": errors, "reason": reasons}), path)


def is_table_of_failures(path: Path) -> bool:
    """Whether a file is a table of failures that embedkit wrote."""
    with opened(path) as file:
        names: list[str] = file.schema_arrow.names
        return names == ["id", "error", "reason"]
