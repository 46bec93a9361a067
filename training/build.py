"""Makes the data, the facts and the method of a run from its configuration."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from embedkit.errors import ConfigError
from embedkit.training.config import Facts, RunConfig, method_name
from embedkit.training.data import ImageSet, Loader, load_parts
from embedkit.training.hardware import multiplies_bf16
from embedkit.training.method import Method
from embedkit.training.methods import method_class
from embedkit.training.models.backbones import Backbone, BackboneRequest
from embedkit.training.optim import Optimizer
from embedkit.training.transfer import Parent, load_weights, say_loaded

__all__ = [
    "build_method",
    "check_method",
    "check_numbers",
    "digest_of",
    "facts_of",
    "most_steps_of",
    "open_data",
    "planned_steps",
    "resolve_precision",
    "steps_per_epoch_of",
]


def check_numbers(config: RunConfig) -> None:
    """Refuse numbers that would fail only in the middle of a run."""
    numbers = {
        "seed": (0, config.seed, 2**63 - 1),
        "threads": (0, config.threads, 4096),
        "epochs": (0, config.epochs, 1e9),
        "steps": (0, config.steps, 2**63 - 1),
        "batch_size": (1, config.batch_size, 2**31),
        "freeze": (0, config.freeze, 2**31),
        "log_every": (1, config.log_every, 2**63 - 1),
        "checkpoint_seconds": (0, config.checkpoint_seconds, 1e9),
        "data.workers": (0, config.data.workers, 4096),
        "max_images": (0, config.max_images, 2**63 - 1),
        "max_flops": (0, config.max_flops, 1e30),
        "evaluation.every": (0, config.evaluation.every, 2**63 - 1),
        "evaluation.patience": (0, config.evaluation.patience, 2**63 - 1),
        "evaluation.images": (2, config.evaluation.images, 2**31),
        **_numbers_of(config.optimizer, "optimizer"),
    }
    for name, optimizer in config.optimizers.items():
        numbers.update(_numbers_of(optimizer, f"optimizers.{name}"))
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


def _numbers_of(optimizer: Optimizer, where: str) -> dict[str, tuple[float, float, float]]:
    """The numbers of an optimizer, each between the least and the greatest that torch takes or makes sense."""
    below_one = 1 - 1e-12
    found = {
        "lr": (0, optimizer.lr, 1e6),
        "weight_decay": (0, optimizer.weight_decay, 1e6),
        "momentum": (0, optimizer.momentum, below_one),
        "warmup_steps": (0, optimizer.warmup_steps, 2**63 - 1),
        "gamma": (0, optimizer.gamma, 1e6),
        "end": (0, optimizer.end, 1e6),
        "clip_norm": (0, optimizer.clip_norm, 1e30),
        "layer_decay": (0, optimizer.layer_decay, 1),
        "accumulate": (1, optimizer.accumulate, 2**31),
        **{f"betas.{at}": (0, beta, below_one) for at, beta in enumerate(optimizer.betas)},
    }
    return {f"{where}.{name}": bounds for name, bounds in found.items()}


def check_method(config: RunConfig, method: Method) -> str:
    """Refuse what a method cannot do with accumulated gradients, fp16 or evaluation.

    Returns:
        A sentence on what accumulated gradients mean for a loss over the whole batch; empty otherwise.
    """
    name, each = method_name(config), config.optimizer.accumulate
    if each > 1 and not method.automatic_optimization:
        raise ConfigError(f"optimizer.accumulate: {name} moves several networks; expected 1")
    if config.precision == "fp16" and not method.automatic_optimization:
        raise ConfigError(f"precision: {name} moves several networks, which fp16 cannot; take fp32")
    if config.evaluation.every % each:
        raise ConfigError(
            f"evaluation.every: expected a multiple of optimizer.accumulate, {each}; found {config.evaluation.every}"
        )
    if each == 1 or not method.compares_images:
        return ""
    return (
        f"{name} compares the images of a batch: {each} batches of {config.batch_size} make one step, but their images "
        f"are not compared as those of one batch of {each * config.batch_size} would be"
    )


def open_data(config: RunConfig) -> tuple[ImageSet, ImageSet]:
    """Training and validation images; both come from the training part of the data."""
    return load_parts(config.data, config.seed)


def facts_of(config: RunConfig, images: ImageSet, total_steps: int | None) -> Facts:
    """The facts that a method gets for a run over these images; `total_steps` is None while a budget is measured."""
    mean, std = config.data.mean, config.data.std
    if not mean and not std:
        mean, std = images.statistics()
    config.data.preprocess(mean, std)  # refuses numbers that are not one a channel
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
        data_sha256=digest_of(images),
    )


def digest_of(images: ImageSet, sample: int = 32) -> str:
    """A digest that says whether two sets are the same: of all labels, and of `sample` evenly spread images.

    Example:
        digest_of(images) == facts.data_sha256
    """
    digest = hashlib.sha256(json.dumps([len(images), images.classes]).encode())
    digest.update(images.labels.numpy().tobytes())
    rows = torch.linspace(0, len(images) - 1, min(sample, len(images))).long()
    digest.update(images.batch(rows).images.numpy().tobytes())
    return digest.hexdigest()


def planned_steps(config: RunConfig, steps_per_epoch: int) -> int:
    """The steps that `steps` or `epochs`, `max_images` and `optimizer.accumulate` come to.

    Example:
        planned_steps(with_overrides(config, ["steps=11", "optimizer.accumulate=4"]), 50)  # 8

    Raises:
        ConfigError: Less than one.
    """
    total = config.steps or round(config.epochs * steps_per_epoch)
    if total < 1:
        raise ConfigError(
            f"epochs: {config.epochs:g} epochs of {steps_per_epoch} batches are less than one step"
        )
    if config.max_images:
        total = min(total, config.max_images // config.batch_size)
        if not total:
            raise ConfigError(
                f"max_images: {config.max_images} are less than one batch of {config.batch_size}"
            )
    each = config.optimizer.accumulate
    if total < each:
        raise ConfigError(f"optimizer.accumulate: {total} batches are less than one step of {each}")
    return total // each * each


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
    """The precision of the run: `auto` is bf16 where this machine multiplies it natively, else fp16 on a GPU.

    Raises:
        ConfigError: fp16 on a CPU.
    """
    on_gpu = config.accelerator != "cpu" and torch.cuda.is_available()
    if config.precision == "fp16" and not on_gpu:
        raise ConfigError("precision: fp16 is for GPUs; on a CPU take bf16 or fp32")
    if config.precision != "auto":
        return config.precision
    if multiplies_bf16(config.accelerator):
        return "bf16"
    return "fp16" if on_gpu else "fp32"
