"""Issuing entries again: card and manifest from `config.json`, then the index and pages of the zoo.

Weights, graph and golden vectors stay as they are, byte for byte.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from embedkit._io.atomic import replacing_folder
from embedkit._io.locks import locked_folder
from embedkit._io.reading import read_regular
from embedkit._io.text import one_line
from embedkit.authoring.card import render_card
from embedkit.errors import EntryError, IntegrityError
from embedkit.hub.publish.index import update_index
from embedkit.hub.verified import MANIFEST_LIMIT
from embedkit.model.config import EntryConfig
from embedkit.model.layout import CARD, CONFIG, MANIFEST, sha256_hex
from embedkit.model.manifest import Manifest

__all__ = ["issued", "reissue_entry", "reissue_zoo", "replace_files"]

_MOST_BYTES = 16 << 30


def issued(name: str, config: EntryConfig, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files of an entry of this configuration: `files` with another configuration, card and manifest.

    Args:
        name: The entry's name.
        config: The configuration.
        files: The content of every file of the manifest. A card is written if there is one.
    """
    written = {**files, CONFIG: (json.dumps(config.to_json(), indent=1) + "\n").encode()}
    if CARD in files:
        written[CARD] = render_card(name, config, files).encode()
    return {**written, MANIFEST: Manifest.encode(written)}


def replace_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files of an entry in one step. Others that lie there stay.

    Raises:
        OutputError: The folder cannot be written.
    """
    with replacing_folder(folder) as partial:
        shutil.copytree(folder, partial, dirs_exist_ok=True)
        for name, content in files.items():
            (partial / name).write_bytes(content)


def reissue_entry(folder: Path) -> bool:
    """Write an entry's configuration, card and manifest again, from `config.json` as it lies there.

    Args:
        folder: The entry's folder. `config.json` may be edited and the card missing; all other files must match the
            manifest.

    Returns:
        Whether anything changed.

    Raises:
        EntryError: Not an entry, or (IntegrityError) another file is not that of its manifest.
        OutputError: The folder cannot be written.
    """
    with locked_folder(folder.parent):
        found = {MANIFEST: _read(folder / MANIFEST, MANIFEST_LIMIT)}
        manifest = Manifest.from_json(found[MANIFEST], f"{folder}/{MANIFEST}")
        for name, record in manifest.files.items():
            path = folder / name
            if name == CARD and not os.path.exists(path):
                continue
            found[name] = _read(path, _MOST_BYTES)
            if name not in (CONFIG, CARD) and sha256_hex(found[name]) != record.sha256:
                raise IntegrityError(f"{path}: its bytes are not those of the manifest; restore it first")
        if CONFIG not in found:
            raise EntryError(f"{folder}/{MANIFEST}: expected {CONFIG} among the files, found none")
        config = EntryConfig.from_json(found[CONFIG], f"{folder}/{CONFIG}")
        files = {name: found.get(name, b"") for name in manifest.files}
        written = issued(folder.name, config, files)
        if written == found:
            return False
        replace_files(folder, written)
    return True


def reissue_zoo(zoo: Path) -> list[str]:
    """Write every entry of a zoo again, then its index and its pages.

    Args:
        zoo: The folder that holds the entries.

    Returns:
        The names of the entries that changed.
    """
    changed = [
        folder.name
        for folder in sorted(zoo.iterdir())
        if os.path.isfile(folder / MANIFEST) and reissue_entry(folder)
    ]
    update_index(zoo)
    return changed


def _read(path: Path, limit: int) -> bytes:
    try:
        return read_regular(path, limit)
    except OSError as error:
        raise EntryError(f"{path} cannot be read ({one_line(error)})") from None
