"""`embedkit.lock` pins the entries of a project by digest.

Where the file exists in the working folder (or `EMBEDKIT_LOCK` names one), a name that it pins must give that manifest.
Loading only reads the file: `--lock`, as of `embedkit zoo pull NAME --lock`, creates it and adds or moves a pin.
A pin names bytes, never their source: entries are looked up in the user's own zoos. The file holds no path of this
machine, so that it can be committed and shared.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from embedkit._io.atomic import write_file
from embedkit._io.locks import locked
from embedkit._io.reading import read_regular
from embedkit._io.text import one_line
from embedkit.errors import ConfigError, EntryError, OutputError
from embedkit.hub.catalog import Pin
from embedkit.hub.urls import is_url
from embedkit.model.layout import SCHEMA_VERSION, parse_json

VARIABLE = "EMBEDKIT_LOCK"
NAME = "embedkit.lock"
#: The zoo of an entry that came from a folder on this machine.
LOCAL = "local"
_LIMIT = 16 << 20


class LockFile:
    """The pins of one lock file."""

    def __init__(self, path: Path):
        """Read the file; a missing one has no pins.

        Raises:
            ConfigError: It is damaged.
        """
        self.path = path
        self._pins = self._read()

    @classmethod
    def find(cls, *, create: bool = False) -> LockFile | None:
        """The lock file of the working folder; None when there is none, unless `create` is set."""
        named = os.environ.get(VARIABLE)
        path = Path(named) if named else Path(NAME)
        return cls(path) if named or create or os.path.isfile(path) else None

    def pin(self, key: str) -> Pin | None:
        """The pin of a name, or of an entry's URL."""
        facts = self._pins.get(key)
        if facts is None:
            return None
        way_out = f"to move the pin: embedkit zoo pull {key}@latest --lock"
        return Pin(sha256=facts["manifest_sha256"], by=str(self.path), way_out=way_out)

    def write(self, key: str, *, zoo: str, revision: str, manifest_sha256: str) -> None:
        """Pin a name. Writers of one file wait for each other, so that no pin is lost.

        Args:
            key: A name without its revision, or an entry's URL.
            zoo: The zoo that it came from. A path is recorded as `local`.
            revision: The zoo's own name for this version: a commit on the Hub, else the manifest's digest.
            manifest_sha256: 64 hex digits.

        Raises:
            OutputError: The file cannot be written.
        """
        if not is_url(zoo) or zoo.startswith("file:"):
            zoo = LOCAL
        # The lock lies beside the file itself, not beside links to it.
        path = Path(os.path.realpath(self.path))
        try:
            with locked(path.with_name(f".{path.name}.lock"), remove=True):
                self._pins = self._read()  # another process may have written since
                self._pins[key] = {"zoo": zoo, "revision": revision, "manifest_sha256": manifest_sha256}
                text = json.dumps({"schema": SCHEMA_VERSION, "entries": self._pins}, indent=1, sort_keys=True)
                write_file(path, f"{text}\n".encode())
        except OutputError:
            raise
        except OSError as error:
            raise OutputError(
                f"{self.path} cannot be written ({one_line(error)}); name another with {VARIABLE}"
            ) from None

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            data = parse_json(read_regular(self.path, _LIMIT), str(self.path))
        except FileNotFoundError:
            return {}
        except (OSError, EntryError) as error:
            raise ConfigError(f"{self.path} cannot be read ({one_line(error)}); fix or remove it") from None
        pins = (
            data.get("entries") if isinstance(data, dict) and data.get("schema") == SCHEMA_VERSION else None
        )
        if not isinstance(pins, dict) or not all(_is_pin(facts) for facts in pins.values()):
            raise ConfigError(f"{self.path} is not a lock file of this version; fix or remove it")
        return pins


def _is_pin(facts: object) -> bool:
    if not isinstance(facts, dict) or not all(isinstance(facts.get(key), str) for key in ("zoo", "revision")):
        return False
    digest = facts.get("manifest_sha256")
    return isinstance(digest, str) and len(digest) == 64 and not set(digest) - set("0123456789abcdef")
