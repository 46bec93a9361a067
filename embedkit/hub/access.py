"""How remote zoos are read: cache folder, credentials, offline."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field

from embedkit.errors import ConfigError
from embedkit.hub.cache import Cache, Gate, open_only
from embedkit.hub.download import Watcher
from embedkit.hub.verified import VerifiedEntry


def default_cache_dir() -> str:
    """The user's cache folder for embedkit, from `EMBEDKIT_CACHE` or the platform's convention.

    A user without a home folder, as in many containers, gets one below the folder for temporary files.
    """
    import platformdirs

    if chosen := os.environ.get("EMBEDKIT_CACHE"):
        return chosen
    try:
        return platformdirs.user_cache_dir("embedkit", appauthor=False)
    except RuntimeError:  # no HOME, and no passwd entry
        return os.path.join(tempfile.gettempdir(), f"embedkit-{os.getuid()}")


def is_offline() -> bool:
    """Whether the environment forbids connections, by the variables and values that the Hub's own client uses."""
    return any(
        os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def check_online(zoo: str) -> None:
    """Refuse to write to a remote zoo where the environment forbids connections.

    Raises:
        ConfigError: It does.
    """
    if is_offline():
        raise ConfigError(
            f"{zoo} needs a connection, and HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids it; unset it for this"
        )


@dataclass(frozen=True, kw_only=True)
class Access:
    """How remote zoos are read.

    Attributes:
        cache_dir: The cache folder; the user's own when None.
        local_files_only: Never open a connection; the environment can ask for the same, see `is_offline`.
        token: Credential for the named zoo; it is sent to no other origin.
        gate: Accepts or refuses an entry by its license before the weights are downloaded.
        watcher: Receives the progress of a download; where None, a bar is drawn if stderr is a terminal.
        trust: Checks an entry before it is returned, pinned or cached; it raises to refuse it.
    """

    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False
    token: str | None = field(default=None, repr=False)
    gate: Gate = open_only
    watcher: Watcher | None = None
    trust: Callable[[VerifiedEntry], None] | None = None

    def admit(self, entry: VerifiedEntry) -> None:
        """Let `trust` check an entry."""
        if self.trust is not None:
            self.trust(entry)

    @property
    def offline(self) -> bool:
        """Whether no connection may be opened."""
        return self.local_files_only or is_offline()

    @property
    def cache(self) -> Cache:
        """The cache."""
        return Cache(self.cache_dir if self.cache_dir is not None else default_cache_dir())
