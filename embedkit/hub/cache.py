"""Entries that came over a connection, in the user's cache folder: whole, verified, and one download for all.

    zoo/entries/<manifest sha256>/<name>/   an entry; it appears by one rename
    zoo/entries/.<manifest sha256>.partial/ one that is being pulled: a process that is killed leaves it to the next
    zoo/locks/<manifest sha256>             who pulls it now
    zoo/seen/                               what each place said last, for when it cannot be asked

An entry's identity is its manifest's digest: two places that hold the same entry share it here.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from embedkit._io.atomic import clear_leftovers, remove_folder, replacing_folder, write_file
from embedkit._io.locks import locked
from embedkit._io.messages import one_line
from embedkit._io.ownership import foreign_access
from embedkit._io.reading import read_regular
from embedkit.errors import ConfigError, EntryError, IntegrityError, OutputError
from embedkit.hub.base import Located
from embedkit.hub.catalog import Pin
from embedkit.hub.download import Watcher, download, full_disk, persistent
from embedkit.hub.folder import FolderEntry
from embedkit.hub.limits import CONFIG_LIMIT, INDEX_LIMIT, MANIFEST_LIMIT, check_file_list, is_non_commercial
from embedkit.hub.verified import VerifiedEntry
from embedkit.model.config import EntryConfig
from embedkit.model.layout import CONFIG, INDEX, MANIFEST, sha256_hex
from embedkit.model.manifest import FileRecord, Manifest


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """What is about to be pulled, for whoever decides or shows it.

    Attributes:
        name: The entry.
        place: The zoo that it comes from.
        license: SPDX identifier of its license.
        bytes: Of all its files.
    """

    name: str
    place: str
    license: str
    bytes: int


class Gate(Protocol):
    """Is asked once the license is known and before the weights come; it raises to refuse."""

    def __call__(self, arrival: Arrival) -> None:
        """Look at what is about to be pulled."""


def commercial_only(arrival: Arrival) -> None:
    """Refuse what may not be used commercially, unless somebody said that this is understood.

    Raises:
        ConfigError: The license is non-commercial.
    """
    if is_non_commercial(arrival.license):
        raise ConfigError(
            f"{arrival.name} of {arrival.place} is under {one_line(arrival.license)}, which forbids commercial use: "
            f"if that suits you, pull it with `embedkit zoo pull {arrival.name} --zoo {arrival.place} --accept-license`"
        )


class Cache:
    """The cache in one folder."""

    def __init__(self, root: str | os.PathLike[str]):
        """Take the folder; it is made, for its owner alone, when something is written."""
        self.root = Path(root).expanduser().absolute() / "zoo"
        self._entries = self.root / "entries"

    def _check_owner(self) -> None:
        """Refuse a cache that another user can write: what lies in it decides what is loaded.

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

    # --- what is there ------------------------------------------------------------------------------------

    def get(self, sha256: str) -> FolderEntry | None:
        """The entry of this manifest, None when it is not here or not whole.

        Sizes, manifest and configuration are looked at; whoever reads a file has its digest checked.

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
        """The manifests' digests of the entries of this name (any, when empty), by the beginning of the digest.

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
            if digest.startswith(prefix) and (not name or (self._entries / digest / name).is_dir())
        ]

    def remove(self, sha256: str) -> None:
        """Drop an entry.

        Raises:
            OutputError: It cannot be removed.
        """
        remove_folder(self._entries / sha256)

    # --- what places said ---------------------------------------------------------------------------------

    def note(self, place: str, asked: str, located: Located, sha256: str) -> None:
        """Remember what a place gave for a name; a cache that cannot be written remembers nothing."""
        facts = {"place": place, "asked": asked, "revision": located.revision, "manifest_sha256": sha256}
        self._write_seen(f"{_digest(place, asked)}.json", json.dumps(facts).encode())

    def noted(self, place: str, asked: str) -> FolderEntry | None:
        """What the place gave last for a name, when it is still here.

        Raises:
            ConfigError: Other users can write to the cache.
        """
        self._check_owner()
        try:
            path = self.root / "seen" / f"{_digest(place, asked)}.json"
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

    def note_index(self, place: str, content: bytes) -> None:
        """Remember a place's index."""
        self._write_seen(f"{_digest(place)}.{INDEX}", content)

    def noted_index(self, place: str) -> bytes | None:
        """The index that the place gave last.

        Raises:
            ConfigError: Other users can write to the cache.
        """
        self._check_owner()
        try:
            return read_regular(self.root / "seen" / f"{_digest(place)}.{INDEX}", INDEX_LIMIT)
        except OSError:
            return None

    def _write_seen(self, name: str, content: bytes) -> None:
        self._check_owner()
        with contextlib.suppress(OSError, OutputError):
            self._folder("seen")
            path = self.root / "seen" / name
            if not path.is_file() or read_regular(path, INDEX_LIMIT) != content:
                write_file(path, content)

    # --- what comes ---------------------------------------------------------------------------------------

    def pull(
        self,
        located: Located,
        *,
        pin: Pin | None = None,
        gate: Gate = commercial_only,
        watcher: Watcher | None = None,
        admit: Callable[[VerifiedEntry], None] = lambda entry: None,
    ) -> FolderEntry:
        """Bring an entry into the cache, unless it is there; an entry that is there is not looked at.

        Args:
            located: Where it lies.
            pin: What its manifest must hash to.
            gate: Decides by the license before the weights come.
            watcher: Is told how far the download is.
            admit: Looks at the whole entry before anybody can find it here, and raises to refuse.

        Raises:
            EntryError: Its manifest or its list of files is not one of an entry.
            IntegrityError: Bytes are not those that the pin, the index or the manifest names.
            ZooError: The place refuses, or (UnreachableError) is down.
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
                f"{where}: the manifest's sha256 is {sha256_hex(raw)[:12]}..., and the place's index says "
                f"{str(located.manifest_sha256)[:12]}...; if it is being published just now, try again"
            )
        manifest = Manifest.from_json(raw, f"{where}/{MANIFEST}")
        total = check_file_list(manifest, where)
        found = self.get(manifest.sha256)
        if found is not None:
            found.name = located.name  # the same bytes may have come under another one
            return found
        try:
            for name in ("entries", "locks"):
                self._folder(name)
            self._check_owner()
            with locked(self.root / "locks" / manifest.sha256) as alone:
                found = self.get(manifest.sha256)
                if found is None:
                    with self._aside(manifest.sha256, alone) as aside:
                        self._fetch(aside, located, manifest, raw, total, gate, watcher, admit)
        except FileNotFoundError as error:
            raise EntryError(f"{error.filename or where} is listed in the manifest and not there") from None
        except OSError as error:
            raise full_disk(error, self.root) from None
        found = self.get(manifest.sha256)
        if found is None:
            raise OutputError(f"{self.root}: the entry was removed while it was pulled; pull it again")
        found.name = located.name
        return found

    @contextlib.contextmanager
    def _aside(self, sha256: str, alone: bool) -> Iterator[Path]:
        """Where an entry is put together, before it appears under its digest in one step."""
        if not alone:
            # Without a lock two may pull at once: each on its own, and nothing is gone on with.
            with replacing_folder(self._entries / sha256) as aside:
                yield aside
            return
        clear_leftovers(self._entries / sha256)
        aside = self._entries / f".{sha256}.partial"  # a killed pull leaves it, and the next goes on with it
        yield aside
        if os.path.lexists(self._entries / sha256):  # what is there was damaged
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
        gate(Arrival(name=located.name, place=located.place, license=config.license, bytes=total))
        if watcher is not None:
            watcher.start(located.name, total)
        for name, record in manifest.files.items():
            _bring(located, name, record, folder, watcher)
        (folder / MANIFEST).write_bytes(raw)
        for left in folder.iterdir():
            if left.name not in manifest.files and left.name != MANIFEST:
                left.unlink()
        for left in aside.iterdir():  # of a pull under another name
            if left != folder:
                shutil.rmtree(left)
        try:
            admit(VerifiedEntry(located.name, FolderEntry(folder)))
        except EntryError:
            shutil.rmtree(aside, ignore_errors=True)
            raise

    def _folder(self, name: str) -> None:
        """Make the cache, for its owner alone."""
        for folder in (self.root.parent, self.root, self.root / name):
            if not folder.is_dir():
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def _bring(located: Located, name: str, record: FileRecord, folder: Path, watcher: Watcher | None) -> None:
    """One file to its place in `folder`; one that a killed pull left whole is hashed and kept."""
    target, part = folder / name, folder / f"{name}.part"
    if target.exists():
        target.replace(part)
    download(located.storage, name, record, part, watcher)
    part.replace(target)


def _digest(*words: str) -> str:
    return sha256_hex("\0".join(words).encode())[:32]
