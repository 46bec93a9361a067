"""timm's networks as entries: by timm's name, from a repository of the Hugging Face Hub, or from a local folder.

A repository or folder of timm's layout holds `config.json` and `model.safetensors` (or `pytorch_model.bin`). Both are
read here and not by timm, which loads a backbone without complaint where tensors are missing, takes options such as a
checkpoint's path from the file, and does not look at the weights' sha256. A bare name is timm's own affair: its table
says where the weights are and how they are converted.

Preprocessing, license and the shape of the module are those of `pretrained_cfg` and `model_args`.

    embedkit import hf-hub:timm/vit_small_patch16_224.dino --name dino-vit_s16.in1k
"""

from __future__ import annotations

import codecs
import math
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

import timm
import yaml
from timm.data import resolve_data_config
from timm.models import PretrainedCfg
from torch import nn

from embedkit._io.text import did_you_mean
from embedkit.authoring.import_request import Imported, License, Request, decide_license, license_in
from embedkit.errors import ConfigError, EntryError, SourceError, UnreachableError, ZooError
from embedkit.hub.access import is_offline
from embedkit.hub.download import download, persistent
from embedkit.hub.hf import HubZoo, Value, ask, hub_module
from embedkit.hub.licenses import is_open, restriction
from embedkit.hub.limits import CONFIG_LIMIT, MOST_BYTES
from embedkit.model.card import Card
from embedkit.model.layout import CARD, CONFIG, WEIGHTS, parse_json, sha256_hex
from embedkit.model.manifest import FileRecord
from embedkit.model.preprocess import Preprocess
from embedkit.training.importers.foreign import (
    fill,
    in_one_line,
    read_checkpoint,
    write_import,
)
from embedkit.training.importers.shaping import heads_of, pool_args, set_image_size, traps
from embedkit.training.models.backbones import args_from_file

__all__ = ["Source", "build_network", "from_name", "import_timm", "preprocess_of", "shaped"]

#: Refuses weights by the licenses that they state; the second argument is for messages.
Admit: TypeAlias = Callable[[tuple[str, ...], str], None]

HUB, FOLDER = "hf-hub:", "local-dir:"
PICKLE = "pytorch_model.bin"

#: The front matter of a model card, its line ends being those of Unix.
_FRONT = re.compile(rb"\s*---[ \t]*\n(.*?)(?<=\n)---[ \t]*(?:\n|\Z)", re.DOTALL)
_REPOSITORY = re.compile(r"(\w[\w.-]*)/(\w[\w.-]*)(?:@(\w[\w./-]*))?", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Weights, and what timm says about them.

    Attributes:
        where: For messages.
        architecture: timm's name of the network.
        model_args: What shapes it.
        cfg: timm's `pretrained_cfg`.
        state: Its tensors, those of its classifier among them.
        preprocess: Its contract.
        licenses: Those that are stated.
        provenance: Where the weights are from.
    """

    where: str
    architecture: str
    model_args: Mapping[str, Any]
    cfg: Mapping[str, Any]
    state: Mapping[str, Any]
    preprocess: Preprocess
    licenses: tuple[str, ...]
    provenance: Mapping[str, Any]


def import_timm(source: str, request: Request, *, token: str | None = None) -> Imported:
    """Write a timm network with its weights as an entry of the zoo.

    Args:
        source: A name of timm's with weights, `hf-hub:org/name[@revision]`, or `local-dir:PATH`.
        request: The entry that is wanted.
        token: Credential for the Hub; see `HubZoo`.

    Returns:
        The entry.

    Raises:
        ConfigError: No such name, no license known, or another one than the weights state.
        SourceError: The folder cannot be read.
        ZooError: The Hub refuses, or (UnreachableError) gives no answer.
        EntryError: The configuration or the weights are not what they promise.
        ParityError: As for `write_entry`; nothing is written.
    """

    def admit(licenses: tuple[str, ...], where: str) -> None:
        """Before any weights are taken."""
        name = _license(request, licenses, where).name
        if (what := restriction(name)) and not request.accept_license:
            raise ConfigError(
                f"{where}: the weights are under {name}, which {what}: to accept this, give --accept-license"
            )

    if source.startswith(HUB):
        found = _from_hub(source.removeprefix(HUB), token, admit)
    elif source.startswith(FOLDER):  # its weights are here
        found = _from_folder(Path(source.removeprefix(FOLDER)))
    else:
        found = from_name(source, admit)
    license = _license(request, found.licenses, found.where)
    network, model_args, preprocess, dropped, notes = shaped(
        request,
        lambda arguments: build_network(found, arguments),
        found.state,
        cfg=found.cfg,
        preprocess=found.preprocess,
        architecture=found.architecture,
        where=found.where,
    )
    return write_import(
        request,
        network,
        architecture=found.architecture,
        model_args={**found.model_args, **model_args},
        preprocess=preprocess,
        license=license,
        provenance={
            **found.provenance,
            **({"stated_licenses": list(found.licenses)} if len(found.licenses) > 1 else {}),
            "removed": dropped,
            "importer": "embedkit.training.importers.timm_models",
            "timm": timm.__version__,
        },
        card=Card(
            summary=f"timm's {found.architecture} with the weights of {found.where}, without its classifier.",
            datasets=("imagenet-1k",) if request.tag == "in1k" else (),
        ),
        recognized=f"{found.where}, network {found.architecture}",
        notes=notes,
    )


def shaped(
    request: Request,
    build: Callable[[Mapping[str, Any]], nn.Module],
    state: Mapping[str, Any],
    *,
    cfg: Mapping[str, Any],
    preprocess: Preprocess,
    architecture: str,
    where: str,
    more_heads: tuple[str, ...] = (),
) -> tuple[nn.Module, dict[str, Any], Preprocess, list[str], tuple[str, ...]]:
    """A network of timm's, filled, with the pooling and the image size that were asked for.

    Args:
        request: What is asked for.
        build: Arguments for timm -> the network, at random initialization.
        state: Its tensors.
        cfg: timm's `pretrained_cfg`.
        preprocess: The contract of these weights.
        architecture: timm's name.
        where: For messages.
        more_heads: What else may be left out, beside the classifier.

    Returns:
        The network, further arguments that shape it, the contract, the tensors left out, and what to tell the user.

    Raises:
        ConfigError: A pooling, a size or a part of the contract that is not possible.
        EntryError: The tensors do not fill the network.
    """
    contract = request.contract.applied(preprocess)
    if contract.channels != preprocess.channels:
        raise ConfigError(f"{where} takes {preprocess.channels} channels: leave --color {contract.color} out")
    network = build({})
    arguments = pool_args(network, request.pool, where)
    if arguments:
        network = build(arguments)
    dropped = fill(network, state, heads=(*heads_of(cfg, arguments), *more_heads), where=where)
    arguments.update(set_image_size(network, preprocess.size, contract.size))
    classes = cfg.get("num_classes")
    notes = traps(
        network,
        architecture,
        contract,
        native=preprocess.size,
        pooled=request.pool is not None,
        projection=classes if dropped and isinstance(classes, int) else 0,
    )
    return network, arguments, contract, dropped, notes


def _license(request: Request, stated: tuple[str, ...], where: str) -> License:
    """Where two are stated (the MAE of one card and of its source), the stricter one counts."""
    strict = [license for license in stated if not is_open(license)]
    known = next(iter([*strict, *stated]), None)
    return decide_license(request, known, stated=True, where=where)


def preprocess_of(cfg: Mapping[str, Any], where: str) -> Preprocess:
    """The contract that says what timm's evaluation does; the inverse of `timm_config`.

    Args:
        cfg: A `pretrained_cfg`; what it leaves out has timm's defaults.
        where: For messages.

    Raises:
        EntryError: A rule that the contract cannot state.
    """
    try:
        data = resolve_data_config({}, pretrained_cfg={"tag": "", **cfg})
        channels, height, width = (int(side) for side in data["input_size"])
        edges = {math.floor(side / data["crop_pct"]) for side in (height, width)}
        mean, std = (tuple(float(value) for value in data[key]) for key in ("mean", "std"))
        mode, interpolation = str(data["crop_mode"]), str(data["interpolation"])
        pads = {round(255 * value) for value in mean}
        if not all(map(math.isfinite, std)):
            raise ValueError("std is not finite")
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise EntryError(f"{where}: pretrained_cfg is not timm's ({in_one_line(error)})") from None
    rules: dict[str, tuple[bool, dict[str, Any]]] = {
        "center": (len(edges) == 1, {"resize": "shortest"}),
        "squash": (edges <= {height, width}, {"resize": "squash"}),
        "border": (len(edges) == len(pads) == 1, {"resize": "longest", "pad": min(pads, default=0)}),
    }
    possible, rule = rules.get(mode, (False, {}))
    if channels not in (1, 3) or not possible:
        raise EntryError(
            f"{where}: images of {channels}x{height}x{width}, crop_mode {mode!r} and crop_pct {data['crop_pct']}: "
            "the preprocess contract cannot state this"
        )
    return Preprocess(
        color="rgb" if channels == 3 else "gray",
        size=(height, width),
        resize_size=0 if mode == "squash" else min(edges),
        interpolation=interpolation,
        mean=mean,
        std=std,
        **rule,
    )


def _from_folder(folder: Path) -> Source:
    def read(name: str) -> bytes | None:
        path = folder / name
        try:
            return path.read_bytes() if os.path.isfile(path) else None
        except OSError as error:
            raise SourceError(f"{path} cannot be read ({error.strerror})") from None

    if not os.path.isdir(folder):
        raise SourceError(f"{folder}: no such folder; give local-dir: and the path of one with {CONFIG}")
    name = folder.absolute().name
    return _of_timm_layout(read, name, {"folder": name})


def _from_hub(address: str, token: str | None, admit: Admit) -> Source:
    match = _REPOSITORY.fullmatch(address)
    if match is None or ".." in address:
        raise ConfigError(f"{HUB}{address}: expected {HUB}org/name or {HUB}org/name@revision")
    organization, name, revision = match.groups()
    where = f"{HUB}{organization}/{name}"
    _refuse_offline(where)
    place = HubZoo(organization, token)
    commit = place.commit(name, revision or "main")
    if commit is None:
        raise ZooError(
            f"{where}: the hub shows no such repository"
            + (f" at {revision}" if revision else "")
            + "; a private one "
            "asks for a token"
        )
    listed = _ask(where, lambda: list(place.api().list_repo_tree(place.repository(name), revision=commit)))
    files = {one.path: one for one in listed if getattr(one, "size", None) is not None}
    storage = place.storage(name, commit)

    def read(path: str) -> bytes | None:
        if path not in files:
            return None
        stored = getattr(files[path], "lfs", None)
        try:
            if stored is None:
                limit = MOST_BYTES if path in (WEIGHTS, PICKLE) else CONFIG_LIMIT
                return persistent(lambda: storage.read(path, limit))
            with tempfile.TemporaryDirectory() as scratch:
                target = Path(scratch) / "file"
                download(storage, path, FileRecord(size=stored.size, sha256=stored.sha256), target)
                return target.read_bytes()
        except FileNotFoundError:
            raise ZooError(f"{where}: the hub lists {path} and does not give it; try again") from None

    return _of_timm_layout(read, where, {"repository": f"{organization}/{name}", "commit": commit}, admit)


def _of_timm_layout(
    read: Callable[[str], bytes | None], where: str, provenance: Mapping[str, Any], admit: Admit | None = None
) -> Source:
    """What the files of a folder or a repository say; `read` gives None for one that is not there."""
    text = read(CONFIG)
    if text is None:
        raise EntryError(f"{where} has no {CONFIG}: it is not of timm's layout")
    config = parse_json(text, f"{where}: {CONFIG}")
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise EntryError(f"{where}: {CONFIG}: architecture: expected timm's name of the network")
    cfg, model_args = config.get("pretrained_cfg", config), config.get("model_args", {})
    if not isinstance(cfg, dict) or not isinstance(model_args, dict):
        raise EntryError(f"{where}: {CONFIG}: expected objects as pretrained_cfg and model_args")
    model_args = args_from_file(model_args, f"{where}: {CONFIG}")
    ours = config.get("embedkit")
    stated = (
        cfg.get("license"),
        *_card_licenses(read(CARD), where),
        config.get("license"),
        ours.get("license") if isinstance(ours, dict) else None,
    )
    licenses = _licenses(stated, where)
    if admit is not None:
        admit(licenses, where)
    for file in (WEIGHTS, PICKLE):
        content = read(file)
        if content is not None:
            break
    else:
        raise EntryError(f"{where} has neither {WEIGHTS} nor {PICKLE}")
    state = read_checkpoint(content, file)
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise EntryError(
            f"{where}: {file}: expected tensors by name; a training checkpoint is given as a file"
        )
    return Source(
        where=where,
        architecture=config["architecture"],
        model_args=model_args,
        cfg=cfg,
        state=state,
        # An entry of ours says more than timm's keys can, such as the color of a border.
        preprocess=Preprocess.from_json(ours.get("preprocess"), where)
        if isinstance(ours, dict)
        else preprocess_of(cfg, where),
        licenses=licenses,
        provenance={**provenance, "file": file, "sha256": sha256_hex(content)},
    )


def from_name(name: str, admit: Admit | None = None) -> Source:
    """A network of timm's own table with its weights, from the Hub's cache or the Hub.

    Args:
        name: timm's, with the tag of the weights.
        admit: Refuses the weights by their licenses, before they are asked for.

    Raises:
        ConfigError: No such name, or one without weights.
        ZooError: The Hub refuses, or (UnreachableError) gives no answer.
    """
    if not timm.is_model(name):
        near = did_you_mean(name, timm.list_models(pretrained=True), most=3)
        raise ConfigError(
            f"{name!r} is neither a checkpoint file, nor {HUB}org/name, nor {FOLDER}PATH, nor a name of timm's"
            + (f"; {near}" if near else "")
        )
    declared = timm.models.get_pretrained_cfg(name)
    if declared is None or not declared.has_weights:
        tagged = timm.list_models(f"{name.partition('.')[0]}*", pretrained=True)[:4]
        raise ConfigError(
            f"{name}: timm has no weights of this name"
            + (f"; it has {', '.join(tagged)}" if tagged else "; name one of its networks that has")
        )
    cfg = declared.to_dict()
    licenses = _licenses((cfg.get("license"),), name)
    if admit is not None:
        admit(licenses, f"timm's {name}")
    _check_reachable(declared.hf_hub_id, f"timm's {name}")
    # With its classifier, since timm is strict about missing tensors only then.
    network = _ask(f"timm's {name}", lambda: timm.create_model(name, pretrained=True))
    return Source(
        where=f"timm's {name}",
        architecture=name.partition(".")[0],
        model_args={},
        cfg=cfg,
        state=network.state_dict(),
        preprocess=preprocess_of(cfg, name),
        licenses=licenses,
        provenance={
            "timm_name": name,
            "weights": cfg.get("hf_hub_id") or cfg.get("url"),
            **_cached(cfg.get("hf_hub_id")),
        },
    )


def _ask(where: str, function: Callable[[], Value]) -> Value:
    """`ask`, for a repository that must be there."""
    errors = hub_module("errors")
    try:
        return ask(where, function)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise ZooError(f"{where}: the hub shows no such repository; a private one asks for a token") from None


def _check_reachable(repository: str | None, where: str) -> None:
    """Ask once for a file of a repository that is not in the cache: without a network timm's client tries for minutes.

    Raises:
        UnreachableError: No answer.
    """
    if not repository or _cached(repository):
        return
    _refuse_offline(where)
    organization, _, name = repository.partition("/")
    try:
        HubZoo(organization).storage(name).read(CONFIG, CONFIG_LIMIT)
    except UnreachableError as error:
        raise UnreachableError(
            f"{where}: its weights are not in the cache, and the hub gives no answer ({error})"
        ) from None
    except (FileNotFoundError, ZooError):
        pass  # an answer; what it means is for timm's client


def _refuse_offline(where: str) -> None:
    if is_offline():
        raise UnreachableError(
            f"{where}: its weights are not here, and HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids a connection; "
            f"unset it, or give a folder that you have as {FOLDER}PATH"
        )


def _cached(repository: str | None) -> dict[str, str]:
    """Commit and sha256 of the weights file that timm has just taken from the Hub."""
    for file in (WEIGHTS, PICKLE) if repository else ():
        path = hub_module().try_to_load_from_cache(repository, file)
        if isinstance(path, str):
            return {
                "commit": Path(path).parent.name,
                "file": file,
                "sha256": sha256_hex(Path(path).read_bytes()),
            }
    return {}


def build_network(source: Source, arguments: Mapping[str, Any] | None = None) -> nn.Module:
    """The network without its classifier, at random initialization.

    Args:
        source: What it is.
        arguments: What replaces those of the source.

    Raises:
        EntryError: timm does not know it, or cannot build it so.
    """
    known = {field.name for field in fields(PretrainedCfg)}
    cfg = {key: value for key, value in source.cfg.items() if key in known}
    if not timm.is_model(source.architecture) or "." in source.architecture:
        raise EntryError(
            f"{source.where}: {CONFIG}: timm {timm.__version__} knows no network {source.architecture[:80]!r}"
        )
    try:
        return timm.create_model(
            source.architecture,
            pretrained_cfg=cfg,
            num_classes=0,
            **{**source.model_args, **(arguments or {})},
        )
    except Exception as error:  # timm checks no argument, and these are from a file
        raise EntryError(
            f"{source.where}: timm cannot build {source.architecture} ({in_one_line(error)})"
        ) from None


def _licenses(stated: tuple[Any, ...], where: str) -> tuple[str, ...]:
    """Those that say something, lists among them laid out, each once whatever its case.

    Raises:
        ConfigError: One is no name of a license.
    """
    found: dict[str, str] = {}
    for one in stated:
        for text in one if isinstance(one, list | tuple) else (one,):
            if text is not None and not isinstance(text, str):
                raise ConfigError(
                    f"{where}: states a license that is no text ({type(text).__name__}): fix it in a folder of your "
                    f"own and give that as {FOLDER}PATH"
                )
            name = license_in(text, where)
            if name is not None:
                found.setdefault(name.casefold(), name)
    return tuple(found.values())


def _card_licenses(card: bytes | None, where: str) -> tuple[Any, ...]:
    """`license` and `license_name` of a model card's front matter; nothing where there is none.

    Raises:
        EntryError: There is one that cannot be read: what it says of the license would be lost.
    """
    text = (card or b"").removeprefix(codecs.BOM_UTF8).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    if not re.match(rb"\s*---[ \t]*(\n|\Z)", text):
        return ()
    front = _FRONT.match(text)
    try:
        if front is None:
            raise ValueError("no second --- after the first")
        facts = yaml.safe_load(front[1].decode())
        if not isinstance(facts, dict | None):
            raise ValueError("it holds no keys")
    except Exception as error:  # YAML's own, and those of its numbers, dates, depth and bytes
        raise EntryError(
            f"{where}: the front matter of {CARD} cannot be read, so that the license is not known "
            f"({ascii(in_one_line(error))}): fix it in a folder of your own and give that as {FOLDER}PATH"
        ) from None
    if facts is None:
        return ()
    return facts.get("license"), facts.get("license_name")
