"""Start from weights: another encoder's tensors in a backbone, and its preprocess contract in a run's configuration.

`parents` finds the encoder that `RunConfig.init` names; this module takes it over.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from embedkit.errors import ConfigError
from embedkit.model.preprocess import Preprocess
from embedkit.training.config import RunConfig
from embedkit.training.data import DataConfig
from embedkit.training.init import under_contract
from embedkit.training.models.backbones import SHORT_NAMES, Backbone

__all__ = ["Loaded", "Parent", "adapt_channels", "load_weights", "say_loaded", "starting_from"]

#: Arguments of timm that the run decides: its images have the channels and the size.
_OF_THE_RUN = ("in_chans", "img_size", "num_classes")


@dataclass(frozen=True, kw_only=True)
class Parent:
    """An encoder that a run starts from.

    Attributes:
        name: As messages and cards call it.
        architecture: timm's name of its backbone.
        model_args: What timm needs to build the same backbone.
        preprocess: Its contract.
        state: Its tensors by name, those of other parts among them.
        record: What `provenance.parents` says of it: `name`, a digest, and `license`, which a run has not.
        ancestors: The records of what it was trained from itself, where no license of its own covers them.
    """

    name: str
    architecture: str
    model_args: Mapping[str, Any]
    preprocess: Preprocess
    state: Mapping[str, Tensor]
    record: Mapping[str, str]
    ancestors: tuple[Mapping[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What was loaded.

    Attributes:
        loaded: Tensors of the backbone that were filled: all of them.
        adapted: Names of those among them that were brought to another shape.
        left: Names of the parent's tensors that the backbone has no place for: heads and the like.
    """

    loaded: int
    adapted: tuple[str, ...] = ()
    left: tuple[str, ...] = ()


def say_loaded(config: RunConfig, parent: Parent, found: Loaded) -> None:
    """Say on stderr what a run starts from, which tensors were changed to fit, and which have no place in it."""
    size, data = parent.preprocess.size, config.data
    parts = [f"init: {parent.name} ({parent.record.get('license', 'a run')})"]
    parts.append(f"all {found.loaded} tensors of {parent.architecture} loaded")
    if found.adapted:
        parts.append(f"adapted to {data.color} at {data.image_size} pixels: {_some(found.adapted)}")
    if found.left:
        parts.append(f"left out: {_some(found.left)}")
    if (data.color, data.image_size) != (parent.preprocess.color, size[0]):
        parts.append(
            f"images {data.color} at {data.image_size}x{data.image_size} pixels instead of "
            f"{parent.preprocess.color} at {size[0]}x{size[1]}"
        )
    _tell("; ".join(parts))


@rank_zero_only
def _tell(line: str) -> None:
    print(f"embedkit: {line}", file=sys.stderr)


def _some(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{', '.join(names[:4])}{more}"


def starting_from(config: RunConfig, parent: Parent) -> RunConfig:
    """`config` with the parent's backbone and contract.

    `data.image_size` and `data.color` stay as they are, unless they are 0 and `auto`; the resize rule keeps its
    proportion to the size. `backbone_args` of the configuration are added to the parent's own.

    Raises:
        ConfigError: A contract of images that are not square.
    """
    if config.backbone and SHORT_NAMES.get(config.backbone, config.backbone) != parent.architecture:
        _tell(
            f"init: the backbone is {parent.architecture}, that of {parent.name}, instead of {config.backbone}"
        )
    short = {timm_name: name for name, timm_name in SHORT_NAMES.items()}
    args = {key: value for key, value in parent.model_args.items() if key not in _OF_THE_RUN}
    return dataclasses.replace(
        config,
        backbone=short.get(parent.architecture, parent.architecture),
        backbone_args={**args, **config.backbone_args},
        data=under_contract(config.data, _contract(config.data, parent.preprocess)),
        parents=(parent.record, *parent.ancestors),
    )


def _contract(data: DataConfig, given: Preprocess) -> Preprocess:
    """The given contract for the size and the color that the data ask for."""
    size = (data.image_size, data.image_size) if data.image_size else given.size
    color = given.color if data.color == "auto" else data.color
    channels = 3 if color == "rgb" else 1
    # one channel that stands for three has their average, three that stand for one have its value
    mean, std = (
        values if len(values) == channels else (sum(values) / len(values),) * channels
        for values in (given.mean, given.std)
    )
    edge = round(given.resize_size * size[0] / given.size[0])
    return dataclasses.replace(given, size=size, color=color, resize_size=edge, mean=mean, std=std)


def load_weights(backbone: nn.Module, parent: Parent, method: str) -> Loaded:
    """Fill every tensor of a backbone from its parent, BatchNorm's statistics among them.

    Args:
        backbone: What the method built for the run.
        parent: Where the tensors come from.
        method: For messages.

    Returns:
        What was loaded, adapted and left.

    Raises:
        ConfigError: The method builds no plain backbone, or one with tensors that the parent does not have.
    """
    if not isinstance(backbone, Backbone):
        raise ConfigError(
            f"init: {method} has no backbone of one whole network, which {parent.name} could fill; leave init out, "
            "or train another method"
        )
    wanted = backbone.net.state_dict()
    prefix = _prefix(wanted, parent)
    own = {key.removeprefix(prefix): key for key in parent.state if key.startswith(prefix)}
    modules = {name.rpartition(".")[0] or "." for name in wanted}
    missing = [name for name in wanted if name not in own]
    # a tensor without a place, of a module that has one: a norm of another kind under the same name
    strange = [name for name in own if name not in wanted and (name.rpartition(".")[0] or ".") in modules]
    if missing or strange:
        raise ConfigError(
            f"init: {method} builds {parent.architecture} in another form than that of {parent.name}: "
            f"{len(missing) + len(strange)} tensors fit nowhere, such as {[*missing, *strange][0]}; leave init out, "
            "or train another method"
        )
    found, adapted = {}, []
    for name, target in wanted.items():
        value = parent.state[own[name]]
        if value.shape != target.shape:
            value = _fit(name, value, target, backbone, parent)
            adapted.append(name)
        if not bool(torch.isfinite(value).all()):
            raise ConfigError(f"init: {parent.name}: {name} holds NaN or infinity: its training diverged")
        found[name] = value
    backbone.net.load_state_dict(found, strict=True)
    left = sorted(set(parent.state) - {own[name] for name in wanted})
    return Loaded(loaded=len(wanted), adapted=tuple(adapted), left=tuple(left))


def _prefix(wanted: Mapping[str, Tensor], parent: Parent) -> str:
    """What stands before the backbone's names in the parent's: nothing, or the name of a module around it."""
    first = next(iter(wanted))
    prefixes = [key.removesuffix(first) for key in parent.state if key == first or key.endswith(f".{first}")]
    if "" in prefixes:
        return ""
    whole = [prefix for prefix in prefixes if all(f"{prefix}{name}" in parent.state for name in wanted)]
    if len(whole) != 1:
        raise ConfigError(
            f"init: {parent.name} holds {len(whole) or 'no'} networks {parent.architecture}, and one is expected; name "
            "another encoder"
        )
    return whole[0]


def _fit(name: str, value: Tensor, target: Tensor, backbone: Backbone, parent: Parent) -> Tensor:
    """A tensor of another shape: the first layer for other channels, or a ViT's position embeddings."""
    if value.ndim == 4 and (value.shape[0], *value.shape[2:]) == (target.shape[0], *target.shape[2:]):
        if {value.shape[1], target.shape[1]} == {1, 3} and target.shape[1] == backbone.in_chans:
            return adapt_channels(value, backbone.in_chans)
    grid = getattr(getattr(backbone.net, "patch_embed", None), "grid_size", None)
    if name == "pos_embed" and grid is not None and value.ndim == 3 and value.shape[2] == target.shape[2]:
        prefixed = target.shape[1] - grid[0] * grid[1]
        resized: Tensor = resample_abs_pos_embed(value.float(), list(grid), num_prefix_tokens=prefixed)
        return resized
    raise ConfigError(
        f"init: {name} of {parent.name} is {tuple(value.shape)}, and {tuple(target.shape)} in the run: "
        f"{parent.architecture} cannot change to images of {backbone.in_chans}x{backbone.image_size[0]}x"
        f"{backbone.image_size[1]}; leave data.image_size and backbone_args as they are in its entry"
    )


def adapt_channels(weight: Tensor, channels: int) -> Tensor:
    """The kernels of a first convolution for 1 instead of 3 channels, or 3 instead of 1.

    A gray image gives what it gave before: three equal channels through three kernels are one channel through their
    sum, and one channel through a kernel is three equal ones through a third of it each.

    Args:
        weight: (O, C, h, w).
        channels: C of the result.
    """
    gray = weight.float().sum(1, keepdim=True)
    return gray.expand(-1, channels, -1, -1) / channels
