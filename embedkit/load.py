"""From a name to an encoder: the look-up order, revisions, pins, and `load_encoder`."""

from __future__ import annotations

import difflib
import fnmatch
import os
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from embedkit.encoder import Encoder
from embedkit.engine import EngineOptions, Provider, available_cpus
from embedkit.entry import MANIFEST, REVISION
from embedkit.errors import ConfigError, EntryError, EntryNotFoundError
from embedkit.hub.folder import FolderEntry, FolderPlace, package_zoo
from embedkit.hub.place import Index, IndexRow, Place, VerifiedEntry

#: What `load_encoder()` gives: the entry that the wheel carries.
DEFAULT_ENCODER = "supervised-efficientnet_lite0"

#: The zoo of the released version, asked last. Empty until a release has a home.
DEFAULT_ZOO = ""

ZOO_VARIABLE = "EMBEDKIT_ZOO"


def load_encoder(
    name: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    token: str | None = None,
    device: str = "auto",
    providers: Sequence[Provider] | None = None,
    precision: str = "fp32",
    threads: int | str = "auto",
) -> Encoder:
    """Load an encoder by name, or from an entry's folder.

    A bare name (`simclr-r50`) is looked up in the places of the environment variable `EMBEDKIT_ZOO` (separated
    by commas), then in those of `config.toml` in the user's configuration folder, then in the package, then in
    the default zoo. Where the package's index knows the name, the entry must have the indexed digest; write
    `name@latest` to take whatever the place holds.

    Args:
        name: A name, `name@revision`, or the path of an entry's folder; the default encoder when None.
        revision: At least 12 hex digits of the manifest's sha256.
        cache_dir: Where downloads and compiled engines are kept; the user's cache folder when None.
        local_files_only: Never open a connection.
        token: Credential for a remote place.
        device: `auto`, `cpu`, `cuda` or `cuda:<index>`.
        providers: ONNX Runtime providers, in order; overrides `device`.
        precision: `fp32`, `tf32` (CUDA) or `fp16` (TensorRT).
        threads: Cores to keep busy, or `auto` for all that this process may use.

    Returns:
        The encoder.

    Raises:
        EntryNotFoundError: No place has it; the message gives the nearest names.
        IntegrityError: Bytes are not those that the manifest or the pin names.
        DeviceError: What was asked for cannot run.
    """
    if isinstance(providers, str):
        raise ConfigError(f"providers: expected a list of names, found {providers!r}; write [{providers!r}]")
    options = EngineOptions(
        device=device,
        providers=tuple(providers) if providers is not None else None,
        precision=precision,
        threads=resolve_threads(threads),
        cache_dir=os.fspath(cache_dir) if cache_dir is not None else default_cache_dir(),
    )
    return Encoder(find_entry(name, revision=revision), options)


def resolve_threads(threads: int | str) -> int:
    """The number of cores behind `threads`: itself, or for `auto` all that this process may use.

    Raises:
        ConfigError: Neither `auto` nor a whole number above 0.
    """
    if threads == "auto":
        return available_cpus()
    try:
        count = int(threads)
    except (ValueError, TypeError, OverflowError):
        count = 0
    if count < 1:
        raise ConfigError(f"threads: expected 'auto' or a whole number above 0, found {threads!r}")
    return count


def default_cache_dir() -> str:
    """The user's cache folder for embedkit, from `EMBEDKIT_CACHE` or the platform's convention."""
    import platformdirs

    return os.environ.get("EMBEDKIT_CACHE") or platformdirs.user_cache_dir("embedkit", appauthor=False)


def find_entry(name: str | os.PathLike[str] | None = None, *, revision: str | None = None) -> VerifiedEntry:
    """Look an entry up and check its manifest and configuration; the weights are not read yet.

    Args:
        name: As for `load_encoder`.
        revision: As for `load_encoder`.

    Raises:
        EntryNotFoundError: No place has it.
        ConfigError: The name or the revision cannot be one.
    """
    text = os.fspath(name) if name is not None else DEFAULT_ENCODER
    if _is_path(text):
        path = Path(os.path.expanduser(text))
        if not os.path.isdir(path):
            raise EntryNotFoundError(
                f"{text!r} is not a folder; give a name, or the path of an entry's folder"
            )
        return _check_revision(VerifiedEntry(_folder_name(path), FolderEntry(path)), revision)
    bare, at, given = text.partition("@")
    if at and revision is not None:
        raise ConfigError(f"{text!r} and revision={revision!r} both name a revision; give one of them")
    revision = given if at else revision
    latest = revision == "latest"
    if revision is not None and not latest and not REVISION.fullmatch(revision):
        raise ConfigError(
            f"revision: expected at least 12 hex digits of the manifest's sha256 or 'latest', found {revision!r}"
        )
    known = package_zoo().index()
    folder = known.folder_of(bare)
    pin = known.rows[folder].manifest_sha256 if folder and revision is None else None
    elsewhere: list[str] = []
    for place in places():
        files = place.find(bare)
        if files is None:
            continue
        entry = VerifiedEntry(folder or Path(files.location).name, files, manifest_sha256=pin)
        if revision is None or latest or entry.revision.startswith(revision):
            return entry
        elsewhere.append(f"{place.uri} has {entry.revision[:12]}")
    if elsewhere:
        raise EntryNotFoundError(f"{bare!r} has no revision {revision}: {'; '.join(elsewhere)}")
    raise _not_found(bare, folder is not None)


def places() -> list[Place]:
    """The places to look in, in order.

    Raises:
        ConfigError: A place that is named does not exist or cannot be read by this version.
    """
    named = [uri.strip() for uri in os.environ.get(ZOO_VARIABLE, "").split(",") if uri.strip()]
    found: list[Place] = [open_place(uri) for uri in (*named, *_configured())]
    found.append(package_zoo())
    if DEFAULT_ZOO:
        found.append(open_place(DEFAULT_ZOO))
    return found


def open_place(uri: str) -> Place:
    """The place behind a path or a URI.

    Raises:
        ConfigError: Not a folder, or a kind of place that this version cannot read.
    """
    if uri.startswith("file://"):
        from urllib.request import url2pathname

        uri = url2pathname(uri.removeprefix("file://"))
    elif "://" in uri:
        raise ConfigError(
            f"the zoo {uri!r} is remote, and this version reads folders: copy it to one and name that"
        )
    return FolderPlace(uri)


@dataclass(frozen=True, kw_only=True)
class EncoderInfo(IndexRow):
    """A zoo entry as `list_encoders` shows it.

    Attributes:
        alias: The bare name, empty when another entry has it.
        place: Where it would be loaded from, empty when only the package's index knows it.
    """

    alias: str = ""
    place: str = ""


def list_encoders(pattern: str = "*") -> list[EncoderInfo]:
    """The encoders that a name reaches, by folder name or alias.

    Args:
        pattern: Shell wildcards, as `*-r10`.

    Returns:
        Sorted by name; those that only the package's index knows have an empty `place`.
    """
    found: dict[str, EncoderInfo] = {}
    asked = [(place, place.index()) for place in places()]
    for name in {name for _, index in asked for name in index.rows}:
        holder = next((place for place, _ in asked if place.find(name)), None)
        # The facts are those of the place that has the entry, else of the first index that knows it.
        index = next(
            index
            for place, index in sorted(asked, key=lambda pair: pair[0] is not holder)
            if name in index.rows
        )
        alias = next((alias for alias, folder in index.aliases.items() if folder == name), "")
        place = holder.uri if holder else ""
        found[name] = EncoderInfo(**{**vars(index.rows[name]), "alias": alias, "place": place})
    return [
        info
        for name, info in sorted(found.items())
        if fnmatch.fnmatchcase(name, pattern) or (info.alias and fnmatch.fnmatchcase(info.alias, pattern))
    ]


def _is_path(text: str) -> bool:
    if "://" in text:
        raise ConfigError(f"{text!r} is remote, and this version loads names and folders")
    separators = {os.sep, os.altsep or os.sep, "/"}
    return any(s in text for s in separators) or text.startswith((".", "~")) or os.path.isfile(
        os.path.join(text, MANIFEST)
    )  # fmt: skip


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
    """The places of the user's configuration file."""
    import platformdirs

    path = platformdirs.user_config_path("embedkit", appauthor=False) / "config.toml"
    try:
        with open(path, "rb") as file:
            value = tomllib.load(file).get("zoo", [])
    except OSError:
        return []
    except ValueError as error:  # TOMLDecodeError, or bytes that are not UTF-8
        raise ConfigError(f"{path} is not TOML ({error})") from None
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(uri, str) for uri in value):
        raise ConfigError(f'{path}: zoo: expected a list such as ["/data/zoo"], found {value!r}')
    return value


def _not_found(name: str, indexed: bool) -> EntryNotFoundError:
    line = f"export {ZOO_VARIABLE}=/path/to/embedkit/zoo"
    if indexed:
        return EntryNotFoundError(
            f"{name!r} is an entry of the zoo that this package does not carry: name a zoo that holds it, with {line}"
        )
    names: set[str] = set()
    for place in places():
        try:
            index: Index = place.index()
        except EntryError:
            continue
        names.update(index.names)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    hint = f"; the nearest names are {', '.join(near)}" if near else ""
    return EntryNotFoundError(f"no encoder is called {name!r}{hint}; to name another zoo: {line}")
