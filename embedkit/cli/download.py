"""Downloads on stderr: the license before each, and a progress bar of bytes."""

from __future__ import annotations

from embedkit.cli.output import tell
from embedkit.hub.cache import Arrival, open_only
from embedkit.hub.progress import DownloadBar


class Download(DownloadBar):
    """Shows each entry's license and draws bytes."""

    def __init__(self, *, accept_license: bool = False):
        """Prepare.

        Args:
            accept_license: Let entries pass that are not under an open license.
        """
        super().__init__()
        self._accept = accept_license

    def gate(self, arrival: Arrival) -> None:
        """Report the entry and its license, and refuse a license that was not accepted."""
        what = f"{arrival.name} from {arrival.zoo}: {arrival.bytes / 1e6:.1f} MB, license {arrival.license}"
        tell(what)
        if not self._accept:
            open_only(arrival)
