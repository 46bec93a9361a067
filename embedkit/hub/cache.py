"""The cache of downloaded entries: complete, verified, and downloaded once for all processes.

    zoo/entries/<manifest sha256>/<name>/   an entry; it appears by one rename
    zoo/entries/.<manifest sha256>.partial/ a download under way; if its process is killed, the next one resumes it
    zoo/locks/<manifest sha256>             the lock of a download
    zoo/seen/                               the last answers of each zoo, used when it is offline

An entry's identity is its manifest's digest: two zoos that have the same entry share one copy.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from embedkit._io.atomic import clear_leftovers, remove_folder, replacing_folder, write_file
from embedkit._io.locks import locked
from embedkit._io.ownership import foreign_access
from embedkit._io.reading import read_regular
from embedkit._io.text import plain_line
from embedkit.errors import ConfigError, EntryError, IntegrityError, OutputError
from embedkit.hub.base import Located
from embedkit.hub.catalog import Pin
from embedkit.hub.download import Watcher, cache_refusal, download, persistent
from embedkit.hub.folder import FolderEntry
from embedkit.hub.licenses import restriction
from embedkit.hub.limits import CONFIG_LIMIT, INDEX_LIMIT, MANIFEST_LIMIT, check_file_list
from embedkit.hub.verified import VerifiedEntry
from embedkit.model.config import EntryConfig
from embedkit.model.layout import CONFIG, INDEX, MANIFEST, sha256_hex
from embedkit.model.manifest import FileRecord, Manifest

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """An entry that is about to be downloaded, for the license gate and for progress output.

    Attributes:
        name: The entry.
        zoo: The zoo that it comes from.
        license: SPDX identifier of its license.
        bytes: Of all its files.
    """

    name: str
    zoo: str
    license: str
    bytes: int


class Gate(Protocol):
    """Called when the license is known and before the weights are downloaded; it raises to refuse the entry."""

    def __call__(self, arrival: Arrival) -> None:
        """Accept the entry, or raise."""


def open_only(arrival: Arrival) -> None:
    """Refuse a license that is not open.

    Raises:
        ConfigError: The license restricts use, or is not on the list of open ones.
    """
    if what := restriction(arrival.license):
        raise ConfigError(
            f"{arrival.name} of {arrival.zoo} is under {plain_line(arrival.license)}, which {what}: "
            f"to accept this, pull it with `embedkit zoo pull {arrival.name} --zoo {arrival.zoo} --accept-license`"
        )


class Cache:
    """The cache of downloaded entries, in one folder."""

    def __init__(self, root: str | os.PathLike[str]):
        """Take the folder; it is made, readable by its owner only, at the first write."""
        self.root = Path(os.path.expanduser(root)).absolute() / "zoo"
        self._entries = self.root / "entries"

    def _check_owner(self) -> None:
        """Refuse a cache that another user can write to: its content decides what is loaded.

        Raises:
            ConfigError: A folder of it belongs to another user than this one or root, or others may write to it.
        """
        inside = [self.root, *(self.root / name for name in ("entries", "seen", "locks"))]
        problems = [(self.root.parent, foreign_access(self.root.parent, sticky=True))]
        problems += [(folder, foreign_access(folder)) for folder in inside]
        for folder, problem in problems:
            if problem:
                raise ConfigError(
                    f"the cache is not used, since {folder} {problem}: close it with `chmod go-w`, if it is yours, or "
                    "name another one with EMBEDKIT_CACHE"
                )

    # --- reading ------------------------------------------------------------------------------------

    def get(self, sha256: str) -> FolderEntry | None:
        """The entry of this manifest; None when it is missing or incomplete.

        Sizes, manifest and configuration are checked here; each other file is hashed when it is read.

        Raises:
            ConfigError: Other users can write to the cache.
        """
        self._check_owner()
        try:
            with os.scandir(self._entries / sha256) as found:
                folder = Path(min(item.path for item in found))
            raw = read_regular(folder / MANIFEST, MANIFEST_LIMIT)
            if sha256_hex(raw) != sha256:
                return None
            files = Manifest.from_json(raw).files
            if any((folder / name).stat().st_size != record.size for name, record in files.items()):
                return None
            if sha256_hex(read_regular(folder / CONFIG, CONFIG_LIMIT)) != files[CONFIG].sha256:
                return None
        except (OSError, ValueError, EntryError):
            return None
        return FolderEntry(folder)

    def revisions(self, name: str = "", prefix: str = "") -> list[str]:
        """The digests of the cached entries of this name (of any name when empty) that start with `prefix`.

        Raises:
            ConfigError: Other users can write to the cache.
        """
        self._check_owner()
        try:
            with os.scandir(self._entries) as found:
                digests = sorted(item.name for item in found if not item.name.startswith("."))
        except OSError:
            return []
        return [
            digest
            for digest in digests
            if digest.startswith(prefix) and (not name or os.path.isdir(self._entries / digest / name))
        ]

    def remove(self, sha256: str) -> None:
        """Remove an entry.

        Raises:
            OutputError: It cannot be removed.
        """
        remove_folder(self._entries / sha256)

    # --- last answers of zoos ---------------------------------------------------------------------------------

    def note(self, zoo: str, asked: str, located: Located, sha256: str) -> None:
        """Record which entry a zoo gave for a name; nothing is recorded where the cache cannot be written."""
        facts = {"zoo": zoo, "asked": asked, "revision": located.revision, "manifest_sha256": sha256}
        self._write_seen(f"{_digest(zoo, asked)}.json", json.dumps(facts).encode())

    def noted(self, zoo: str, asked: str) -> FolderEntry | None:
        """The entry that the zoo gave last for a name, if it is still in the cache.

        Raises:
            ConfigError: Other users can write to the cache.
        """
        self._check_owner()
        try:
            path = self.root / "seen" / f"{_digest(zoo, asked)}.json"
            facts = json.loads(read_regular(path, MANIFEST_LIMIT))
            sha256, version = facts["manifest_sha256"], facts["revision"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if not isinstance(sha256, str) or not re.fullmatch(r"[0-9a-f]{64}", sha256):
            return None
        entry = self.get(sha256)
        if entry is not None:
            entry.version = str(version)
        return entry

    def note_index(self, zoo: str, content: bytes) -> None:
        """Record a zoo's index."""
        self._write_seen(f"{_digest(zoo)}.{INDEX}", content)

    def noted_index(self, zoo: str) -> bytes | None:
        """The last index of the zoo.

        Raises:
            ConfigError: Other users can write to the cache.
        """
        self._check_owner()
        try:
            return read_regular(self.root / "seen" / f"{_digest(zoo)}.{INDEX}", INDEX_LIMIT)
        except OSError:
            return None

    def _write_seen(self, name: str, content: bytes) -> None:
        self._check_owner()
        with contextlib.suppress(OSError, OutputError):
            self._folder("seen")
            path = self.root / "seen" / name
            if not os.path.isfile(path) or read_regular(path, INDEX_LIMIT) != content:
                write_file(path, content)

    # --- downloading ---------------------------------------------------------------------------------------

    def pull(
        self,
        located: Located,
        *,
        pin: Pin | None = None,
        gate: Gate = open_only,
        watcher: Watcher | None = None,
        admit: Callable[[VerifiedEntry], None] = lambda entry: None,
    ) -> FolderEntry:
        """Download an entry into the cache, unless it is already there.

        Args:
            located: Where it is stored.
            pin: The digest that its manifest must have.
            gate: Accepts or refuses the license before the weights are downloaded.
            watcher: Receives the progress.
            admit: Checks the whole entry before it appears in the cache; it raises to refuse it.

        Raises:
            EntryError: Its manifest is damaged, or lists files that no entry has.
            IntegrityError: Bytes differ from the digest in the pin, the index or the manifest.
            ZooError: The zoo refuses, or (UnreachableError) is down.
            OutputError: The cache cannot be written.
        """
        storage, where = located.storage, located.storage.uri
        try:
            raw = persistent(lambda: storage.read(MANIFEST, MANIFEST_LIMIT))
        except FileNotFoundError:
            raise EntryError(f"{where} is not a zoo entry: it has no {MANIFEST}") from None
        if pin is not None:
            pin.check(raw, where, located.name)
        if located.manifest_sha256 not in (None, sha256_hex(raw)):
            raise IntegrityError(
                f"{where}: the manifest's sha256 is {sha256_hex(raw)[:12]}..., and the zoo's index says "
                f"{str(located.manifest_sha256)[:12]}...; if it is being published right now, try again"
            )
        manifest = Manifest.from_json(raw, f"{where}/{MANIFEST}")
        total = check_file_list(manifest, where)
        found = self.get(manifest.sha256)
        if found is not None:
            found.name = located.name  # the same bytes may have been cached under another name
            return found
        try:
            for name in ("entries", "locks"):
                self._folder(name)
            self._check_owner()
            with locked(self.root / "locks" / manifest.sha256) as alone:
                found = self.get(manifest.sha256)
                if found is None:
                    _LOGGER.info("downloading %s from %s, %d bytes", located.name, where, total)
                    with self._aside(manifest.sha256, alone) as aside:
                        self._fetch(aside, located, manifest, raw, total, gate, watcher, admit)
        except FileNotFoundError as error:
            raise EntryError(f"{error.filename or where} is listed in the manifest and missing") from None
        except OSError as error:
            raise cache_refusal(error, self.root) from None
        found = self.get(manifest.sha256)
        if found is None:
            raise OutputError(f"{self.root}: the entry was removed during the download; pull it again")
        found.name = located.name
        return found

    @contextlib.contextmanager
    def _aside(self, sha256: str, alone: bool) -> Iterator[Path]:
        """The folder in which an entry is assembled before it appears under its digest in one step."""
        if not alone:
            # Without a lock, two processes may download at once: each uses its own folder, and nothing is resumed.
            with replacing_folder(self._entries / sha256) as aside:
                yield aside
            return
        clear_leftovers(self._entries / sha256)
        aside = self._entries / f".{sha256}.partial"  # resumed by the next pull if this one is killed
        yield aside
        if os.path.lexists(self._entries / sha256):  # the entry there was damaged
            self.remove(sha256)
        aside.rename(self._entries / sha256)

    def _fetch(
        self,
        aside: Path,
        located: Located,
        manifest: Manifest,
        raw: bytes,
        total: int,
        gate: Gate,
        watcher: Watcher | None,
        admit: Callable[[VerifiedEntry], None],
    ) -> None:
        storage = located.storage
        folder = aside / located.name
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        have = sum(item.stat().st_size for item in folder.iterdir())
        free = shutil.disk_usage(folder).free
        if total - have > free:
            raise OutputError(
                f"{self.root}: {located.name} takes {total} bytes and {free} are free; make room, or name another "
                "cache with EMBEDKIT_CACHE"
            )
        if manifest.files[CONFIG].size > CONFIG_LIMIT:
            raise EntryError(f"{storage.uri}: {CONFIG}: more than {CONFIG_LIMIT} bytes")
        _bring(located, CONFIG, manifest.files[CONFIG], folder, None)
        config = EntryConfig.from_json(read_regular(folder / CONFIG, CONFIG_LIMIT), f"{storage.uri}/{CONFIG}")
        gate(Arrival(name=located.name, zoo=located.zoo, license=config.license, bytes=total))
        if watcher is not None:
            watcher.start(located.name, total)
        for name, record in manifest.files.items():
            _bring(located, name, record, folder, watcher)
        (folder / MANIFEST).write_bytes(raw)
        for left in folder.iterdir():
            if left.name not in manifest.files and left.name != MANIFEST:
                left.unlink()
        for left in aside.iterdir():  # from a pull under another name
            if left != folder:
                shutil.rmtree(left)
        try:
            admit(VerifiedEntry(located.name, FolderEntry(folder)))
        except EntryError:
            shutil.rmtree(aside, ignore_errors=True)
            raise

    def _folder(self, name: str) -> None:
        """Make a folder of the cache that only its owner can read."""
        for folder in (self.root.parent, self.root, self.root / name):
            if not os.path.isdir(folder):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def _bring(located: Located, name: str, record: FileRecord, folder: Path, watcher: Watcher | None) -> None:
    """Download one file into `folder`; a complete file of a killed pull is hashed and kept."""
    target, part = folder / name, folder / f"{name}.part"
    if os.path.exists(target):
        target.replace(part)
    download(located.storage, name, record, part, watcher)
    part.replace(target)


def _digest(*words: str) -> str:
    return sha256_hex("\0".join(words).encode())[:32]
