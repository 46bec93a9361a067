"""What a folder job reports: its progress while it runs, and what it did at the end."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["EmbedReport", "Progress"]


@dataclass(frozen=True, kw_only=True)
class EmbedReport:
    """What a job did.

    Attributes:
        output: The file or folder that holds the rows.
        images: Images embedded by this run.
        kept: Rows of earlier runs that are still valid.
        removed: Rows that were removed, of images that changed or are gone.
        gone: Kept rows whose image file does not exist any more.
        failed: Images that could not be read; they are listed in `errors`.
        seconds: Wall time of the job without loading the encoder.
        provider: The provider that ran, by ONNX Runtime's name.
        dim: Width D.
        errors: The table of failures (`id`, `error`, `reason`), None when there is none.
        notes: What the user should know, one sentence each.

    Examples:
        >>> report = embedkit.embed("samples/", "new.parquet")
        >>> report.images, report.failed, report.dim, report.errors
        (10, 0, 1280, None)
        >>> report.images_per_second > 0
        True
    """

    output: str
    images: int
    kept: int
    removed: int
    failed: int
    seconds: float
    provider: str
    dim: int
    errors: str | None
    gone: int = 0
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The report as one line: rows, failures and speed."""
        kept = f", {self.kept} kept" if self.kept else ""
        removed = f", {self.removed} removed" if self.removed else ""
        failed = f"{self.failed} failed ({self.errors})" if self.failed else "none failed"
        speed = f", {self.images_per_second:.1f} images/s on {self.provider}" if self.images else ""
        return f"{self.output}: {self.images} embedded{kept}{removed}, {failed}; dim {self.dim}{speed}"

    @property
    def images_per_second(self) -> float:
        """Images embedded by this run per second."""
        return self.images / self.seconds if self.seconds > 0 else 0.0


class Progress:
    """Receives the progress of a job; this one ignores it."""

    def start(self, total: int) -> None:
        """`total` images are about to be embedded."""

    def advance(self, images: int, failed: int) -> None:
        """`images` more images were embedded, and `failed` more could not be read."""
