"""The shards of one embed job: written aside and renamed, so that a kill at any moment loses at most one shard.

A job with one output file keeps its shards in `OUT.partial/` until the file is assembled; a job that writes a
folder keeps them there for good. A shard carries the pictures that failed beside its rows, so that one rename
commits both.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedkit import lancetable
from embedkit.embeddings import (
    RESERVED,
    ROW_GROUP,
    Passport,
    done_name,
    errors_path,
    ids_path,
    json_bytes,
    passport_path,
    read_passport,
    replacing,
    shard_name,
    write_table,
)
from embedkit.errors import ConfigError, OutputError
from embedkit.stored import read_npy

_ERRORS_KEY = b"embedkit.errors"

#: id, error class, reason: a row of the error table.
Failure = tuple[str, str, str]


@dataclass(frozen=True)
class Known:
    """What is known of a picture that has a row: enough to tell whether the file has changed since."""

    size: int
    mtime_ns: int
    sha256: str | None


class ShardStore:
    """The shards of one part of one job in a folder, under a lock."""

    def __init__(self, folder: Path, part: int = 1, parts: int = 1):
        """Create the folder if need be and lock this part.

        Raises:
            OutputError: The folder cannot be written, or another process works on the same part.
        """
        self.folder, self.part, self.parts = folder, part, parts
        self._job = folder / f"_job-{part:05d}-of-{parts:05d}.json"
        self.done = folder / done_name(part, parts)
        self.errors = folder / f"_errors-{part:05d}-of-{parts:05d}.parquet"
        self._created = not folder.exists()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(folder / f"_lock-{part:05d}-of-{parts:05d}", "a")
        except OSError as error:
            raise OutputError(
                f"{folder} cannot be written ({error.strerror}); choose another output with -o"
            ) from None
        try:
            _lock(self._lock.fileno())
        except OSError:
            self._lock.close()
            raise OutputError(f"another process is writing {folder}; wait for it, or stop it first") from None
        for aside in folder.glob(f".part-{part:05d}-of-{parts:05d}-*.tmp"):
            aside.unlink()  # of a run that was killed in the middle of a shard
        self._next = max((int(path.stem.rsplit("-", 1)[1]) for path in self.shards()), default=-1) + 1

    def close(self) -> None:
        """Release the lock; a folder that this store made and that holds nothing goes away."""
        self._lock.close()
        if self._created and not self.shards() and not self.done.exists():
            self.remove()

    def remove(self) -> None:
        """Delete the folder and all in it, when it holds nothing but this job."""
        self._lock.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def clear(self) -> None:
        """Forget this part: its shards, job and marks."""
        for path in (*self.shards(), self._job, self.done, self.errors):
            path.unlink(missing_ok=True)
        self._next = 0

    def shards(self) -> list[Path]:
        """This part's shards, in order."""
        return sorted(
            self.folder.glob(shard_name(self.part, self.parts, 0).replace("000000.parquet", "*.parquet"))
        )

    def read_job(self) -> dict[str, Any] | None:
        """What an earlier run of this job chose, None when there was none."""
        try:
            job = json.loads(self._job.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            raise ConfigError(f"{self._job} is damaged; start anew with --overwrite") from None
        return job

    def write_job(self, job: dict[str, Any]) -> None:
        """Record what this run chose."""
        with replacing(self._job) as aside:
            aside.write_bytes(json_bytes(job))

    def append(self, table: pa.Table, failures: list[Failure]) -> None:
        """Commit rows and failures as one shard."""
        metadata = {**(table.schema.metadata or {}), _ERRORS_KEY: json.dumps(failures).encode()}
        write_table(
            table.replace_schema_metadata(metadata),
            self.folder / shard_name(self.part, self.parts, self._next),
        )
        self._next += 1

    def known(self) -> tuple[dict[str, Known], list[Failure]]:
        """What the shards hold: rows by id, and failures."""
        rows: dict[str, Known] = {}
        failures: list[Failure] = []
        for path in self.shards():
            rows.update(known_rows(path))
            text = (pq.read_schema(path).metadata or {}).get(_ERRORS_KEY, b"[]")
            failures += [tuple(item) for item in json.loads(text)]
        return rows, failures

    def drop(self, ids: Collection[str]) -> None:
        """Take rows out of the shards that hold them, each shard replaced by one rename."""
        gone = pa.array(sorted(ids), pa.string())
        for path in self.shards():
            table = pq.read_table(path)
            keep = pc.invert(pc.is_in(table["id"], gone))
            if not pc.all(keep).as_py():
                write_table(table.filter(keep), path)

    def tables(self) -> Iterator[pa.Table]:
        """The shards' rows, one shard at a time."""
        for path in self.shards():
            yield pq.read_table(path).replace_schema_metadata(None)

    def finish(self, passport: Passport, rows: int, failures: list[Failure]) -> None:
        """Mark this part of a folder of shards as complete."""
        write_failures(failures, self.errors)
        with replacing(self.done) as aside:
            aside.write_bytes(json_bytes({"rows": rows, "failed": len(failures), "entry": passport.entry}))
        self._job.unlink(missing_ok=True)


class Finished:
    """A finished `.parquet`, `.npy` or LanceDB table that a job extends.

    Attributes:
        passport: What it says of itself.
        known: What is known of its pictures, by id.
        labels: Its label columns, name -> Arrow type name.
        has_sha256: Whether contents were recorded.
    """

    def __init__(self, path: Path, passport: Passport, known: dict[str, Known], schema: pa.Schema):
        """Take what was read; see `open`."""
        self._path, self.passport, self.known = path, passport, known
        self.labels = {field.name: str(field.type) for field in schema if field.name not in RESERVED}
        self.has_sha256 = "sha256" in schema.names

    @classmethod
    def open(cls, path: Path) -> Finished:
        """Read all but the vectors.

        Raises:
            OutputError: A file that embedkit did not write.
        """
        if path.suffix == ".lance":
            table = lancetable.open_table(path)
            passport = lancetable.passport_of(table, path)
            return cls(
                path, passport, _known(lancetable.read(table, _known_columns(table.schema))), table.schema
            )
        if path.suffix == ".npy":
            _, lines, passport = read_npy(path)
            known = {line["id"]: Known(line["size"], line["mtime_ns"], line.get("sha256")) for line in lines}
            return cls(path, passport, known, pa.Table.from_pylist(lines).schema)
        return cls(path, read_passport(path), known_rows(path), pq.read_schema(path))

    def tables(self) -> Iterator[pa.Table]:
        """Its rows in bounded pieces."""
        if self._path.suffix == ".lance":
            yield from lancetable.read(lancetable.open_table(self._path))
            return
        if self._path.suffix == ".npy":
            vectors, lines, passport = read_npy(self._path)
            for start in range(0, len(lines), ROW_GROUP):
                table = pa.Table.from_pylist(lines[start : start + ROW_GROUP])
                flat = pa.array(np.asarray(vectors[start : start + ROW_GROUP]).reshape(-1), pa.float32())
                yield table.append_column("embedding", pa.FixedSizeListArray.from_arrays(flat, passport.dim))
            return
        with pq.ParquetFile(self._path) as file:
            for batch in file.iter_batches(ROW_GROUP):
                yield pa.Table.from_batches([batch]).replace_schema_metadata(None)


def known_rows(path: Path) -> dict[str, Known]:
    """What is known of every picture in a Parquet file of embeddings, by id."""
    with pq.ParquetFile(path) as file:
        return _known(file.iter_batches(65536, columns=_known_columns(file.schema_arrow)))


def _known_columns(schema: pa.Schema) -> list[str]:
    return [name for name in ("id", "size", "mtime_ns", "sha256") if name in schema.names]


def _known(blocks: Iterable[pa.RecordBatch | pa.Table]) -> dict[str, Known]:
    rows: dict[str, Known] = {}
    for block in blocks:
        data = block.to_pydict()
        digests = data.get("sha256") or [None] * block.num_rows
        for name, size, mtime, digest in zip(
            data["id"], data["size"], data["mtime_ns"], digests, strict=True
        ):
            rows[name] = Known(size, mtime, digest)
    return rows


def write_failures(failures: list[Failure], path: Path) -> None:
    """The error table: `id`, `error`, `reason`; no failures, no file."""
    if not failures:
        path.unlink(missing_ok=True)
        return
    ids, errors, reasons = zip(*failures, strict=True)
    write_table(pa.table({"id": ids, "error": errors, "reason": reasons}), path)


def _lock(descriptor: int) -> None:
    """An exclusive lock that ends with the process; no lock on systems without flock."""
    with contextlib.suppress(ImportError):
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


@dataclass(frozen=True)
class Target:
    """Where rows go: the output, its kind (`parquet`, `npy`, `folder` or `lance`), and which part of how many."""

    path: Path
    kind: str
    part: int = 1
    parts: int = 1

    @classmethod
    def of(cls, output: str | os.PathLike[str], worker: tuple[int, int] | None) -> Target:
        """Tell the kind of an output by its name.

        Raises:
            ConfigError: A name that is no output, or a worker that is none.
        """
        text = os.fspath(output)
        path = Path(text)
        if lancetable.is_table(text):
            path, kind = lancetable.table_path(text), "lance"
        elif text.endswith(("/", os.sep)) or path.is_dir():
            kind = "folder"
        elif path.suffix in (".parquet", ".npy"):
            kind = path.suffix[1:]
        else:
            raise ConfigError(
                f"output: expected X.parquet, X.npy, a folder ending in '/' or lance://FOLDER/TABLE, found {text!r}"
            )
        if worker is None:
            return cls(path, kind)
        part, parts = worker
        if not 1 <= part <= parts:
            raise ConfigError(f"worker: expected I/N with I from 1 to N, found {part}/{parts}")
        if kind != "folder":
            raise ConfigError(
                f"worker: several workers write into a folder: take -o {path.stem}/ instead of {text!r}"
            )
        return cls(path, kind, part, parts)

    def open_store(self) -> ShardStore:
        """This job's shards, locked."""
        if self.kind == "folder":
            return ShardStore(self.path, self.part, self.parts)
        if self.kind == "lance" and self.path.parent.parent.is_dir():
            with contextlib.suppress(OSError):  # a new database is a new folder
                self.path.parent.mkdir(exist_ok=True)
        check_writable(self.path)
        store = ShardStore(aside_folder(self.path))
        for path in (self.path, ids_path(self.path), passport_path(self.path), errors_path(self.path)):
            # Under the lock, what was written aside is of a run that was killed before the rename.
            for aside in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
                aside.unlink()
        return store

    def finished(self) -> Finished | None:
        """What an earlier job left there; a folder is its own store."""
        if self.kind == "lance":
            return Finished.open(self.path) if lancetable.exists(self.path) else None
        return Finished.open(self.path) if self.kind != "folder" and self.path.exists() else None

    def errors(self, store: ShardStore) -> Path:
        """Where the table of failures goes."""
        return store.errors if self.kind == "folder" else errors_path(self.path)


def aside_folder(output: Path) -> Path:
    """Where the shards of a job with one output file lie until it is assembled."""
    return output.with_name(output.name + ".partial")


def check_writable(output: Path) -> None:
    """Refuse early what would only fail after all the work.

    Raises:
        OutputError: The folder of the output does not exist or cannot be written.
    """
    folder = output.parent
    if not folder.is_dir():
        raise OutputError(f"the folder {folder} of the output does not exist; create it first")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"the folder {folder.resolve()} cannot be written; choose another output with -o")
