"""The Embeddings file: Parquet columns, the passport in its schema, and what reads and writes them.

Columns: `id`, `part` (int32, 0 unless a picture has several rows), `embedding` (fixed_size_list<float32>[D]),
`size` (bytes), `mtime_ns`, `sha256` (when contents were verified) and the source's label columns; (`id`, `part`)
is unique. The passport stands in the schema metadata under `embedkit`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embedkit._io import atomic
from embedkit.errors import ConfigError, OutputError, SpaceMismatchError
from embedkit.parquetfile import opened

PASSPORT_KEY = b"embedkit"
PASSPORT_VERSION = 1

#: Columns that are ours; a label column of the same name is stored as `source_<name>`.
RESERVED = ("id", "part", "embedding", "size", "mtime_ns", "sha256")

#: Rows of a row group: 2.6 MB at D = 1280; several are in memory while a file is put together.
ROW_GROUP = 512
#: The widest embedding; entries have the same limit.
MOST_DIM = 1 << 20
_RESERVED_LABEL = re.compile(f"(source_)*({'|'.join(RESERVED)})")
_SHA256 = re.compile("[0-9a-f]{64}")
_SHARD = re.compile(r"part-(\d+)-of-(\d+)-(\d+)\.parquet")
_DONE = re.compile(r"_done-(\d+)-of-(\d+)\.json")


@dataclass(frozen=True, kw_only=True)
class Run:
    """How rows were computed. Runs of one file may differ: they change the last digits, not the space.

    Attributes:
        provider: ONNX Runtime's name of what ran.
        precision: `fp32`, `tf32` or `fp16`.
        decode: `auto` or `exact`.
        threads: Cores that were kept busy.
        batch_size: Pictures in one batch.
        versions: Package name -> version.
    """

    provider: str
    precision: str
    decode: str
    threads: int
    batch_size: int
    versions: Mapping[str, str]

    def _is_sound(self) -> bool:
        return (
            all(isinstance(text, str) for text in (self.provider, self.precision, self.decode))
            and all(type(number) is int for number in (self.threads, self.batch_size))
            and isinstance(self.versions, dict)
            and all(isinstance(version, str) for version in self.versions.values())
        )


@dataclass(frozen=True, kw_only=True)
class Passport:
    """What a file of embeddings says of itself.

    Attributes:
        entry: The zoo entry's name.
        manifest_sha256: The entry's identity, 64 hex digits.
        fingerprint: The space's identity, 64 hex digits: files of different fingerprints never mix.
        dim: Width D.
        normalized: Whether rows have Euclidean length 1.
        runs: The different ways in which the rows were computed.
    """

    entry: str
    manifest_sha256: str
    fingerprint: str
    dim: int
    normalized: bool
    runs: tuple[Run, ...] = ()

    def with_run(self, run: Run) -> Passport:
        """The passport after rows of `run` were added; a run like one that it has changes nothing."""
        return self if run in self.runs else replace(self, runs=(*self.runs, run))

    def check_same_space(self, other: Passport, where: str) -> None:
        """Refuse to mix two spaces.

        Raises:
            SpaceMismatchError: Naming both.
        """
        if self.fingerprint != other.fingerprint:
            raise SpaceMismatchError(
                f"{where} holds embeddings of {self.entry} (space {self.fingerprint[:12]}, "
                f"{'normalised' if self.normalized else 'not normalised'}), which cannot be mixed with those of "
                f"{other.entry} (space {other.fingerprint[:12]}, "
                f"{'normalised' if other.normalized else 'not normalised'}); "
                "write to another file, or start this one anew with --overwrite"
            )

    def to_json(self) -> str:
        """The passport as it stands in the schema metadata."""
        return json.dumps({"version": PASSPORT_VERSION, **asdict(self)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Passport:
        """Parse a passport.

        Raises:
            OutputError: It is not one, or of a later version.
        """
        try:
            data = json.loads(text)
            version = data.pop("version")
            if type(version) is int and version != PASSPORT_VERSION:
                raise OutputError(f"{where}: a passport of version {version}; upgrade embedkit")
            found = cls(**data | {"runs": tuple(Run(**run) for run in data["runs"])})
            if type(version) is not int or not found._is_sound():
                raise ValueError
            return found
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise OutputError(
                f"{where}: its passport is damaged; was it written by another program?"
            ) from None

    def _is_sound(self) -> bool:
        """Whether every value is of its type and in its range: a file may say anything."""
        return (
            isinstance(self.entry, str)
            and all(
                isinstance(name, str) and _SHA256.fullmatch(name)
                for name in (self.manifest_sha256, self.fingerprint)
            )
            and type(self.dim) is int
            and 1 <= self.dim <= MOST_DIM
            and isinstance(self.normalized, bool)
            and all(run._is_sound() for run in self.runs)
        )


def schema_of(passport: Passport, labels: Mapping[str, str], *, sha256: bool) -> pa.Schema:
    """The Parquet schema of a file with this passport and these label columns (name -> Arrow type name)."""
    fields = [
        pa.field("id", pa.string(), nullable=False),
        pa.field("part", pa.int32(), nullable=False),
        pa.field("embedding", pa.list_(pa.float32(), passport.dim), nullable=False),
        pa.field("size", pa.int64()),
        pa.field("mtime_ns", pa.int64()),
    ]
    if sha256:
        fields.append(pa.field("sha256", pa.string()))
    fields += [pa.field(name, pa.type_for_alias(kind)) for name, kind in labels.items()]
    return pa.schema(fields, metadata={PASSPORT_KEY: passport.to_json().encode()})


def read_passport(path: str | os.PathLike[str]) -> Passport:
    """The passport of a Parquet file of embeddings.

    Raises:
        OutputError: Not such a file.
    """
    try:
        with opened(path) as file:
            schema = file.schema_arrow
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise OutputError(f"{os.fspath(path)} cannot be read as Parquet ({first_line(error)})") from None
    text = (schema.metadata or {}).get(PASSPORT_KEY)
    if text is None:
        raise OutputError(
            f"{os.fspath(path)} is a Parquet file without a passport: embedkit did not write it"
        )
    return Passport.from_json(text, os.fspath(path))


def label_column(label: str) -> str:
    """The column of a source's label: its own name, unless that is one of ours.

    `id` becomes `source_id`, and `source_id` becomes `source_source_id`, so that no two labels share a column.
    """
    return f"source_{label}" if _RESERVED_LABEL.fullmatch(label) else label


def shard_name(part: int, parts: int, number: int) -> str:
    """The file name of one shard of a folder of embeddings; parts count from 1."""
    return f"part-{part:05d}-of-{parts:05d}-{number:06d}.parquet"


def done_name(part: int, parts: int) -> str:
    """The file that says that a part is complete. The underscore hides it from readers of Parquet data sets."""
    return f"_done-{part:05d}-of-{parts:05d}.json"


def is_folder_of_shards(path: Path) -> bool:
    """Whether a folder holds embeddings, be they complete or not."""
    return path.is_dir() and any(_SHARD.fullmatch(name) or _DONE.fullmatch(name) for name in os.listdir(path))


def shards_of(folder: Path) -> list[Path]:
    """The shards of a complete folder of embeddings, in order.

    Raises:
        OutputError: No shard, parts of different counts, or a part that is missing or not finished.
    """
    found = {path: match.groups() for path in folder.iterdir() if (match := _SHARD.fullmatch(path.name))}
    done = {path.name: match[2] for path in folder.iterdir() if (match := _DONE.fullmatch(path.name))}
    counts = {int(parts) for parts in (*done.values(), *(parts for _, parts, _ in found.values()))}
    if not counts:
        raise OutputError(f"{folder} holds no embeddings; write some with `embedkit embed ... -o {folder}/`")
    if len(counts) > 1:
        raise OutputError(
            f"{folder} mixes runs of {' and '.join(map(str, sorted(counts)))} parts; start it anew"
        )
    parts = counts.pop()
    missing = [part for part in range(1, parts + 1) if done_name(part, parts) not in done]
    if missing:
        raise OutputError(
            f"{folder}: part {missing[0]} of {parts} is missing or not finished; "
            f"run it with --worker {missing[0]}/{parts}"
        )
    return sorted(found)


@dataclass(frozen=True)
class Embeddings:
    """Embeddings in memory, with their ids, labels and passport.

    Attributes:
        ids: One per row.
        parts: int32 (N,), 0 unless a picture has several rows.
        vectors: float32 (N, D).
        passport: What they are.
        labels: Label columns by name, each of length N.
    """

    ids: list[str]
    parts: np.ndarray
    vectors: np.ndarray
    passport: Passport
    labels: dict[str, list] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def label(self, name: str, where: str) -> list:
        """A label column.

        Raises:
            ConfigError: There is none of this name; those that there are, are named.
        """
        if name not in self.labels:
            raise no_column(where, name, self.labels)
        return self.labels[name]

    @classmethod
    def read(cls, source: str | os.PathLike[str]) -> Embeddings:
        """Read a Parquet file, a folder of shards, a `.npy` file with its ids and passport, or a LanceDB table.

        Raises:
            OutputError: Not embeddings of ours, a folder with a missing part, or damaged ones.
            SpaceMismatchError: Parts of different spaces.
            MissingDependencyError: A table, and pylance is not installed.
        """
        from embedkit.stored import open_stored  # which stands on this module

        stored = open_stored(source)
        ids, parts = stored.keys()
        labels = {name: stored.column(name) for name in stored.labels}
        return cls(ids, parts, stored.vectors(), stored.passport, labels)


def no_column(where: str, name: str, known: Iterable[str]) -> ConfigError:
    """The error for a label column that is not there."""
    return ConfigError(
        f"{where} has no column {name!r}; it has {', '.join(sorted(known)) or 'no label column'}"
    )


def vectors_of(table: pa.Table, dim: int, where: str) -> np.ndarray:
    """The `embedding` column as float32 (N, D).

    Raises:
        OutputError: A row, or a number of a row, is missing; `where` names what was read.
    """
    chunks = table["embedding"].chunks
    blocks = [chunk.flatten() for chunk in chunks]  # which leaves rows of null out
    if any(array.null_count for array in (*chunks, *blocks)):
        raise OutputError(
            f"{where} is damaged (an embedding, or a number of one, is missing); embed the pictures again"
        )
    vectors = np.concatenate([block.to_numpy() for block in blocks] or [np.empty(0, np.float32)])
    if len(vectors) != table.num_rows * dim:
        raise OutputError(
            f"{where} is damaged (expected {table.num_rows} rows of {dim} numbers, found {len(vectors)} numbers); "
            "embed the pictures again"
        )
    return vectors.reshape(-1, dim)


def beside(output: Path, suffix: str) -> Path:
    """The file of another suffix beside an output, or beside the file that the output is a link to."""
    there = output.with_suffix(suffix)
    if output.is_symlink() and not os.path.lexists(there):
        return Path(os.path.realpath(output)).with_suffix(suffix)
    return there


def errors_path(output: Path) -> Path:
    """Where the images that failed are listed: `X.errors.parquet` of `X.parquet`, `X.npy.errors.parquet` of `X.npy`."""
    return beside(
        output, ".errors.parquet" if output.suffix == ".parquet" else f"{output.suffix}.errors.parquet"
    )


def aside_folder(output: Path) -> Path:
    """Where a job with one output file works until the file is there: beside the file itself, not beside a link."""
    real = Path(os.path.realpath(output))
    return real.with_name(real.name + ".partial")


def write_table(table: pa.Table, path: Path) -> None:
    """Write one Parquet file aside, flush it to the disk, and rename it into place."""
    with replacing(path) as aside, parquet_writer(aside, table.schema) as writer:
        writer.write_table(table, row_group_size=ROW_GROUP)


@contextlib.contextmanager
def parquet_writer(path: Path, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    """A writer with our settings: floats do not compress, ids and labels do."""
    compression: dict[str, str] = {name: "zstd" for name in schema.names if name != "embedding"}
    dictionary = [name for name in schema.names if name not in RESERVED]
    with (
        pa.OSFile(os.fspath(path), "wb") as file,  # pyarrow takes a path with a colon for a URL
        pq.ParquetWriter(
            file,
            schema,
            compression=compression or "none",
            use_dictionary=dictionary,
            write_statistics=["id"],
        ) as writer,
    ):
        yield writer


def write_rows(tables: Iterable[pa.Table], path: Path, schema: pa.Schema) -> int:
    """Stream tables into one Parquet file of fixed row groups, so that equal rows give equal bytes.

    Returns:
        The number of rows.
    """
    count = 0
    with replacing(path) as aside, parquet_writer(aside, schema) as writer:
        for table in regroup(tables, ROW_GROUP):
            writer.write_table(table, row_group_size=ROW_GROUP)
            count += table.num_rows
    return count


def regroup(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of exactly `rows` rows, the last one shorter."""
    held: list[pa.Table] = []
    count = 0
    for table in tables:
        held.append(table)
        count += table.num_rows
        while count >= rows:
            merged = pa.concat_tables(held)
            yield merged.slice(0, rows).combine_chunks()
            held, count = [merged.slice(rows)], count - rows
    if count:
        yield pa.concat_tables(held).combine_chunks()


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The same rows under `schema`: columns that the table lacks become nulls."""
    names = table.column_names
    columns = [
        table[field.name].cast(field.type) if field.name in names else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write to a file aside, flush it to the disk, and rename it to `path`, as `_io.atomic.replacing` does.

    Yields:
        The path of the file aside, for writers that open files themselves.
    """
    with atomic.replacing(path) as file:
        yield Path(file.name)
        os.fsync(file.fileno())


def first_line(error: BaseException) -> str:
    """The begin of a library's message, for a sentence of ours."""
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


def json_bytes(value: Any) -> bytes:
    """`value` as indented JSON text, for the small files that stand beside embeddings."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()
