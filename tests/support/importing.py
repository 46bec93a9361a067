"""Random networks, their rows by torch, and what else the importers' tests compare with."""

import hashlib
import os
from pathlib import Path

import numpy as np
import timm
import torch

from embedkit.authoring.golden import synthetic_images
from embedkit.images.transform import read_pixels
from embedkit.model.config import EntryConfig
from embedkit.training.export.torch_to_onnx import PixelEncoder

NON_COMMERCIAL = "CC-BY-NC-4.0"
IMAGES = list(synthetic_images(8, seed=5, height=40, width=52))


def random_network(architecture, seed=0, **arguments):
    """A timm network whose norms differ from the identity, so that every tensor matters."""
    torch.manual_seed(seed)
    network = timm.create_model(architecture, num_classes=0, **arguments).eval()
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if "running_var" in name or (tensor.ndim == 1 and name.endswith("weight")):
                tensor.uniform_(0.5, 1.5)
            elif tensor.ndim == 1 and tensor.is_floating_point():
                tensor.normal_(0, 0.1)
            elif "num_batches" in name:
                tensor.fill_(7)
    return network


def embed(network, preprocess):
    """Rows (8, D) by torch, not normalized."""
    pixels = np.stack([read_pixels(image, preprocess, decode="exact") for image in IMAGES])
    with torch.inference_mode():
        return PixelEncoder(network, preprocess)(torch.from_numpy(pixels)).numpy()


def cosines(left, right):
    """Per row, around the mean row: untrained networks give nearly the same row for every image."""
    left, right = (rows - rows.mean(axis=0) for rows in (np.float64(left), np.float64(right)))
    return (left * right).sum(axis=1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)


def under(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def read_config(folder):
    return EntryConfig.from_json((folder / "config.json").read_bytes())


def sha256_of(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


class Dangerous:
    """A pickle of it would run a command that touches `target`."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)
