"""What every import of foreign weights shares: reading without running, filling without a gap, license, entry."""

from __future__ import annotations

import argparse
import dataclasses
import io
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from embedkit.authoring.golden import sample_pixels
from embedkit.authoring.import_request import Imported, License, Request
from embedkit.errors import EntryError
from embedkit.hub.licenses import restriction
from embedkit.model.card import Card
from embedkit.model.config import EntryConfig
from embedkit.model.preprocess import Preprocess
from embedkit.training.export.writer import timm_config, update_index, write_entry

_SCALAR = np.float64(0).__reduce__()[0]
#: What checkpoints hold beside tensors and plain values: the options of a run, and numbers of numpy. Each builds a
#: value and does nothing else.
_HARMLESS: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(kind)) for kind in "?bhilqBHILQefd"),
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
]
#: BatchNorm's counter, which older versions of torch did not store and which no embedding depends on.
_COUNTER = ".num_batches_tracked"
_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


def read_checkpoint(content: bytes, where: str) -> Any:
    """What a checkpoint holds; nothing in it is run.

    Args:
        content: The bytes of a safetensors file, or of what `torch.save` wrote.
        where: The file's name; its suffix tells which.

    Raises:
        EntryError: Neither, or a pickle that asks for more than tensors and plain values.
    """
    try:
        if where.endswith(".safetensors"):
            return safetensors.torch.load(content)
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the unpickler makes of other bytes
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked:
            raise EntryError(
                f"{where}: the pickle asks for {asked[1][:100]}, and nothing in it is run; where it comes from, have "
                "the state dict saved alone, as .safetensors"
            ) from None
        raise EntryError(
            f"{where} is no checkpoint that can be read ({type(error).__name__}): is it whole, and written by "
            "torch.save or as .safetensors?"
        ) from None


def is_plain(value: object) -> bool:
    """Whether a value is a dense tensor of real numbers that are there.

    A weights-only pickle may also hold sparse, nested, complex, quantized and empty "meta" tensors.
    """
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and not value.is_nested
        and value.device.type == "cpu"
        and (value.is_floating_point() or value.dtype in _WHOLE)
    )


def fill(
    network: nn.Module,
    state: Mapping[str, Any],
    *,
    heads: tuple[str, ...],
    where: str,
    names: Mapping[str, str] | None = None,
) -> list[str]:
    """Load a network from foreign tensors: none missing, every shape equal, all numbers finite.

    Args:
        network: A timm network with `num_classes=0`.
        state: The foreign state dict.
        heads: What the keys begin with that may be left out.
        where: For messages.
        names: Foreign key -> name in the network; a key that is not in it belongs to no encoder. The same names
            when None.

    Returns:
        Those of `heads` that were left out, sorted.

    Raises:
        EntryError: A tensor is missing, is there twice, has another shape, is none or not finite, or belongs nowhere.
    """
    wanted = network.state_dict()
    found: dict[str, Any] = {}
    keys: dict[str, str] = {}
    dropped: set[str] = set()
    unknown: list[str] = []
    for key, value in state.items():
        name = key if names is None else names.get(key, "")
        if name in wanted:
            if name in found:
                raise EntryError(
                    f"{where}: {keys[name][:100]!r} and {key[:100]!r} are both {name} of the network; have the state "
                    "dict saved with one of them"
                )
            found[name], keys[name] = value, key
        elif key.startswith(heads):
            dropped.add(next(head for head in heads if key.startswith(head)))
        else:
            unknown.append(key)
    missing = [name for name in wanted if name not in found and not name.endswith(_COUNTER)]
    if missing:
        count = (
            "1 tensor of the network is"
            if len(missing) == 1
            else f"{len(missing)} tensors of the network are"
        )
        raise EntryError(f"{where}: {count} missing, {_some(missing)}; is --architecture right?")
    if unknown:
        count = "1 tensor belongs" if len(unknown) == 1 else f"{len(unknown)} tensors belong"
        raise EntryError(
            f"{where}: {count} neither to the network nor to a head, {_some(unknown)}; is --architecture right?"
        )
    for name, value in found.items():
        expected = wanted[name]
        if not is_plain(value):
            raise EntryError(f"{where}: {name}: expected a plain tensor of real numbers")
        if value.shape != expected.shape:
            raise EntryError(
                f"{where}: {name}: the network has {tuple(expected.shape)}, and the checkpoint "
                f"{tuple(value.shape)}; is --architecture right?"
            )
        if not bool(torch.isfinite(value.float()).all()):
            raise EntryError(f"{where}: {name} holds NaN or infinity: the checkpoint is damaged or diverged")
    network.load_state_dict({**wanted, **found}, strict=True)
    return sorted(dropped)


def write_import(
    request: Request,
    network: nn.Module,
    *,
    architecture: str,
    model_args: Mapping[str, Any],
    preprocess: Preprocess,
    license: License,
    provenance: Mapping[str, Any],
    card: Card,
    recognized: str,
    in_timm: bool = True,
    notes: tuple[str, ...] = (),
) -> Imported:
    """Write the entry, with all gates of `write_entry`, and the zoo's index.

    Args:
        request: What was asked for.
        network: Filled; it is put into eval mode.
        architecture: timm's name of it.
        model_args: What timm needs to build the same.
        preprocess: The contract.
        license: As decided.
        provenance: What is known of the weights.
        card: Words of the card; limits about the license are added.
        recognized: For `Imported`.
        in_timm: Whether timm can build the network.
        notes: For `Imported`; the license is added where it is not open.

    Raises:
        EntryError: The network takes no such images, gives no vector, or cannot be stored as a graph over its
            weights.
        ParityError: ONNX Runtime, torch and timm do not agree.
        OutputError: The zoo cannot be written.
    """
    network = network.eval()
    size = f"{preprocess.channels}x{preprocess.size[0]}x{preprocess.size[1]}"
    try:
        with torch.inference_mode():
            features = network(torch.zeros(2, preprocess.channels, *preprocess.size))
    except Exception as error:  # whatever a network makes of a size that is not its own
        raise EntryError(f"{architecture} does not take images of {size} ({in_one_line(error)})") from None
    if not isinstance(features, Tensor) or features.ndim != 2:
        raise EntryError(
            f"{architecture} does not give one vector an image; embedkit stores such networks only"
        )
    limits = []
    if what := restriction(license.name):
        limits.append(f"The weights are under {license.name}, which {what}.")
    if license.published is not None:
        limits.append(
            f"The weights published in this layout are under {license.published}; according to the "
            f"person who imported these, they are others, from {request.origin}, under {license.name}."
        )
        provenance = {**provenance, "published_license": license.published}
    config = EntryConfig(
        architecture=architecture,
        outputs={"embedding": (features.shape[1],)},
        method=request.method,
        dim=features.shape[1],
        preprocess=preprocess,
        data=request.data or request.tag,
        license=license.name,
        provenance={
            **({"source": request.origin} if request.origin else {}),
            **provenance,
            "license_by": license.stated_by,
            "compared_on": "synthetic images" if request.samples is None else "images",
        },
        timm=timm_config(network, preprocess, model_args=model_args, tag=request.tag, license=license.name)
        if in_timm
        else {},
        card=dataclasses.replace(card, limits=(*card.limits, *limits)),
    )
    folder = request.zoo / request.name
    try:
        write_entry(
            folder,
            network=network,
            config=config,
            samples=sample_pixels(preprocess, request.samples),
        )
    except torch.onnx.OnnxExporterError as error:
        raise EntryError(f"{architecture} cannot be written as ONNX ({in_one_line(error)})") from None
    update_index(request.zoo)
    return Imported(
        folder=folder,
        architecture=architecture,
        license=license.name,
        recognized=recognized,
        presumed=license.presumed,
        notes=(*notes, *limits),
    )


def in_one_line(error: Exception) -> str:
    """What another library's error says, in one line of 200 characters; its type where it says nothing."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _some(keys: list[str]) -> str:
    return "such as " + ", ".join(repr(key[:100]) for key in keys[:3])
