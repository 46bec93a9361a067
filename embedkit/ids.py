"""From the id of a row back to the path that it was made of, as `embedkit.sources` writes ids."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import unquote_to_bytes

from embedkit.errors import OutputError


def path_of_id(name: str, root: str | os.PathLike[str] | None = None) -> str:
    """The path behind an id, with what is inside a container still behind it (`file.tar::member`).

    Args:
        name: The id: a path with `/` separators, or a percent-encoded `file:` URI where it is not UTF-8.
        root: The folder that ids are relative to; the working folder when None.
    """
    if name.startswith("file:"):
        name = os.fsdecode(unquote_to_bytes(name.removeprefix("file:")))
    name = name.replace("/", os.sep)
    return name if root is None else os.path.join(root, name)


def check_no_image(
    outputs: Mapping[str, str | os.PathLike[str] | None],
    ids: Iterable[str],
    root: str | os.PathLike[str] | None = None,
) -> None:
    """Refuse outputs that would overwrite an image, or an archive of images, that the embeddings are of.

    Args:
        outputs: Option as the user knows it -> the path; None where it was not given.
        ids: Of the rows.
        root: The folder that ids are relative to; the working folder when None.

    Raises:
        OutputError: The first output that is one of the images.
    """
    taken: dict[tuple[int, int], str] = {}
    for option, path in outputs.items():
        if path is not None and Path(path).is_file():
            status = os.stat(path)
            taken[status.st_dev, status.st_ino] = option
    if not taken:
        return
    for path in dict.fromkeys(path_of_id(name, root).partition("::")[0] for name in ids):
        try:
            status = os.stat(path)
        except (OSError, ValueError):
            continue
        option = taken.get((status.st_dev, status.st_ino), "")
        if option:
            raise OutputError(
                f"{option}: {os.fspath(outputs[option] or '')!r} is one of the images that the embeddings are of "
                f"({path!r}); choose another name"
            )
