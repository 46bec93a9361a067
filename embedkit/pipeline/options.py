"""The options of the folder job: the one definition that `embedkit.embed`, the job and the command share."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from embedkit.embeddings.metadata import DTYPES
from embedkit.errors import ConfigError

if TYPE_CHECKING:
    from embedkit.encoder import Encoder
    from embedkit.pipeline.parts import PartFinder

__all__ = ["ON_ERROR", "EmbedOptions"]

ON_ERROR = ("skip", "stop")

_COUNT = re.compile(r"\d{1,18}", re.ASCII)
_SHARE = re.compile(r"\d{1,3}(\.\d{1,9})?%", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class EmbedOptions:
    """What a job may be told, with its defaults.

    None for `batch_size`, `decode` and `exclude` means: as the unfinished job that this one continues, else the
    default; for `dtype` also: as the output that this job extends.

    Attributes:
        encoder: A name, an entry's folder or a loaded `Encoder`; the default encoder when None.
        revision: As for `load_encoder`.
        batch_size: Images in one batch; chosen for the device when None.
        device: As for `load_encoder`.
        providers: As for `load_encoder`.
        precision: As for `load_encoder`.
        threads: As for `load_encoder`.
        decode: `auto` (the default) or `exact`.
        max_pixels: Greatest number of pixels of an image file; 179 million when None.
        image_column: The column of Parquet files that holds the images; found by type and name when None.
        normalize: Whether rows have Euclidean length 1.
        dtype: How the numbers of rows are stored: `float32` (the default) or `float16`, half the size.
        root: Ids are paths relative to this folder.
        recursive: Whether folders inside folders are entered.
        exclude: Patterns of images and folders to leave out, added to `._*`, `@eaDir` and `#recycle`, which an empty
            pattern turns off; see `embedkit.images.exclude.Excludes`.
        label_from_folder: Whether a column `label` gets the name of each image's class folder.
        on_error: `skip` or `stop`.
        max_failures: How many images may fail, as a number or a share of all such as `1%`, before the job stops; any
            number when None.
        prune: Whether rows are dropped whose files are gone, or that lie in the sources and are not listed.
        verify_content: Whether a changed image is found by its sha256 instead of size and modification time.
        worker: (I, N), counted from 1: embed the I-th of N parts.
        overwrite: Whether to start again, replacing the output.
        local_files_only: Never open a connection.
        lock: As for `load_encoder`.
        parts: Finds the parts of images that get a row each, such as faces; whole images when None.
    """

    encoder: str | os.PathLike[str] | Encoder | None = None
    revision: str | None = None
    batch_size: int | None = None
    device: str = "auto"
    providers: Sequence[str] | None = None
    precision: str = "fp32"
    threads: int | str = "auto"
    decode: str | None = None
    max_pixels: int | None = None
    image_column: str | None = None
    normalize: bool = True
    dtype: str | None = None
    root: str | os.PathLike[str] | None = None
    recursive: bool = True
    exclude: Sequence[str] | None = None
    label_from_folder: bool = False
    on_error: str = "skip"
    max_failures: int | str | None = None
    prune: bool = False
    verify_content: bool = False
    worker: tuple[int, int] | None = None
    overwrite: bool = False
    local_files_only: bool = False
    lock: bool = False
    parts: PartFinder | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without opening anything.

        Raises:
            ConfigError: A value out of its range.
        """
        if self.max_pixels is not None and self.max_pixels < 1:
            raise ConfigError(f"max_pixels: expected at least 1, found {self.max_pixels}")
        if self.on_error not in ON_ERROR:
            raise ConfigError(f"on_error: expected skip or stop, found {self.on_error!r}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConfigError(f"dtype: expected {' or '.join(DTYPES)}, found {self.dtype!r}")
        if isinstance(self.exclude, str) or not all(isinstance(one, str) for one in self.exclude or ()):
            raise ConfigError(f"exclude: expected a list of patterns such as ['raw'], found {self.exclude!r}")
        self.failures_allowed(0)
        if self.worker is not None:
            part, parts = self.worker
            if not 1 <= part <= parts:
                raise ConfigError(f"worker: expected I/N with I from 1 to N, found {part}/{parts}")

    def failures_allowed(self, images: int) -> int | None:
        """How many of so many images may fail; None for any number.

        Raises:
            ConfigError: `max_failures` is neither a number of images nor a share of them.
        """
        if self.max_failures is None:
            return None
        text = str(self.max_failures).strip()
        if isinstance(self.max_failures, int | str) and not isinstance(self.max_failures, bool):
            if _COUNT.fullmatch(text):
                return int(text)
            if _SHARE.fullmatch(text) and (share := Fraction(text.removesuffix("%"))) <= 100:
                return int(images * share / 100)
        raise ConfigError(
            f"max_failures: expected a number of images or a share of them such as 1%, found {self.max_failures!r}"
        )
