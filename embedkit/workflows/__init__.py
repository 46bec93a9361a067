"""What needs images and an encoder both.

`embedding` embeds images on the spot. `search`, `verify`, `identify` and `calibrate` compare them; `faces` finds,
aligns and encodes faces; `cluster_folders` copies images into a folder for each cluster; `visual` draws contact sheets
and maps. `adopt` gives metadata to a file of another program; `evaluate` measures an encoder on labeled images;
`check_entry` verifies an entry on this machine, and `doctor` examines the installation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from embedkit._io.lazy import export_lazily

if TYPE_CHECKING:
    from embedkit.workflows.adopt import adopt
    from embedkit.workflows.calibrate import calibrate_images
    from embedkit.workflows.check_entry import verify_entry
    from embedkit.workflows.cluster_folders import cluster_folders
    from embedkit.workflows.doctor import examine
    from embedkit.workflows.evaluate import evaluate
    from embedkit.workflows.faces.parts import FaceParts
    from embedkit.workflows.identify import identify_images
    from embedkit.workflows.search import cached_index, open_index, search
    from embedkit.workflows.verify import verify
    from embedkit.workflows.visual.atlas import write_atlas
    from embedkit.workflows.visual.contact_sheet import write_contact_sheet

__all__ = [
    "FaceParts",
    "adopt",
    "cached_index",
    "calibrate_images",
    "cluster_folders",
    "evaluate",
    "examine",
    "identify_images",
    "open_index",
    "search",
    "verify",
    "verify_entry",
    "write_atlas",
    "write_contact_sheet",
]

#: Public name -> the module that defines it. Names resolve at first use, so that importing this package stays cheap.
_MODULES = {
    "FaceParts": "faces.parts",
    "adopt": "adopt",
    "cached_index": "search",
    "calibrate_images": "calibrate",
    "cluster_folders": "cluster_folders",
    "evaluate": "evaluate",
    "examine": "doctor",
    "identify_images": "identify",
    "open_index": "search",
    "search": "search",
    "verify": "verify",
    "verify_entry": "check_entry",
    "write_atlas": "visual.atlas",
    "write_contact_sheet": "visual.contact_sheet",
}
export_lazily(__name__, _MODULES)
