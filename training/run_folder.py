"""The files of a run.

`config.json` (resolved), `environment.json`, `metrics.csv`, `tensorboard/`, `checkpoints/last.ckpt`, with evaluation
while training `checkpoints/best.ckpt`, and at the end `encoder.safetensors`, `cost.json` and, where the method
has one, `pretext.png`.
"""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from embedkit._io.atomic import write_file
from embedkit.errors import OutputError
from embedkit.model.layout import PRETEXT_IMAGE
from embedkit.training import config as configuration
from embedkit.training.build import build_method
from embedkit.training.config import Facts, RunConfig
from embedkit.training.init import ENCODER
from embedkit.training.method import Method
from embedkit.training.models.backbones import Backbone

__all__ = [
    "BEST",
    "CHECKPOINT",
    "CONFIG",
    "COST",
    "ENVIRONMENT",
    "METRICS",
    "check_out",
    "kept_in",
    "load_run",
    "load_weights",
    "read_checkpoint",
    "read_config",
    "save_encoder",
    "write_config",
    "write_json",
]

CONFIG = "config.json"
ENVIRONMENT = "environment.json"
METRICS = "metrics.csv"
COST = "cost.json"
CHECKPOINT = Path("checkpoints") / "last.ckpt"
#: The weights of the best evaluation, of a run with evaluation while training.
BEST = CHECKPOINT.with_name("best.ckpt")

Kept = Literal["best", "last"]


def load_run(run: str | os.PathLike[str], checkpoint: Kept | None = None) -> tuple[RunConfig, Method]:
    """A run's resolved configuration and its method, in eval mode, with the weights of a checkpoint.

    Example:
        config, method = load_run("runs/first", "last")

    Args:
        run: The run folder.
        checkpoint: `best` or `last`; by default as `kept_in` says.

    Raises:
        OutputError: No run there, or none with that checkpoint.
    """
    run = Path(run)
    config, facts = read_config(run)
    weights = read_checkpoint(run, BEST if (checkpoint or kept_in(run)) == "best" else CHECKPOINT)
    method = build_method(config, facts)
    load_weights(method, weights)
    return config, method.eval()


def kept_in(run: Path) -> Kept:
    """Which weights are a run's result: the best of a run with evaluation while training, else the last."""
    return "best" if os.path.isfile(run / BEST) else "last"


def load_weights(method: Method, checkpoint: dict[str, Any]) -> None:
    """Give a method the weights and the counters of a checkpoint."""
    method.on_load_checkpoint(checkpoint)  # a method whose parameters change shape resizes them here
    method.load_state_dict(checkpoint["state_dict"])


def check_out(out: Path) -> None:
    """Refuse a folder that holds a run, or a file that a run would overwrite."""
    if os.path.exists(out / CONFIG):
        there = (
            f"continue it with --resume {out}"
            if os.path.exists(out / CHECKPOINT)
            else "it has no checkpoint: remove it"
        )
        raise OutputError(f"{out}: there is a run in this folder; {there} or choose another --output")
    for name in (CHECKPOINT, BEST, ENCODER, METRICS, PRETEXT_IMAGE):
        if os.path.exists(out / name):
            raise OutputError(f"{out / name} is there, and would be overwritten: choose another --output")


def read_checkpoint(run: Path, name: Path = CHECKPOINT) -> dict[str, Any]:
    """A checkpoint of a run, the last by default; only tensors and plain values are loaded.

    Raises:
        OutputError: None there, or a damaged one.
    """
    path = run / name
    try:
        with zipfile.ZipFile(path) as parts:
            if (part := parts.testzip()) is not None:  # torch does not check the checksums
                raise ValueError(f"checksum of {part}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise OutputError(f"{path}: no checkpoint that can be read ({error})") from error
    except Exception as error:  # the unpickler raises anything on other bytes
        raise OutputError(
            f"{path} is damaged ({type(error).__name__}); train again into a new folder"
        ) from error


def read_config(run: Path) -> tuple[RunConfig, Facts]:
    """The resolved configuration of a run, and the facts that its method got.

    Raises:
        OutputError: No run there.
        ConfigError: A field that this version does not have, or a value of another type than its field's.
    """
    where = str(run / CONFIG)
    stored = configuration.read_json(run / CONFIG, OutputError)
    if not isinstance(stored, dict) or not {"config", "facts"} <= stored.keys():
        raise OutputError(f"{run}: expected a run folder with a readable {CONFIG}, found other JSON in it")
    config, facts = (configuration.from_json(stored[key], f"{where}: {key}") for key in ("config", "facts"))
    return configuration.checked(config, RunConfig, where), configuration.checked(facts, Facts, where)


def write_config(run: Path, config: RunConfig, facts: Facts) -> None:
    """Write what `read_config` reads."""
    stored = {"config": configuration.to_json(config), "facts": configuration.to_json(facts)}
    write_json(run / CONFIG, stored)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, atomically."""
    write_file(path, (json.dumps(value, indent=1) + "\n").encode())


def save_encoder(method: Method, path: Path) -> None:
    """The encoder's weights as safetensors, under timm's names where it is a backbone."""
    encoder = method.encoder()
    if isinstance(encoder, Backbone):
        encoder = encoder.net
    weights = {name: value.detach().cpu().contiguous() for name, value in encoder.state_dict().items()}
    save_file(weights, path)
