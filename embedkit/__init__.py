"""embedkit: image embeddings without PyTorch.

Start here:

    import embedkit

    embedkit.embed("photos/", "photos.parquet")  # a folder to a file of embeddings
    photos = embedkit.Embeddings.load("photos.parquet")
    print(photos.ids[0], photos.vectors.shape)
    found = embedkit.search("photos.parquet", ["cat.jpg"], k=5)  # the most similar photos
    copies = embedkit.find_duplicates("photos.parquet", threshold=0.95)
    groups = embedkit.cluster("photos.parquet", n_clusters=10)
    vectors = embedkit.load_encoder().encode(["cat.jpg"])  # float32 (1, D), for a program of your own

Functions:

- images to embeddings: `embed`, `load_encoder`, `list_encoders`, `adopt`
- look into them: `search`, `similarity`, `find_duplicates`, `find_leaks`, `cluster`, `lint`
- one identity or two: `verify`, `identify`, `calibrate`
- show and measure: `write_contact_sheet`, `write_atlas`, `evaluate`

`help(embedkit.search)` and the like explain one. Every error is an `EmbedkitError`.

The public API is flat and stands here; other modules may move.

What runs is logged under the name `embedkit` and its children (`embedkit.encoder`, `embedkit.hub`,
`embedkit.pipeline`): INFO for encoders loaded, downloads and jobs, WARNING for what a user should look at. Nothing is
shown until the application configures `logging`.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from embedkit._io.lazy import export_lazily

if TYPE_CHECKING:
    from embedkit.analysis.clustering.cluster import Clustering, cluster
    from embedkit.analysis.duplicates import Duplicates, find_duplicates
    from embedkit.analysis.leaks import find_leaks
    from embedkit.analysis.lint import lint
    from embedkit.analysis.matching.calibrate import calibrate
    from embedkit.analysis.matching.calibration import Calibration
    from embedkit.analysis.matching.identification import identify
    from embedkit.analysis.neighbors import SearchIndex
    from embedkit.analysis.similarity import similarity
    from embedkit.embeddings.metadata import Metadata
    from embedkit.embeddings.table import Embeddings
    from embedkit.encoder import EncodedBatch, Encoder, load_encoder
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
        TooManyFailuresError,
        UnreachableError,
        ZooError,
    )
    from embedkit.hub.listing import EncoderInfo, list_encoders
    from embedkit.model.mixture import GaussianMixture
    from embedkit.pipeline.embed import embed
    from embedkit.pipeline.report import EmbedReport
    from embedkit.workflows.adopt import adopt
    from embedkit.workflows.evaluate import evaluate
    from embedkit.workflows.faces.encoder import FaceEncoder
    from embedkit.workflows.faces.finder import FaceFinder
    from embedkit.workflows.search import search
    from embedkit.workflows.verify import verify
    from embedkit.workflows.visual.atlas import write_atlas
    from embedkit.workflows.visual.contact_sheet import write_contact_sheet

__version__ = "0.1.0"

__all__ = [
    "AccessError",
    "Calibration",
    "Clustering",
    "ConfigError",
    "DeviceError",
    "Duplicates",
    "EmbedReport",
    "Embeddings",
    "EmbedkitError",
    "EncodedBatch",
    "Encoder",
    "EncoderInfo",
    "EntryError",
    "EntryNotFoundError",
    "FaceEncoder",
    "FaceFinder",
    "GaussianMixture",
    "ImageError",
    "IntegrityError",
    "Metadata",
    "MissingDependencyError",
    "OutputError",
    "ParityError",
    "SearchIndex",
    "SignatureError",
    "SourceError",
    "SpaceMismatchError",
    "TooManyFailuresError",
    "UnreachableError",
    "ZooError",
    "adopt",
    "calibrate",
    "cluster",
    "embed",
    "evaluate",
    "find_duplicates",
    "find_leaks",
    "identify",
    "lint",
    "list_encoders",
    "load_encoder",
    "search",
    "similarity",
    "verify",
    "write_atlas",
    "write_contact_sheet",
]

#: Public name -> the module that defines it. Names resolve at first use, so that importing this package stays cheap.
_MODULES = {
    "AccessError": "errors",
    "Calibration": "analysis.matching.calibration",
    "Clustering": "analysis.clustering.cluster",
    "ConfigError": "errors",
    "DeviceError": "errors",
    "Duplicates": "analysis.duplicates",
    "EmbedReport": "pipeline.report",
    "Embeddings": "embeddings.table",
    "EmbedkitError": "errors",
    "EncodedBatch": "encoder",
    "Encoder": "encoder",
    "EncoderInfo": "hub.listing",
    "EntryError": "errors",
    "EntryNotFoundError": "errors",
    "FaceEncoder": "workflows.faces.encoder",
    "FaceFinder": "workflows.faces.finder",
    "GaussianMixture": "model.mixture",
    "ImageError": "errors",
    "IntegrityError": "errors",
    "Metadata": "embeddings.metadata",
    "MissingDependencyError": "errors",
    "OutputError": "errors",
    "ParityError": "errors",
    "SearchIndex": "analysis.neighbors",
    "SignatureError": "errors",
    "SourceError": "errors",
    "SpaceMismatchError": "errors",
    "TooManyFailuresError": "errors",
    "UnreachableError": "errors",
    "ZooError": "errors",
    "adopt": "workflows.adopt",
    "calibrate": "analysis.matching.calibrate",
    "cluster": "analysis.clustering.cluster",
    "embed": "pipeline.embed",
    "evaluate": "workflows.evaluate",
    "find_duplicates": "analysis.duplicates",
    "find_leaks": "analysis.leaks",
    "identify": "analysis.matching.identification",
    "lint": "analysis.lint",
    "list_encoders": "hub.listing",
    "load_encoder": "encoder",
    "search": "workflows.search",
    "similarity": "analysis.similarity",
    "verify": "workflows.verify",
    "write_atlas": "workflows.visual.atlas",
    "write_contact_sheet": "workflows.visual.contact_sheet",
}
export_lazily(__name__, _MODULES, packages=("analysis", "workflows"))

logging.getLogger(__name__).addHandler(logging.NullHandler())
