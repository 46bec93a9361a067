"""What embeddings are for: similarity, search, duplicates, leaks, lint, clusters and calibrated matches.

`vectors` opens and checks rows for all the others. `similarity` compares them; `neighbors` (with `index_file`) and
`neighbors_on_disk` search them; `duplicates` (with `deletable`) and `leaks` find rows that are too similar;
`lint` checks a whole set; `clustering` groups rows; `matching` decides, with measured error rates, whether rows show
one identity.

Everything here takes `Embeddings`, their files or arrays; nothing here needs images, a model or torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from embedkit._io.lazy import export_lazily

if TYPE_CHECKING:
    from embedkit.analysis.clustering.cluster import cluster
    from embedkit.analysis.clustering.scores import clustering_scores
    from embedkit.analysis.duplicates import find_duplicates, threshold_for_precision
    from embedkit.analysis.leaks import find_leaks
    from embedkit.analysis.lint import lint
    from embedkit.analysis.matching.calibrate import calibrate, calibrate_pairs
    from embedkit.analysis.matching.calibration import verify_vectors
    from embedkit.analysis.matching.identification import identify
    from embedkit.analysis.matching.pairs import lfw_protocol, read_pairs, sample_pairs
    from embedkit.analysis.similarity import pair_similarity, similarity, top_k

__all__ = [
    "calibrate",
    "calibrate_pairs",
    "cluster",
    "clustering_scores",
    "find_duplicates",
    "find_leaks",
    "identify",
    "lfw_protocol",
    "lint",
    "pair_similarity",
    "read_pairs",
    "sample_pairs",
    "similarity",
    "threshold_for_precision",
    "top_k",
    "verify_vectors",
]

#: Public name -> the module that defines it. Names resolve at first use, so that importing this package stays cheap.
_MODULES = {
    "calibrate": "matching.calibrate",
    "calibrate_pairs": "matching.calibrate",
    "cluster": "clustering.cluster",
    "clustering_scores": "clustering.scores",
    "find_duplicates": "duplicates",
    "find_leaks": "leaks",
    "identify": "matching.identification",
    "lfw_protocol": "matching.pairs",
    "lint": "lint",
    "pair_similarity": "similarity",
    "read_pairs": "matching.pairs",
    "sample_pairs": "matching.pairs",
    "similarity": "similarity",
    "threshold_for_precision": "duplicates",
    "top_k": "similarity",
    "verify_vectors": "matching.calibration",
}
export_lazily(__name__, _MODULES)
