"""An entry whose bytes are checked against its manifest before they are returned."""

from __future__ import annotations

import errno

from embedkit._io.text import one_line
from embedkit.errors import EntryError, IntegrityError
from embedkit.hub.base import EntryFiles
from embedkit.hub.catalog import Pin, index_pin
from embedkit.model.config import EntryConfig
from embedkit.model.layout import (
    CARD,
    CONFIG,
    GOLDEN,
    GRAPH,
    MANIFEST,
    sha256_hex,
)
from embedkit.model.manifest import Manifest

#: Greatest sizes in bytes of what is read before its digest is known, or parsed as a whole.
MANIFEST_LIMIT = 1_000_000


CONFIG_LIMIT = 16 << 20


#: Greatest size of an entry's files in bytes: those that are parsed or shown whole, and all others.
_LIMITS = {CONFIG: CONFIG_LIMIT, CARD: 16 << 20, GRAPH: 64 << 20, GOLDEN: 64 << 20}


_FILE_LIMIT = 16 << 30


class VerifiedEntry:
    """An entry that returns the bytes of a file only after they matched the manifest.

    Attributes:
        name: The folder's name.
        location: Its folder or URL, for messages.
        manifest: The parsed manifest.
        manifest_bytes: The manifest as stored.
        config: The parsed `config.json`.
    """

    def __init__(
        self, name: str, files: EntryFiles, *, manifest_sha256: str | None = None, pin: Pin | None = None
    ):
        """Read and check the manifest and the configuration.

        Args:
            name: The folder's name.
            files: The raw files.
            manifest_sha256: The digest that the manifest must have by an index.
            pin: The digest that the manifest must have, and who requires it.

        Raises:
            EntryError: No manifest, or an invalid file.
            IntegrityError: Bytes that do not match the pin or the manifest.
        """
        self.name = name
        self.location = files.location
        self._files = files
        try:
            raw = files.read(MANIFEST, MANIFEST_LIMIT)
        except FileNotFoundError:
            raise EntryError(f"{self.location} is not a zoo entry: it has no readable {MANIFEST}") from None
        except OSError as error:
            raise EntryError(
                f"{self.location} is not a zoo entry: it has no readable {MANIFEST} ({one_line(error)})"
            ) from None
        if manifest_sha256 is not None:
            pin = index_pin(name, manifest_sha256)
        if pin is not None:
            pin.check(raw, self.location, name)
        self.manifest_bytes = raw
        self.manifest = Manifest.from_json(raw, f"{self.location}/{MANIFEST}")
        self.config = EntryConfig.from_json(self.read(CONFIG), f"{self.location}/{CONFIG}")

    @property
    def revision(self) -> str:
        """The manifest's sha256: the entry's identity, 64 hex digits."""
        return self.manifest.sha256

    def read(self, name: str) -> bytes:
        """The verified bytes of one file.

        Raises:
            EntryError: The entry does not list the file, or it cannot be read.
            IntegrityError: Its size or sha256 differs from the manifest.
        """
        record = self.manifest.files.get(name)
        if record is None:
            raise EntryError(f"{self.location}: the entry has no {name}")
        most = _LIMITS.get(name, _FILE_LIMIT)
        if record.size > most:
            raise EntryError(
                f"{self.location}/{MANIFEST}: {name} has {record.size} bytes; expected at most {most}"
            )
        try:
            data = self._files.read(name, record.size + 1)
        except OSError as error:
            if error.errno == errno.EFBIG:
                raise IntegrityError(
                    f"{self.location}/{name}: expected {record.size} bytes, found more; pull the entry again"
                ) from None
            raise EntryError(
                f"{self.location}/{name} cannot be read ({one_line(error)}); pull it again"
            ) from None
        except MemoryError:
            raise EntryError(
                f"{self.location}/{name}: its {record.size} bytes do not fit into memory"
            ) from None
        found = (len(data), sha256_hex(data))
        if found != (record.size, record.sha256):
            raise IntegrityError(
                f"{self.location}/{name}: expected {record.size} bytes of sha256 {record.sha256[:12]}..., found "
                f"{found[0]} bytes of {found[1][:12]}...; pull the entry again"
            )
        return data

    @property
    def card(self) -> str:
        """The model card, Markdown with a YAML head."""
        return self.read(CARD).decode(errors="replace")
