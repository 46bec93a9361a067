"""The manifest: size and sha256 of every file of an entry, and the fingerprint of its embedding space."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from reprlib import repr as _short

from embedkit._io.json import canonical_json
from embedkit.errors import EntryError
from embedkit.model.config import EntryConfig
from embedkit.model.layout import (
    _SHA256,
    CONFIG,
    GRAPH,
    GRAPH_INT8,
    MANIFEST,
    SCHEMA_VERSION,
    WEIGHTS,
    _check_schema,
    _object,
    check_file_name,
    parse_json,
    sha256_hex,
)


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """Size in bytes and sha256 (64 hex digits) of one file of an entry."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """`manifest.json`: every other file of the entry by name, size and sha256.

    Attributes:
        files: File name -> record.
        sha256: Of the manifest's own bytes: the identity of the entry. A revision is a prefix of it.
    """

    files: Mapping[str, FileRecord]
    sha256: str

    @staticmethod
    def encode(files: Mapping[str, bytes]) -> bytes:
        """The bytes of a manifest over `files` (name -> content), equal for equal content."""
        records = {
            name: {"size": len(content), "sha256": sha256_hex(content)}
            for name, content in sorted(files.items())
        }
        return (json.dumps({"schema": SCHEMA_VERSION, "files": records}, indent=1) + "\n").encode()

    @classmethod
    def from_json(cls, text: bytes, where: str = MANIFEST) -> Manifest:
        """Parse and check a manifest.

        Raises:
            EntryError: Not JSON, another schema version, an unusable file name, size or digest.
        """
        if len(text) > 1_000_000:
            raise EntryError(f"{where}: expected less than 1 MB, found {len(text)} bytes")
        data = _object(parse_json(text, where), where)
        _check_schema(data, where)
        files: dict[str, FileRecord] = {}
        for name, record in _object(data.get("files"), f"{where}: files").items():
            check_file_name(name, where)
            if name == MANIFEST:
                raise EntryError(f"{where}: files: a manifest cannot list itself")
            fields = _object(record, f"{where}: {name}")
            size, digest = fields.get("size"), fields.get("sha256")
            if type(size) is not int or size < 0:
                raise EntryError(f"{where}: {name}.size: expected bytes, found {_short(size)}")
            if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
                raise EntryError(f"{where}: {name}.sha256: expected 64 hex digits, found {_short(digest)}")
            files[name] = FileRecord(size=size, sha256=digest)
        if len({name.casefold() for name in files}) != len(files):
            raise EntryError(f"{where}: two file names differ only in case; rename one of them")
        for name in (CONFIG, WEIGHTS, GRAPH):
            if name not in files:
                raise EntryError(f"{where}: an entry needs {name}, and the manifest does not list it")
        return cls(files=files, sha256=sha256_hex(text))


def space_fingerprint(
    manifest: Manifest, config: EntryConfig, *, normalized: bool, variant: str = "fp32"
) -> str:
    """The identity of an embedding space, 64 hex digits.

    Two files of embeddings are comparable if and only if their fingerprints are equal. Provider, fp16/TF32 and decode
    mode are excluded: they change the last digits, not the space.

    Args:
        manifest: The entry's manifest.
        config: The entry's configuration.
        normalized: Whether rows are L2-normalized.
        variant: `fp32`, or `int8` for the quantized graph.
    """
    graph = GRAPH_INT8 if variant == "int8" else GRAPH
    identity = {
        "graph": manifest.files[graph].sha256,
        "weights": manifest.files[WEIGHTS].sha256,
        "preprocess": config.preprocess.to_json(),
        "dim": config.dim,
        "normalized": normalized,
        "variant": variant,
    }
    return sha256_hex(canonical_json(identity))
