"""Verification of an entry: its files, and its golden vectors on this machine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from embedkit._io.npz import read_npz
from embedkit.encoder import comparable, open_engine
from embedkit.errors import EmbedkitError, EntryError
from embedkit.hub.access import default_cache_dir
from embedkit.hub.resolve import find_entry
from embedkit.images.transform import read_pixels
from embedkit.model.layout import GOLDEN, MIXTURE
from embedkit.model.mixture import GaussianMixture
from embedkit.model.providers import CPU, EngineOptions, available_cpus

#: A larger tolerance for embeddings of length 1 would accept more than rounding errors.
MOST_TOLERANCE = 1e-2
#: Greatest size of golden vectors in bytes; those of the zoo take 60 kB.
MOST_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class EntryCheck:
    """The result of `verify_entry`.

    Attributes:
        name: The entry.
        ok: Whether every check passed.
        files: Files whose size and sha256 matched.
        bytes: Their total size.
        detail: The difference from the golden vectors and the provider, or the failure.
    """

    name: str
    ok: bool
    files: int
    bytes: int
    detail: str


def verify_entry(name: str | os.PathLike[str], *, device: str = "auto") -> EntryCheck:
    """Check every file of an entry against its manifest, and its golden vectors on this machine's provider.

    Args:
        name: A name, `name@revision`, or an entry's folder.
        device: As for `load_encoder`.

    Examples:
        >>> check = embedkit.workflows.verify_entry("supervised-efficientnet_lite0")
        >>> check.ok, check.files
        (True, 5)
    """
    text, checked, size = os.fspath(name), 0, 0
    try:
        entry = find_entry(name)
        text = entry.name
        for file in entry.manifest.files:
            size += len(entry.read(file))
            checked += 1
        options = EngineOptions(device=device, threads=available_cpus(), cache_dir=default_cache_dir())
        engine = open_engine(entry, options)
        images, expected, allowed = _golden(entry.read(GOLDEN), entry.config.outputs)
        preprocess = entry.config.preprocess
        differences = []
        for index, image in enumerate(images):
            found = engine.run_all(read_pixels(image, preprocess, decode="exact")[None])
            differences += [
                np.abs(comparable(name, found[name])[0] - rows[index]).max()
                for name, rows in expected.items()
            ]
        difference = float(np.max(differences))  # max() would ignore a NaN
        if MIXTURE in entry.manifest.files:
            GaussianMixture._of_entry(entry)
    except EmbedkitError as error:
        return EntryCheck(name=text, ok=False, files=checked, bytes=size, detail=str(error))
    ok = bool(difference <= allowed)  # false for NaN
    how = f"within {difference:.1e} of" if ok else f"are off by {difference:.1e}, more than"
    detail = f"golden vectors {how} {allowed:.0e} on {engine.provider}"
    if engine.note and engine.provider == CPU:
        detail += f" ({engine.note})"
    return EntryCheck(name=text, ok=ok, files=checked, bytes=size, detail=detail)


def _golden(
    data: bytes, outputs: Mapping[str, tuple[int, ...]]
) -> tuple[np.ndarray, dict[str, np.ndarray], float]:
    """Images uint8 (N, H, W, 3), each output for them, float32 (N, ...), and the allowed difference."""
    try:
        golden = read_npz(data, ("images", "tolerance_fp32", *outputs), limit=MOST_BYTES)
        allowed = float(golden["tolerance_fp32"])
    except (ValueError, TypeError) as error:
        raise EntryError(f"{GOLDEN} is damaged ({error})") from None
    images, expected = golden["images"], {name: golden[name] for name in outputs}
    if not 0 < allowed <= MOST_TOLERANCE:
        raise EntryError(f"{GOLDEN}: a tolerance of {allowed:g} is too large; pull the entry again")
    for name, shape in outputs.items():
        rows = expected[name]
        if (
            images.ndim != 4
            or not len(images)
            or rows.shape != (len(images), *shape)
            or rows.dtype.kind != "f"
        ):
            raise EntryError(
                f"{GOLDEN}: {images.shape} images do not belong to {name} of {rows.shape}, where an image "
                f"gives {shape}"
            )
    return images, expected, allowed
