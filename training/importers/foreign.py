"""What every import of foreign weights shares: reading without running, filling without a gap, license, entry."""

from __future__ import annotations

import argparse
import dataclasses
import io
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from embedkit.authoring.golden import sample_pixels
from embedkit.errors import ConfigError, EntryError
from embedkit.hub.limits import is_non_commercial
from embedkit.model.card import Card
from embedkit.model.config import EntryConfig
from embedkit.model.layout import ENTRY_NAME
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
#: One line of an SPDX expression, or of the name that a hub has for a license.
_LICENSE = re.compile(r"[A-Za-z0-9.+() -]{1,100}")
#: What stands in the place of a license and names none.
_NO_LICENSE = ("", "unknown", "other")
#: Characters of the words that are kept with an entry.
_MOST_WORDS = 500
_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be made of foreign weights.

    Attributes:
        name: The entry, `<method>-<arch>.<data>`.
        zoo: The folder that holds the entries.
        license: SPDX identifier of the weights' license; None takes the one that is known.
        origin: Where the weights come from, an address or words.
        data: What they were trained on, in words; the name's last part when None.
        samples: 64 or more images to measure rounding and parity on; synthetic ones when None.

    Raises:
        ConfigError: The name cannot be an entry's, or the license or the words cannot stand in its files.
    """

    name: str
    zoo: Path
    license: str | None = None
    origin: str | None = None
    data: str | None = None
    samples: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if not ENTRY_NAME.fullmatch(self.name):
            raise ConfigError(
                f"{self.name!r}: expected <method>-<arch>.<data> in small letters, such as simsiam-r50.in1k"
            )
        license_in(self.license, "--license")
        for option, words in (("--source", self.origin), ("--data", self.data)):
            # A lone surrogate, which no file can hold, is not printable either.
            if words and not (words.strip() and words.isprintable() and len(words) <= _MOST_WORDS):
                raise ConfigError(
                    f"{option} {words[:60]!a}: expected one line of at most {_MOST_WORDS} printable characters"
                )

    @property
    def method(self) -> str:
        """The first part of the name."""
        return self.name.partition("-")[0]

    @property
    def tag(self) -> str:
        """The last part of the name."""
        return self.name.partition(".")[2]


@dataclass(frozen=True, kw_only=True)
class Imported:
    """An entry that was written.

    Attributes:
        folder: The entry.
        architecture: The network's name.
        license: SPDX identifier of the weights' license.
        said: What was recognized, in words.
        presumed: Whether that license is only the one under which others published weights of this layout.
    """

    folder: Path
    architecture: str
    license: str
    said: str
    presumed: bool = False


@dataclass(frozen=True, kw_only=True)
class License:
    """The license of an entry, and where it is from.

    Attributes:
        name: SPDX identifier.
        stated_by: Who says so, in words.
        published: The license that it stands instead of, if any.
        presumed: Whether nobody stated or gave it: it is that of the published weights of the layout.
    """

    name: str
    stated_by: str
    published: str | None = None
    presumed: bool = False


def license_in(text: str | None, where: str) -> str | None:
    """A license as somebody wrote it, without the space around it; None where it names none.

    Args:
        text: What was written.
        where: For messages.

    Raises:
        ConfigError: It is no name of a license.
    """
    name = (text or "").strip()
    if name.casefold() in _NO_LICENSE:
        return None
    if not _LICENSE.fullmatch(name):
        raise ConfigError(
            f"{where}: {name[:60]!a} is no name of a license: expected at most 100 letters, digits, spaces and .+()- "
            "in one line, such as Apache-2.0"
        )
    return name


def decide_license(request: Request, known: str | None, *, stated: bool, where: str) -> License:
    """The license of imported weights; none is made up, and none is replaced without being named.

    Args:
        request: What was asked for.
        known: The license that is known, if any.
        stated: Whether these weights state it themselves; else it is the one under which the weights of this layout
            were published, and a checkpoint of one's own may have another.
        where: For messages.

    Raises:
        ConfigError: No license is known and none was given, or what was given is none, or another than the weights
            state, or than was published without saying where these come from.
    """
    given = license_in(request.license, "--license")
    if not known:
        if not given:
            raise ConfigError(
                f"{where}: no license is known for these weights; look it up and give it with --license"
            )
        return License(name=given, stated_by="whoever imported them")
    if not given or given.casefold() == known.casefold():
        return License(
            name=known,
            stated_by="the weights' source" if stated else "those who published this layout",
            presumed=not stated and not given,
        )
    if stated:
        raise ConfigError(f"{where}: these weights state the license {known}: leave --license {given} out")
    if not request.origin:
        raise ConfigError(
            f"{where}: the published weights of this layout are under {known}: leave --license {given} out, or say "
            "with --source where other weights come from"
        )
    return License(name=given, stated_by="whoever imported them", published=known)


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
    said: str,
    in_timm: bool = True,
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
        said: For `Imported`.
        in_timm: Whether timm can build the network.

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
    if is_non_commercial(license.name):
        limits.append(f"The weights are under {license.name}, which forbids commercial use.")
    if license.published is not None:
        limits.append(
            f"The weights published in this layout are under {license.published}; whoever imported these said that "
            f"they are others, from {request.origin}, under {license.name}."
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
        said=said,
        presumed=license.presumed,
    )


def in_one_line(error: Exception) -> str:
    """What another library's error says, in one line of 200 characters; its type where it says nothing."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _some(keys: list[str]) -> str:
    return "such as " + ", ".join(repr(key[:100]) for key in keys[:3])
