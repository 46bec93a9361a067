"""What may be downloaded: checked from the manifest, before the first byte of a file is requested."""

from __future__ import annotations

from embedkit.errors import EntryError
from embedkit.hub.catalog import INDEX_LIMIT
from embedkit.hub.verified import CONFIG_LIMIT, MANIFEST_LIMIT
from embedkit.model.layout import MANIFEST
from embedkit.model.manifest import Manifest

__all__ = ["CONFIG_LIMIT", "INDEX_LIMIT", "MANIFEST_LIMIT", "check_file_list"]

MOST_FILES = 64
MOST_BYTES = 64 << 30

#: Data for the runtime, or text and images for people; nothing that can be executed.
SUFFIXES = (".json", ".md", ".npz", ".onnx", ".png", ".safetensors", ".sig", ".txt")


def check_file_list(manifest: Manifest, where: str) -> int:
    """Refuse a list of files that no entry has; the names were checked when the manifest was parsed.

    Returns:
        The size of all files together, in bytes.

    Raises:
        EntryError: Too many files or bytes, or a file that is neither data nor text.
    """
    if len(manifest.files) > MOST_FILES:
        raise EntryError(f"{where}: {MANIFEST}: {len(manifest.files)} files; expected at most {MOST_FILES}")
    for name in manifest.files:
        if not name.endswith(SUFFIXES) and name not in ("LICENSE", "NOTICE"):
            raise EntryError(
                f"{where}: {MANIFEST}: {name} is not a file of an entry: expected {', '.join(SUFFIXES)}"
            )
    total = sum(record.size for record in manifest.files.values())
    if total > MOST_BYTES:
        raise EntryError(f"{where}: {MANIFEST}: {total} bytes; expected at most {MOST_BYTES}")
    return total
