"""embedkit: image embeddings from images, without PyTorch.

The public API is flat and lives here; other modules may move.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from embedkit.analysis.clustering.cluster import Clustering, cluster
    from embedkit.analysis.duplicates import Duplicates, find_duplicates
    from embedkit.analysis.lint import lint
    from embedkit.analysis.matching.calibrate import calibrate
    from embedkit.analysis.matching.calibration import Calibration
    from embedkit.analysis.matching.identification import identify
    from embedkit.analysis.neighbors import Index
    from embedkit.analysis.similarity import similarity
    from embedkit.embeddings.metadata import Metadata
    from embedkit.embeddings.table import Embeddings
    from embedkit.encoder import Batch, Encoder, load_encoder
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
        SignatureError,
        SourceError,
        SpaceMismatchError,
        UnreachableError,
        ZooError,
    )
    from embedkit.hub.listing import EncoderInfo, list_encoders
    from embedkit.model.mixture import Mixture
    from embedkit.pipeline.embed import embed
    from embedkit.pipeline.report import EmbedReport
    from embedkit.workflows.faces.faces import FaceEncoder, FaceFinder
    from embedkit.workflows.verify import verify

__version__ = "0.1.0"

__all__ = [
    "AccessError",
    "Batch",
    "Calibration",
    "Clustering",
    "ConfigError",
    "DeviceError",
    "Duplicates",
    "EmbedReport",
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
    "Metadata",
    "MissingDependencyError",
    "Mixture",
    "OutputError",
    "ParityError",
    "SignatureError",
    "SourceError",
    "SpaceMismatchError",
    "UnreachableError",
    "ZooError",
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
    "Calibration": "analysis.matching.calibration",
    "Clustering": "analysis.clustering.cluster",
    "Duplicates": "analysis.duplicates",
    "EmbedReport": "pipeline.report",
    "Embeddings": "embeddings.table",
    "Encoder": "encoder",
    "EncoderInfo": "hub.listing",
    "FaceEncoder": "workflows.faces.faces",
    "FaceFinder": "workflows.faces.faces",
    "Index": "analysis.neighbors",
    "Mixture": "model.mixture",
    "Metadata": "embeddings.metadata",
    "calibrate": "analysis.matching.calibrate",
    "cluster": "analysis.clustering.cluster",
    "embed": "pipeline.embed",
    "find_duplicates": "analysis.duplicates",
    "identify": "analysis.matching.identification",
    "lint": "analysis.lint",
    "list_encoders": "hub.listing",
    "load_encoder": "encoder",
    "similarity": "analysis.similarity",
    "verify": "workflows.verify",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'embedkit' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"embedkit.{_HOMES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
