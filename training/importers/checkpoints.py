"""Checkpoint files of other training code: recognized by `LAYOUTS`, filled into timm's networks, written as entries.

Embeddings are what each source evaluates: the global average pool of a ResNet, the class token after the last norm of
a ViT (for MAE that is its linear probe; its fine-tuning pools the patches instead, with a norm of its own).

    embedkit import checkpoint_0099.pth.tar --name simsiam-r50.in1k
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import embedkit.training.models.backbones  # noqa: F401  registers embedkit's own networks with timm
from embedkit.authoring.import_request import Imported, Request, decide_license
from embedkit.errors import ConfigError, SourceError
from embedkit.model.card import Card
from embedkit.model.layout import sha256_hex
from embedkit.training.importers.foreign import (
    fill,
    is_plain,
    read_checkpoint,
    write_import,
)
from embedkit.training.importers.layouts import LAYOUTS, STEMS, Layout
from embedkit.training.importers.shaping import pool_args, traps
from embedkit.training.importers.state_dicts import TIMM, create, import_state_dict

__all__ = ["import_checkpoint"]

_POOLING = {
    "token": "the class token after the last norm",
    "avg": "the mean of the patches after the last norm",
}


@dataclass(frozen=True, kw_only=True)
class _Found:
    """A layout in a checkpoint: the state dict, where it lies, and the encoder's keys as timm names them."""

    layout: Layout
    nest: str
    prefix: str
    state: Mapping[str, Any]
    names: Mapping[str, str]

    @property
    def encoder(self) -> Iterator[tuple[str, Any]]:
        """Names in timm and values, without the heads that have the prefix, too."""
        for key, name in self.names.items():
            if not key.startswith(self.layout.heads):
                yield name, self.state[key]

    @property
    def channels(self) -> int:
        """Those that the first convolution takes, 0 where there is none of a known name."""
        kernels = {
            name: value.shape[1]
            for name, value in self.encoder
            if name.startswith(tuple(STEMS)) and is_plain(value) and value.ndim == 4
        }
        return kernels[min(kernels)] if kernels else 0

    @property
    def undeclared(self) -> int:
        """How many keys are neither the encoder's nor a head's."""
        return sum(key not in self.names and not key.startswith(self.layout.heads) for key in self.state)


def import_checkpoint(
    path: str | os.PathLike[str],
    request: Request,
    *,
    layout: str | None = None,
    architecture: str | None = None,
) -> Imported:
    """Write the encoder in a checkpoint file as an entry of the zoo.

    Args:
        path: What `torch.save` wrote, or a `.safetensors` file.
        request: The entry that is wanted. Position embeddings are not resampled to its image size, but for `timm`.
        layout: One of `LAYOUTS` by name, or `timm`; recognized when None.
        architecture: timm's name; by the shapes when None.

    Returns:
        The entry.

    Raises:
        SourceError: The file cannot be read.
        ConfigError: The layout is unknown or ambiguous, the name does not fit it, or no license is known.
        EntryError: A pickle that asks for more than tensors, or tensors that do not fill the network exactly.
        ParityError: As for `write_entry`; nothing is written.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error.strerror}); give a checkpoint file") from None
    checkpoint = read_checkpoint(content, path.name)
    if layout == TIMM:
        return import_state_dict(content, checkpoint, request, architecture=architecture, where=path.name)
    found = _named(checkpoint, layout, path.name) if layout else _recognized(checkpoint, request, path.name)
    chosen = found.layout
    if chosen.methods and request.method not in chosen.methods:
        expected = " or ".join(f"{method}-" for method in chosen.methods)
        raise ConfigError(
            f"{request.name!r}: {path.name} has the layout of {chosen.title}: expected a name that begins with "
            f"{expected}, or another --layout"
        )
    license = decide_license(request, chosen.license, stated=False, where=path.name)
    preprocess = request.contract.applied(chosen.preprocess)
    name, network, model_args = _build(found, architecture, request, path.name)
    dropped = fill(network, found.state, heads=chosen.heads, where=path.name, names=found.names)
    if chosen.layer4_stride == 1:
        _keep_resolution(network)
        name = f"vissl_{name}_stride16"
    pooling = _POOLING.get(getattr(network, "global_pool", ""), "average pool")
    return write_import(
        request,
        network,
        architecture=name,
        model_args=model_args,
        preprocess=preprocess,
        license=license,
        provenance={
            "file": path.name,
            "sha256": sha256_hex(content),
            "layout": f"{chosen.name}: {chosen.title}",
            **({"paper": chosen.paper} if chosen.paper else {}),
            "state_dict": found.nest or "the whole file",
            "prefix": found.prefix,
            "removed": dropped,
            "pooling": pooling,
            "importer": "embedkit.training.importers.checkpoints",
        },
        card=Card(
            summary=f"The encoder of a checkpoint in the layout of {chosen.title}, without its heads; the embedding is "
            f"{pooling}.",
            datasets=("imagenet-1k",) if request.tag == "in1k" else (),
            limits=(
                ("timm has no such network (the last stage keeps its resolution): load it with embedkit.",)
                if chosen.layer4_stride == 1
                else ()
            ),
        ),
        recognized=f"layout {chosen.name}, network {name}",
        notes=traps(
            network,
            name,
            preprocess,
            native=preprocess.size,
            pooled=request.pool is not None,
        ),
        in_timm=chosen.layer4_stride == 2,
    )


def _named(checkpoint: Any, layout: str, where: str) -> _Found:
    """The layout that was asked for; its first layer may have any name."""
    chosen = next((one for one in LAYOUTS if one.name == layout), None)
    if chosen is None:
        raise ConfigError(f"--layout {layout!r}: expected {TIMM}, or one of {_listed(LAYOUTS)}")
    found = _find(checkpoint, chosen) or _find(checkpoint, chosen, stems=("",))
    if found is None:
        places = " or ".join(f"{prefix}* in {nest or 'the file itself'}" for nest, prefix in chosen.places)
        raise ConfigError(
            f"{where}: expected keys {places}, as {chosen.title} writes them; found {_first_keys(checkpoint)}"
        )
    return found


def _recognized(checkpoint: Any, request: Request, where: str) -> _Found:
    """The one layout that fits: by place, prefix and channels, then by what is left over, then by the entry's name."""
    fitting = [found for layout in LAYOUTS if (found := _find(checkpoint, layout)) is not None]
    if not fitting:
        raise ConfigError(
            f"{where}: no layout is recognized in {_first_keys(checkpoint)}; known are {_listed(LAYOUTS)}: give "
            f"--layout and --architecture ({TIMM} for timm's own names), or the state dict in one of them"
        )
    channels = {found.channels for found in fitting}
    fitting = [found for found in fitting if found.channels == found.layout.preprocess.channels]
    if not fitting:
        raise ConfigError(
            f"{where}: its first convolution takes {min(channels)} channels, for which no layout says how images "
            "become them"
        )
    least = min(found.undeclared for found in fitting)
    fitting = [found for found in fitting if found.undeclared == least]
    named = [found for found in fitting if request.method in found.layout.methods]
    if len(named or fitting) > 1:
        raise ConfigError(
            f"{where}: {_first_keys(checkpoint)} may be of {_listed(found.layout for found in fitting)}: give "
            f"--layout, or --layout {TIMM} and --architecture if it was trained with timm"
        )
    return (named or fitting)[0]


def _find(checkpoint: Any, layout: Layout, stems: tuple[str, ...] | None = None) -> _Found | None:
    if stems is None:
        stems = tuple(stem for stem, names in STEMS.items() if set(names) & set(layout.architectures))
    alone = (("", prefix) for _, prefix in layout.places)
    for nest, prefix in (*layout.places, *alone):
        state = checkpoint
        for key in nest.split(".") if nest else ():
            state = state.get(key) if isinstance(state, Mapping) else None
        if not isinstance(state, Mapping):
            continue
        state = {key: value for key, value in state.items() if isinstance(key, str)}
        names = {key: _renamed(key.removeprefix(prefix), layout) for key in state if key.startswith(prefix)}
        if any(name.startswith(stems) and isinstance(state[key], Tensor) for key, name in names.items()):
            return _Found(layout=layout, nest=nest, prefix=prefix, state=state, names=names)
    return None


def _renamed(key: str, layout: Layout) -> str:
    for theirs, ours in layout.renames:
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    return key


def _build(
    found: _Found, architecture: str | None, request: Request, where: str
) -> tuple[str, nn.Module, dict[str, Any]]:
    """The network whose names and shapes are nearest to the checkpoint's, and what timm needs to build it."""
    # A value may have any attribute, and a nested tensor has no shape: `fill` refuses them by name.
    image_size = request.contract.image_size
    shapes = {(name, tuple(value.shape) if is_plain(value) else ()) for name, value in found.encoder}

    def arguments(name: str) -> dict[str, Any]:
        token: dict[str, Any] = {"global_pool": "token"} if "cls_token" in found.names.values() else {}
        if token and image_size is not None:
            token["img_size"] = [image_size, image_size]
        given = found.layout.model_args.get(name, {})
        return {"in_chans": found.layout.preprocess.channels, **token, **given}

    def distance(name: str) -> int:
        with torch.device("meta"):  # shapes alone: no memory, no random numbers
            network = create(name, arguments(name))
        return len({(key, tuple(value.shape)) for key, value in network.state_dict().items()} ^ shapes)

    candidates = [
        name
        for stem, names in STEMS.items()
        if any(key.startswith(stem) for key, _ in shapes)
        for name in found.layout.architectures
        if name in names
    ]
    if architecture is None and not candidates:
        raise ConfigError(f"{where}: give --architecture, timm's name of the network")
    chosen = architecture or min(candidates, key=distance)
    network = create(chosen, arguments(chosen))
    patch = getattr(getattr(network, "patch_embed", None), "patch_size", None)
    if image_size is not None and patch is not None and any(image_size % side for side in patch):
        raise ConfigError(f"--image-size {image_size}: expected a multiple of the patch, {patch[0]} pixels")
    pooled = pool_args(network, request.pool, where)
    if pooled:
        network = create(chosen, {**arguments(chosen), **pooled})
    return chosen, network, {**arguments(chosen), **pooled}


def _keep_resolution(network: nn.Module) -> None:
    """Take the stride out of a ResNet's last stage; unlike timm's `output_stride=16`, nothing is dilated."""
    layer4 = network.get_submodule("layer4")
    for module in layer4.modules():
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)


def _first_keys(checkpoint: Any) -> str:
    """The first keys of a checkpoint, and those of its first dictionary."""
    if not isinstance(checkpoint, Mapping):
        return f"a {type(checkpoint).__name__}"
    keys = ", ".join(repr(key)[:60] for key in list(checkpoint)[:4])
    inner = next(((key, value) for key, value in checkpoint.items() if isinstance(value, Mapping)), None)
    if inner is None:
        return f"the keys {keys}"
    return f"the keys {keys}, and in {inner[0]!r}: {', '.join(repr(key)[:60] for key in list(inner[1])[:4])}"


def _listed(layouts: Iterable[Layout]) -> str:
    return ", ".join(layout.name for layout in layouts)
