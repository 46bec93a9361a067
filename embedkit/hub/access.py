"""How remote zoos are read: cache folder, credentials, offline."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field

from embedkit.errors import ConfigError
from embedkit.hub.cache import Cache, Gate, commercial_only
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
    """Whether the environment forbids connections, by the names and values that the Hub's own client looks at."""
    return any(
        os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def check_online(place: str) -> None:
    """Refuse to write to a remote place where the environment forbids connections.

    Raises:
        ConfigError: It does.
    """
    if is_offline():
        raise ConfigError(
            f"{place} needs a connection, and HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids it; unset it for this"
        )


@dataclass(frozen=True, kw_only=True)
class Access:
    """How remote places are read.

    Attributes:
        cache_dir: Where entries are kept; the user's cache folder when None.
        local_files_only: Never open a connection; the environment may say the same, see `is_offline`.
        token: Credential for the place that is named, and for no other origin.
        gate: Decides by the license whether an entry is pulled.
        watcher: Is told how far a download is.
        trust: Looks at an entry before it is given out, pinned or put into the cache, and raises to refuse.
    """

    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False
    token: str | None = field(default=None, repr=False)
    gate: Gate = commercial_only
    watcher: Watcher | None = None
    trust: Callable[[VerifiedEntry], None] | None = None

    def admit(self, entry: VerifiedEntry) -> None:
        """Let `trust` look at an entry."""
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
