"""The files of a zoo entry, the grammar of names and revisions, and the schema version."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from reprlib import repr as _short
from typing import Any

from embedkit._io.json import JsonFormat
from embedkit.errors import EntryError

SCHEMA_VERSION = 1


CONFIG = "config.json"


WEIGHTS = "model.safetensors"


GRAPH = "model.onnx"


GRAPH_INT8 = "model.int8.onnx"


CARD = "README.md"


GOLDEN = "golden.npz"


MANIFEST = "manifest.json"


MIXTURE = "mixture.safetensors"


#: The pretext task of the method that trained the encoder, on held-out images.
PRETEXT_IMAGE = "pretext.png"


INDEX = "index.json"


#: Folders are `<method>-<arch>.<data>`; a revision is at least 12 hex digits of the manifest's sha256.
ENTRY_NAME = re.compile(r"[a-z0-9][a-z0-9_]*-[a-z0-9_]+\.[a-z0-9_]+")


REVISION = re.compile(r"[0-9a-f]{12,64}")


_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,119}")


_SHA256 = re.compile(r"[0-9a-f]{64}")


_JSON = JsonFormat(error=EntryError, step="pull the entry again")


def sha256_hex(data: bytes | memoryview) -> str:
    """The sha256 of `data` as 64 lower-case hex digits."""
    return hashlib.sha256(data).hexdigest()


def check_file_name(name: str, where: str) -> None:
    """Refuse a file name that could leave the entry's folder, or that some file system cannot hold.

    Raises:
        EntryError: Separators, dot-dot, control characters, device names, anything but `[A-Za-z0-9._-]`.
    """
    stem = name.split(".", 1)[0].casefold()
    devices = {"con", "prn", "aux", "nul", *(f"{dev}{n}" for dev in ("com", "lpt") for n in range(10))}
    if not _FILE_NAME.fullmatch(name) or ".." in name or name.endswith(".") or stem in devices:
        raise EntryError(
            f"{where}: {name[:80]!r} is not a usable file name (letters, digits, '.', '_' and '-')"
        )


def parse_json(text: bytes | str, where: str) -> Any:
    """`text` as strict JSON; see `embedkit._io.json.JsonFormat`.

    Raises:
        EntryError: Naming the file and the parser's reason.
    """
    return _JSON.parse(text, where)


def _object(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise EntryError(f"{where}: expected an object, found {type(value).__name__}")
    return value


def _text(data: Mapping[str, Any], key: str, where: str) -> str:
    value = data.get(key)
    if not isinstance(value, str) or not value:
        raise EntryError(f"{where}: {key}: expected text, found {_short(value)}")
    return value


def _check_schema(data: Mapping[str, Any], where: str) -> None:
    found = data.get("schema")
    if type(found) is not int or found != SCHEMA_VERSION:  # True == 1
        step = (
            "upgrade embedkit" if type(found) is int and found > SCHEMA_VERSION else "export the entry again"
        )
        raise EntryError(f"{where}: schema: expected {SCHEMA_VERSION}, found {_short(found)}; {step}")
