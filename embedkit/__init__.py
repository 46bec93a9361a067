"""embedkit: image embeddings from pictures, without PyTorch.

The public API is flat and lives here; other modules may move.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from embedkit.embeddings import Embeddings, Passport
    from embedkit.encoder import Batch, Encoder
    from embedkit.errors import (
        ConfigError,
        DeviceError,
        EmbedkitError,
        EntryError,
        EntryNotFoundError,
        ImageError,
        IntegrityError,
        MissingDependencyError,
        OutputError,
        ParityError,
        SourceError,
        SpaceMismatchError,
    )
    from embedkit.job import Report
    from embedkit.load import EncoderInfo, list_encoders, load_encoder
    from embedkit.pipeline import embed

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "ConfigError",
    "DeviceError",
    "Embeddings",
    "EmbedkitError",
    "Encoder",
    "EncoderInfo",
    "EntryError",
    "EntryNotFoundError",
    "ImageError",
    "IntegrityError",
    "MissingDependencyError",
    "OutputError",
    "ParityError",
    "Passport",
    "Report",
    "SourceError",
    "SpaceMismatchError",
    "embed",
    "list_encoders",
    "load_encoder",
]

#: Public name -> its module. Names resolve at first use, since numpy, Pillow and pyarrow cost more than
#: `embedkit --help` may take.
_HOMES = {
    "Batch": "encoder",
    "Embeddings": "embeddings",
    "Encoder": "encoder",
    "EncoderInfo": "load",
    "Passport": "embeddings",
    "Report": "job",
    "embed": "pipeline",
    "list_encoders": "load",
    "load_encoder": "load",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'embedkit' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"embedkit.{_HOMES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
