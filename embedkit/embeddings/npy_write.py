"""The three files of a `.npy` array of embeddings, written and committed together.

Three files cannot be renamed in one step. They are written into the job's own folder `X.npy.partial/`, then a mark
is set there, then they are renamed, and the mark is removed. When a writer is killed after the mark, everything is on
the disk, and the next writer finishes the commit; a kill before the mark changes nothing. A reader refuses files
while the mark exists.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from embedkit._io import atomic
from embedkit._io.reading import open_regular
from embedkit._io.text import one_line
from embedkit.embeddings.metadata import Metadata
from embedkit.embeddings.schema import RESERVED, vectors_of
from embedkit.embeddings.side_files import beside, scratch_folder

__all__ = [
    "finish_commit",
    "ids_path",
    "is_uncommitted",
    "map_array",
    "metadata_path",
    "rows_digest",
    "write_npy",
]

_MARK = "_commit"
#: Name in the job's folder -> what ends the target's name.
_STAGED = {"_new.npy": "", "_new.ids.jsonl": ".ids.jsonl", "_new.metadata.json": ".metadata.json"}
#: Rows that the digest of the array covers: enough to tell two versions apart, and quick to read.
_SAMPLES = 64


def ids_path(npy: Path) -> Path:
    """`X.ids.jsonl` beside `X.npy`: one JSON object a row."""
    return beside(npy, ".ids.jsonl")


def metadata_path(npy: Path) -> Path:
    """`X.metadata.json` beside `X.npy`."""
    return beside(npy, ".metadata.json")


def write_npy(tables: Iterable[pa.Table], path: Path, metadata: Metadata, rows: int) -> int:
    """Stream tables into a `.npy` file with its ids and metadata, and commit the three together.

    Args:
        tables: The rows.
        path: The `.npy` file. No other writer may be at it: a job holds its lock.
        metadata: Written beside it.
        rows: How many rows will come.

    Returns:
        The number of rows.

    Raises:
        OutputError: A file cannot be written.
    """
    folder = scratch_folder(path)
    staged = [folder / name for name in _STAGED]
    try:
        folder.mkdir(exist_ok=True)
        count, columns = 0, {}
        stored = "<f2" if metadata.dtype == "float16" else "<f4"
        header = {"descr": stored, "fortran_order": False, "shape": (rows, metadata.dim)}
        with open(staged[0], "wb") as array, open(staged[1], "wb") as ids:
            np.lib.format.write_array_header_1_0(array, header)
            digest = hashlib.sha256()
            for table in tables:
                # Written, not mapped: on a full disk a mapped page ends the process.
                vectors = vectors_of(table, metadata.dim, os.fspath(path))
                array.write(np.ascontiguousarray(vectors, stored).data)
                count += table.num_rows
                columns = {f.name: str(f.type) for f in table.schema if f.name not in RESERVED}
                for line in table.drop_columns(["embedding"]).to_pylist():
                    text = (json.dumps(line, ensure_ascii=False) + "\n").encode()
                    digest.update(text)
                    ids.write(text)
            _flush(array)
            _flush(ids)
        card: dict[str, Any] = json.loads(metadata.to_json())
        card["files"] = {"ids_sha256": digest.hexdigest(), "rows_sha256": rows_digest(map_array(staged[0]))}
        card["labels"] = columns
        with open(staged[2], "wb") as file:
            file.write((json.dumps(card, sort_keys=True) + "\n").encode())
            _flush(file)
        (folder / _MARK).touch()
    except BaseException as error:
        _discard(path)
        if isinstance(error, OSError):
            raise atomic.refusal(path, error) from None
        raise
    finish_commit(path)
    with contextlib.suppress(OSError):
        folder.rmdir()  # fails in a job, whose shards are still there
    return count


def finish_commit(path: Path) -> bool:
    """Rename what a killed writer had ready for `path`. The caller holds the lock of the job.

    Returns:
        Whether there was a commit to finish.

    Raises:
        OutputError: A file cannot be written.
    """
    folder = scratch_folder(path)
    if not is_uncommitted(path):
        _discard(path)
        return False
    for name, suffix in _STAGED.items():
        if os.path.exists(folder / name):
            _place(folder / name, beside(path, suffix) if suffix else path)
    (folder / _MARK).unlink()
    return True


def is_uncommitted(path: Path) -> bool:
    """Whether a writer was stopped, or is, between the renames."""
    return os.path.exists(scratch_folder(path) / _MARK)


def _discard(path: Path) -> None:
    """Delete what was written for a commit that was not marked."""
    for name in _STAGED:
        with contextlib.suppress(OSError):
            (scratch_folder(path) / name).unlink()


def map_array(path: Path) -> npt.NDArray[Any]:
    """The array of a `.npy` file, mapped into memory: floating-point numbers."""
    open_regular(path).close()  # a FIFO would be waited for
    try:
        vectors = np.lib.format.open_memmap(path, "r")
    except OSError:
        raise
    except Exception as error:  # a header is Python's syntax, and a bad one fails in whatever evaluates it
        raise ValueError(f"{path.name} is no array: {one_line(error)}") from None
    if vectors.dtype.kind != "f":
        raise ValueError(f"{path.name} holds {vectors.dtype}, not floating-point numbers")
    return vectors


def rows_digest(vectors: npt.NDArray[Any]) -> str:
    """A digest of the shape and of rows spread over an array, the first and the last among them."""
    digest = hashlib.sha256(f"{vectors.dtype.str} {vectors.shape}".encode())
    last = len(vectors) - 1 if vectors.ndim == 2 else 0
    for row in dict.fromkeys(np.linspace(0, max(last, 0), _SAMPLES).astype(int).tolist()):
        digest.update(np.ascontiguousarray(np.atleast_1d(vectors)[row : row + 1]).tobytes())
    return digest.hexdigest()


def _place(staged: Path, target: Path) -> None:
    """Rename a staged file to its target, through a link, and with the permissions of the file that it replaces."""
    real = os.path.realpath(target)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.chmod(staged, os.stat(real).st_mode & 0o7777)
        try:
            os.replace(staged, real)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            with open(staged, "rb") as source, atomic.replacing(real) as copy:
                shutil.copyfileobj(source, copy)
            staged.unlink()
    except OSError as error:
        raise atomic.refusal(target, error) from None


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
