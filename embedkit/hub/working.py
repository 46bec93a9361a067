"""The `zoo/` folder of the working directory: entries by name in a checkout, however embedkit is installed.

Any folder may be called `zoo`, also one of a stranger. So it is asked last, and serves no bytes but those that the
package's own index pins; what else lies there, its own index included, is not read.
"""

from __future__ import annotations

from pathlib import Path

from embedkit._io.reading import read_regular
from embedkit.hub.base import EntryFiles
from embedkit.hub.catalog import Index, IndexRow, Pin
from embedkit.hub.folder import FolderEntry, FolderZoo
from embedkit.hub.verified import MANIFEST_LIMIT
from embedkit.model.layout import MANIFEST, REVISION, sha256_hex

FOLDER = "zoo"


class WorkingZoo:
    """The entries of `./zoo` whose manifests the package's index pins; every other one does not exist here."""

    tagged = False

    def __init__(self, package: FolderZoo):
        """Take the zoo whose index pins; nothing is read yet."""
        self._package = package
        self.path = Path(FOLDER)

    @property
    def uri(self) -> str:
        """The folder, as text."""
        return str(self.path)

    def index(self) -> Index:
        """No rows: the package's index has them all."""
        return Index()

    def find(self, name: str, revision: str | None = None, pin: Pin | None = None) -> EntryFiles | None:
        """The entry that the package's index has under this name, if the folder holds that very version."""
        row = self._row(name)
        if row is None or pin is not None and pin.sha256 != row.manifest_sha256:
            return None
        if revision is not None and not (
            REVISION.fullmatch(revision) and row.manifest_sha256.startswith(revision)
        ):
            return None
        return FolderEntry(self.path / row.name) if self._digest(row) == row.manifest_sha256 else None

    def offers(self, name: str) -> bool:
        """Whether the entry can be loaded from here."""
        return self.find(name) is not None

    holds = offers

    def other_version(self, name: str) -> Path | None:
        """The folder of an entry that the package's index has under this name, in another version than that one."""
        row = self._row(name)
        if row is None or self._digest(row) in (None, row.manifest_sha256):
            return None
        return self.path / row.name

    def _row(self, name: str) -> IndexRow | None:
        index = self._package.index()
        folder = index.folder_of(name)
        return index.rows[folder] if folder is not None else None

    def _digest(self, row: IndexRow) -> str | None:
        try:
            return sha256_hex(read_regular(self.path / row.name / MANIFEST, MANIFEST_LIMIT))
        except OSError:
            return None
