"""An entry is one encoder, whoever loads it: timm from the folder, with its own transform, and our runtime."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

timm = pytest.importorskip("timm")
torch = pytest.importorskip("torch")

import embedkit.training.models.backbones  # noqa: F401  (registers the small networks)
from embedkit import load_encoder
from embedkit.model.config import EntryConfig
from embedkit.model.layout import ENTRY_NAME

ZOO = Path(__file__).parents[2] / "zoo"
ENTRIES = sorted(path for path in ZOO.iterdir() if ENTRY_NAME.fullmatch(path.name))


@pytest.mark.parametrize("folder", ENTRIES, ids=[path.name for path in ENTRIES])
def test_timm_and_the_runtime_agree_on_16_photographs(folder, jpeg_maker):
    config = EntryConfig.from_json((folder / "config.json").read_bytes())
    if not config.timm:
        pytest.skip("timm cannot build this network; its card says so")
    files = [jpeg_maker(seed, width=300 + 20 * seed, height=420 - 10 * seed) for seed in range(16)]
    rows = load_encoder(folder, device="cpu").encode(files, decode="exact")

    network = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network), is_training=False)
    mode = {"rgb": "RGB", "gray": "L"}[config.preprocess.color]
    images = [transform(Image.open(io.BytesIO(file)).convert(mode)) for file in files]
    with torch.inference_mode():
        features = network(torch.stack(images)).numpy()
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    assert (rows * features).sum(axis=1).min() >= 0.99999
