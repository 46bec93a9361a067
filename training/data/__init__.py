"""Data sets, the order of their batches, and the labels and targets of each image."""

from embedkit.training.data.config import DataConfig, keep_labels, load_images, load_parts, split_validation
from embedkit.training.data.images import Batch, ImageSet
from embedkit.training.data.loader import Loader
from embedkit.training.data.samplers import IdentityBalanced, Labeled, LabeledAndUnlabeled, Sampler, Shuffled

__all__ = [
    "Batch",
    "DataConfig",
    "IdentityBalanced",
    "ImageSet",
    "Labeled",
    "LabeledAndUnlabeled",
    "Loader",
    "Sampler",
    "Shuffled",
    "keep_labels",
    "load_images",
    "load_parts",
    "split_validation",
]
