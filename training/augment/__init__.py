"""Augmentations: random transforms of a whole batch, on its device, every image with its own parameters.

An augmentation is a pure function of a batch and a generator: floating-point images (N, C, H, W) in [0, 1] in, a
batch out. Parameters are drawn as batched tensors on the generator's device and moved to the batch's, so a
CPU generator gives the same outcome wherever the images are. Nothing loops over images; where images need
different operations (RandAugment), they are grouped by operation.

Definitions are torchvision's (`torchvision.transforms.v2`, floating-point images) unless a class says
otherwise, and the tests hold each to it; what they do to pixels stands in `operations`.
"""

from embedkit.training.augment.augmentation import Augmentation, Compose, Parameters
from embedkit.training.augment.color import (
    ColorJitter,
    GaussianBlur,
    GaussianNoise,
    RandomGrayscale,
    RandomInvert,
    RandomSolarize,
)
from embedkit.training.augment.geometry import (
    RandomAffine,
    RandomErasing,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RandomShift,
    RandomVerticalFlip,
    Rotate90,
)
from embedkit.training.augment.randaugment import RandAugment

__all__ = [
    "TWO_VIEWS",
    "ColorJitter",
    "Compose",
    "GaussianBlur",
    "GaussianNoise",
    "Parameters",
    "RandAugment",
    "RandomAffine",
    "RandomErasing",
    "RandomGrayscale",
    "RandomHorizontalFlip",
    "RandomInvert",
    "RandomResizedCrop",
    "RandomShift",
    "RandomSolarize",
    "RandomVerticalFlip",
    "Rotate90",
    "Augmentation",
]

#: What methods that compare two views of a small image draw twice: crops, flips and light. On Fashion-MNIST
#: milder ones leave SimCLR near a random network.
TWO_VIEWS = Compose(
    steps=(
        RandomResizedCrop(scale=(0.2, 1.0)),
        RandomHorizontalFlip(),
        ColorJitter(brightness=0.4, contrast=0.4, saturation=0.0, hue=0.0, p=0.8),
    )
)
