"""The loop of a run: Lightning's Trainer with what the house adds between batches, and what is written at the end."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from embedkit._io.atomic import write_file
from embedkit.errors import ConfigError, OutputError
from embedkit.model.layout import PRETEXT_IMAGE
from embedkit.training.best import Best
from embedkit.training.build import (
    build_method,
    check_method,
    most_steps_of,
)
from embedkit.training.callbacks import Budget, Checkpoint, Metrics, ProgressLine, Waiting
from embedkit.training.config import Facts, RunConfig
from embedkit.training.cost import Cost
from embedkit.training.data import ImageSet, Loader
from embedkit.training.evaluation.online import held_out
from embedkit.training.hardware import describe, keep_freed_memory
from embedkit.training.init import ENCODER
from embedkit.training.models.backbones import Backbone
from embedkit.training.pretext import pretext_on
from embedkit.training.pretext_image import pretext_png
from embedkit.training.run_folder import (
    BEST,
    CHECKPOINT,
    COST,
    ENVIRONMENT,
    METRICS,
    load_weights,
    read_checkpoint,
    save_encoder,
    write_config,
    write_json,
)
from embedkit.training.transfer import Parent

__all__ = ["RunResult", "rank", "run_loop"]


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """The result of a run.

    Attributes:
        run: The run folder.
        finished: Whether all planned steps were made; if not, `resume` goes on.
        steps: Steps made in all.
        metrics: The values that the method logged last, and `validation_*`: its pretext metric on held-out images, and
            the metric that chose the best weights.
        cost: As in `cost.json`.
        best_step: Steps after which the weights of `encoder.safetensors` were the best evaluated; None without
            evaluation while training, where they are the last.
    """

    run: Path
    finished: bool
    steps: int
    metrics: dict[str, float]
    cost: dict[str, Any]
    best_step: int | None = None


def rank() -> int:
    """This process's number, also before Lightning has joined the processes."""
    return rank_zero_only.rank  # type: ignore[attr-defined]


def run_loop(
    config: RunConfig,
    facts: Facts,
    images: ImageSet,
    validation: ImageSet,
    run: Path,
    deadline: float | None,
    *,
    checkpoint: Path | None = None,
    longer: bool = False,
    progress: bool,
    callbacks: Sequence[lightning.Callback],
    loggers: Sequence[Logger],
    parent: Parent | None = None,
) -> RunResult:
    """Train to the end of the plan, or to the deadline.

    Args:
        config: Resolved.
        facts: Of the data.
        images: Training images.
        validation: Held-out ones.
        run: The run folder.
        deadline: On `time.monotonic`; None without one.
        checkpoint: Where a resumed run goes on.
        longer: Whether it goes on although it had stopped improving.
        progress: Whether stderr shows it.
        callbacks: The caller's, after those of the run.
        loggers: The caller's, beside TensorBoard's.
        parent: Whose weights the backbone starts from.

    Raises:
        ConfigError: Settings that do not fit together or do not fit the machine, or a training that diverged.
        OutputError: A folder that cannot be written.
    """
    torch.set_num_threads(config.threads)
    keep_freed_memory()
    method = build_method(config, facts, parent)
    if (said := check_method(config, method)) and rank() == 0:
        _say(said)
    if config.compile:
        for backbone in (module for module in method.modules() if isinstance(module, Backbone)):
            backbone.compile()
    metrics, cost = Metrics(run / METRICS, config.log_every), Cost()
    saver = Checkpoint(run / CHECKPOINT, config.checkpoint_seconds, every=config.optimizer.accumulate)
    best = None
    if config.evaluation.every:
        best = Best(
            config.evaluation,
            held_out(config.evaluation, images, validation),
            run / BEST,
            metrics,
            saver,
            say=_say if progress and rank() == 0 else lambda sentence: None,
            reopened=longer,
        )
    budget = Budget(
        deadline,
        lambda planned: write_config(run, config, planned),
        flops=config.max_flops,
        cost=cost,
        most_steps=most_steps_of(config, facts),
        every=config.optimizer.accumulate,
        pauses=best,
    )
    own: list[lightning.Callback] = [saver, cost, budget, Waiting(), metrics]
    if best is not None:
        own.insert(0, best)  # what is saved holds its choices, and its operations are not the steps'
    if progress:
        own.append(ProgressLine())
    if rank() == 0:
        try:
            (run / CHECKPOINT).parent.mkdir(parents=True, exist_ok=True)
            write_config(run, config, facts)
        except OSError as error:
            raise OutputError(
                f"{run} cannot be written ({error.strerror}); choose another --output"
            ) from None
    with _quiet():
        trainer = _trainer(
            accelerator=config.accelerator,
            devices=config.devices,
            num_nodes=config.num_nodes,
            precision={"bf16": "bf16-mixed", "fp16": "16-mixed", "fp32": "32-true"}[config.precision],
            max_epochs=1,  # to Lightning the run is one endless epoch, which `Budget` ends
            callbacks=[*own, *callbacks],
            logger=[TensorBoardLogger(run, name="", version="tensorboard"), *loggers],
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
        if rank() == 0:
            write_json(run / ENVIRONMENT, describe(config.threads, str(trainer.strategy.root_device)))
        try:
            trainer.fit(method, train_dataloaders=loader, ckpt_path=checkpoint, weights_only=True)
        except SystemExit:
            if trainer.interrupted:  # Lightning's answer to an interrupt
                raise KeyboardInterrupt from None
            raise
        if progress and rank() == 0:
            loader.say()
        if method.total_steps is None:  # the budget ended before the pace was measured: the run ends here
            method.total_steps = method.batches_seen
            if trainer.is_global_zero:
                write_config(run, config, dataclasses.replace(facts, total_steps=method.batches_seen))
        saver.save(trainer)
        steps = method.batches_seen
        if best is not None and best.best is not None and trainer.is_global_zero:
            load_weights(method, read_checkpoint(run, BEST))
        with trainer.precision_plugin.forward_context():
            pretext = pretext_on(method, validation)
        last = {**metrics.last, **{f"validation_{name}": value for name, value in pretext.items()}}
        if best is not None and best.best is not None:
            last[f"validation_{best.images.metric}"] = best.best
    if trainer.is_global_zero:
        save_encoder(method, run / ENCODER)
        write_json(run / COST, cost.to_json())
    if not all(torch.isfinite(value).all() for value in method.encoder().state_dict().values()):
        raise ConfigError(
            f"{run}: the training diverged, its weights are not finite; lower optimizer.lr, and train again"
        )
    if trainer.is_global_zero and (png := pretext_png(method, validation)):
        write_file(run / PRETEXT_IMAGE, png)
    return RunResult(
        run=run,
        finished=steps >= method.total_steps or (best is not None and best.stopped),
        steps=steps,
        metrics=last,
        cost=cost.to_json(),
        best_step=best.best_step if best is not None and best.best is not None else None,
    )


def _say(sentence: str) -> None:
    print(f"embedkit: {sentence}", file=sys.stderr)


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
