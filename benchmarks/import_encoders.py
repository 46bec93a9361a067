"""Import the recommended encoders with random weights, and compare each with timm's own pipeline.

No weights are downloaded: timm initializes each network, its tensors are made to differ from the identity, and a folder
of timm's layout states them. The import then has all its gates: torch, ONNX Runtime and timm agree to 1e-4 on
L2-normalized rows. After it, the entry's rows for photographs are compared with what timm gives for the same files by
its own transform, at the recommended size. Random weights show arithmetic, preprocessing and sizes, not quality.

    python benchmarks/import_encoders.py --out benchmarks/results
    python benchmarks/import_encoders.py vit_pe_core_tiny_patch16_384 tiny_vit_5m_224
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from embedkit import load_encoder
from embedkit.authoring.contract import Contract
from embedkit.authoring.import_request import Request
from embedkit.authoring.recommended import RECOMMENDED, Recommended
from embedkit.errors import EmbedkitError
from embedkit.hub.licenses import is_open
from embedkit.training.importers.timm_models import import_timm

SAMPLES = Path(__file__).parents[1] / "samples"
#: The least cosine between a row of the entry and timm's, around their mean: untrained networks give nearly one row.
LEAST_COSINE = 0.9999


def random_network(name: str, seed: int = 0) -> nn.Module:
    """A network of timm's at a random initialization in which every tensor matters."""
    torch.manual_seed(seed)
    network = timm.create_model(name).eval()
    with torch.no_grad():
        for key, tensor in network.state_dict().items():
            if not tensor.is_floating_point():
                continue
            if "running_var" in key or key.endswith(("gamma", "gamma_1", "gamma_2")):
                tensor.uniform_(0.5, 1.5)
            elif tensor.ndim == 1 and key.endswith("weight"):
                tensor.uniform_(0.8, 1.2)
            elif tensor.ndim == 1 or "pos_embed" in key or key.endswith(("_token", "latent")):
                tensor.normal_(0, 0.1)
    return network


def write_folder(folder: Path, network: nn.Module, one: Recommended) -> None:
    """A folder of timm's layout, as the Hub has it."""
    cfg = timm.models.get_pretrained_cfg(one.name).to_dict()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architecture": one.architecture, "pretrained_cfg": cfg}))
    save_file(
        {key: value.contiguous() for key, value in network.state_dict().items()}, folder / "model.safetensors"
    )


def timm_rows(network: nn.Module, one: Recommended, images: list[Path]) -> np.ndarray:
    """Rows (N, D) by timm alone: its transform of its configuration, and its network."""
    if one.pixels != one.native:
        network.set_input_size(img_size=(one.pixels, one.pixels))
    network.reset_classifier(0)
    settings: dict[str, Any] = resolve_model_data_config(network)
    settings.update(
        timm.data.resolve_data_config({}, pretrained_cfg=timm.models.get_pretrained_cfg(one.name).to_dict())
    )
    settings["input_size"] = (3, one.pixels, one.pixels)
    transform = create_transform(**settings, is_training=False)
    with torch.inference_mode():
        rows = [network(transform(Image.open(path).convert("RGB"))[None]) for path in images]
    return torch.cat(rows).double().numpy()


def compare(one: Recommended, images: list[Path]) -> dict[str, Any]:
    """Import one encoder, and compare."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        folder, zoo = Path(scratch) / "source", Path(scratch) / "zoo"
        network = random_network(one.architecture)
        write_folder(folder, network, one)
        size = one.pixels if one.pixels != one.native else None
        request = Request(name="random-encoder.noise", zoo=zoo, contract=Contract(image_size=size))
        done = import_timm(f"local-dir:{folder}", request)
        encoder = load_encoder(done.folder, device="cpu")
        found = encoder.encode(images, normalize=False, decode="exact").astype(np.float64)
        expected = timm_rows(network, one, images)
        config = json.loads((done.folder / "config.json").read_text())["embedkit"]
    assert found.shape == (len(images), one.dim) == expected.shape
    left, right = found - found.mean(0), expected - expected.mean(0)
    cosines = (left * right).sum(1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)
    return {
        "name": one.name,
        "license": one.license,
        "open": is_open(one.license),
        "pixels": one.pixels,
        "dim": one.dim,
        "parity": config["provenance"]["parity"]["max_difference"],
        "min_cosine": round(float(cosines.min()), 7),
        "stored": config["provenance"]["stored"]["dtype"],
        "seconds": round(time.perf_counter() - began, 1),
        "notes": list(done.notes),
        "ok": bool(cosines.min() >= LEAST_COSINE),
    }


def report(rows: list[dict[str, Any]], day: str) -> str:
    """The result as Markdown."""
    lines = [
        f"# Import of the recommended encoders, {day}",
        "",
        "Random weights; `benchmarks/import_encoders.py`. Parity: the greatest difference of ONNX Runtime and torch on "
        f"L2-normalized rows (limit 1e-4). Cosine: the entry against timm's own pipeline, around the mean row, lowest "
        f"of the samples (limit {LEAST_COSINE}).",
        "",
        f"timm {timm.__version__}, torch {torch.__version__}, {platform.machine()}.",
        "",
        "| encoder | pixels | dim | parity | cosine | stored | seconds | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        facts = [row.get(key, "") for key in ("pixels", "dim", "parity", "min_cosine", "stored", "seconds")]
        lines.append(
            f"| {' | '.join(map(str, [row['name'], *facts, 'ok' if row['ok'] else row.get('error', 'FAILED')]))} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="timm's names without tags; all when left out")
    parser.add_argument("--out", type=Path, help="folder of the dated result")
    arguments = parser.parse_args()
    images = sorted(SAMPLES.glob("*.jpg"))
    rows = []
    for one in RECOMMENDED:
        if arguments.names and one.architecture not in arguments.names:
            continue
        try:
            rows.append(compare(one, images))
        except EmbedkitError as error:
            rows.append({"name": one.name, "ok": False, "error": str(error)})
        print(json.dumps(rows[-1]), flush=True)
    if arguments.out:
        day = datetime.date.today().isoformat()
        (arguments.out / f"import-{day}.md").write_text(report(rows, day))
    raise SystemExit(0 if rows and all(row["ok"] for row in rows) else 1)


if __name__ == "__main__":
    main()
