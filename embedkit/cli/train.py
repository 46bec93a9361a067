"""`embedkit train`: a recipe and images to a run folder."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from typing import Annotated

import typer

from embedkit._io.optional import requires
from embedkit._io.outputs import check_outputs
from embedkit.cli.terminal import tell
from embedkit.errors import ConfigError


def train(
    recipe: Annotated[
        str | None, typer.Argument(help="A recipe's name, such as simclr; none with --resume.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="IDX files, Parquet, CSV, class folders, sklearn:digits or synthetic:N."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="FIELD=VALUE", help="One field, such as optimizer.lr=0.001. Repeatable."
        ),
    ] = None,
    max_minutes: Annotated[
        float | None, typer.Option(min=0.0, help="Plan the steps so that the run ends within this time.")
    ] = None,
    out: Annotated[
        str | None, typer.Option(metavar="RUN", help="The run folder.", show_default="runs/RECIPE-DATE")
    ] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="RUN", help="Go on from this run's last checkpoint.")
    ] = None,
    list_: Annotated[
        bool, typer.Option("--list", help="Print all recipes, and what each reached, and train none.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Train an encoder by a recipe.

    The run folder holds the resolved configuration, metrics.csv, TensorBoard's log, checkpoints and at the end
    encoder.safetensors. A killed run goes on with --resume, to the weights that it would have had.
    """
    if not list_ and (recipe is None) == (resume is None):
        raise typer.BadParameter("name a recipe (embedkit train --list shows all), or a run with --resume")
    if resume is not None and (data or set_ or out):
        raise ConfigError("--resume goes on with what the run was told; leave out --data, --set and --out")
    check_outputs({"--out": out}, {"--data": data})
    with requires("training", "train,cpu"):
        from embedkit.training import recipes, run
        from embedkit.training.config import with_overrides
    if list_:
        found = recipes.summaries()
        width = max(map(len, found))
        print(json.dumps(found) if as_json else "\n".join(f"{k:{width}}  {v}" for k, v in found.items()))
        return
    if resume is not None:
        result = run.resume(resume, max_minutes=max_minutes)
    else:
        config = with_overrides(recipes.recipe(recipe or ""), set_ or ())
        name = (recipe or "").replace(":", "-")
        folder = out or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        chosen = any(line.partition("=")[0].strip() == "data.color" for line in set_ or ())
        result = run.train(config, data=data, out=folder, max_minutes=max_minutes, color_given=chosen)
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return  # with several devices, Lightning starts this command once for each
    if as_json:
        print(json.dumps({**dataclasses.asdict(result), "run": str(result.run)}))
    else:
        print(result.run)
    if not result.finished:
        tell(f"{result.steps} steps made and some are left: embedkit train --resume {result.run}")
