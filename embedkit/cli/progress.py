"""The progress of long commands, on stderr: a bar on a terminal, else a line every 30 seconds."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
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

from embedkit.cli.output import is_quiet, tell
from embedkit.pipeline import report

#: Seconds between two lines where stderr is not a terminal.
INTERVAL = 30.0


class Drawn:
    """A bar on stderr while its block runs; on a stderr that is no terminal, and with `--quiet`, it stays silent."""

    def __init__(self, *columns: ProgressColumn):
        """Prepare a bar of these columns."""
        console = Console(stderr=True)
        self.on_terminal = console.is_terminal
        drawn = self.on_terminal and not is_quiet()
        self._progress = Progress(*columns, console=console, transient=True, disable=not drawn)
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


class Bar(Drawn, report.Progress):
    """Reports images/s, failures and the time left."""

    def __init__(self, what: str, *, _interval: float | None = None):
        """Prepare a bar that says `what` it does."""
        super().__init__(
            TextColumn(what),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[failures]}"),
        )
        self._what = what
        self._total = self._done = self._failed = 0
        self._started = time.monotonic()
        self._lines = _Lines(self._line, INTERVAL if _interval is None else _interval)

    def __enter__(self) -> Self:
        super().__enter__()
        self._started = time.monotonic()
        if not self.on_terminal:
            self._lines.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lines.stop()
        super().__exit__(kind, error, trace)

    def start(self, total: int) -> None:
        """`total` images are about to be embedded."""
        self._task = self._progress.add_task("", total=total, rate="", failures="")
        self._total, self._started = total, time.monotonic()

    def advance(self, images: int, failed: int) -> None:
        """So many more images were embedded, and so many failed."""
        if self._task is None:
            return
        self._failed += failed
        self._done += images + failed
        speed = self._progress.tasks[self._task].speed
        self._progress.update(
            self._task,
            advance=images + failed,
            rate=f"{speed:.1f} images/s" if speed else "",
            failures=f"{self._failed} failed" if self._failed else "",
        )

    def _line(self) -> str:
        """The progress as a sentence."""
        seconds = time.monotonic() - self._started
        if not self._total:
            return (
                f"{self._what}: preparing for {_duration(seconds)} (images are listed, the encoder is loaded)"
            )
        if self._done >= self._total:
            return f"{self._what}: all {self._total} images are done, the output is completed"
        speed = self._done / seconds
        left = f"{_duration((self._total - self._done) / speed)} left" if speed else "time left unknown"
        done = f"{self._done} of {self._total} images"
        return f"{self._what}: {done}, {speed:.1f} images/s, {self._failed} failed, {left}"


class _Lines:
    """Prints a line again and again, in a thread: a job that waits for a disk or a network is seen, too."""

    def __init__(self, line: Callable[[], str], interval: float):
        self._line, self._interval = line, interval
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._print, name="embedkit-progress", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def _print(self) -> None:
        while not self._end.wait(self._interval):
            tell(self._line())


def _duration(seconds: float) -> str:
    """A time for people: `45 s`, `12 min`, `3 h 5 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
