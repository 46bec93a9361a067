"""Color images under a gray recipe: refused with the recipe for color, unless gray was asked for."""

from __future__ import annotations

import dataclasses
import sys

import numpy as np

from embedkit.errors import ConfigError
from embedkit.training import recipes
from embedkit.training.config import RunConfig, method_name
from embedkit.training.data.datasets import open_source

__all__ = ["check_color"]

#: Images that are looked at, evenly spread.
_SAMPLE = 16
#: Levels between the channels of a pixel from which on it is a color: the noise of a JPEG of a gray image has fewer.
_COLORED = 32


def check_color(config: RunConfig, *, given: bool) -> None:
    """Refuse color images that would be trained without their color, or say so on stderr where gray was asked for.

    Example:
        check_color(dataclasses.replace(recipe("simclr"), data=DataConfig(path="photos/")), given=False)

    Args:
        config: With the path of its data.
        given: Whether `data.color` was chosen for this run, and not left as the recipe has it.

    Raises:
        ConfigError: The color is lost and was not given up on purpose; the message names a recipe for color.
    """
    if config.data.color != "gray" or not _colored(config):
        return
    side, path = config.data.image_size, config.data.path
    if given:
        print(
            f"embedkit: the images have color, and are trained gray at {side}x{side} pixels; data.color=rgb keeps it",
            file=sys.stderr,
        )
        return
    other = _recipe_for_color(config)
    instead = (
        f"embedkit train {other} trains them in color"
        if other
        else "--set data.color=rgb --set data.image_size=64 trains them in color"
    )
    raise ConfigError(
        f"data.color: the images of {path} have color, and {config.recipe or method_name(config)} is for gray ones of "
        f"{side}x{side} pixels; {instead}, --set data.color=gray without it"
    )


def _colored(config: RunConfig) -> bool:
    if config.data.path.startswith("synthetic:"):
        return False
    source = open_source(config.data.path, "train", label=config.data.label)
    rows = np.linspace(0, len(source) - 1, min(_SAMPLE, len(source))).astype(np.int64)
    pixels = source.decode(rows, dataclasses.replace(config.data, color="rgb").contract(), {}).short()
    return int((pixels.amax(1) - pixels.amin(1)).max()) > _COLORED


def _recipe_for_color(config: RunConfig) -> str:
    """`METHOD:color`, or else the first variant of the method's recipe that has color; empty where none has."""
    method = config.recipe.partition(":")[0] or method_name(config)
    own = [name for name in recipes.summaries() if name.partition(":")[0] == method]
    if f"{method}:color" in own:
        return f"{method}:color"
    return next((name for name in own if recipes.recipe(name).data.color == "rgb"), "")
