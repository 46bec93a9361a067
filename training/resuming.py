"""What a run that goes on may be told: to be longer, or that its data moved; nothing that changes its meaning."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from embedkit.errors import ConfigError
from embedkit.training.build import digest_of, planned_steps
from embedkit.training.config import Facts, RunConfig, with_overrides
from embedkit.training.data import ImageSet

__all__ = ["LENGTH", "check_data", "lengthened", "longer_by_minutes", "told"]

#: How long a run is.
LENGTH = ("epochs", "steps", "max_images")
#: What neither its weights nor its length depend on.
_ASIDE = ("checkpoint_seconds", "log_every", "evaluation.patience", "data.workers")
#: Share of a time budget that is planned for, the rest being margin.
_FILLED = 0.95


def told(config: RunConfig, assignments: Iterable[str]) -> tuple[RunConfig, set[str]]:
    """The configuration of a run with what a resume sets, and the fields that it changed.

    Example:
        config, changed = told(config, ["epochs=40", "log_every=50"])

    Raises:
        ConfigError: A field that would change the run's meaning, by name.
    """
    fields: set[str] = set()
    for assignment in assignments:
        field = assignment.partition("=")[0].strip()
        changed = with_overrides(config, [assignment])
        if field == "epochs":
            changed = dataclasses.replace(changed, steps=0)
        if changed == config:
            continue
        if field not in (*LENGTH, *_ASIDE):
            raise ConfigError(
                f"--set {field}: this would make it another run; --resume takes {', '.join((*LENGTH, *_ASIDE))}, and "
                "with a changed configuration a run starts over: --config RUN/config.json"
            )
        config, fields = changed, fields | {field}
    return config, fields


def lengthened(config: RunConfig, facts: Facts, seen: int) -> Facts:
    """The facts with the number of steps that the configuration now asks for.

    Example:
        facts = lengthened(with_overrides(config, ["steps=2000"]), facts, seen=1000)

    Raises:
        ConfigError: Fewer steps than were made.
    """
    total = planned_steps(config, facts.steps_per_epoch)
    if total < seen:
        raise ConfigError(f"steps: the run has made {seen} steps, and {total} are asked for")
    return dataclasses.replace(facts, total_steps=total)


def longer_by_minutes(facts: Facts, minutes: float, checkpoint: dict[str, Any], every: int) -> Facts:
    """The facts of a run that had made all its steps, with as many more as fit into a time at the pace it had.

    Example:
        facts = longer_by_minutes(facts, 20.0, read_checkpoint(run), config.optimizer.accumulate)

    Args:
        facts: Of the run.
        minutes: Of the resumed part.
        checkpoint: The last one, which knows the pace.
        every: Batches of one step; the total is a multiple of them.
    """
    cost = checkpoint["callbacks"]["Cost"]
    seen = int(cost["steps"])
    more = int(_FILLED * 60 * minutes * seen / max(cost["seconds"], 1e-9))
    return dataclasses.replace(facts, total_steps=seen + max(1, more // every) * every)


def check_data(config: RunConfig, facts: Facts, images: ImageSet) -> None:
    """Refuse other training images than those that the run began with.

    Example:
        check_data(config, facts, open_data(config)[0])

    Raises:
        ConfigError: Another number of images, or other labels or pixels; of a run of an older version the number alone
            is compared.
    """
    if len(images) != facts.num_images:
        raise ConfigError(
            f"data.path: {config.data.path} has {len(images)} training images and the run began with "
            f"{facts.num_images}; resume it with its own data"
        )
    if facts.data_sha256 and digest_of(images) != facts.data_sha256:
        raise ConfigError(
            f"data.path: {config.data.path} has other images or labels than those that the run began with; "
            "resume it with its own data"
        )
