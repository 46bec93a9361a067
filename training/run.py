"""The run: a configuration and data in, a run folder with a usable encoder out.

`config.json` (resolved), `environment.json`, `metrics.csv`, `tensorboard/`, `checkpoints/last.ckpt`, and at the
end `encoder.safetensors` and `cost.json`. Lightning's Trainer runs the loop; what stands here is what a run
promises beyond it: a killed run goes on to the same weights, and a time budget is kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import sys
import time
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from safetensors.torch import save_file

from embedkit.errors import ConfigError, OutputError
from embedkit.training import config as configuration
from embedkit.training.callbacks import Budget, Checkpoint, Cost, Metrics, Progress
from embedkit.training.config import Facts, RunConfig, method_name
from embedkit.training.data import (
    ImageSet,
    Loader,
    keep_labels,
    load_images,
    split_validation,
)
from embedkit.training.data.datasets import absolute, open_source
from embedkit.training.hardware import describe, keep_freed_memory, multiplies_bf16
from embedkit.training.init import ENCODER, under_contract
from embedkit.training.method import Method
from embedkit.training.methods import method_class
from embedkit.training.models.backbones import Backbone, BackboneRequest

__all__ = ["RunResult", "build_method", "facts_of", "load_run", "open_data", "resume", "train"]

CONFIG = "config.json"
ENVIRONMENT = "environment.json"
METRICS = "metrics.csv"
COST = "cost.json"
CHECKPOINT = Path("checkpoints") / "last.ckpt"


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run came to.

    Attributes:
        run: The run folder.
        finished: Whether all planned steps were made; if not, `resume` goes on.
        steps: Steps made in all.
        metrics: What the method logged last, and `validation_*`: its pretext metric on held-out images.
        cost: As in `cost.json`.
    """

    run: Path
    finished: bool
    steps: int
    metrics: dict[str, float]
    cost: dict[str, Any]


def train(
    config: RunConfig,
    *,
    data: str | None = None,
    out: str | os.PathLike[str],
    max_minutes: float | None = None,
    progress: bool = True,
) -> RunResult:
    """Train from the beginning.

    Args:
        config: Complete, as a recipe returns it.
        data: Replaces `config.data.path`.
        out: The run folder; made here, and must hold no run.
        max_minutes: Plan the number of steps so that the run ends within so many minutes, instead of
            `config.epochs` and `config.steps`.
        progress: Show loss, images per second and time left on stderr.

    Returns:
        The result; the encoder and the checkpoint are on disk.

    Raises:
        ConfigError: Settings or data that do not fit together.
        OutputError: The run folder holds a run already.
    """
    started = time.monotonic()
    out = Path(out)
    # Lightning's other processes run this again, in the folder that the first one has made
    if _rank() == 0:
        _check_out(out)
    if max_minutes is not None and not 0 < max_minutes < 1e6:
        raise ConfigError(f"max_minutes: expected more than 0 and less than a million, found {max_minutes}")
    _check(config)
    contract = method_class(method_name(config)).contract(config.method)
    if contract is not None:
        config = dataclasses.replace(config, data=under_contract(config.data, contract))
    path = absolute(config.data.path if data is None else data)
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, path=path),
        precision=_resolve_precision(config),
        threads=config.threads or torch.get_num_threads(),
    )
    images, validation = open_data(config)
    _say_what_is_lost(config)
    steps_per_epoch = _steps_per_epoch(config, images)
    total: int | None = config.steps or round(config.epochs * steps_per_epoch)
    if not total or total < 1:
        raise ConfigError(f"epochs: {config.epochs:g} epochs of {steps_per_epoch} batches are no step at all")
    if config.max_images:
        total = min(total, config.max_images // config.batch_size)
        if not total:
            raise ConfigError(
                f"max_images: {config.max_images} are less than one batch of {config.batch_size}"
            )
    measured = max_minutes is not None or bool(config.max_flops)
    facts = facts_of(config, images, None if measured else total)
    deadline = None if max_minutes is None else started + 60 * max_minutes
    try:
        return _run(config, facts, images, validation, out, deadline, None, progress)
    except ConfigError:  # what is repaired may go into the same folder, unless something was trained there
        if _rank() == 0 and not (out / CHECKPOINT).exists():
            (out / CONFIG).unlink(missing_ok=True)
        raise


def resume(
    run: str | os.PathLike[str], *, max_minutes: float | None = None, progress: bool = True
) -> RunResult:
    """Go on from a run's last checkpoint, to the weights that an uninterrupted run would have.

    They are equal bit for bit on the same machine with the same versions; threads, precision and the planned
    number of steps are those that the run stored.

    Args:
        run: The run folder.
        max_minutes: Stop after so many minutes even if steps are left; the plan stays.
        progress: As for `train`.

    Raises:
        OutputError: No run there that can be continued.
    """
    started = time.monotonic()
    run = Path(run)
    config, facts = _read_config(run)
    checkpoint = run / CHECKPOINT
    if not checkpoint.is_file():
        raise OutputError(
            f"{run}: the run was stopped before its first checkpoint; train again into a new folder"
        )
    _read_checkpoint(run)  # a damaged one is said to be so before Lightning meets it
    images, validation = open_data(config)
    deadline = None if max_minutes is None else started + 60 * max_minutes
    return _run(config, facts, images, validation, run, deadline, checkpoint, progress)


def load_run(run: str | os.PathLike[str]) -> tuple[RunConfig, Method]:
    """A run's resolved configuration and its method, in eval mode, with the weights of the last checkpoint.

    Raises:
        OutputError: No run there, or none with a checkpoint.
    """
    run = Path(run)
    config, facts = _read_config(run)
    checkpoint = _read_checkpoint(run)
    method = build_method(config, facts)
    method.on_load_checkpoint(checkpoint)  # a method whose parameters change shape resizes them here
    method.load_state_dict(checkpoint["state_dict"])
    return config, method.eval()


def _check_out(out: Path) -> None:
    """Refuse a folder that holds a run, or a file that a run would overwrite."""
    if (out / CONFIG).exists():
        there = (
            f"go on with --resume {out}" if (out / CHECKPOINT).exists() else "it has no checkpoint: remove it"
        )
        raise OutputError(f"{out}: there is a run in this folder; {there} or choose another --out")
    for name in (CHECKPOINT, ENCODER, METRICS):
        if (out / name).exists():
            raise OutputError(f"{out / name} is there, and would be overwritten: choose another --out")


def _check(config: RunConfig) -> None:
    """Refuse numbers that would only fail in the middle of a run."""
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
        "optimizer.clip_norm": (0, config.optimizer.clip_norm, 1e30),
    }
    for name, (least, value, most) in numbers.items():
        if not least <= value <= most:
            raise ConfigError(f"{name}: expected {least} to {most:g}, found {value}")


def _read_checkpoint(run: Path) -> dict[str, Any]:
    path = run / CHECKPOINT
    try:
        with zipfile.ZipFile(path) as parts:
            if (part := parts.testzip()) is not None:  # torch does not look at the checksums
                raise ValueError(f"checksum of {part}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise OutputError(f"{path}: no checkpoint that can be read ({error})") from error
    except Exception as error:  # whatever the unpickler makes of other bytes
        raise OutputError(
            f"{path} is damaged ({type(error).__name__}); train again into a new folder"
        ) from error


def _read_config(run: Path) -> tuple[RunConfig, Facts]:
    try:
        stored = json.loads((run / CONFIG).read_text(encoding="utf-8"))
        return configuration.from_json(stored["config"]), configuration.from_json(stored["facts"], "facts")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{run}: expected a run folder with a readable {CONFIG} ({error})") from error


def _write_config(run: Path, config: RunConfig, facts: Facts) -> None:
    stored = {"config": configuration.to_json(config), "facts": configuration.to_json(facts)}
    _write(run / CONFIG, stored)


def _write(path: Path, value: Any) -> None:
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def open_data(config: RunConfig) -> tuple[ImageSet, ImageSet]:
    """Training and validation images; both come from the training part of the data."""
    images = load_images(config.data)
    train_part, validation = split_validation(images, config.data.validation, config.seed)
    if config.data.labels_per_class:
        train_part = keep_labels(train_part, config.data.labels_per_class, config.seed)
    return train_part, validation


def facts_of(config: RunConfig, images: ImageSet, total_steps: int | None) -> Facts:
    """What the method of a run over these images is told; `total_steps` is None while a budget is measured."""
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
        steps_per_epoch=_steps_per_epoch(config, images),
        total_steps=total_steps,
        optimizer=config.optimizer,
        optimizers=config.optimizers,
        seed=config.seed,
    )


def _steps_per_epoch(config: RunConfig, images: ImageSet) -> int:
    sampler = config.data.sampler
    return Loader(images, sampler, batch_size=config.batch_size, seed=config.seed).steps_per_epoch


def build_method(config: RunConfig, facts: Facts) -> Method:
    """The method at its random initialization, a function of the seed; torch's own generator stays as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        channels, height, width = facts.image_shape
        request = BackboneRequest(
            name=config.backbone, in_chans=channels, image_size=(height, width), args=config.backbone_args
        )
        kind = method_class(method_name(config))
        backbone = kind.build_backbone(request, config.method, facts)
        return kind(backbone, config.method, facts)


def _say_what_is_lost(config: RunConfig) -> None:
    """Say on stderr that color images are trained without their color."""
    if config.data.color != "gray" or config.data.path.startswith("synthetic:") or _rank():
        return
    source = open_source(config.data.path, "train", label=config.data.label)
    rows = np.linspace(0, len(source) - 1, min(16, len(source))).astype(np.int64)
    colored = dataclasses.replace(config.data, color="rgb").preprocess((0.0,) * 3, (1.0,) * 3)
    pixels = source.decode(rows, colored, {}).short()
    if int((pixels.amax(1) - pixels.amin(1)).max()) > 32:
        side = config.data.image_size
        print(
            f"embedkit: the images have color, and are trained gray at {side}x{side} pixels; "
            "--set data.color=rgb and data.image_size=PIXELS keep it",
            file=sys.stderr,
        )


def _most_steps(config: RunConfig, facts: Facts) -> int | None:
    """The steps that other limits leave to a budget that is measured; None where none is set."""
    given = config.steps or (round(config.epochs * facts.steps_per_epoch) if config.max_flops else 0)
    limits = [given, config.max_images // config.batch_size]
    return min((limit for limit in limits if limit), default=None)


def _rank() -> int:
    """This process's number, also before Lightning has joined the processes."""
    return rank_zero_only.rank  # type: ignore[attr-defined]


def _resolve_precision(config: RunConfig) -> Any:
    if config.precision != "auto":
        return config.precision
    return "bf16" if multiplies_bf16(config.accelerator) else "fp32"


def _run(
    config: RunConfig,
    facts: Facts,
    images: ImageSet,
    validation: ImageSet,
    run: Path,
    deadline: float | None,
    checkpoint: Path | None,
    progress: bool,
) -> RunResult:
    torch.set_num_threads(config.threads)
    keep_freed_memory()
    method = build_method(config, facts)
    metrics, cost = Metrics(run / METRICS, config.log_every), Cost()
    if config.optimizer.accumulate > 1 and not method.automatic_optimization:
        raise ConfigError(f"optimizer.accumulate: {method_name(config)} moves several networks; expected 1")
    budget = Budget(
        deadline,
        lambda planned: _write_config(run, config, planned),
        flops=config.max_flops,
        cost=cost,
        most_steps=_most_steps(config, facts),
    )
    saver = Checkpoint(run / CHECKPOINT, config.checkpoint_seconds, every=config.optimizer.accumulate)
    callbacks: list[lightning.Callback] = [saver, cost, budget, metrics]
    if progress:
        callbacks.append(Progress())
    if _rank() == 0 and checkpoint is None:
        try:
            (run / CHECKPOINT).parent.mkdir(parents=True, exist_ok=True)
            _write_config(run, config, facts)
        except OSError as error:
            raise OutputError(f"{run} cannot be written ({error.strerror}); choose another --out") from None
    with _quiet():
        trainer = _trainer(
            accelerator=config.accelerator,
            devices=config.devices,
            num_nodes=config.num_nodes,
            precision="bf16-mixed" if config.precision == "bf16" else "32-true",
            max_epochs=1,  # to Lightning the run is one endless epoch, which `Budget` ends
            callbacks=callbacks,
            logger=TensorBoardLogger(run, name="", version="tensorboard"),
            log_every_n_steps=config.log_every,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            accumulate_grad_batches=config.optimizer.accumulate,
            sync_batchnorm=config.sync_batch_norm,
        )
        loader = Loader(
            images,
            config.data.sampler,
            batch_size=config.batch_size,
            seed=config.seed,
            position=lambda: method.batches_seen,
            rank=trainer.global_rank,
            world=trainer.world_size,
            workers=config.data.workers,
        )
        if _rank() == 0:
            _write(run / ENVIRONMENT, describe(config.threads, str(trainer.strategy.root_device)))
        try:
            trainer.fit(method, train_dataloaders=loader, ckpt_path=checkpoint, weights_only=True)
        except SystemExit:
            if trainer.interrupted:  # Lightning's answer to an interrupt
                raise KeyboardInterrupt from None
            raise
        if method.total_steps is None:  # the budget ended before the pace was known: what was done is the run
            method.total_steps = method.batches_seen
            if trainer.is_global_zero:
                _write_config(run, config, dataclasses.replace(facts, total_steps=method.batches_seen))
        saver.save(trainer)
        with trainer.precision_plugin.forward_context():
            pretext = pretext_on(method, validation)
        last = {**metrics.last, **{f"validation_{name}": value for name, value in pretext.items()}}
    if trainer.is_global_zero:
        save_encoder(method, run / ENCODER)
        _write(run / COST, cost.to_json())
    if not all(torch.isfinite(value).all() for value in method.encoder().state_dict().values()):
        raise ConfigError(
            f"{run}: the training diverged, its weights are no numbers; lower optimizer.lr, and train again"
        )
    return RunResult(
        run=run,
        finished=method.batches_seen >= method.total_steps,
        steps=method.batches_seen,
        metrics=last,
        cost=cost.to_json(),
    )


def _trainer(**settings: Any) -> lightning.Trainer:
    """Lightning's trainer.

    Raises:
        ConfigError: Devices that this machine does not have.
    """
    try:
        return lightning.Trainer(**settings)
    except (MisconfigurationException, ImportError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"accelerator, devices and num_nodes do not fit this machine ({reason})") from None


def pretext_on(
    method: Method, images: ImageSet, generator: torch.Generator | None = None
) -> dict[str, float]:
    """The pretext metrics on up to 2,048 images, means over batches of up to 256; {} where there are none.

    Args:
        method: Left in eval mode.
        images: Held-out ones.
        generator: One for all batches; when None every batch begins with the same one.
    """
    if not len(images):
        return {}
    size = min(256, len(images))
    sums: dict[str, list[float]] = {}
    method.eval()
    with torch.no_grad():
        for rows in torch.arange(min(2048, len(images)) // size * size).split(size):
            batch = images.batch(rows).to(method.device)
            draws = generator or method.generator("validation")
            for name, value in method.pretext_metric(batch, draws).items():
                if not math.isnan(float(value)):  # of a batch without any label
                    sums.setdefault(name, []).append(float(value))
    return {name: sum(values) / len(values) for name, values in sums.items()}


def save_encoder(method: Method, path: Path) -> None:
    """The encoder's weights as safetensors, under timm's names where it is a backbone."""
    encoder = method.encoder()
    if isinstance(encoder, Backbone):
        encoder = encoder.net
    weights = {name: value.detach().cpu().contiguous() for name, value in encoder.state_dict().items()}
    save_file(weights, path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Lightning without its advice: what a run does is ours to say."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning.*")
            yield
    finally:
        logger.setLevel(level)
