"""The contact sheet of a command: written, and reported on stderr."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from embedkit.cli.output import tell, warn

if TYPE_CHECKING:
    from embedkit.images.originals import Originals
    from embedkit.workflows.visual.contact_sheet import Section


def write_sheet(path: Path, title: str, sections: Sequence[Section], originals: Originals) -> None:
    """Write a contact sheet and report it; a warning names an image that could not be read."""
    from embedkit.workflows.visual import contact_sheet as sheets

    done = sheets.write_contact_sheet(path, title, sections, originals)
    left = f"; {done.left_out} more groups did not fit" if done.left_out else ""
    tell(f"{path} shows {done.images} images{left}")
    if done.missing:
        warn(
            f"{len(done.missing)} of these images cannot be read (the first is "
            f"{done.missing[0]}); --root names the folder that ids are relative to"
        )
