"""State dicts with timm's own names: `--layout timm`, for networks that were trained or fine-tuned with timm.

embedkit import model_best.pth.tar --layout timm --architecture convnext_tiny --name own-convnext.birds --license MIT
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import timm
import torch
from torch import nn

import embedkit.training.models.backbones  # noqa: F401  registers embedkit's own networks with timm
from embedkit._io.text import did_you_mean
from embedkit.authoring.import_request import Imported, Request, decide_license
from embedkit.errors import ConfigError, EntryError
from embedkit.model.card import Card
from embedkit.model.layout import sha256_hex
from embedkit.training.importers.foreign import in_one_line, is_plain, write_import
from embedkit.training.importers.timm_models import preprocess_of, shaped

__all__ = ["TIMM", "create", "import_state_dict"]

#: `--layout` of this module.
TIMM = "timm"
#: Where training scripts put the state dict; the average of the weights is what they evaluate.
_PLACES = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "")
#: What wrappers put before every name.
_WRAPPERS = ("module.", "_orig_mod.", "model.", "backbone.", "net.")
#: Last layers, whatever they are called in this architecture.
_HEADS = ("head.", "head_dist.", "fc.", "classifier.", "last_linear.")


def import_state_dict(
    content: bytes, checkpoint: Any, request: Request, *, architecture: str | None, where: str
) -> Imported:
    """Write a network of timm's with the tensors of a checkpoint as an entry.

    Preprocessing is that of timm's default weights of the architecture, where the request says nothing else.

    Args:
        content: The file's bytes, for its digest.
        checkpoint: What it holds.
        request: The entry that is wanted; its license must be given.
        architecture: timm's name.
        where: For messages.

    Raises:
        ConfigError: No architecture or license, or the former is none of timm's.
        EntryError: The tensors do not fill the network exactly.
        ParityError: As for `write_entry`; nothing is written.
    """
    if architecture is None:
        raise ConfigError(f"{where}: give --architecture, timm's name of the network, such as convnext_tiny")
    license = decide_license(request, None, stated=False, where=where)
    place, state = _state_of(checkpoint, where)
    with torch.device("meta"):  # shapes alone
        plain = create(architecture, {})
    channels = _trained_channels(plain, state)
    cfg = dict(getattr(plain, "pretrained_cfg", {}))
    arguments = {**channels, **_trained_size(plain, architecture, channels, state, request)}
    size = _input_size(cfg, arguments)
    base = preprocess_of({**cfg, "input_size": size, **_normalization(cfg, size[0])}, architecture)
    network, model_args, preprocess, dropped, notes = shaped(
        request,
        lambda more: create(architecture, {**arguments, **more}),
        state,
        cfg=cfg,
        preprocess=base,
        architecture=architecture,
        where=where,
        more_heads=_HEADS,
    )
    told = (
        f"preprocessing is that of timm's {architecture}: mean {base.mean}, std {base.std}, {base.size[0]} pixels; "
        "where the training had another one, give --mean, --std, --image-size and so on"
    )
    return write_import(
        request,
        network,
        architecture=architecture,
        model_args={**arguments, **model_args},
        preprocess=preprocess,
        license=license,
        provenance={
            "file": where,
            "sha256": sha256_hex(content),
            "layout": "timm",
            "state_dict": place or "the whole file",
            "removed": dropped,
            "importer": "embedkit.training.importers.state_dicts",
            "timm": timm.__version__,
        },
        card=Card(summary=f"timm's {architecture} with the weights of {where}, without its classifier."),
        recognized=f"layout timm, network {architecture}",
        notes=notes if request.contract.mean else (told, *notes),
    )


def create(name: str, model_args: Mapping[str, Any]) -> nn.Module:
    """A network of timm's without its classifier.

    Raises:
        ConfigError: timm has none of this name, or refuses the arguments.
    """
    if not timm.is_model(name):
        near = did_you_mean(name, timm.list_models(), most=3)
        raise ConfigError(
            f"--architecture {name!r}: timm has no network of this name" + (f"; {near}" if near else "")
        )
    try:
        return timm.create_model(name, num_classes=0, **model_args)
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"--architecture {name}: timm refuses {dict(model_args)} ({in_one_line(error)})"
        ) from None


def _state_of(checkpoint: Any, where: str) -> tuple[str, dict[str, Any]]:
    """The tensors by timm's names, and the key of the checkpoint that they are under."""
    for place in _PLACES:
        found = checkpoint.get(place) if place and isinstance(checkpoint, Mapping) else checkpoint
        if not isinstance(found, Mapping) or not any(isinstance(one, torch.Tensor) for one in found.values()):
            continue
        state = {key: value for key, value in found.items() if isinstance(key, str)}
        for wrapper in _unwrapped(state):
            state = {key.removeprefix(wrapper): value for key, value in state.items()}
        return place, state
    raise EntryError(
        f"{where}: expected tensors by name, in the file itself or under {', '.join(_PLACES[:-1])}"
    )


def _unwrapped(state: Mapping[str, Any]) -> Iterator[str]:
    names = list(state)
    for _ in range(len(_WRAPPERS)):
        wrapper = next((one for one in _WRAPPERS if all(name.startswith(one) for name in names)), None)
        if wrapper is None:
            return
        yield wrapper
        names = [name.removeprefix(wrapper) for name in names]


def _trained_channels(plain: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """`in_chans`, where the first convolution takes another number of channels than the architecture's own."""
    name, own = next(((key, one) for key, one in plain.state_dict().items() if one.ndim == 4), ("", None))
    given: Any = state.get(name)
    if own is None or not is_plain(given) or given.ndim != 4 or given.shape[1] == own.shape[1]:
        return {}
    return {"in_chans": int(given.shape[1])}


def _trained_size(
    plain: nn.Module,
    architecture: str,
    channels: Mapping[str, Any],
    state: Mapping[str, Any],
    request: Request,
) -> dict[str, Any]:
    """`img_size`, where the position embeddings are those of the wanted size and not of the architecture's own."""
    size = request.contract.image_size
    given: Any = state.get("pos_embed")
    own = getattr(plain, "pos_embed", None)
    if size is None or own is None or not is_plain(given) or given.shape == own.shape:
        return {}
    with torch.device("meta"):
        other = create(architecture, {**channels, "img_size": [size, size]})
    fits = other.get_parameter("pos_embed").shape == given.shape
    return {"img_size": [size, size]} if fits else {}


def _input_size(cfg: Mapping[str, Any], arguments: Mapping[str, Any]) -> list[int]:
    channels, *sides = cfg.get("input_size") or (3, 224, 224)
    return [arguments.get("in_chans", channels), *arguments.get("img_size", sides)]


def _normalization(cfg: Mapping[str, Any], channels: int) -> dict[str, Any]:
    """Mean and std for as many channels: where the number differs, the mean over those that are stated."""
    stated = {key: list(cfg.get(key) or (0.5,)) for key in ("mean", "std")}
    return {
        key: values if len(values) == channels else [sum(values) / len(values)] * channels
        for key, values in stated.items()
    }
