"""Whether an entry is whole, and whether this machine computes what it promises."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass

import numpy as np

from embedkit.encoder import Encoder
from embedkit.engine import CPU, EngineOptions, available_cpus
from embedkit.entry import GOLDEN
from embedkit.errors import EmbedkitError, EntryError
from embedkit.load import default_cache_dir, find_entry


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What `verify_entry` found.

    Attributes:
        name: The entry.
        ok: Whether everything held.
        files: Files whose size and sha256 matched.
        bytes: Their size together.
        detail: The difference from the golden vectors and what ran, or what is wrong.
    """

    name: str
    ok: bool
    files: int
    bytes: int
    detail: str


def verify_entry(name: str | os.PathLike[str], *, device: str = "auto") -> Verification:
    """Check every file of an entry against its manifest, and its golden vectors on this machine's provider.

    Args:
        name: A name, `name@revision`, or an entry's folder.
        device: As for `load_encoder`.
    """
    text, checked, size = os.fspath(name), 0, 0
    try:
        entry = find_entry(name)
        text = entry.name
        for file in entry.manifest.files:
            size += len(entry.read(file))
            checked += 1
        options = EngineOptions(device=device, threads=available_cpus(), cache_dir=default_cache_dir())
        encoder = Encoder(entry, options)
        pictures, expected, allowed = _golden(entry.read(GOLDEN), encoder.dim)
        difference = float(np.abs(encoder.encode(pictures, decode="exact") - expected).max())
    except EmbedkitError as error:
        return Verification(name=text, ok=False, files=checked, bytes=size, detail=str(error))
    detail = f"golden vectors within {difference:.1e} of {allowed:.0e} on {encoder.provider}"
    if encoder.note and encoder.provider == CPU:
        detail += f" ({encoder.note})"
    ok = bool(difference <= allowed)  # NaN is not within anything
    return Verification(name=text, ok=ok, files=checked, bytes=size, detail=detail)


def _golden(data: bytes, dim: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Pictures uint8 (N, H, W, 3), their embeddings float32 (N, D) and how far they may differ."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as golden:
            pictures, rows = golden["pictures"], golden["embedding"]
            allowed = float(golden["tolerance_fp32"])
    except Exception as error:  # zipfile, zlib and numpy each raise a family of their own
        raise EntryError(f"{GOLDEN} is damaged ({' '.join(str(error).split())[:200]})") from None
    if (
        pictures.ndim != 4
        or not len(pictures)
        or rows.shape != (len(pictures), dim)
        or rows.dtype.kind != "f"
    ):
        raise EntryError(
            f"{GOLDEN}: {pictures.shape} pictures do not belong to {rows.shape} embeddings of {dim}"
        )
    return pictures, rows, allowed
