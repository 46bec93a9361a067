"""The progress bars of long commands, on stderr."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from embedkit.pipeline import report


class Drawn:
    """A bar that is drawn on stderr while its block runs; on a stderr that is no terminal it stays silent."""

    def __init__(self, *columns: ProgressColumn):
        """Prepare a bar of these columns."""
        console = Console(stderr=True)
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


class Bar(Drawn, report.Progress):
    """Draws images/s and the time left."""

    def __init__(self, what: str):
        """Prepare a bar that says `what` it does."""
        super().__init__(
            TextColumn(what),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[failures]}"),
        )
        self._failed = 0

    def start(self, total: int) -> None:
        """`total` images are about to be embedded."""
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
