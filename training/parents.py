"""The encoder that a run starts from: a zoo's entry, a run, or a network of timm with its weights.

embedkit train supervised --data PHOTOGRAPHS --set init=supervised-efficientnet_lite0
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from embedkit.errors import ConfigError, EntryError
from embedkit.hub.licenses import is_open
from embedkit.hub.resolve import find_entry, is_path
from embedkit.hub.verified import VerifiedEntry
from embedkit.model.layout import MANIFEST, WEIGHTS, sha256_hex
from embedkit.training.build import build_method
from embedkit.training.config import from_json
from embedkit.training.init import ENCODER
from embedkit.training.models.backbones import SHORT_NAMES, Backbone, args_from_file
from embedkit.training.run_folder import CONFIG, read_config
from embedkit.training.transfer import Parent

__all__ = ["TIMM", "find_parent"]

#: Before a name of timm's.
TIMM = "timm:"


def find_parent(name: str) -> Parent:
    """Find what `RunConfig.init` names, and read its weights.

    Args:
        name: An entry's name or folder, as `load_encoder` takes it; a run's folder; or `timm:NAME`.

    Returns:
        The encoder. An entry's files have been checked against its manifest.

    Raises:
        ConfigError: It has no backbone that timm can build, or a run that has not finished.
        EmbedkitError: As for `load_encoder`, and for `timm:NAME` as for `import_timm`.
    """
    if name.startswith(TIMM):
        return _of_timm(name.removeprefix(TIMM))
    folder = Path(name)
    if is_path(name) and os.path.isfile(folder / CONFIG) and not os.path.isfile(folder / MANIFEST):
        return _of_run(folder)
    return _of_entry(find_entry(name))


def _of_entry(entry: VerifiedEntry) -> Parent:
    config = entry.config
    if config.kind != "encoder":
        raise ConfigError(f"init: {entry.name} is a {config.kind}, and a run starts from an encoder")
    run = config.provenance.get("run")
    if config.timm.get("model_args") is not None:
        architecture: str = config.architecture
        args: Any = config.timm["model_args"]
    elif isinstance(run, Mapping) and isinstance(run.get("backbone"), str):
        # an encoder of more than a backbone, such as a backbone and a linear layer: the run knows the backbone
        architecture = SHORT_NAMES.get(run["backbone"]) or run["backbone"]
        args = run.get("backbone_args") or {}  # of runs before there were any: none
        args = from_json(args, f"{entry.location}: provenance.run.backbone_args") if args else {}
    else:
        raise ConfigError(
            f"init: {entry.name} is {config.architecture}, which timm cannot build, so that it cannot be trained; "
            "name another encoder"
        )
    return Parent(
        name=entry.name,
        architecture=architecture,
        model_args=args_from_file(args, entry.location),
        preprocess=config.preprocess,
        state=_tensors(entry.read(WEIGHTS), f"{entry.location}/{WEIGHTS}"),
        record={"name": entry.name, "manifest_sha256": entry.revision, "license": config.license},
    )


def _of_run(run: Path) -> Parent:
    config, facts = read_config(run)
    if not os.path.isfile(run / ENCODER):
        raise ConfigError(
            f"init: {run}: the run has not finished; continue it with `embedkit train --resume {run}`"
        )
    backbone = build_method(config, facts).backbone
    if not isinstance(backbone, Backbone) or backbone.model_args is None:
        raise ConfigError(
            f"init: the encoder of {run} is not one whole network of timm; name another encoder"
        )
    content = (run / ENCODER).read_bytes()
    return Parent(
        name=run.resolve().name,
        architecture=backbone.architecture,
        model_args=backbone.model_args,
        preprocess=config.data.preprocess(facts.mean, facts.std),
        state=_tensors(content, str(run / ENCODER)),
        record={"name": run.resolve().name, "weights_sha256": sha256_hex(content)},
        ancestors=config.parents,
    )


def _of_timm(name: str) -> Parent:
    # with it comes onnx, which no other run needs
    from embedkit.training.importers.timm_models import build_network, from_name

    found = from_name(name)
    pool: Any = getattr(build_network(found), "global_pool", "")
    pool = pool if isinstance(pool, str) else getattr(pool, "pool_type", "")
    strict = [license for license in found.licenses if not is_open(license)]
    known = next(iter([*strict, *found.licenses]), None)
    facts = {key: found.provenance.get(key) for key in ("weights", "commit", "sha256")}
    return Parent(
        name=f"{TIMM}{name}",
        architecture=found.architecture,
        model_args={**({"global_pool": pool} if pool else {}), **found.model_args},
        preprocess=found.preprocess,
        state=found.state,
        record={
            "name": f"{TIMM}{name}",
            **{key: str(value) for key, value in facts.items() if value},
            "license": known or "unknown",
        },
    )


def _tensors(content: bytes, where: str) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(content)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise EntryError(f"{where} cannot be read ({type(error).__name__}: {error})") from None
