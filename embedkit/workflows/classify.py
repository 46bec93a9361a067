"""Classification: the likeliest classes of images, by the classifier of an entry."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from embedkit._io.atomic import write_file
from embedkit._io.text import did_you_mean
from embedkit.encoder import load_encoder, reason_of
from embedkit.errors import ConfigError, SourceError
from embedkit.images.sources import list_sources
from embedkit.pipeline.report import Progress

__all__ = ["Classified", "classify_images"]

#: What a table may be written as, by suffix.
_SUFFIXES = (".csv", ".parquet")


@dataclass(frozen=True)
class Classified:
    """The classes of images, the likeliest first: `top` rows for each image, in order of the images.

    Attributes:
        ids: The image of each row.
        labels: The class of each row.
        probabilities: float32, of each row.
        failed: One sentence for each image that could not be read: its id and the reason.
        encoder: The name of the entry.
    """

    ids: list[str]
    labels: list[str]
    probabilities: np.ndarray
    failed: list[str]
    encoder: str

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `id`, `label` and `probability` as Parquet or CSV, by the suffix.

        Raises:
            ConfigError: Another suffix.
            OutputError: The file cannot be written.
        """
        path = Path(path)
        check_suffix(path)
        if path.suffix == ".csv":
            text = io.StringIO(newline="")
            rows = csv.writer(text, lineterminator="\n")
            rows.writerow(["id", "label", "probability"])
            rows.writerows(zip(self.ids, self.labels, map(_decimals, self.probabilities), strict=True))
            write_file(path, text.getvalue().encode("utf-8", "surrogateescape"))
            return
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.table(
            {
                "id": pa.array(self.ids, pa.string()),
                "label": pa.array(self.labels, pa.string()),
                "probability": pa.array(self.probabilities, pa.float32()),
            }
        )
        content = pa.BufferOutputStream()
        pq.write_table(table, content)
        write_file(path, content.getvalue().to_pybytes())


def check_suffix(path: Path) -> None:
    """Refuse a file that `Classified.save` cannot write, before the work.

    Raises:
        ConfigError: It ends in neither.
    """
    if path.suffix not in _SUFFIXES:
        near = did_you_mean(path.suffix, _SUFFIXES, otherwise=f"expected {' or '.join(_SUFFIXES)}")
        raise ConfigError(
            f"{path}: a table cannot be written as {path.suffix or 'a file without a suffix'}; {near}"
        )


def _decimals(probability: float) -> str:
    return f"{probability:.6f}"


def classify_images(
    sources: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
    *,
    encoder: str | os.PathLike[str],
    top: int = 1,
    device: str = "auto",
    threads: int | str = "auto",
    progress: Progress | None = None,
) -> Classified:
    """The likeliest classes of every image of some sources.

    Args:
        sources: As `embed` takes them.
        encoder: An entry with a classifier: a name or a folder.
        top: Classes for each image, the likeliest first.
        device: As for `load_encoder`.
        threads: As for `load_encoder`.
        progress: Receives the progress.

    Returns:
        The classes; an image that cannot be read has no row.

    Raises:
        EntryError: The entry has no classifier.
        ConfigError: `top` is not one of 1 to the number of classes.
        SourceError: A source does not exist, or no image can be read.

    Example:
        >>> done = classify_images("photographs", encoder="./zoo/supervised-lite0.flowers", top=2)
        >>> list(zip(done.ids, done.labels))[:2]
        [('photographs/a.jpg', 'tulip'), ('photographs/a.jpg', 'rose')]
    """
    loaded = load_encoder(encoder, device=device, threads=threads)
    loaded._check_head()
    if not 1 <= top <= len(loaded.classes):
        raise ConfigError(
            f"top: expected 1 to {len(loaded.classes)}, the classes of {loaded.name}; found {top}"
        )
    listing = list_sources(sources)
    failed = [f"{name}: {reason}" for name, _, reason in listing.errors]
    items, size = listing.items, loaded.default_batch_size
    progress = progress or Progress()
    progress.start(len(items))
    batches = ([item.read for item in items[at : at + size]] for at in range(0, len(items), size))
    ids: list[str] = []
    chosen: list[np.ndarray] = []
    values: list[np.ndarray] = []
    first = 0
    with closing(loaded._flow(batches, output="logits")) as flow:
        for block, faults in flow:
            names = [item.id for item in items[first : first + len(block)]]
            failed += [f"{names[row]}: {reason_of(fault)}" for row, fault in sorted(faults.items())]
            good = [row for row in range(len(block)) if row not in faults]
            order = np.argsort(-block[good], axis=1, kind="stable")[:, :top]  # (n, top)
            ids += [names[row] for row in good for _ in range(top)]
            chosen.append(order.ravel())
            values.append(np.take_along_axis(block[good], order, axis=1).ravel())
            first += len(block)
            progress.advance(len(good), len(faults))
    if not ids:
        raise SourceError(
            f"none of the images can be read; the first: {failed[0]}" if failed else "there are no images"
        )
    labels = [loaded.classes[index] for index in np.concatenate(chosen).tolist()]
    return Classified(ids, labels, np.concatenate(values), failed, loaded.name)
