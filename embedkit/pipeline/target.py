"""Where the rows of an embed job go: the kind of the output, its files, and what of them may be replaced."""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from embedkit._io.atomic import clear_leftovers
from embedkit._io.outputs import check_ours, check_outputs
from embedkit._io.reading import open_regular
from embedkit.embeddings import lance as lancetable
from embedkit.embeddings.npy import finish_commit, ids_path, is_ids, is_metadata, metadata_path
from embedkit.embeddings.parquet_write import read_metadata
from embedkit.embeddings.paths import aside_folder, errors_path
from embedkit.errors import ConfigError, OutputError
from embedkit.pipeline.checkpoint import ShardStore, is_table_of_failures
from embedkit.pipeline.finished import Finished


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
        if not text:
            raise ConfigError("output: the name is empty; give X.parquet, X.npy or a folder ending in '/'")
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

    def check_sources(self, sources: Sequence[str]) -> None:
        """Refuse an output, or a file beside it, that is one of the sources or matches a pattern among them.

        Raises:
            OutputError: Naming both.
        """
        outputs = {"-o": self.path}
        if self.kind != "folder":
            outputs["the table of failures of -o"] = errors_path(self.path)
        if self.kind == "npy":
            outputs |= {"the ids of -o": ids_path(self.path), "the metadata of -o": metadata_path(self.path)}
        taken = {f"the source {source!r}": source for source in sources}
        for source in sources:
            if glob.has_magic(source) and not os.path.lexists(source):
                matches = glob.iglob(source, recursive=True, include_hidden=True)
                taken |= {f"the source {path!r}, which {source!r} matches": path for path in matches}
        check_outputs(outputs, taken)

    def open_store(self) -> ShardStore:
        """This job's shards, locked; a commit that was killed is finished, and its scratch files are cleared.

        Raises:
            OutputError: The output cannot be written, another process writes it, or a file that would be replaced
                was not written by embedkit.
        """
        if self.kind == "folder":
            return ShardStore(self.path, self.part, self.parts)
        if self.kind == "lance" and self.path.parent.parent.is_dir():
            with contextlib.suppress(OSError):  # a new database is a new folder
                self.path.parent.mkdir(exist_ok=True)
        check_writable(Path(os.path.realpath(self.path)))
        store = ShardStore(aside_folder(self.path), scratch=True)
        try:
            if self.kind == "npy":
                finish_commit(self.path)
                check_ours(ids_path(self.path), is_ids, "ids")
                check_ours(metadata_path(self.path), is_metadata, "metadata")
            check_ours(errors_path(self.path), is_table_of_failures, "a table of failures")
            for path in (self.path, errors_path(self.path)):
                clear_leftovers(Path(os.path.realpath(path)))
        except BaseException:
            store.close()
            raise
        return store

    def check_replaceable(self) -> None:
        """Refuse to start again over a file that embedkit did not write.

        Raises:
            OutputError: Naming it.
        """
        if self.kind == "parquet":
            check_ours(self.path, lambda path: bool(read_metadata(path)), "embeddings")
        elif self.kind == "npy":
            check_ours(self.path, _has_metadata, "embeddings")
        elif self.kind == "lance" and lancetable.exists(self.path):
            table = lancetable.open_table(self.path)
            check_ours(self.path, lambda path: bool(lancetable.metadata_of(table, path)), "embeddings")

    def finished(self) -> Finished | None:
        """What an earlier job left there; a folder is its own store."""
        if self.kind == "lance":
            return Finished.open(self.path) if lancetable.exists(self.path) else None
        return Finished.open(self.path) if self.kind != "folder" and self.path.exists() else None

    def errors(self, store: ShardStore) -> Path:
        """Where the table of failures goes."""
        return store.errors if self.kind == "folder" else errors_path(self.path)


def _has_metadata(npy: Path) -> bool:
    with open_regular(npy) as file:
        return file.read(6) == b"\x93NUMPY" and is_metadata(metadata_path(npy))


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
