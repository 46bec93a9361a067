"""The progress bars of long commands, on stderr."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from embedkit.pipeline import report


class Bar(report.Progress):
    """Draws images/s and the time left while its block runs; silent on a stderr that is no terminal."""

    def __init__(self, what: str):
        """Prepare a bar that says `what` it does."""
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn(what),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[failures]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._failed = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def start(self, total: int) -> None:
        """`total` images are about to be embedded."""
        # Not before: the download of an encoder draws its own bar, and two at once would overwrite each other.
        self._progress.start()
        self._task = self._progress.add_task("", total=total, rate="", failures="")

    def advance(self, images: int, failed: int) -> None:
        """So many more images were embedded, and so many failed."""
        if self._task is None:
            return
        self._failed += failed
        speed = self._progress.tasks[self._task].speed
        self._progress.update(
            self._task,
            advance=images + failed,
            rate=f"{speed:.1f} images/s" if speed else "",
            failures=f"{self._failed} failed" if self._failed else "",
        )
