"""Give metadata to a file of embeddings that another program wrote, after checking that an encoder made its rows.

pandas, Polars and DuckDB drop the metadata of the files that they write, and other tools write none. Widths and lengths
are always checked. Where images of the rows are at hand, some are embedded again and compared: only that tells two
encoders of one width apart. Ids in the file are untrusted: only files below a folder that the user names are opened.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedkit._io.outputs import check_outputs
from embedkit.embeddings.foreign import are_unit, check_unique, lengths_of
from embedkit.embeddings.foreign_files import ForeignFile, open_foreign
from embedkit.embeddings.formats import save_rows
from embedkit.embeddings.metadata import Metadata, check_same_space
from embedkit.embeddings.schema import conform, vectors_of
from embedkit.encoder import Encoder, load_encoder
from embedkit.errors import ConfigError, EmbedkitError, SpaceMismatchError
from embedkit.images.ids import path_of
from embedkit.images.originals import Originals

__all__ = ["Adopted", "adopt"]

#: Images that are embedded again, and ids that are looked up to find so many.
_SAMPLE, _LOOKED_UP = 16, 1000
#: The least cosine of a stored row and its image's embedding by the same encoder: decoding at a reduced scale gives
#: 0.9994 and float16 0.999, while unrelated encoders give about 0.
_LEAST = 0.99
#: How far the length of a raw row may be from that of its image's embedding, as a share.
_LENGTH = 0.05


@dataclass(frozen=True)
class Adopted:
    """What was adopted, and how far it was checked.

    Attributes:
        output: The file that was written.
        rows: The number of rows.
        metadata: What the file says of them.
        compared: How many images were embedded again and compared.
        cosine: The least cosine among these; None where no image was compared.
        unchecked: Why no image was compared; empty where some were.
    """

    output: str
    rows: int
    metadata: Metadata
    compared: int
    cosine: float | None
    unchecked: str


def adopt(
    source: str | os.PathLike[str],
    encoder: Encoder | str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    images: str | os.PathLike[str] | None = None,
    id: str = "id",
    embedding: str = "embedding",
    device: str = "auto",
    threads: int | str = "auto",
) -> Adopted:
    """Write a file of embeddings from one that has no metadata; the source is not changed.

    Args:
        source: A Parquet file with a column of ids and a column of vectors, or a `.npy` file with its ids beside it in
            `X.ids.txt` (one a line) or `X.ids.jsonl`.
        encoder: The encoder that made the rows: a name, an entry's folder or a loaded one.
        output: `X.parquet`, `X.npy`, a folder ending in `/`, or `lance://FOLDER/TABLE`; `X.adopted.parquet` or
            `X.adopted.npy` beside the source when None.
        images: The folder that ids are relative to; the working folder when None. An id that leads out of it, by `..`
            or as an absolute path, is not opened; links inside it are followed.
        id: The column of ids.
        embedding: The column of vectors.
        device: For an encoder that is loaded here.
        threads: For an encoder that is loaded here.

    Returns:
        What was written, and how far it was checked.

    Raises:
        ConfigError: Columns or rows that are not such, with the first one's name.
        SpaceMismatchError: Another encoder made the rows; the message has the cosine that was found.
        OutputError: The source cannot be read, or the output cannot be written or is the source.

    Examples:
        >>> import pyarrow.parquet
        >>> table = pyarrow.parquet.read_table("samples.parquet", columns=["id", "embedding"])
        >>> pyarrow.parquet.write_table(table.slice(0, 5).replace_schema_metadata(), "five.parquet")
        >>> adopted = embedkit.adopt("five.parquet", "supervised-efficientnet_lite0")
        >>> adopted.output, adopted.rows, adopted.compared
        ('five.adopted.parquet', 5, 5)
    """
    path = Path(source)
    file = open_foreign(path, id=id, embedding=embedding)
    if output is None:
        output = path.with_name(f"{path.stem}.adopted{'.npy' if path.suffix == '.npy' else '.parquet'}")
    check_outputs({"output": output}, {os.fspath(one): one for one in file.files})
    originals = Originals(images)
    if not isinstance(encoder, Encoder):
        encoder = load_encoder(encoder, device=device, threads=threads)
    if not len(file):
        raise ConfigError(f"{path} has no row, so there is nothing to adopt")
    keys = file.keys()
    check_unique(keys, str(path))
    sample = {} if encoder.config.takes_aligned_faces else _readable(keys, originals)
    stored, normalized = _check_rows(file, encoder, list(sample))
    metadata = encoder.metadata(normalize=normalized)
    if file.metadata is not None:
        check_same_space(
            file.metadata, metadata, str(path), "the encoder", "name the encoder that made the file"
        )
        metadata = file.metadata
    compared, cosine = _compare(encoder, stored, sample, keys, normalized, str(path))
    schema = file.columns.schema(metadata)
    save_rows(output, lambda: (conform(block, schema) for block in file.blocks(encoder.dim)), schema)
    unchecked = ""
    if not compared and encoder.config.takes_aligned_faces:
        unchecked = f"{encoder.name} embeds aligned faces, not whole images"
    elif not compared:
        root = originals.root or "the working folder"
        unchecked = f"no image of the rows can be read below {root}; --root names another"
    return Adopted(os.fspath(output), len(file), metadata, compared, cosine, unchecked)


def _check_rows(
    file: ForeignFile, encoder: Encoder, sample: Sequence[int]
) -> tuple[dict[int, np.ndarray], bool]:
    """Read all vectors once.

    Returns:
        The vectors of the sample by row, and whether all rows are normalized.

    Raises:
        ConfigError: A row that is no embedding of this width, or rows of which some are normalized.
    """
    where, stored, lengths, first = str(file.path), {}, [], 0
    for block in file.blocks(encoder.dim):
        vectors = vectors_of(block, encoder.dim, where)
        name = partial(_name, block["id"], first)
        lengths.append(lengths_of(vectors, name, where))
        for row in sample:
            if first <= row < first + len(block):
                stored[row] = vectors[row - first].copy()
        first += len(block)
    every = np.concatenate(lengths)
    unit = are_unit(every)
    if len(every) / 2 <= unit.sum() < len(every):  # a raw row may have length 1 by chance
        row = int(unit.argmin())
        raise ConfigError(
            f"{where}: row {row} has length {every[row]:.4g}, and {int(unit.sum())} of {len(every)} rows have length "
            "1: rows are all normalized or all raw; divide them by their lengths, or leave some out"
        )
    return stored, bool(unit.all())


def _name(ids: pa.ChunkedArray, first: int, row: int) -> str:
    return f"row {first + row} ({ids[row].as_py()!r})"


def _readable(keys: pa.Table, originals: Originals) -> dict[int, bytes]:
    """Up to `_SAMPLE` rows, spread over all, whose images are at hand: row -> the encoded image.

    An image whose size is not the recorded one may have changed since. Such are taken only where there are no others.
    """
    several = set(keys.filter(pc.not_equal(keys["part"], 0))["id"].to_pylist())  # faces, crops or frames
    found: dict[int, bytes] = {}
    changed: dict[int, bytes] = {}
    for row in np.random.default_rng(0).permutation(len(keys))[:_LOOKED_UP].tolist():
        name = keys["id"][row].as_py()
        if name in several or not _is_below(name, originals):
            continue
        size = keys["size"][row].as_py() if "size" in keys.column_names else None
        try:
            data = originals.read(name)
        except (EmbedkitError, OSError, ValueError):
            continue
        if size is None or size == len(data) or "::" in name:
            found[row] = data
        elif len(changed) < _SAMPLE:
            changed[row] = data
        if len(found) == _SAMPLE:
            break
    return found or changed


def _is_below(name: str, originals: Originals) -> bool:
    """Whether an id names a path below the root, without a step upwards."""
    root = os.path.join(os.path.abspath(originals.root or os.curdir), "")
    path = path_of(name, root)  # an absolute path stays as it is
    parts = path.replace("\\", "/").split("/")
    return "\0" not in path and ".." not in parts and os.path.abspath(path).startswith(root)


def _compare(
    encoder: Encoder,
    stored: dict[int, np.ndarray],
    sample: dict[int, bytes],
    keys: pa.Table,
    normalized: bool,
    where: str,
) -> tuple[int, float | None]:
    """Embed the images of the sample again, and compare.

    Returns:
        How many images could be embedded, and the least cosine; None for no image.

    Raises:
        SpaceMismatchError: The encoder gives other embeddings.
        ConfigError: It gives the same for most rows, and others for some, or raw rows of other lengths.
    """
    rows, cosines, shares = [], [], []
    order = list(sample)
    for batch in encoder.stream((sample[row] for row in order), normalize=False):
        for index, fresh in zip(batch.ids, batch.embeddings.astype(np.float64), strict=True):
            row = order[int(index)]
            old = stored[row].astype(np.float64)
            rows.append(row)
            length = float(np.linalg.norm(fresh)) or np.inf  # zeros are like no row
            cosines.append(float(old @ fresh / (np.linalg.norm(old) * length)))
            shares.append(float(np.linalg.norm(old) / length))
    if not rows:
        return 0, None
    least, middle = min(cosines), float(np.median(cosines))
    if middle < _LEAST:
        raise SpaceMismatchError(
            f"{where} was not made by {encoder.name}, or its ids belong to other rows: between stored rows and the "
            f"embeddings of their images the median cosine is {middle:.3f} ({len(rows)} images), and the same encoder "
            f"gives at least {_LEAST}; name the encoder that made it"
        )
    if least < _LEAST:
        name = keys["id"][rows[cosines.index(least)]].as_py()
        raise ConfigError(
            f"{where}: the row of {name!r} does not belong to that image (cosine {least:.3f}, where most rows have "
            f"{middle:.3f}): the image has changed, or ids were moved between rows; leave the row out, or embed again"
        )
    if not normalized and abs(share := float(np.median(shares)) - 1) > _LENGTH:
        raise ConfigError(
            f"{where}: raw rows are {share + 1:.3g} times as long as the embeddings of their images, so they were "
            "scaled; divide them by that, or by their lengths"
        )
    return len(rows), least
