"""Training: a configuration and data in, a run folder with a usable encoder out.

Lightning's Trainer runs the loop. This module adds that a killed run goes on to the same weights, and that a run
ends within its time budget. `run_folder` has the files of a run, `build` what is made from its configuration.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from embedkit.errors import ConfigError, OutputError
from embedkit.training.build import (
    build_method,
    check_numbers,
    facts_of,
    most_steps_of,
    open_data,
    resolve_precision,
    steps_per_epoch_of,
)
from embedkit.training.callbacks import Budget, Checkpoint, Metrics, ProgressLine, Waiting
from embedkit.training.config import Facts, RunConfig, method_name
from embedkit.training.cost import Cost
from embedkit.training.data import ImageSet, Loader
from embedkit.training.data.datasets import absolute
from embedkit.training.hardware import describe, keep_freed_memory
from embedkit.training.init import ENCODER, under_contract
from embedkit.training.lost_color import check_color
from embedkit.training.methods import method_class
from embedkit.training.parents import find_parent
from embedkit.training.pretext import pretext_on
from embedkit.training.run_folder import (
    CHECKPOINT,
    CONFIG,
    COST,
    ENVIRONMENT,
    METRICS,
    check_out,
    load_run,
    read_checkpoint,
    read_config,
    save_encoder,
    write_config,
    write_json,
)
from embedkit.training.transfer import Parent, starting_from

__all__ = [
    "CHECKPOINT",
    "CONFIG",
    "COST",
    "METRICS",
    "Facts",
    "RunResult",
    "build_method",
    "facts_of",
    "load_run",
    "open_data",
    "resume",
    "train",
]


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """The result of a run.

    Attributes:
        run: The run folder.
        finished: Whether all planned steps were made; if not, `resume` goes on.
        steps: Steps made in all.
        metrics: The values that the method logged last, and `validation_*`: its pretext metric on held-out images.
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
    color_given: bool = True,
) -> RunResult:
    """Train from the beginning.

    Args:
        config: Complete, as a recipe returns it.
        data: Replaces `config.data.path`.
        out: The run folder; made here, and must hold no run.
        max_minutes: Plan the number of steps so that the run ends within so many minutes, instead of
            `config.epochs` and `config.steps`.
        progress: Show loss, images per second and time left on stderr.
        color_given: Whether `config.data.color` was chosen for these images. If it is only what the recipe has, color
            images are not trained gray: they are refused, with the name of a recipe for color.

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
        check_out(out)
    if max_minutes is not None and not 0 < max_minutes < 1e6:
        raise ConfigError(f"max_minutes: expected more than 0 and less than a million, found {max_minutes}")
    check_numbers(config)
    parent = find_parent(config.init) if config.init else None
    config = dataclasses.replace(config, parents=()) if parent is None else starting_from(config, parent)
    contract = method_class(method_name(config)).contract(config.method)
    if contract is not None:
        if parent is not None:
            raise ConfigError(f"init: method.weights gives {method_name(config)} its encoder; leave init out")
        config = dataclasses.replace(config, data=under_contract(config.data, contract))
    path = absolute(config.data.path if data is None else data)
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, path=path),
        precision=resolve_precision(config),
        threads=config.threads or torch.get_num_threads(),
    )
    if _rank() == 0:  # before all images are decoded
        check_color(config, given=color_given or contract is not None or parent is not None)
    images, validation = open_data(config)
    steps_per_epoch = steps_per_epoch_of(config, images)
    total: int | None = config.steps or round(config.epochs * steps_per_epoch)
    if not total or total < 1:
        raise ConfigError(
            f"epochs: {config.epochs:g} epochs of {steps_per_epoch} batches are less than one step"
        )
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
        return _run(config, facts, images, validation, out, deadline, None, progress, parent)
    except ConfigError:  # the next try may use the same folder, unless something was trained there
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
    config, facts = read_config(run)
    checkpoint = run / CHECKPOINT
    if not checkpoint.is_file():
        raise OutputError(
            f"{run}: the run was stopped before its first checkpoint; train again into a new folder"
        )
    read_checkpoint(run)  # a damaged one must fail here, before Lightning loads it
    images, validation = open_data(config)
    deadline = None if max_minutes is None else started + 60 * max_minutes
    return _run(config, facts, images, validation, run, deadline, checkpoint, progress)


def _rank() -> int:
    """This process's number, also before Lightning has joined the processes."""
    return rank_zero_only.rank  # type: ignore[attr-defined]


def _run(
    config: RunConfig,
    facts: Facts,
    images: ImageSet,
    validation: ImageSet,
    run: Path,
    deadline: float | None,
    checkpoint: Path | None,
    progress: bool,
    parent: Parent | None = None,
) -> RunResult:
    torch.set_num_threads(config.threads)
    keep_freed_memory()
    method = build_method(config, facts, parent)
    metrics, cost = Metrics(run / METRICS, config.log_every), Cost()
    if config.optimizer.accumulate > 1 and not method.automatic_optimization:
        raise ConfigError(f"optimizer.accumulate: {method_name(config)} moves several networks; expected 1")
    budget = Budget(
        deadline,
        lambda planned: write_config(run, config, planned),
        flops=config.max_flops,
        cost=cost,
        most_steps=most_steps_of(config, facts),
    )
    saver = Checkpoint(run / CHECKPOINT, config.checkpoint_seconds, every=config.optimizer.accumulate)
    callbacks: list[lightning.Callback] = [saver, cost, budget, Waiting(), metrics]
    if progress:
        callbacks.append(ProgressLine())
    if _rank() == 0 and checkpoint is None:
        try:
            (run / CHECKPOINT).parent.mkdir(parents=True, exist_ok=True)
            write_config(run, config, facts)
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
            write_json(run / ENVIRONMENT, describe(config.threads, str(trainer.strategy.root_device)))
        try:
            trainer.fit(method, train_dataloaders=loader, ckpt_path=checkpoint, weights_only=True)
        except SystemExit:
            if trainer.interrupted:  # Lightning's answer to an interrupt
                raise KeyboardInterrupt from None
            raise
        if progress and _rank() == 0:
            loader.say()
        if method.total_steps is None:  # the budget ended before the pace was measured: the run ends here
            method.total_steps = method.batches_seen
            if trainer.is_global_zero:
                write_config(run, config, dataclasses.replace(facts, total_steps=method.batches_seen))
        saver.save(trainer)
        with trainer.precision_plugin.forward_context():
            pretext = pretext_on(method, validation)
        last = {**metrics.last, **{f"validation_{name}": value for name, value in pretext.items()}}
    if trainer.is_global_zero:
        save_encoder(method, run / ENCODER)
        write_json(run / COST, cost.to_json())
    if not all(torch.isfinite(value).all() for value in method.encoder().state_dict().values()):
        raise ConfigError(
            f"{run}: the training diverged, its weights are not finite; lower optimizer.lr, and train again"
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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence Lightning's advice: this module reports what a run does."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning.*")
            yield
    finally:
        logger.setLevel(level)
