"""Downloads on stderr: the license before each, and a progress bar of bytes."""

from __future__ import annotations

from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn

from embedkit._io.text import safe_for_terminal
from embedkit.cli.progress import Drawn
from embedkit.cli.terminal import tell
from embedkit.hub.cache import Arrival, commercial_only


class Download(Drawn):
    """Shows each entry's license and draws bytes."""

    def __init__(self, *, accept_license: bool = False):
        """Prepare.

        Args:
            accept_license: Let entries pass that may not be used commercially.
        """
        super().__init__(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
        )
        self._accept = accept_license

    def gate(self, arrival: Arrival) -> None:
        """Report the entry and its license, and refuse a license that was not accepted."""
        what = f"{arrival.name} from {arrival.zoo}: {arrival.bytes / 1e6:.1f} MB, license {arrival.license}"
        tell(what)
        if not self._accept:
            commercial_only(arrival)

    def start(self, what: str, total: int) -> None:
        """`total` bytes of `what` are about to come."""
        self._task = self._progress.add_task(safe_for_terminal(what), total=total)

    def advance(self, count: int) -> None:
        """So many more bytes are there."""
        if self._task is not None:
            self._progress.advance(self._task, count)
