"""Opens training images by a path: IDX files, Parquet, CSV, class folders, scikit-learn's digits, synthetic ones.

A source has its labels in memory and reads an image by its row, so that it can be loaded whole or streamed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from embedkit._io.text import did_you_mean
from embedkit.errors import ConfigError
from embedkit.training.data import arrays
from embedkit.training.data.source import FileSource, Source, number
from embedkit.training.data.tables import read_csv, read_parquet

__all__ = ["absolute", "check_label", "open_source"]

Split = Literal["train", "test"]

_SUFFIXES = (
    ".png",
    ".jpg",
    ".jpeg",
    ".webp",
    ".gif",
    ".bmp",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
    ".avif",
    ".heic",
)
_HINT = "sklearn:digits and synthetic:1000 need no files"
#: The folder beside class folders whose images are no class.
_UNLABELED = "unlabeled"


def open_source(path: str, split: Split, *, label: str = "label", targets: Sequence[str] = ()) -> Source:
    """The images that `path` names.

    Args:
        path: As `DataConfig.path`.
        split: Which part; formats that hold one part alone have it as `train`.
        label: Label column of a Parquet or CSV file.
        targets: Further columns that must be there.

    Raises:
        ConfigError: No path, a path that is not there, or a part that the data lack.
        SourceError: Files whose content does not fit their names.
    """
    source = _open(path, split, label, tuple(targets))
    for name in targets:
        if name not in source.targets:
            raise ConfigError(f"data.targets: {path} has no column {name!r}; {_nearest(name, source)}")
    return source


def check_label(source: Source, path: str, label: str) -> None:
    """Refuse a label column that a table does not have.

    `label`, the default, may be missing: most methods need no labels. Sources without columns have the labels that
    they have, whatever the name.

    Raises:
        ConfigError: With the nearest names.
    """
    if source.columns and label not in ("", "label", *source.columns):
        raise ConfigError(
            f"data.label: {path} has no column {label!r}; {_nearest(label, source)}; data.label= trains without labels"
        )


def _nearest(name: str, source: Source) -> str:
    columns = ", ".join(source.columns) or "none"
    near = did_you_mean(name, source.columns, most=3)
    return f"{near} it has {columns}" if near else f"it has {columns}"


def _open(path: str, split: Split, label: str, targets: tuple[str, ...]) -> Source:
    if not path:
        raise ConfigError(f"no data: pass --data PATH (IDX files, Parquet, CSV or class folders); {_HINT}")
    if path == "sklearn:digits":
        return arrays.digits(split)
    if path.startswith("synthetic:"):
        return arrays.synthetic(path, split)
    found = Path(path)
    if os.path.isfile(found) and found.suffix == ".parquet":
        if split == "test":
            raise ConfigError(
                f"{path}: one Parquet file has no test part; name a folder with train and test files"
            )
        return read_parquet([found], label, targets)
    if os.path.isfile(found) and found.suffix.lower() == ".csv":
        if split == "test":
            raise ConfigError(f"{path}: one CSV file has no test part")
        return read_csv(found, label, targets)
    if not os.path.isdir(found):
        raise ConfigError(f"{path}: there is no such folder, Parquet or CSV file; {_HINT}")
    if arrays.has_idx(found):
        return arrays.idx(found, split)
    if any(found.rglob("*.parquet")):
        files = sorted(file for file in found.rglob("*.parquet") if file.name.startswith(split))
        if not files:
            raise ConfigError(f"{path}: expected Parquet files whose names begin with {split!r}, found none")
        return read_parquet(files, label, targets)
    parts = (found / "train", found / "test")
    if all(os.path.isdir(part) for part in parts):
        return _Folders(parts[split == "test"])
    if split == "test":
        raise ConfigError(
            f"{path}: expected the folders train and test, each with class folders, for a test part"
        )
    return _Folders(found)


class _Folders(FileSource):
    """One folder per class; images beside the class folders and in the folder `unlabeled` have no label."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.files = sorted(file for file in root.rglob("*") if file.suffix.lower() in _SUFFIXES)
        if not self.files:
            raise ConfigError(f"{root}: no images, Parquet or IDX files in this folder; {_HINT}")
        names = [file.relative_to(root).parts for file in self.files]
        self.classes, self.labels = number(
            [parts[0] if len(parts) > 1 and parts[0] != _UNLABELED else None for parts in names]
        )


def absolute(path: str) -> str:
    """A data path that means the same from every working directory; names such as `sklearn:digits` as they are."""
    return path if not path or not os.path.exists(path) else os.path.abspath(path)
