"""`embedkit.lock`: which bytes a project means by each name, from the first use on.

Where the file exists in the working folder (or `EMBEDKIT_LOCK` names one), each name that is loaded is written into it
at its first use, and must give the same manifest ever after. `embedkit zoo pull NAME --lock` makes the file and
moves a pin. A pin says which bytes a name means, never where they come from: that is up to the user's own zoos. The
file holds no path of this machine, so that it can be committed and shared.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from embedkit._io.atomic import write_file
from embedkit._io.locks import locked
from embedkit._io.reading import read_regular
from embedkit.errors import ConfigError, EntryError, OutputError
from embedkit.hub.catalog import Pin
from embedkit.hub.urls import is_url
from embedkit.model.layout import SCHEMA_VERSION, parse_json

VARIABLE = "EMBEDKIT_LOCK"
NAME = "embedkit.lock"
#: Where an entry of a zoo on this machine came from, whatever its path is.
LOCAL = "local"
_LIMIT = 16 << 20


class LockFile:
    """The pins of one lock file."""

    def __init__(self, path: Path):
        """Read the file; one that is not there holds nothing.

        Raises:
            ConfigError: It is damaged.
        """
        self.path = path
        self._pins = self._read()

    @classmethod
    def find(cls, *, create: bool = False) -> LockFile | None:
        """The lock file of the working folder, None when there is none and none is to be made."""
        named = os.environ.get(VARIABLE)
        path = Path(named) if named else Path(NAME)
        return cls(path) if named or create or path.is_file() else None

    def pin(self, key: str) -> Pin | None:
        """What `key` (a name, or an entry's URL) must give."""
        facts = self._pins.get(key)
        if facts is None:
            return None
        way_out = f"to move the pin: embedkit zoo pull {key}@latest --lock"
        return Pin(sha256=facts["manifest_sha256"], by=str(self.path), way_out=way_out)

    def write(self, key: str, *, place: str, revision: str, manifest_sha256: str) -> None:
        """Pin a name; writers of one file wait for each other, so that none loses another's pin.

        Args:
            key: A name without its revision, or an entry's URL.
            place: Where it came from, as readers of the file see it: a URL, or for a local zoo nothing but `local`.
            revision: What the place calls this version: a commit on the Hub, else the manifest's digest.
            manifest_sha256: 64 hex digits.

        Raises:
            OutputError: The file cannot be written.
        """
        if not is_url(place) or place.startswith("file:"):
            place = LOCAL
        path = Path(
            os.path.realpath(self.path)
        )  # the lock stands beside the file itself, not beside links to it
        try:
            with locked(path.with_name(f".{path.name}.lock"), remove=True):
                self._pins = self._read()  # another process may have written since
                self._pins[key] = {"place": place, "revision": revision, "manifest_sha256": manifest_sha256}
                text = json.dumps({"schema": SCHEMA_VERSION, "entries": self._pins}, indent=1, sort_keys=True)
                write_file(path, f"{text}\n".encode())
        except OutputError:
            raise
        except OSError as error:
            reason = error.strerror or error
            raise OutputError(
                f"{self.path} cannot be written ({reason}); name another with {VARIABLE}"
            ) from None

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            data = parse_json(read_regular(self.path, _LIMIT), str(self.path))
        except FileNotFoundError:
            return {}
        except (OSError, EntryError) as error:
            raise ConfigError(f"{self.path} cannot be read ({error}); fix or remove it") from None
        pins = (
            data.get("entries") if isinstance(data, dict) and data.get("schema") == SCHEMA_VERSION else None
        )
        if not isinstance(pins, dict) or not all(_is_pin(facts) for facts in pins.values()):
            raise ConfigError(f"{self.path} is not a lock file of this version; fix or remove it")
        return pins


def _is_pin(facts: object) -> bool:
    if not isinstance(facts, dict) or not all(
        isinstance(facts.get(key), str) for key in ("place", "revision")
    ):
        return False
    digest = facts.get("manifest_sha256")
    return isinstance(digest, str) and len(digest) == 64 and not set(digest) - set("0123456789abcdef")
