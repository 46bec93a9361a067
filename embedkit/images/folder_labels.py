"""Labels from class folders: one mapping for all images of a folder, under one name of a column."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping

from embedkit.images.containers import EMPTY

__all__ = ["FolderLabels"]

_COLUMN = "label"


class FolderLabels:
    """Gives images the name of their folder as a label. The column gets its name when all sources are listed."""

    def __init__(self) -> None:
        """Begin without labels."""
        self._of_folder: dict[str, dict[str, object]] = {}

    def __bool__(self) -> bool:
        """Whether any image has a label."""
        return bool(self._of_folder)

    def below(self, path: str) -> Mapping[str, object]:
        """The label of an image of a folder: the first folder on its path, which is relative to the source."""
        folder, inside, _ = path.partition(os.sep)
        return self._label(folder if inside else "")

    def beside(self, path: str) -> Mapping[str, object]:
        """The label of an image that stands alone or in an archive: the folder that holds it."""
        return self._label(os.path.basename(os.path.dirname(os.path.normpath(path))))

    def name_column(self, taken: Collection[str]) -> str:
        """Name the column, which no source may have: `label`, else `folder_label`."""
        column = _COLUMN
        while column in taken:
            column = f"folder_{column}"
        for folder, label in self._of_folder.items():
            label[column] = os.fsencode(folder).decode(errors="replace")
        return column

    def _label(self, folder: str) -> Mapping[str, object]:
        if folder in ("", os.curdir, os.pardir):
            return EMPTY
        return self._of_folder.setdefault(folder, {})
