"""The configuration of a run, its JSON form, and overrides of single fields from the command line."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from embedkit._io.json import JsonFormat
from embedkit._io.reading import read_regular
from embedkit._io.text import did_you_mean, one_line
from embedkit.errors import ConfigError, EmbedkitError
from embedkit.training.data import DataConfig
from embedkit.training.data.config import CONTRACT
from embedkit.training.optim import Optimizer

__all__ = [
    "Evaluation",
    "Facts",
    "RunConfig",
    "from_json",
    "method_name",
    "checked",
    "read_config_file",
    "read_json",
    "to_json",
    "with_overrides",
]

_T = TypeVar("_T")
_PACKAGE = "embedkit.training."
_MAPPING = "mapping"
#: Fields that an encoder named by `init` decides.
_OF_THE_GIVEN = ("parents", *(f"data.{name}" for name in CONTRACT if name not in ("image_size", "color")))


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Evaluation while training, on the held-out training images: never on the test part.

    Attributes:
        every: Steps between two evaluations, the first before the first step; 0 for none.
        metric: Chooses the best weights: `knn_top1`, `map_at_r`, or `auto`, which is kNN where the held-out images'
            classes are trained on, and MAP@R where they are not.
        patience: End the run after so many evaluations in a row without better weights; 0 never does.
        images: Held-out images at most, and training images at most that kNN searches.
    """

    every: int = 0
    metric: Literal["auto", "knn_top1", "map_at_r"] = "auto"
    patience: int = 0
    images: int = 2048


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides a run's result; a recipe returns one.

    Attributes:
        recipe: The name that it was made by.
        method: The `Config` of a module of `embedkit.training.methods`; which module says which method.
        backbone: As `create_backbone` takes it; the method says which channels and size it is built for.
        backbone_args: Further arguments of `create_backbone`, and of the network for timm: `norm`, `drop_path_rate`.
        init: What the backbone's weights are at the start: an entry's name or folder, a run's folder or `timm:NAME`,
            whose backbone and preprocess contract the run takes over; empty for random ones. See `parents`.
        freeze: Parts of the backbone that keep the weights of `init`, from the input on: 1 is the stem, 2 the stem and
            the first stage of a ResNet or block of a ViT; 0 for none. Their BatchNorm stays in eval mode.
        parents: Name, digest and license of what `init` named; the run writes them down.
        data: Where the images come from and how they are brought to size.
        optimizer: And its schedule.
        optimizers: Of single networks of the method (`Method.networks`), by name, where they differ.
        batch_size: Images of one step, over all devices.
        epochs: Passes over the training images, unless `steps` is above 0.
        steps: Batches of the whole run; 0: as many as `epochs` are.
        max_images: End after so many images, counted as often as they are seen; 0: no such limit.
        max_flops: End after so many floating-point operations of training (see `callbacks.Cost`); 0: no such limit.
        seed: Of weights, batches, views and masks.
        precision: `bf16` (autocast), `fp16` (autocast and scaled gradients; on a GPU), `fp32`, or `auto`: bf16 where
            the processor multiplies it natively, else fp16 on a GPU and fp32 on a CPU.
        threads: Of torch on the CPU; 0: its own choice. The resolved number is used again on resume.
        accelerator: As Lightning's Trainer takes it.
        devices: As Lightning's Trainer takes it; `batch_size` must be a multiple of all devices.
        compile: Whether torch compiles the backbone; a method that calls only parts of it (`mae`) gains nothing.
        sync_batch_norm: BatchNorm over the images of all devices; torch has it on GPU alone.
        num_nodes: As Lightning's Trainer takes it.
        evaluation: While training, on held-out images.
        checkpoint_seconds: Time between two checkpoints.
        log_every: Steps between two rows of `metrics.csv`.
    """

    recipe: str = ""
    method: Any
    backbone: str = "r10"
    backbone_args: Mapping[str, Any] = field(default_factory=dict)
    init: str = ""
    freeze: int = 0
    parents: tuple[Mapping[str, str], ...] = ()
    data: DataConfig = DataConfig()
    optimizer: Optimizer = Optimizer()
    optimizers: Mapping[str, Optimizer] = field(default_factory=dict)
    batch_size: int = 512
    epochs: float = 10.0
    steps: int = 0
    max_images: int = 0
    max_flops: float = 0.0
    seed: int = 0
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    threads: int = 0
    accelerator: str = "auto"
    devices: int = 1
    num_nodes: int = 1
    sync_batch_norm: bool = False
    compile: bool = False
    evaluation: Evaluation = Evaluation()
    checkpoint_seconds: float = 60.0
    log_every: int = 10


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a run tells its method.

    Attributes:
        image_shape: (C, H, W) of the images.
        mean: Per channel, in units of [0, 1], over the training images.
        std: Per channel, in units of [0, 1].
        num_classes: K; 0 where the data have no labels.
        targets: Classes of each further target, by name.
        num_images: Training images, the labeled and the others.
        batch_size: Images of one step, over all ranks.
        steps_per_epoch: Batches of one pass over the data.
        total_steps: Batches of the whole run; None while a time budget is still being measured.
        optimizer: Of the run.
        optimizers: Of single networks, by name.
        seed: Of the run.
        data_sha256: Digest of a sample of the training images and of all their labels; empty in older runs.
    """

    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int = 0
    targets: Mapping[str, int] = field(default_factory=dict)
    num_images: int = 0
    batch_size: int
    steps_per_epoch: int
    total_steps: int | None
    optimizer: Optimizer = Optimizer()
    optimizers: Mapping[str, Optimizer] = field(default_factory=dict)
    seed: int = 0
    data_sha256: str = ""


def method_name(config: RunConfig) -> str:
    """The module of `embedkit.training.methods` that the run's method stands in."""
    return type(config.method).__module__.removeprefix(f"{_PACKAGE}methods.").partition(".")[0]


def to_json(value: Any) -> Any:
    """A configuration as JSON values: a dataclass becomes an object whose `type` is `module.Class`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": _kind(type(value)), **fields}
    if isinstance(value, (tuple, list)):
        return [to_json(item) for item in value]
    if isinstance(value, Mapping):
        return {"type": _MAPPING, "items": {str(key): to_json(item) for key, item in value.items()}}
    return value


def _kind(cls: type) -> str:
    """`module.Class` below `embedkit.training`: of the package that gives the class, where one does.

    Files of runs stay readable when a class moves within its package: `augment.Compose`, in any file of `augment`.
    """
    module = cls.__module__
    package = module.rpartition(".")[0]
    if package.startswith(_PACKAGE) and getattr(sys.modules[package], cls.__name__, None) is cls:
        module = package
    return f"{module}.{cls.__name__}".removeprefix(_PACKAGE)


def from_json(value: Any, where: str = "config") -> Any:
    """The inverse of `to_json`: lists become tuples; only dataclasses of `embedkit.training` are made.

    Raises:
        ConfigError: An unknown type or field.
    """
    if isinstance(value, list):
        return tuple(from_json(item, f"{where}.{index}") for index, item in enumerate(value))
    if not isinstance(value, dict):
        return value
    if value.get("type") == _MAPPING:
        items = value.get("items")
        if not isinstance(items, dict):
            raise ConfigError(f"{where}.items: expected an object, found {type(items).__name__}")
        return {key: from_json(item, f"{where}.{key}") for key, item in items.items()}
    fields = {key: from_json(item, f"{where}.{key}") for key, item in value.items() if key != "type"}
    kind = str(value.get("type", ""))
    module, _, name = kind.rpartition(".")
    try:
        cls = getattr(importlib.import_module(_PACKAGE + module), name)
    except (ImportError, AttributeError):
        cls = None
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise ConfigError(f"{where}.type: this embedkit has no {kind!r}; was the run made by a newer one?")
    known = [f.name for f in dataclasses.fields(cls)]
    for key in fields:
        if key not in known:
            raise ConfigError(f"{where}: {kind} has no field {key!r}; {_nearest(key, known)}")
    try:
        return cls(**fields)
    except TypeError as error:  # a field without a default is missing, or a value is of another type
        raise ConfigError(f"{where}: {kind}: {error}") from None


def read_config_file(path: str | os.PathLike[str]) -> RunConfig:
    """The configuration in a run's `config.json`, or one that `to_json` made.

    Example:
        config = read_config_file("runs/simclr-color/config.json")

    Raises:
        ConfigError: No such file, no configuration of a run, or a value of another type than its field's.
    """
    stored = read_json(path, ConfigError)
    if isinstance(stored, dict) and isinstance(stored.get("config"), dict):
        stored = stored["config"]
    return checked(from_json(stored, str(path)), RunConfig, str(path))


def read_json(path: str | os.PathLike[str], error: type[EmbedkitError]) -> Any:
    """The JSON in a run's file, which may have been written by hand.

    Raises:
        EmbedkitError: Of the class `error`: it cannot be read, or is not JSON.
    """
    form = JsonFormat(error=error, step="expected a run's config.json")
    try:
        return form.parse(read_regular(path, form.limit), os.fspath(path))
    except (OSError, ValueError) as fault:  # ValueError: a path with a NUL
        raise error(f"{os.fspath(path)}: expected a run's config.json ({one_line(fault)})") from None


def checked(value: Any, kind: type[_T], where: str) -> _T:
    """What `from_json` made of a file, if it is a `kind` and its values are of the types of their fields.

    Raises:
        ConfigError: Naming the field.
    """
    if not isinstance(value, kind):
        raise ConfigError(f"{where}: expected a run's config.json, found other JSON")
    _check_types(value, where)
    return value


def _check_types(node: Any, where: str) -> None:
    """Refuse values that their fields do not take: a file may have been written by hand."""
    hints = typing.get_type_hints(type(node))
    for f in dataclasses.fields(node):
        value = getattr(node, f.name)
        if not _fits(value, hints[f.name]):
            raise ConfigError(f"{where}: {f.name}: expected {_in_words(hints[f.name])}, found {value!r}")
        inner = value if isinstance(value, tuple) else (value,)
        for item in value.values() if isinstance(value, Mapping) else inner:
            if dataclasses.is_dataclass(item):
                _check_types(item, f"{where}: {f.name}")


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        if not isinstance(value, tuple) or (arguments[-1] is not ... and len(value) != len(arguments)):
            return False
        kinds = arguments[:1] * len(value) if arguments[-1] is ... else arguments
        return all(map(_fits, value, kinds))
    if origin is Mapping:
        return isinstance(value, Mapping) and all(_fits(item, arguments[1]) for item in value.values())
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, kind) for kind in arguments)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or hint)


def _in_words(hint: Any) -> str:
    kinds = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
    return kinds.get(hint) or str(getattr(hint, "__name__", hint)).replace("typing.", "")


def with_overrides(config: RunConfig, assignments: Iterable[str]) -> RunConfig:
    """`config` with single fields replaced.

    Args:
        config: A complete configuration, as a recipe returns it.
        assignments: `field=value`, dotted into nested fields and numbered into tuples:
            `method.temperature=0.2`, `optimizer.lr=1e-3`, `method.augment.steps.0.scale=0.3,1`. Where `init` is set and
            the configuration has none, size, color and backbone become the given encoder's, unless they are set too.

    Raises:
        ConfigError: No `=`, an unknown field, or a value that the field's type does not take.
    """
    assignments = list(assignments)
    paths = [assignment.partition("=")[0].strip() for assignment in assignments]
    if "init" in paths and not config.init:
        # size, color and network were the recipe's for weights of its own; now they are the given encoder's
        data = dataclasses.replace(config.data, image_size=0, load_size=0, color="auto")
        config = dataclasses.replace(config, backbone_args={}, data=data)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set {assignment}: expected field=value, such as optimizer.lr=0.001")
        config = _replace(config, path.strip().split("."), text.strip(), f"--set {path.strip()}")
    if config.init:
        for path in paths:
            if path in _OF_THE_GIVEN:
                raise ConfigError(f"--set {path}: with init it is as in the given encoder; leave it out")
    return config


def _replace(node: Any, path: list[str], text: str, where: str) -> Any:
    key, rest = path[0], path[1:]
    if isinstance(node, tuple):
        if not key.isdecimal() or len(key) > 9 or int(key) >= len(node):
            raise ConfigError(f"{where}: expected a number of 0 to {len(node) - 1}, found {key!r}")
        old, hint = node[int(key)], type(node[int(key)])
        new = _replace(old, rest, text, where) if rest else _parse(text, hint, where)
        return (*node[: int(key)], new, *node[int(key) + 1 :])
    if isinstance(node, Mapping):
        return {**node, key: _item(node, key, rest, text, where)}
    if not dataclasses.is_dataclass(node) or isinstance(node, type):
        raise ConfigError(f"{where}: {key!r} is one name too many: before it is the value {node!r}")
    known = [f.name for f in dataclasses.fields(node)]
    if key not in known:
        raise ConfigError(f"{where}: {type(node).__name__} has no field {key!r}; {_nearest(key, known)}")
    old = getattr(node, key)
    if rest:
        new = _replace(old, rest, text, where)
        if isinstance(old, Mapping) and not _fits(new, hint := typing.get_type_hints(type(node))[key]):
            raise ConfigError(f"{where}: expected {_in_words(typing.get_args(hint)[1])}, found {text!r}")
    elif dataclasses.is_dataclass(old) or isinstance(old, Mapping):
        inner = ", ".join(old if isinstance(old, Mapping) else [f.name for f in dataclasses.fields(old)])
        raise ConfigError(f"{where}: set one of its fields ({inner}) instead of the whole")
    else:
        new = _parse(text, typing.get_type_hints(type(node))[key], where)
    return dataclasses.replace(node, **{key: new})


def _item(node: Mapping[str, Any], key: str, rest: list[str], text: str, where: str) -> Any:
    """The new value of an item: of a setting within it, or JSON, or a string."""
    if rest:
        if key not in node:
            raise ConfigError(f"{where}: there is no {key!r}; {_nearest(key, list(node))}")
        return _replace(node[key], rest, text, where)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return tuple(value) if isinstance(value, list) else value


def _nearest(key: str, known: list[str]) -> str:
    return did_you_mean(key, known, most=3, otherwise=f"it has {', '.join(known)}")


def _parse(text: str, hint: Any, where: str) -> Any:
    """`text` as a value of the type `hint`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if text not in arguments:
            raise ConfigError(f"{where}: expected one of {', '.join(map(str, arguments))}, found {text!r}")
        return text
    if origin is tuple:
        items = [item.strip() for item in text.strip("[]() ").split(",") if item.strip()]
        if arguments[-1] is ...:
            return tuple(_parse(item, arguments[0], where) for item in items)
        if len(items) != len(arguments):
            raise ConfigError(
                f"{where}: expected {len(arguments)} values with commas between, found {text!r}"
            )
        return tuple(_parse(item, kind, where) for item, kind in zip(items, arguments, strict=True))
    if type(None) in arguments:
        if text.lower() in ("none", "null"):
            return None
        return _parse(text, next(kind for kind in arguments if kind is not type(None)), where)
    if hint is str:
        return text
    if hint is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        if hint in (int, float):
            number = hint(text)
            if math.isfinite(number):
                return number
    except (ValueError, OverflowError):
        pass
    raise ConfigError(f"{where}: expected {_in_words(hint)}, found {text!r}")
