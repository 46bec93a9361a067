"""Makes the data, the facts and the method of a run from its configuration."""

from __future__ import annotations

from typing import Any

import torch

from embedkit.errors import ConfigError
from embedkit.training.config import Facts, RunConfig, method_name
from embedkit.training.data import ImageSet, Loader, load_parts
from embedkit.training.hardware import multiplies_bf16
from embedkit.training.method import Method
from embedkit.training.methods import method_class
from embedkit.training.models.backbones import Backbone, BackboneRequest
from embedkit.training.transfer import Parent, load_weights, say_loaded

__all__ = [
    "build_method",
    "check_numbers",
    "facts_of",
    "most_steps_of",
    "open_data",
    "resolve_precision",
    "steps_per_epoch_of",
]


def check_numbers(config: RunConfig) -> None:
    """Refuse numbers that would fail only in the middle of a run."""
    numbers = {
        "seed": (0, config.seed, 2**63 - 1),
        "threads": (0, config.threads, 4096),
        "log_every": (1, config.log_every, 2**63 - 1),
        "checkpoint_seconds": (0, config.checkpoint_seconds, 1e9),
        "optimizer.lr": (0, config.optimizer.lr, 1e6),
        "data.workers": (0, config.data.workers, 4096),
        "max_images": (0, config.max_images, 2**63 - 1),
        "max_flops": (0, config.max_flops, 1e30),
        "optimizer.accumulate": (1, config.optimizer.accumulate, 2**31),
        "optimizer.layer_decay": (0, config.optimizer.layer_decay, 1),
        "optimizer.clip_norm": (0, config.optimizer.clip_norm, 1e30),
    }
    for name, (least, value, most) in numbers.items():
        if not least <= value <= most:
            raise ConfigError(f"{name}: expected {least} to {most:g}, found {value}")
    if config.freeze and not config.init:
        raise ConfigError("freeze: it keeps the weights that init names, and none are named; set init too")
    if not config.init and (config.data.color == "auto" or not config.data.image_size):
        raise ConfigError(
            "data.color and data.image_size: auto and 0 stand for those of an encoder that init names; name one, or "
            "set both"
        )


def open_data(config: RunConfig) -> tuple[ImageSet, ImageSet]:
    """Training and validation images; both come from the training part of the data."""
    return load_parts(config.data, config.seed)


def facts_of(config: RunConfig, images: ImageSet, total_steps: int | None) -> Facts:
    """The facts that a method gets for a run over these images; `total_steps` is None while a budget is measured."""
    mean, std = (config.data.mean, config.data.std) if config.data.mean else images.statistics()
    size = config.data.image_size
    return Facts(
        image_shape=(len(mean), size, size),
        mean=mean,
        std=std,
        num_classes=len(images.classes),
        num_images=len(images),
        batch_size=config.batch_size,
        targets={name: len(classes) for name, classes in images.target_classes.items()},
        steps_per_epoch=steps_per_epoch_of(config, images),
        total_steps=total_steps,
        optimizer=config.optimizer,
        optimizers=config.optimizers,
        seed=config.seed,
    )


def steps_per_epoch_of(config: RunConfig, images: ImageSet) -> int:
    """Batches that the run's sampler makes of the images in one epoch."""
    sampler = config.data.sampler
    return Loader(images, sampler, batch_size=config.batch_size, seed=config.seed).steps_per_epoch


def build_method(config: RunConfig, facts: Facts, parent: Parent | None = None) -> Method:
    """The method at its random initialization, a function of the seed; torch's own generator stays as it was.

    Args:
        config: Of the run.
        facts: Of its data.
        parent: Fills the backbone before the method copies it: a teacher starts from the same weights.

    Raises:
        ConfigError: Settings that do not fit together, or a backbone that the parent cannot fill.
    """
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        channels, height, width = facts.image_shape
        request = BackboneRequest(
            name=config.backbone, in_chans=channels, image_size=(height, width), args=config.backbone_args
        )
        kind = method_class(method_name(config))
        backbone = kind.build_backbone(request, config.method, facts)
        if parent is not None and not kind.takes_weights:
            raise ConfigError(
                f"init: {method_name(config)} trains networks against each other, which start at random; leave init out"
            )
        if parent is not None:
            say_loaded(config, parent, load_weights(backbone, parent, method_name(config)))
        if config.freeze and isinstance(backbone, Backbone):
            backbone.freeze(config.freeze)
        return kind(backbone, config.method, facts)


def most_steps_of(config: RunConfig, facts: Facts) -> int | None:
    """The steps that other limits leave to a budget that is measured; None where none is set."""
    given = config.steps or (round(config.epochs * facts.steps_per_epoch) if config.max_flops else 0)
    limits = [given, config.max_images // config.batch_size]
    return min((limit for limit in limits if limit), default=None)


def resolve_precision(config: RunConfig) -> Any:
    """The precision of the run: `auto` is bf16 where this machine multiplies it natively, else fp32."""
    if config.precision != "auto":
        return config.precision
    return "bf16" if multiplies_bf16(config.accelerator) else "fp32"
