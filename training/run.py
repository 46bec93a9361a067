"""Training: a configuration and data in, a run folder with a usable encoder out.

Lightning's Trainer runs the loop. This module adds that a killed run goes on to the same weights, and that a run
ends within its time budget. `run_folder` has the files of a run, `build` what is made from its configuration.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import lightning
import torch
from lightning.pytorch.loggers import Logger

from embedkit.errors import ConfigError, OutputError
from embedkit.training.build import (
    build_method,
    check_numbers,
    facts_of,
    open_data,
    planned_steps,
    resolve_precision,
    steps_per_epoch_of,
)
from embedkit.training.config import Facts, RunConfig, method_name
from embedkit.training.data.datasets import absolute
from embedkit.training.init import under_contract
from embedkit.training.loop import RunResult, rank, run_loop
from embedkit.training.lost_color import check_color
from embedkit.training.methods import method_class
from embedkit.training.parents import find_parent
from embedkit.training.resuming import LENGTH, check_data, lengthened, longer_by_minutes, told
from embedkit.training.run_folder import (
    CHECKPOINT,
    CONFIG,
    COST,
    METRICS,
    check_out,
    load_run,
    read_checkpoint,
    read_config,
)
from embedkit.training.transfer import starting_from

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


def train(
    config: RunConfig,
    *,
    data: str | None = None,
    out: str | os.PathLike[str],
    max_minutes: float | None = None,
    progress: bool = True,
    color_given: bool = True,
    callbacks: Sequence[lightning.Callback] = (),
    logger: Logger | Sequence[Logger] = (),
) -> RunResult:
    """Train from the beginning.

    Example:
        config = with_overrides(recipe("simclr:color"), ["evaluation.every=100"])
        train(config, data="images/", out="runs/first", logger=CSVLogger("logs"))

    Args:
        config: Complete, as a recipe returns it.
        data: Replaces `config.data.path`.
        out: The run folder; made here, and must hold no run.
        max_minutes: Plan the number of steps so that the run ends within so many minutes, instead of
            `config.epochs` and `config.steps`.
        progress: Show loss, images per second and time left on stderr.
        color_given: Whether `config.data.color` was chosen for these images. If it is only what the recipe has, color
            images are not trained gray: they are refused, with the name of a recipe for color.
        callbacks: Of Lightning, called after those of the run; their state stands in the checkpoint.
        logger: Of Lightning, one or more, beside TensorBoard's in the run folder.

    Returns:
        The result; the encoder and the checkpoint are on disk.

    Raises:
        ConfigError: Settings or data that do not fit together.
        OutputError: The run folder holds a run already.
    """
    started = time.monotonic()
    out = Path(out)
    # Lightning's other processes run this again, in the folder that the first one has made
    if rank() == 0:
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
    if rank() == 0:  # before all images are decoded
        check_color(config, given=color_given or contract is not None or parent is not None)
    images, validation = open_data(config)
    steps_per_epoch = steps_per_epoch_of(config, images)
    total = planned_steps(config, steps_per_epoch)
    measured = max_minutes is not None or bool(config.max_flops)
    facts = facts_of(config, images, None if measured else total)
    deadline = None if max_minutes is None else started + 60 * max_minutes
    try:
        return run_loop(
            config,
            facts,
            images,
            validation,
            out,
            deadline,
            progress=progress,
            callbacks=callbacks,
            loggers=[logger] if isinstance(logger, Logger) else logger,
            parent=parent,
        )
    except ConfigError:  # the next try may use the same folder, unless something was trained there
        if rank() == 0 and not os.path.exists(out / CHECKPOINT):
            (out / CONFIG).unlink(missing_ok=True)
        raise


def resume(
    run: str | os.PathLike[str],
    *,
    overrides: Iterable[str] = (),
    data: str | None = None,
    max_minutes: float | None = None,
    progress: bool = True,
    callbacks: Sequence[lightning.Callback] = (),
    logger: Logger | Sequence[Logger] = (),
) -> RunResult:
    """Go on from a run's last checkpoint, to the weights that an uninterrupted run would have.

    They are equal bit for bit on the same machine with the same versions; threads, precision and the planned
    number of steps are those that the run stored. A run that is made longer goes on with the learning rate that its
    schedule has at this step of the new length.

    Example:
        resume("runs/first", overrides=["epochs=40"])

    Args:
        run: The run folder.
        overrides: `field=value` of what may change: the run's length, its patience and how often it writes.
        data: Where the data are now; they must be those that the run began with.
        max_minutes: Stop after so many minutes even if steps are left; the plan stays. A run that has made all its
            steps is made longer by what fits into that time.
        progress: As for `train`.
        callbacks: As for `train`.
        logger: As for `train`.

    Raises:
        ConfigError: A field that would change the meaning of the run, or other data.
        OutputError: No run there that can be continued.
    """
    started = time.monotonic()
    run = Path(run)
    config, facts = read_config(run)
    config, changed = told(config, overrides)
    if data is not None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=absolute(data)))
    check_numbers(config)
    checkpoint = run / CHECKPOINT
    if not os.path.isfile(checkpoint):
        raise OutputError(
            f"{run}: the run was stopped before its first checkpoint; train again into a new folder"
        )
    state = read_checkpoint(run)  # a damaged one must fail here, before Lightning loads it
    seen = int(state["state_dict"]["_extra_state"]["batches_seen"])
    longer = bool(changed & {*LENGTH, "evaluation.patience"})
    if changed & {*LENGTH}:
        facts = lengthened(config, facts, seen)
    elif max_minutes is not None and facts.total_steps is not None and seen >= facts.total_steps:
        facts, longer = longer_by_minutes(facts, max_minutes, state, config.optimizer.accumulate), True
    images, validation = open_data(config)
    check_data(config, facts, images)
    return run_loop(
        config,
        facts,
        images,
        validation,
        run,
        None if max_minutes is None else started + 60 * max_minutes,
        checkpoint=checkpoint,
        longer=longer,
        progress=progress,
        callbacks=callbacks,
        loggers=[logger] if isinstance(logger, Logger) else logger,
    )
