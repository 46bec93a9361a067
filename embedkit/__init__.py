"""embedkit: image embeddings from pictures, without PyTorch.

The public API is flat and lives here; other modules may move.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from embedkit.analysis.calibrating import calibrate
    from embedkit.analysis.calibration import Calibration
    from embedkit.analysis.clustering import Clustering, cluster
    from embedkit.analysis.duplicates import Duplicates, find_duplicates
    from embedkit.analysis.identification import identify
    from embedkit.analysis.index import Index
    from embedkit.analysis.lint import lint
    from embedkit.analysis.similarity import similarity
    from embedkit.embeddings import Embeddings, Passport
    from embedkit.encoder import Batch, Encoder
    from embedkit.errors import (
        AccessError,
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
        PlaceError,
        SignatureError,
        SourceError,
        SpaceMismatchError,
        UnreachableError,
    )
    from embedkit.job import Report
    from embedkit.load import EncoderInfo, list_encoders, load_encoder
    from embedkit.mixture import Mixture
    from embedkit.pictures.faces import FaceEncoder, FaceFinder
    from embedkit.pictures.verification import verify
    from embedkit.pipeline import embed

__version__ = "0.1.0"

__all__ = [
    "AccessError",
    "Batch",
    "Calibration",
    "Clustering",
    "ConfigError",
    "DeviceError",
    "Duplicates",
    "Embeddings",
    "EmbedkitError",
    "Encoder",
    "EncoderInfo",
    "EntryError",
    "EntryNotFoundError",
    "FaceEncoder",
    "FaceFinder",
    "ImageError",
    "Index",
    "IntegrityError",
    "MissingDependencyError",
    "Mixture",
    "OutputError",
    "ParityError",
    "Passport",
    "PlaceError",
    "Report",
    "SignatureError",
    "SourceError",
    "SpaceMismatchError",
    "UnreachableError",
    "calibrate",
    "cluster",
    "embed",
    "find_duplicates",
    "identify",
    "lint",
    "list_encoders",
    "load_encoder",
    "similarity",
    "verify",
]

#: Public name -> its module. Names resolve at first use, since numpy, Pillow and pyarrow cost more than
#: `embedkit --help` may take.
_HOMES = {
    "Batch": "encoder",
    "Calibration": "analysis.calibration",
    "Clustering": "analysis.clustering",
    "Duplicates": "analysis.duplicates",
    "Embeddings": "embeddings",
    "Encoder": "encoder",
    "EncoderInfo": "load",
    "FaceEncoder": "pictures.faces",
    "FaceFinder": "pictures.faces",
    "Index": "analysis.index",
    "Mixture": "mixture",
    "Passport": "embeddings",
    "Report": "job",
    "calibrate": "analysis.calibrating",
    "cluster": "analysis.clustering",
    "embed": "pipeline",
    "find_duplicates": "analysis.duplicates",
    "identify": "analysis.identification",
    "lint": "analysis.lint",
    "list_encoders": "load",
    "load_encoder": "load",
    "similarity": "analysis.similarity",
    "verify": "pictures.verification",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'embedkit' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"embedkit.{_HOMES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
