"""A cache of the metrics of baselines, on this machine.

They depend on features and labels alone, and every encoder of a comparison needs the same ones. The metrics of an
encoder are never cached, so that a second evaluation can show that the first one was wrong.
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

__all__ = ["key_of", "load", "store"]

#: A larger file is not read. Eight metrics of a million images are this large.
MOST_BYTES = 64 << 20


def key_of(words: Iterable[str], tensors: Iterable[Tensor]) -> str:
    """A digest of what metrics depend on: words (the protocol, versions) and every bit of the tensors."""
    found = hashlib.sha256(json.dumps([*words, torch.__version__, np.__version__]).encode())
    for tensor in tensors:
        found.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().numpy().data)
    return found.hexdigest()


def store(key: str, facts: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Store facts (of JSON) and arrays under a key; a cache that cannot be written is left as it is."""
    content = io.BytesIO()
    np.savez(
        content,
        allow_pickle=False,
        **{f"a_{name}": value for name, value in arrays.items()},
        facts=json.dumps(facts),
    )
    with contextlib.suppress(OSError, OutputError):
        path = _path(key)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_file(path, content.getvalue())


def load(key: str) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """What is stored under a key; None where nothing is, or where it is not what `store` writes for metrics."""
    try:
        path = _path(key)
        if path.stat().st_size > MOST_BYTES:
            return None
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as found:
            arrays = {name[2:]: found[name] for name in found.files if name.startswith("a_")}
            facts = json.loads(str(found["facts"]))
    except Exception:  # zip, the array's header, JSON: whatever fails, the metrics are measured again
        return None
    return (facts, arrays) if _is_sound(facts, arrays) else None


def _is_sound(facts: Any, arrays: Mapping[str, np.ndarray]) -> bool:
    """Whether these are `metrics` and `l2`, numbers or None, and values of each image."""
    return (
        isinstance(facts, dict)
        and facts.keys() == {"metrics", "l2"}
        and isinstance(facts["metrics"], dict)
        and all(
            value is None or type(value) in (int, float)
            for value in (*facts["metrics"].values(), facts["l2"])
        )
        and all(array.dtype == np.float64 and array.ndim == 1 for array in arrays.values())
    )


def _path(key: str) -> Path:
    return Path(default_cache_dir()) / "metrics" / f"{key}.npz"
