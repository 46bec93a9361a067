"""Run by `test_devices.py`: a run of P x K batches on as many CPU devices as are asked for (gloo).

No augmentation and a backbone without BatchNorm: two devices then make the steps of one.
"""

import dataclasses
import sys

from embedkit.training import recipes, run
from embedkit.training.augment import Compose
from embedkit.training.config import with_overrides
from embedkit.training.optim import Optimizer

SETTINGS = [
    "backbone=vit_t4",
    "backbone_args.depth=1",
    "backbone_args.embed_dim=48",
    "batch_size=16",
    "steps=4",
    "precision=fp32",
    "threads=1",
    "accelerator=cpu",
    "data.image_size=16",
    "data.validation=0.25",
    "evaluation.every=2",
]


def train(folder, devices):
    config = with_overrides(recipes.recipe("sphereface"), [*SETTINGS, f"devices={devices}"])
    sgd = Optimizer(name="sgd", lr=0.05, schedule="constant", warmup_steps=0)
    method = dataclasses.replace(config.method, augment=Compose(steps=()))
    config = dataclasses.replace(config, method=method, optimizer=sgd)
    run.train(config, data="synthetic:80", out=folder, progress=False)


if __name__ == "__main__":
    train(sys.argv[1], 2)
