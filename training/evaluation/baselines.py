"""Figures of baselines, kept on this machine.

Each is a function of its features and labels alone, and every encoder of a comparison asks for the same ones. An
encoder's own figures are never kept: measuring them again must be able to fail.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embedkit._io.atomic import write_file
from embedkit.errors import OutputError
from embedkit.hub.access import default_cache_dir

__all__ = ["digest", "keep", "recall"]

#: A larger file is not read; eight figures of a million images fill it.
MOST_BYTES = 64 << 20


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
    """What was kept under a name; None when nothing was, or it is not what `keep` writes for figures."""
    try:
        path = _path(name)
        if path.stat().st_size > MOST_BYTES:
            return None
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as found:
            arrays = {key[2:]: found[key] for key in found.files if key.startswith("a_")}
            facts = json.loads(str(found["facts"]))
    except Exception:  # zip, the array's header, JSON: whatever fails, the figures are measured again
        return None
    return (facts, arrays) if _is_sound(facts, arrays) else None


def _is_sound(facts: Any, arrays: Mapping[str, np.ndarray]) -> bool:
    """Whether these are `figures` and `l2`, numbers or None, and values of each image."""
    return (
        isinstance(facts, dict)
        and facts.keys() == {"figures", "l2"}
        and isinstance(facts["figures"], dict)
        and all(
            value is None or type(value) in (int, float)
            for value in (*facts["figures"].values(), facts["l2"])
        )
        and all(array.dtype == np.float64 and array.ndim == 1 for array in arrays.values())
    )


def _path(name: str) -> Path:
    return Path(default_cache_dir()) / "figures" / f"{name}.npz"
