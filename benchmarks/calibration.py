"""Does the promise hold on other people? The false-match rate of held-out identities against what was predicted.

    embedkit embed test.parquet -o emb.parquet && python benchmarks/calibration.py emb.parquet --label identity

Each split, by its seed, draws half of the identities. A threshold is calibrated on pairs of these, and
`Calibration.predict` says in which interval the rate of a sample like that of the other half lies in 95 of 100 cases;
the other half is counted. A confidence interval of the first rate alone stands beside it: it leaves out the chance of
the second sample.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from embedkit import Embeddings
from embedkit.analysis.matching.calibrate import calibrate_pairs
from embedkit.analysis.matching.pairs import identity_codes, sample_pairs
from embedkit.analysis.similarity import pair_similarity


def one_split(vectors: np.ndarray, codes: np.ndarray, seed: int, target: float) -> dict[str, float | bool]:
    """Calibrate on half of the identities, count on the other half."""
    rng = np.random.default_rng(seed)
    names = np.unique(codes)
    chosen = rng.permutation(names)[: len(names) // 2]
    own = np.isin(codes, chosen)
    found = calibrate_pairs(
        vectors[own], sample_pairs(codes[own].tolist(), seed=seed), target, replicates=200, seed=seed
    )
    other, held = codes[~own], vectors[~own]
    pairs = sample_pairs(other.tolist(), seed=seed)
    scores = pair_similarity(held, pairs.a, pairs.b)[~pairs.same]
    rate = float((scores >= found.threshold).mean())
    low, high = found.predict(identities=len(np.unique(other)), impostors=len(scores))
    return {
        "threshold": found.threshold,
        "predicted_low": low,
        "predicted_high": high,
        "rate": rate,
        "inside": low <= rate <= high,
        "inside_confidence": found.fmr_interval[0] <= rate <= found.fmr_interval[1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("embeddings", type=Path)
    parser.add_argument("--label", default="identity", help="label column that names identities")
    parser.add_argument("--splits", type=int, default=100)
    parser.add_argument("--target-fmr", type=float, default=1e-3)
    parser.add_argument("--json", type=Path, help="write every split here")
    args = parser.parse_args()
    rows = Embeddings.load(args.embeddings)
    codes = identity_codes(rows.label(args.label, str(args.embeddings)))
    known = codes >= 0
    splits = [
        one_split(rows.vectors[known], codes[known], seed, args.target_fmr) for seed in range(args.splits)
    ]
    inside, alone = (sum(bool(one[key]) for one in splits) for key in ("inside", "inside_confidence"))
    rates = [one["rate"] for one in splits]
    print(
        f"{rows.metadata.entry if rows.metadata else args.embeddings}: {len(np.unique(codes[known]))} identities; "
        f"inside the prediction interval in {inside} of {len(splits)} splits, inside the confidence interval in "
        f"{alone}; rates {min(rates):.2e} to {max(rates):.2e}, asked {args.target_fmr:g}"
    )
    if args.json:
        args.json.write_text(json.dumps(splits, indent=1) + "\n")


if __name__ == "__main__":
    main()
