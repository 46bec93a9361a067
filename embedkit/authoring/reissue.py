"""Issuing entries again: card and manifest from `config.json`, then the zoo's index and pages. Weights stay as they are."""

from __future__ import annotations

import json
from pathlib import Path

from embedkit._io.atomic import replacing_folder
from embedkit.authoring.card import render_card
from embedkit.hub.publish.index import update_index
from embedkit.hub.resolve import find_entry
from embedkit.model.layout import CARD, CONFIG, MANIFEST, MIXTURE
from embedkit.model.manifest import Manifest


def reissue_entry(folder: Path) -> bool:
    """Write an entry's configuration, card and manifest again, in today's form.

    Args:
        folder: The entry's folder. Every file must match its manifest.

    Returns:
        Whether anything changed.

    Raises:
        EntryError: Not an entry, or (IntegrityError) its bytes are not those of its manifest.
        OutputError: The folder cannot be written.
    """
    entry = find_entry(folder)
    files = {name: entry.read(name) for name in entry.manifest.files}
    files[CONFIG] = (json.dumps(entry.config.to_json(), indent=1) + "\n").encode()
    files[CARD] = render_card(entry.name, entry.config, mixture=MIXTURE in files).encode()
    manifest = Manifest.encode(files)
    if manifest == entry.manifest_bytes:
        return False
    with replacing_folder(folder) as aside:
        for name, content in {**files, MANIFEST: manifest}.items():
            (aside / name).write_bytes(content)
    return True


def reissue_zoo(zoo: Path) -> list[str]:
    """Issue every entry of a zoo again, then its index and its pages.

    Args:
        zoo: The folder that holds the entries.

    Returns:
        The names of the entries that changed.
    """
    changed = [
        folder.name
        for folder in sorted(zoo.iterdir())
        if (folder / MANIFEST).is_file() and reissue_entry(folder)
    ]
    update_index(zoo)
    return changed
