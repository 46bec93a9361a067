"""A given encoder: the file of its weights, and its preprocess contract."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from embedkit.errors import ConfigError, EntryError
from embedkit.model.config import EntryConfig
from embedkit.model.layout import CONFIG, MANIFEST, WEIGHTS
from embedkit.model.preprocess import Preprocess
from embedkit.training.config import from_json, read_json
from embedkit.training.data import DataConfig

__all__ = ["contract_of", "under_contract", "weights_in"]

#: In a run folder.
ENCODER = "encoder.safetensors"


def weights_in(folder: Path) -> Path:
    """The weights' file of a run's or an entry's folder; any other path is the file itself."""
    return next((path for path in (folder / ENCODER, folder / WEIGHTS) if os.path.isfile(path)), folder)


def contract_of(folder: Path) -> Preprocess | None:
    """The preprocess contract of an entry's or a run's folder; None of a file of weights alone.

    Raises:
        ConfigError: A folder whose `config.json` cannot be read.
    """
    file = folder / CONFIG
    if not os.path.isfile(file):
        return None
    try:
        content = file.read_bytes()
        if os.path.isfile(folder / MANIFEST):
            return EntryConfig.from_json(content).preprocess
        stored = read_json(file, ConfigError)
        facts = from_json(stored["facts"], "facts")
        return from_json(stored["config"]["data"]).preprocess(facts.mean, facts.std)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EntryError) as error:
        raise ConfigError(f"{file}: neither an entry's configuration nor a run's ({error})") from error


def under_contract(data: DataConfig, contract: Preprocess) -> DataConfig:
    """`data` whose images are brought to size and normalized as the contract says.

    Raises:
        ConfigError: A contract of images that are not square.
    """
    height, width = contract.size
    if height != width:
        raise ConfigError(
            f"data.image_size: the given encoder takes {height}x{width} pixels, which are not square"
        )
    return dataclasses.replace(
        data,
        color=contract.color,  # type: ignore[arg-type]
        image_size=height,
        resize=contract.resize,  # type: ignore[arg-type]
        resize_size=contract.resize_size,
        interpolation=contract.interpolation,
        pad=contract.pad,
        mean=contract.mean,
        std=contract.std,
    )
