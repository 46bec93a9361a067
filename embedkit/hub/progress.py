"""The progress bar of downloads."""

from __future__ import annotations

import os
from types import TracebackType
from typing import TYPE_CHECKING, Self

from embedkit._io.text import safe_for_terminal

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class DownloadBar:
    """A `Watcher` that draws on stderr while its block runs, and is silent where stderr is no terminal.

    It is silent, too, where `HF_HUB_DISABLE_PROGRESS_BARS` silences those of the Hub's own client. Nothing is imported
    or drawn before a download begins.
    """

    def __init__(self) -> None:
        """Prepare."""
        self._drawn: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._drawn is not None:
            self._drawn.stop()

    def start(self, what: str, total: int) -> None:
        """The download of `what`, of `total` bytes, begins."""
        if self._drawn is None:
            self._drawn = _bar()
            self._drawn.start()
        self._task = self._drawn.add_task(safe_for_terminal(what), total=total)

    def advance(self, count: int) -> None:
        """`count` more bytes are on the disk."""
        if self._drawn is not None and self._task is not None:
            self._drawn.advance(self._task, count)


def _bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    console = Console(stderr=True)
    silenced = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper() in ("1", "ON", "YES", "TRUE")
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=console,
        transient=True,
        disable=silenced or not console.is_terminal,
    )
