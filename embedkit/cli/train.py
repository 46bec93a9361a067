"""`embedkit train`: a recipe and images to a run folder."""

from __future__ import annotations

import dataclasses
import os
import re
import time
from typing import Annotated

import typer

from embedkit._io.optional import requires
from embedkit._io.outputs import check_outputs
from embedkit.cli.options import AsJson, OptionalData, Quiet, ShowList, output
from embedkit.cli.output import print_json, print_line, print_table, tell
from embedkit.errors import ConfigError


def train(
    recipe: Annotated[
        str | None, typer.Argument(help="A recipe's name, such as simclr; none with --config or --resume.")
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(metavar="FILE.json", help="A configuration in place of a recipe: RUN/config.json."),
    ] = None,
    data: OptionalData = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="FIELD=VALUE",
            help="One field, such as optimizer.lr=0.001; with --resume epochs, steps and what else only makes the "
            "run longer. Repeatable.",
        ),
    ] = None,
    max_minutes: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Plan the steps so that the run ends within this time; with --resume the most that it goes on, and "
            "a finished run is made longer by it.",
        ),
    ] = None,
    output: Annotated[str | None, output("RUN", "The run folder. [default: runs/RECIPE-DATE]")] = None,
    resume: Annotated[
        str | None,
        typer.Option(metavar="RUN", help="Go on from this run's last checkpoint; --data if its data moved."),
    ] = None,
    list_: ShowList = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Train an encoder by a recipe.

    The run folder holds the resolved configuration, metrics.csv, TensorBoard's log, checkpoints and at the end
    encoder.safetensors, and pretext.png: the pretext task on held-out images, where the method has one to look at. A
    killed run goes on with --resume, to the weights that it would have had.

    Examples:
        embedkit train simclr --data photos.parquet --max-minutes 30 -o runs/first
        embedkit train --resume runs/first
        embedkit train --list
    """
    if not list_ and [recipe, config, resume].count(None) != 2:
        raise typer.BadParameter(
            "name one of a recipe (embedkit train --list shows all), a --config or a run with --resume"
        )
    if resume is not None and output is not None:
        raise ConfigError("--resume goes on in the run's own folder; leave out --output")
    check_outputs({"--output": output}, {"--data": data, "--config": config})
    with requires("training", "train,cpu"):
        from embedkit.training import recipes, run
        from embedkit.training.config import read_config_file, with_overrides
    if list_:
        found = recipes.summaries()
        if as_json:
            print_json(found)
        else:
            print_table(["recipe", "what it is, and what was measured"], found.items())
        return
    if resume is not None:
        result = run.resume(
            resume, overrides=set_ or (), data=data, max_minutes=max_minutes, progress=not quiet
        )
    else:
        given = recipes.recipe(recipe) if recipe is not None else read_config_file(config or "")
        chosen = with_overrides(given, set_ or ())
        name = re.sub(r"\W+", "-", chosen.recipe).strip("-")[:80] or "run"  # a file may say anything
        folder = output or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        colored = any(line.partition("=")[0].strip() == "data.color" for line in set_ or ())
        result = run.train(
            chosen,
            data=data,
            out=folder,
            max_minutes=max_minutes,
            progress=not quiet,
            color_given=colored or recipe is None,
        )
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return  # with several devices, Lightning starts this command once for each
    if as_json:
        print_json(dataclasses.asdict(result))
    else:
        print_line(result.run)
    if result.best_step is not None:
        tell(
            f"the weights are the best evaluated, after {result.best_step} of {result.steps} steps; embedkit export "
            "takes them"
        )
    if not result.finished:
        tell(f"{result.steps} steps made and some are left: embedkit train --resume {result.run}")
