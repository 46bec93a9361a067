"""Figures of baselines, kept on this machine.

Each is a function of its features and labels alone, and every encoder of a comparison asks for the same ones. An
encoder's own figures are never kept: measuring them again must be able to fail.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embedkit.errors import OutputError
from embedkit.hub.access import default_cache_dir
from embedkit.hub.files import write_file

__all__ = ["digest", "keep", "recall"]


def digest(words: Iterable[str], tensors: Iterable[Tensor]) -> str:
    """What figures depend on, as a name: words (the protocol, versions), and every bit of the tensors."""
    found = hashlib.sha256(json.dumps([*words, torch.__version__, np.__version__]).encode())
    for tensor in tensors:
        found.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().numpy().data)
    return found.hexdigest()


def keep(name: str, facts: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Keep facts (of JSON) and arrays under a name; where nothing can be written, nothing is kept."""
    content = io.BytesIO()
    np.savez(
        content,
        allow_pickle=False,
        **{f"a_{key}": value for key, value in arrays.items()},
        facts=json.dumps(facts),
    )
    with contextlib.suppress(OSError, OutputError):
        path = _path(name)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_file(path, content.getvalue())


def recall(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """What was kept under a name; None when nothing was, or it cannot be read."""
    try:
        with np.load(io.BytesIO(_path(name).read_bytes()), allow_pickle=False) as found:
            arrays = {key[2:]: found[key] for key in found.files if key.startswith("a_")}
            return json.loads(str(found["facts"])), arrays
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _path(name: str) -> Path:
    return Path(default_cache_dir()) / "figures" / f"{name}.npz"
