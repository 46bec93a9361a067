"""From a name to a verified entry: the look-up order, revisions and pins."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from embedkit._io.reading import read_regular
from embedkit._io.text import did_you_mean
from embedkit.errors import (
    ConfigError,
    EmbedkitError,
    EntryError,
    EntryNotFoundError,
    IntegrityError,
    UnreachableError,
)
from embedkit.hub.access import Access
from embedkit.hub.base import Zoo
from embedkit.hub.cached import CachedZoo
from embedkit.hub.catalog import Pin, index_pin
from embedkit.hub.folder import FolderEntry, package_zoo
from embedkit.hub.lockfile import LockFile
from embedkit.hub.open import open_zoo
from embedkit.hub.urls import file_path, is_url, parse_entry
from embedkit.hub.verified import VerifiedEntry
from embedkit.hub.working import WorkingZoo
from embedkit.model.layout import REVISION

#: What `load_encoder()` gives: the entry that the wheel carries.
DEFAULT_ENCODER = "supervised-efficientnet_lite0"


#: The zoo of the released version, asked last. Empty until a release has a home.
DEFAULT_ZOO = ""


ZOO_VARIABLE = "EMBEDKIT_ZOO"


def find_entry(
    name: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    access: Access | None = None,
    zoo: str | None = None,
    lock: bool = False,
) -> VerifiedEntry:
    """Look up an entry and check its manifest and configuration; a remote entry is downloaded into the cache.

    Args:
        name: As for `load_encoder`.
        revision: As for `load_encoder`.
        access: How remote zoos are read.
        zoo: Look in this zoo only.
        lock: Pin the entry in the lock file, replacing an older pin. Without it, the file is only read.

    Raises:
        EntryNotFoundError: No zoo has it.
        ConfigError: The name or the revision is invalid.
        EmbedkitError: As for `load_encoder`.
    """
    access = access or Access()
    text = os.fspath(name) if name is not None else DEFAULT_ENCODER
    url = is_url(text) and not text.startswith("file://")
    if zoo is None and not url and is_path(text):
        own = _entry_at(text, revision)
        access.admit(own)
        return own
    address = parse_entry(text) if url else None
    if address is not None:
        bare, given = f"{address.zoo}/{address.name}", address.revision
    else:
        bare, at, behind = text.partition("@")
        given = behind if at else None
    if given is not None and revision is not None:
        raise ConfigError(f"{text!r} and revision={revision!r} both name a revision; give one of them")
    wanted = Wanted.of(bare, given if given is not None else revision, lock=lock)
    if address is not None:
        entry = _in_zoos(address.name, [open_zoo(address.zoo, access)], wanted, access)
        if entry is None:
            raise EntryNotFoundError(_no_entry(address.zoo, address.name, access))
        return entry
    among = [open_zoo(zoo, access)] if zoo is not None else zoos(access)
    carried = zoo is None and wanted.pin is not None and _is_carried(bare, wanted.pin)
    # An entry in the package is not requested from a remote zoo: pinned bytes are the same everywhere.
    asked = [one for one in among if not (carried and isinstance(one, CachedZoo))]
    entry = _in_zoos(bare, asked, wanted, access, working_zoo() if zoo is None else None)
    if entry is None:
        raise _not_found(bare, access, among, zoo)
    return entry


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The requirements on an entry.

    Attributes:
        revision: The revision that the user asked for; None for the zoo's current one.
        pin: The pin of the lock file or the package's index, when the user asked for no revision.
        locked: The pin of the lock file, also when the user asked for a revision.
        folder: The entry of this name in the package's index; empty when it has none.
        key: The name in the lock file.
        lock: The lock file to write the name into; None when it is not to be pinned.
    """

    key: str
    folder: str = ""
    revision: str | None = None
    pin: Pin | None = None
    locked: Pin | None = None
    lock: LockFile | None = None

    @classmethod
    def of(cls, key: str, revision: str | None, *, lock: bool = False) -> Wanted:
        """The requirements for `key`: `latest` lifts every pin, and `lock` that of the lock file."""
        file = LockFile.find(create=lock)
        writable = file if lock else None
        if revision == "latest":
            return cls(key=key, lock=writable)
        locked = file.pin(key) if file is not None and not lock else None
        pin, folder = None, None
        if revision is None:
            index = package_zoo().index()
            folder = index.folder_of(key)
            pin = locked or (index_pin(folder, index.rows[folder].manifest_sha256) if folder else None)
        return cls(key=key, folder=folder or "", revision=revision, pin=pin, locked=locked, lock=writable)

    def check(self, zoo: Zoo, entry: VerifiedEntry, version: str) -> VerifiedEntry:
        """Check an entry against the lock file, or record it there."""
        if self.locked is not None:
            self.locked.check(entry.manifest_bytes, entry.location, self.key)
        elif self.lock is not None:
            self.lock.write(
                self.key, zoo=zoo.uri, revision=version or entry.revision, manifest_sha256=entry.revision
            )
        return entry


def _in_zoos(
    name: str, among: Sequence[Zoo], wanted: Wanted, access: Access, last: WorkingZoo | None = None
) -> VerifiedEntry | None:
    """The first entry of this name that meets the requirements; None when no zoo has the name.

    Where no zoo has it, the cache is asked for a pinned one, then `last`.
    """
    revision = wanted.revision
    digest = revision is not None and bool(REVISION.fullmatch(revision))
    if revision is not None and not digest:
        among = [zoo for zoo in among if zoo.tagged]
        if not among:
            raise ConfigError(
                f"revision: expected at least 12 hex digits of the manifest's sha256 or 'latest', found {revision!r}"
            )
    elsewhere: list[str] = []
    down: UnreachableError | None = None
    for zoo in among:
        try:
            files = zoo.find(name, revision, wanted.pin)
        except UnreachableError as error:
            if wanted.pin is None:
                raise  # another zoo might have another version
            down = down or error
            continue
        if files is None:
            continue
        if files.name != name and not files.name.startswith(f"{name}."):
            raise EntryError(
                f"{zoo.uri} answers {name!r} with {files.name}, which is another entry: ask for that one by its "
                "name, or tell the maintainer of the zoo"
            )
        if wanted.locked is None and wanted.folder and files.name != wanted.folder:
            raise ConfigError(
                f"{name!r} is {wanted.folder} in this version of embedkit, and {files.name} in {zoo.uri}: "
                f"give the whole name, {files.name} or {wanted.folder}"
            )
        entry = VerifiedEntry(files.name, files, pin=wanted.pin)
        if revision is None or not digest or entry.revision.startswith(revision) or files.version == revision:
            access.admit(entry)
            return wanted.check(zoo, entry, files.version)
        elsewhere.append(f"{zoo.uri} has {entry.revision[:12]}")
    found = _from_cache(name, wanted, access) or (last.find(name, revision, wanted.pin) if last else None)
    if found is not None:
        entry = _check_revision(VerifiedEntry(found.name, found, pin=wanted.pin), revision)
        access.admit(entry)
        return wanted.check(package_zoo(), entry, "")
    if elsewhere:
        raise EntryNotFoundError(f"{name!r} has no revision {revision}: {'; '.join(elsewhere)}")
    if down is not None:
        raise down
    return None


def _from_cache(name: str, wanted: Wanted, access: Access) -> FolderEntry | None:
    """The pinned entry from the cache, though it came from a zoo that is not configured any more.

    A lock file may come with a data set of another person. It can select a version of the entry that was asked for, but
    no other entry of the cache; for a name of the package's index, no other version either.

    Raises:
        IntegrityError: The lock file pins another version than the package's index, and no zoo has it.
    """
    if wanted.pin is None:
        return None
    cached = access.cache.get(wanted.pin.sha256)
    if cached is None or not (cached.name == name or cached.name.startswith(f"{name}.")):
        return None
    indexed = package_zoo().index().rows.get(wanted.folder)
    if indexed is not None and (cached.name, wanted.pin.sha256) != (wanted.folder, indexed.manifest_sha256):
        raise IntegrityError(
            f"{wanted.pin.by} pins {wanted.pin.sha256[:12]}... for {name}, which none of the zoos holds, and the index "
            f"of this package {indexed.manifest_sha256[:12]}...: name the zoo that has it in {ZOO_VARIABLE}, or remove "
            "the pin"
        )
    return cached


def _is_carried(name: str, pin: Pin) -> bool:
    """Whether the package contains the pinned version of an entry."""
    index = package_zoo().index()
    folder = index.folder_of(name)
    return (
        folder is not None
        and index.rows[folder].manifest_sha256 == pin.sha256
        and package_zoo().holds(folder)
    )


def zoos(access: Access | None = None) -> list[Zoo]:
    """The zoos to look in, in order; none of them is opened yet.

    Raises:
        ConfigError: A configured zoo does not exist, or is invalid.
    """
    named = [uri.strip() for uri in os.environ.get(ZOO_VARIABLE, "").split(",") if uri.strip()]
    found: list[Zoo] = [open_zoo(uri, access) for uri in (*named, *_configured())]
    found.append(package_zoo())
    if DEFAULT_ZOO:
        found.append(open_zoo(DEFAULT_ZOO, access))
    return found


def working_zoo() -> WorkingZoo:
    """The `zoo/` folder of the working directory, which is asked after all others and after the cache."""
    return WorkingZoo(package_zoo())


def is_path(text: str) -> bool:
    """Whether a text names an entry's folder: it has a separator, or begins with `.` or `~`. A bare name never does."""
    separators = {os.sep, os.altsep or os.sep, "/"}
    return any(separator in text for separator in separators) or text.startswith((".", "~"))


def _entry_at(text: str, revision: str | None) -> VerifiedEntry:
    """The entry in a folder."""
    path = Path(file_path(text))
    if not os.path.isdir(path):
        raise EntryNotFoundError(f"{text!r} is not a folder; give a name, or the path of an entry's folder")
    return _check_revision(VerifiedEntry(_folder_name(path), FolderEntry(path)), revision)


def _folder_name(path: Path) -> str:
    """The entry's name: the folder's, or the repository's where the folder is a snapshot in a Hub cache."""
    path = Path(os.path.abspath(path))
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.rpartition("--")[2]
    return path.resolve().name


def _check_revision(entry: VerifiedEntry, revision: str | None) -> VerifiedEntry:
    if revision is not None and revision != "latest" and not entry.revision.startswith(revision):
        raise EntryNotFoundError(f"{entry.location} has revision {entry.revision[:12]}, not {revision}")
    return entry


def _configured() -> list[str]:
    """The zoos of the user's configuration file."""
    import platformdirs

    try:
        path = platformdirs.user_config_path("embedkit", appauthor=False) / "config.toml"
    except RuntimeError:  # no HOME, and no passwd entry
        return []
    try:
        value = tomllib.loads(read_regular(path, 1 << 20).decode()).get("zoo", [])
    except OSError:
        return []
    except ValueError as error:  # TOMLDecodeError, or bytes that are not UTF-8
        raise ConfigError(f"{path} is not TOML ({error})") from None
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(uri, str) for uri in value):
        raise ConfigError(f'{path}: zoo: expected a list such as ["/data/zoo"], found {value!r}')
    return value


def _no_entry(zoo: str, name: str, access: Access) -> str:
    if access.offline:
        return f"{zoo}/{name} is not in the cache, and no connection may be opened; pull it once while online"
    hint = "; a private one needs a token" if access.token is None else ""
    return f"{zoo} has no entry {name!r}, or does not show it{hint}"


def _not_found(name: str, access: Access, among: Sequence[Zoo], zoo: str | None) -> EntryNotFoundError:
    line = f"export {ZOO_VARIABLE}=/path/to/embedkit/zoo"
    offline = " (no connection may be opened, and the cache does not have it)" if access.offline else ""
    if zoo is not None:
        return EntryNotFoundError(f"{among[0].uri} has no entry {name!r}{_near(name, among)}{offline}")
    if package_zoo().index().folder_of(name) is not None:
        here = working_zoo().other_version(name)
        note = f"; to load the other version in .{os.sep}{here}, write its path" if here is not None else ""
        return EntryNotFoundError(
            f"{name!r} is an entry of the zoo that this package does not contain{offline}: name a zoo that has it, "
            f"with {line}, or bring it into the cache, with `embedkit zoo pull {name} --zoo URL`, or from a bundle, "
            f"with `embedkit zoo pull BUNDLE.tar`{note}"
        )
    if os.path.isdir(name):
        return EntryNotFoundError(
            f"there is no encoder {name!r}; to load the folder of this name, write its path: .{os.sep}{name}"
        )
    return EntryNotFoundError(
        f"there is no encoder {name!r}{_near(name, among)}{offline}; `embedkit zoo list` prints those there are"
        + ("" if os.environ.get(ZOO_VARIABLE) else f"; to name another zoo: {line}")
    )


def _near(name: str, among: Sequence[Zoo]) -> str:
    names: set[str] = set()
    for zoo in among:
        try:
            names.update(zoo.index().names)
        except EmbedkitError:
            continue
    hint = did_you_mean(name, sorted(names), most=3)
    return f" ({hint})" if hint else ""
