"""Where images come from: files, folders, patterns, lists, tar archives and Parquet files, as one listing.

Listing decodes no image. It names each image once, in an order that is the same on every machine, with a small object
that reads its bytes on demand. Ids, sizes and times are those of an embeddings file. `embedkit.images.archives` and
`embedkit.images.tables` list the content of containers; this module gives it ids and a position.
"""

from __future__ import annotations

import difflib
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from embedkit._io.text import one_line
from embedkit.errors import SourceError
from embedkit.images.archives import Archives
from embedkit.images.containers import EMPTY, Contents
from embedkit.images.exclude import Excludes
from embedkit.images.files import other_form, read_file
from embedkit.images.folder_labels import FolderLabels
from embedkit.images.ids import id_of
from embedkit.images.patterns import is_folder, is_pattern, matches
from embedkit.images.tables import Tables

SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .ppm .pgm .pbm .pnm .heic .heif .avif".split()
)

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_PACKED = re.compile(
    r"\.(zip|7z|rar|tgz|tbz2?|txz|tzst|tar\.(gz|bz2|xz|zst|lz|lz4|lzma|br|z))$", re.IGNORECASE
)
_UTF8_BOM, _UTF16_BOMS = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")
#: Times in an embeddings file are int64; some file systems have years after 2262.
_LAST_NS = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Item:
    """One image of a listing.

    Attributes:
        id: The normalized path as given, with `/` separators, or relative to the root; `file.tar::member`;
            `file.parquet::path`, or `file.parquet::#row` (from 0) where the path is missing or not unique.
            A name that is not valid UTF-8, or a path that itself holds `::`, becomes a percent-encoded `file:` URI.
        size: Bytes of the file or the tar member; of the whole file for a Parquet row.
        mtime_ns: Of the file, within an int64; of the container for members and rows, whose own times are often 0.
        read: Returns the encoded bytes, in any thread. Raises OSError, `ImageError` or `SourceError`.
        labels: The scalar columns of a Parquet row, or the label from the image's folder; empty elsewhere.
        path: The file itself (`surrogateescape` where it is not UTF-8); None for members and rows.
    """

    id: str
    size: int
    mtime_ns: int
    read: Callable[[], bytes]
    labels: Mapping[str, object] = field(default_factory=lambda: EMPTY)  # the same one for all
    path: str | None = None


@dataclass(frozen=True, slots=True)
class Listing:
    """The content of sources.

    Attributes:
        items: Every image once, in source order.
        label_schema: Label column -> Arrow type name; empty when no source has labels.
        errors: (id, error class name, reason) of what was found but cannot be listed.
        notes: Sentences for the user.
        folder_column: The label column that holds the images' folders; None when they were not asked for.
    """

    items: list[Item]
    label_schema: dict[str, str]
    errors: list[tuple[str, str, str]]
    notes: list[str]
    folder_column: str | None = None

    def empty(self, where: str) -> SourceError:
        """The error of a listing without an image; it names what was skipped."""
        return SourceError(
            f"no images in {where}; {'; '.join(self.notes) or 'check the path and the suffixes'}"
        )


class PathList(tuple[str, ...]):
    """Paths from a list. None is a pattern, and one that cannot be read is an error row, not the end."""

    @classmethod
    def parse(cls, text: bytes, *, null: bool = False) -> PathList:
        """The paths of a list in UTF-8 (or the system's encoding) or, with its byte order mark, UTF-16.

        Args:
            text: One path a line; empty lines are ignored.
            null: Whether the paths are separated by NUL bytes instead of lines.

        Raises:
            SourceError: The list is separated by NUL bytes and `null` is not set, or it is not the UTF-16 it claims.
        """
        text = _without_mark(text)
        if b"\0" in text and not null:
            raise SourceError("the list on standard input is separated by NUL bytes, not lines; add --null")
        lines = text.split(b"\0" if null else b"\n")
        return cls(path for line in lines if (path := os.fsdecode(line if null else line.rstrip(b"\r"))))

    def __str__(self) -> str:
        return f"a list of {len(self)} path{'s' * (len(self) != 1)}"


def list_sources(
    sources: Sequence[str | os.PathLike[str] | PathList] | str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    recursive: bool = True,
    image_column: str | None = None,
    exclude: Sequence[str] = (),
    label_from_folder: bool = False,
) -> Listing:
    """List the images of `sources`, each once, at its first position.

    A file is taken whatever its suffix, but a `.tar` or `.parquet` is opened. A folder gives its files that have an
    image's suffix and are not hidden, then its folders, both sorted by the bytes of their names; containers in it are
    not opened. A pattern (`*`, `?`, `[a-z]`, `**`) stands for its matches, as if the shell had expanded it. A file
    that a pattern or a list names and that cannot be read is an error row and does not stop the listing.

    `exclude` leaves images out by their path: in a folder or an archive the path from there on, in a list or a match of
    a pattern the path as given, of a file that is a source itself its name.

    Args:
        sources: Paths, patterns or lists of paths.
        root: The folder that ids are relative to; without it they are the paths as given.
        recursive: Whether subfolders are included.
        image_column: The column of Parquet files that holds the images; found by type and name when None.
        exclude: Patterns, added to the default ones, which an empty pattern turns off; see
            `embedkit.images.exclude.Excludes`.
        label_from_folder: Whether images get a label column with the name of their folder: in a folder the first one
            below the source, elsewhere the one that holds the image. Rows of a Parquet file with labels keep those.

    Raises:
        SourceError: A source does not exist, cannot be opened, is of an unknown kind, or is outside `root`; or labels
            are asked for, and no image has such a folder.
    """
    lister = _Lister(
        None if root is None else os.fspath(root),
        recursive,
        image_column,
        Excludes(exclude),
        FolderLabels() if label_from_folder else None,
    )
    given = [sources] if isinstance(sources, PathList | str | bytes | os.PathLike) else sources
    for source in given:
        if isinstance(source, PathList):
            for path in source:
                lister.add(path, listed=True)
        else:
            lister.add(os.fsdecode(source))
    label_schema = {name: type_name for name, (type_name, _) in lister.labels.items()}
    column = lister.name_folder_column(label_schema)
    return Listing(
        items=list(lister.items.values()),
        label_schema=label_schema if column is None else {**label_schema, column: "string"},
        errors=[(name, kind, reason) for name, (kind, reason) in lister.errors.items()],
        notes=lister.notes(),
        folder_column=column,
    )


class _Lister:
    """A listing under construction. Its dicts keep the order and drop duplicates."""

    def __init__(
        self,
        root: str | None,
        recursive: bool,
        image_column: str | None,
        excludes: Excludes,
        folders: FolderLabels | None,
    ):
        if root is not None and not os.path.isdir(root):
            raise SourceError(f"the root {root!r} is not a folder; give one that holds every source")
        self._root = None if root is None else os.path.abspath(root)
        self._recursive = recursive
        self._excludes, self._folders = excludes, folders
        self._containers: dict[str, Archives | Tables] = {
            ".tar": Archives(_is_image),
            ".parquet": Tables(image_column),
        }
        self._opened: set[str] = set()  # containers
        self._passed: dict[str, None] = {}  # files in folders that are not images
        self._members: Counter[str] = Counter()  # suffixes of members that are not images
        self._remarks: list[str] = []
        self.items: dict[str, Item] = {}
        self.errors: dict[str, tuple[str, str]] = {}
        self.labels: dict[str, tuple[str, str]] = {}  # name -> Arrow type name, and the file that has it

    def add(self, given: str, listed: bool = False) -> None:
        """Add one source; if it comes from a list or a pattern (`listed`), a failure is an error row."""
        if listed and self._excludes.leaves_out(_slashes(given)):
            return
        try:
            self._add(given, pattern=not listed)
        except _Unlistable as error:
            if not listed:
                raise SourceError(str(error)) from None
            self._fail(given, error.cause, str(error))

    def _add(self, given: str, *, pattern: bool) -> None:
        """Add one source; `pattern`: it may be a pattern."""
        try:
            status = os.stat(given)
        except (OSError, ValueError) as error:
            if _URL.match(given):
                raise _Unlistable(f"{given!r} is a URL; download or mount it, and give that path") from None
            if (other := other_form(given)) is not None:
                return self._add(other, pattern=False)
            if pattern and is_pattern(given) and not os.path.lexists(given):
                return self._add_pattern(given)
            if isinstance(error, FileNotFoundError | NotADirectoryError):
                raise _Unlistable(f"{given!r} does not exist; {_nearest(given)}", error) from None
            raise _Unlistable(f"{given!r} cannot be opened: {one_line(error)}", error) from None
        if stat.S_ISDIR(status.st_mode):
            return self._add_folder(given)
        if not stat.S_ISREG(status.st_mode):
            raise _Unlistable(f"{given!r} is neither a file nor a folder; write its content to a file first")
        if self._excludes.leaves_out(os.path.basename(given)):
            return
        if _PACKED.search(given):
            raise _Unlistable(f"{given!r} is compressed; unpack it and give the folder or the plain .tar")
        container = self._containers.get(_suffix(given))
        if container is None:
            self._add_file(given, status, EMPTY if self._folders is None else self._folders.beside(given))
        elif (name := self._name(given)) not in self._opened:
            self._opened.add(name)
            try:
                contents = container.contents(given, status)
            except SourceError as error:
                raise _Unlistable(str(error)) from None
            self._add_contents(given, status, contents)

    def notes(self) -> list[str]:
        """Sentences for the user about what is not in the listing."""
        notes = [*self._remarks, *self._excludes.notes()]
        left = [_suffix(name) for name in self._passed if name not in self.items and name not in self._opened]
        closed = [suffix for suffix in left if suffix in self._containers]
        other = [suffix or "no suffix" for suffix in left if suffix not in self._containers]
        for kinds, what in (
            (other, "without an image's suffix ({}); name a file to include it"),
            (closed, "in folders that may hold images ({}); name them as sources to open them"),
        ):
            if kinds:
                common = ", ".join(kind for kind, _ in Counter(kinds).most_common(5))
                notes.append(f"skipped {len(kinds)} file{'s' * (len(kinds) > 1)} {what.format(common)}")
        if count := self._members.total():
            common = ", ".join(kind for kind, _ in self._members.most_common(5))
            notes.append(
                f"skipped {count} member{'s' * (count > 1)} of archives without an image's suffix ({common}); "
                "unpack the archive and name the files to include them"
            )
        return notes

    def name_folder_column(self, taken: Collection[str]) -> str | None:
        """Name the column of the images' folders; None when they were not asked for."""
        if self._folders is None:
            return None
        if self.items and not self._folders:
            raise SourceError(
                f"label_from_folder: none of the {len(self.items)} images lies in a folder below its source; give the "
                "folder that holds the class folders"
            )
        column = self._folders.name_column(taken)
        if column != "label":
            self._remarks.append(
                f"the folders of images are the column {column!r}, since a source has a column 'label'"
            )
        return column

    def _name(self, path: str, inner: str = "") -> str:
        """The id of `path`, or of the image `inner` in a container at `path`."""
        if self._root is None:
            name = os.path.normpath(path)
        else:
            name, above = os.path.abspath(path), os.path.join(self._root, "")
            if not os.path.join(name, "").startswith(above):
                raise _Unlistable(f"{path!r} is outside the root {self._root!r}; give a root that holds both")
            name = name[len(above) :] or os.curdir
        return id_of(name, inner)

    def _fail(self, path: str, error: Exception | None, reason: str = "") -> None:
        """Add an error row; `reason` if there is no error of the system."""
        try:
            name = path if _URL.match(path) else self._name(path)
        except SourceError:  # outside the root
            name = id_of(path)
        kind = "SourceError" if error is None else type(error).__name__
        self.errors[name] = (kind, reason if error is None else one_line(error))

    def _scan(self, path: str) -> list[os.DirEntry[str]]:
        """The entries of a folder in the order of their names' bytes; an error row if it cannot be read."""
        try:
            with os.scandir(path or os.curdir) as entries:
                return sorted(entries, key=lambda entry: os.fsencode(entry.name))
        except OSError as error:
            self._fail(path, error)
            return []

    def _add_pattern(self, pattern: str) -> None:
        found = matches(pattern, self._scan)
        if not found:
            raise _Unlistable(f"nothing matches the pattern {pattern!r}; {_nearest(pattern)}")
        for path in found:
            self.add(path, listed=True)

    def _add_folder(self, top: str) -> None:
        """Walk `top`, also through links to folders, but never into a folder that contains the current one.

        Below a link, a further link is entered only if its folder has not been entered yet. Without that, the cost of a
        set of links to each other would grow with the factorial of their number.
        """
        entered: set[tuple[int, int]] = set()
        above_all = len(os.path.join(top, ""))
        # A folder to walk, the folders above it, whether it is below a link, whether it must be new.
        pending: list[tuple[str, tuple[tuple[int, int], ...], bool, bool]] = [(top, (), False, False)]
        while pending:
            path, above, linked, must_be_new = pending.pop()
            try:
                status = os.stat(path)
            except OSError as error:
                self._fail(path, error)
                continue
            here = (status.st_dev, status.st_ino)
            if here in above or (must_be_new and here in entered):
                continue
            entered.add(here)
            folders = []
            for entry in self._scan(path):
                relative = entry.path[above_all:]
                if entry.name.startswith(".") or self._excludes.leaves_out_entry(_slashes(relative)):
                    continue
                if is_folder(entry):
                    link = entry.is_symlink()
                    folders.append((entry.path, (*above, here), linked or link, linked and link))
                elif _is_image(entry.name):
                    self._add_entry(entry, EMPTY if self._folders is None else self._folders.below(relative))
                else:
                    self._passed[self._name(entry.path)] = None
            if self._recursive:
                pending.extend(reversed(folders))

    def _add_entry(self, entry: os.DirEntry[str], labels: Mapping[str, object]) -> None:
        try:
            status = os.stat(entry.path)  # entry.stat() would keep half a kilobyte as long as the entry lives
        except OSError as error:
            return self._fail(entry.path, error)
        if stat.S_ISREG(status.st_mode):
            self._add_file(entry.path, status, labels)
        else:  # a FIFO would hang its reader
            self.errors[self._name(entry.path)] = ("SourceError", "neither a file nor a folder")

    def _add_file(self, path: str, status: os.stat_result, labels: Mapping[str, object]) -> None:
        name = self._name(path)
        if name not in self.items:
            if ".." not in path:  # else `..` may follow a link, and the normalized path may be another file
                path = os.path.normpath(path)
            path = name if name == path else path  # one string in memory instead of two
            self.items[name] = Item(name, status.st_size, _time_of(status), _File(path), labels, path)

    def _add_contents(self, path: str, status: os.stat_result, contents: Contents) -> None:
        for column, type_name in contents.label_schema.items():
            first, where = self.labels.setdefault(column, (type_name, path))
            if first != type_name:
                raise SourceError(
                    f"the column {column!r} is {first} in {where!r}, {type_name} in {path!r}; embed them separately"
                )
        if contents.damage:
            inner, reason = contents.damage
            self.errors[self._name(path, inner)] = ("SourceError", reason)
        self._remarks.extend(contents.notes)
        self._members.update(contents.passed)
        for inner, size, read, labels in contents.images:
            if self._excludes.leaves_out(inner):
                continue
            if self._folders is not None and not contents.label_schema:
                labels = self._folders.beside(inner)
            id = self._name(path, inner)
            self.items.setdefault(id, Item(id, size, _time_of(status), read, labels))


class _Unlistable(SourceError):
    """The reason to refuse one source, and the system error that caused it; an error row in a list."""

    def __init__(self, message: str, cause: Exception | None = None):
        super().__init__(message)
        self.cause = cause


class _File:
    """Reads one file."""

    __slots__ = ("_path",)

    def __init__(self, path: str):
        self._path = path

    def __call__(self) -> bytes:
        return read_file(self._path)


def _without_mark(text: bytes) -> bytes:
    """A list without the byte order mark that Windows puts in front; UTF-16 becomes UTF-8."""
    if text.startswith(_UTF16_BOMS):
        try:
            return text.decode("utf-16").encode()
        except UnicodeError:
            raise SourceError(
                "the list on standard input has the byte order mark of UTF-16 and is not UTF-16; write UTF-8"
            ) from None
    return text.removeprefix(_UTF8_BOM)


def _time_of(status: os.stat_result) -> int:
    return max(-_LAST_NS, min(status.st_mtime_ns, _LAST_NS))


def _slashes(path: str) -> str:
    return path.replace(os.sep, "/")


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _is_image(name: str) -> bool:
    return _suffix(name) in SUFFIXES


def _nearest(path: str) -> str:
    """The way from a path that does not exist to one that does."""
    if os.path.islink(path):
        return f"it is a link to {os.readlink(path)!r}"
    parent, name = os.path.split(os.path.normpath(path))
    while parent and not os.path.isdir(parent):
        parent, name = os.path.split(parent)
    try:
        near = difflib.get_close_matches(name, os.listdir(parent or os.curdir)[:10_000])
    except OSError:
        near = []
    if near:
        return f"did you mean {' or '.join(repr(os.path.join(parent, match)) for match in near)}?"
    return f"the nearest folder that exists is {parent or os.getcwd()!r}"
