"""Arguments of a network that a file states."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import timm

from embedkit.errors import EntryError

__all__ = ["args_from_file"]

#: Options of `timm.create_model` that say what is loaded, not what is built; a file has no say in them.
_NOT_FOR_FILES = {*inspect.signature(timm.create_model).parameters, "features_only", "pretrained_strict"}


def args_from_file(model_args: Any, where: str) -> dict[str, Any]:
    """A file's `model_args` without `num_classes`: what shapes the network for `timm.create_model`.

    Raises:
        EntryError: No object, or one with an option that makes timm load something, such as a checkpoint's path.
    """
    if not isinstance(model_args, Mapping):
        raise EntryError(f"{where}: model_args: expected an object, found {type(model_args).__name__}")
    refused = sorted(_NOT_FOR_FILES & set(model_args) - {"num_classes"})
    if refused:
        raise EntryError(
            f"{where}: model_args: {refused[0]} says what is loaded, not what is built; it is not taken from a file"
        )
    return {key: value for key, value in model_args.items() if key != "num_classes"}
