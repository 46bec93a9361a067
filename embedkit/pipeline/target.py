"""Where the rows of a job go: the output, its format, its files, and which of them may be replaced."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from embedkit._io.atomic import clear_leftovers
from embedkit._io.outputs import check_ours, check_outputs
from embedkit.embeddings.base import Format
from embedkit.embeddings.earlier import EarlierRows
from embedkit.embeddings.formats import output_format
from embedkit.embeddings.side_files import scratch_folder
from embedkit.errors import ConfigError
from embedkit.images.sources import PathList
from embedkit.pipeline.checkpoint import ShardStore, is_table_of_failures

__all__ = ["Target"]


@dataclass(frozen=True)
class Target:
    """The output of a job.

    Attributes:
        path: Where it is.
        format: Its format.
        part: Which part of a sharded output this job writes, counted from 1.
        parts: Of how many.
    """

    path: Path
    format: Format
    part: int = 1
    parts: int = 1

    @classmethod
    def of(cls, output: str | os.PathLike[str], worker: tuple[int, int] | None) -> Target:
        """Find the format of an output by its name.

        Raises:
            ConfigError: A name of no format, or a worker of an output that several cannot share.
        """
        name = os.fspath(output)
        form = output_format(name)
        path = form.locate(name)
        if worker is None:
            return cls(path, form)
        if not form.sharded:
            raise ConfigError(
                f"worker: several workers write into a folder: take -o {path.stem}/ instead of {name!r}"
            )
        return cls(path, form, *worker)

    def __str__(self) -> str:
        return f"{self.path}/" if self.format.sharded else str(self.path)

    def check_sources(self, sources: Sequence[str | PathList]) -> None:
        """Refuse an output, or a file beside it, that is one of the sources or matches a pattern among them.

        Raises:
            OutputError: Naming both.
        """
        outputs = {"-o": self.path}
        if not self.format.sharded:
            outputs["the table of failures of -o"] = self.format.errors_path(self.path)
        outputs |= {f"the {what} of -o": path for what, path in self.format.side_files(self.path).items()}
        given = [source for source in sources if isinstance(source, str)]
        taken = {f"the source {source!r}": source for source in given}
        for source in given:
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
        if self.format.sharded:
            return ShardStore(self.path, self.part, self.parts)
        self.format.check_writable(self.path)
        errors = self.format.errors_path(self.path)
        store = ShardStore(scratch_folder(self.path), scratch=True)
        try:
            self.format.prepare(self.path)
            check_ours(errors, is_table_of_failures, "a table of failures")
            for path in (self.path, errors):
                clear_leftovers(Path(os.path.realpath(path)))
        except BaseException:
            store.close()
            raise
        return store

    def check_replaceable(self) -> None:
        """Refuse to start again over embeddings that embedkit did not write.

        Raises:
            OutputError: Naming them.
        """
        self.format.check_replaceable(self.path)

    def earlier(self) -> EarlierRows | None:
        """The output of an earlier job; None where there is none, or where the shards are the output."""
        return self.format.earlier(self.path)

    def errors(self, store: ShardStore) -> Path:
        """Where the table of failures goes."""
        return store.errors if self.format.sharded else self.format.errors_path(self.path)
