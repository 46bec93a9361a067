"""Write a zoo as one tar, for machines without a network."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

from embedkit._io.atomic import replacing
from embedkit._io.outputs import check_ours
from embedkit.hub.publish.index import build_facts, index_bytes, make_index
from embedkit.hub.verified import VerifiedEntry
from embedkit.model.layout import INDEX, MANIFEST
from embedkit.storage.tar import ArchiveStorage


def write_archive(entries: Iterable[VerifiedEntry], out: Path) -> list[str]:
    """Write entries as one tar: the index first, then each entry's folder; the same bytes for the same entries.

    Returns:
        The names of the entries.

    Raises:
        IntegrityError: An entry's bytes are not those of its manifest.
        OutputError: The file cannot be written.
    """
    chosen = sorted(entries, key=lambda entry: entry.name)
    index = make_index({entry.name: build_facts(entry) for entry in chosen}, {})
    check_ours(out, _is_ours, "an archive of a zoo")
    with (
        replacing(out) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        _add(archive, INDEX, index_bytes(index))
        for entry in chosen:
            for name in sorted(entry.manifest.files):
                _add(archive, f"{entry.name}/{name}", entry.read(name))
            _add(archive, f"{entry.name}/{MANIFEST}", entry.manifest_bytes)
    return [entry.name for entry in chosen]


def _is_ours(path: Path) -> bool:
    """Whether a file is a zoo's archive, or empty."""
    return path.stat().st_size == 0 or INDEX in ArchiveStorage(path)


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # no time and no owner, which would depend on the machine
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))
