"""From a training run to a zoo entry, with the run's configuration, data, cost and pretext task in its card."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from embedkit.errors import ConfigError
from embedkit.hub.publish.index import check_zoo
from embedkit.model.card import Card
from embedkit.model.config import EntryConfig
from embedkit.model.layout import ENTRY_NAME, MANIFEST, PRETEXT_IMAGE
from embedkit.model.preprocess import Preprocess
from embedkit.training import config as configuration
from embedkit.training.config import RunConfig, method_name
from embedkit.training.data import ImageSet, load_parts
from embedkit.training.export.head import classifier_name
from embedkit.training.export.head import with_head as add_head
from embedkit.training.export.licenses import license_of
from embedkit.training.export.writer import timm_config, update_index, write_entry
from embedkit.training.method import Method
from embedkit.training.methods import summary_of
from embedkit.training.models.backbones import Backbone
from embedkit.training.pretext import pretext_intervals, pretext_on
from embedkit.training.pretext_image import pretext_png
from embedkit.training.run_folder import CONFIG as RUN_CONFIG
from embedkit.training.run_folder import COST, Kept, kept_in, load_run

__all__ = ["export_run"]

SAMPLES = 64


def export_run(
    run: str | os.PathLike[str],
    name: str,
    zoo: str | os.PathLike[str],
    *,
    license: str | None = None,
    data: str | None = None,
    limits: Sequence[str] = (),
    checkpoint: str | None = None,
    with_head: bool = False,
) -> Path:
    """Write the encoder of a training run as the entry `<zoo>/<name>`.

    Args:
        run: The folder that `embedkit train` wrote.
        name: `<method>-<arch>.<data>`.
        zoo: The folder that holds the entries; its index is updated.
        license: SPDX identifier of the weights' license; by default that of the weights that the run started from, and
            `other` where it started from none.
        data: What it was trained on, in words; taken from the run when None.
        limits: Sentences about what the encoder is not good for, for its card.
        checkpoint: `best` or `last`; by default the best weights of a run with evaluation while training, which is
            said on stderr, else the last.
        with_head: Store the method's classifier too, which gives `logits` beside `embedding`.

    Returns:
        The folder of the entry.

    Raises:
        ConfigError: The folder is not a run, the name cannot be an entry's, or the license is more open than that of
            the weights that the run started from.
        ParityError: ONNX Runtime and torch disagree; nothing is written.
    """
    run, folder = Path(run), Path(zoo) / name
    if not os.path.isfile(run / RUN_CONFIG):
        raise ConfigError(
            f"{run} is neither an entry (it has no {MANIFEST}) nor a training run; give the folder that "
            "`embedkit train` wrote"
        )
    if not os.path.isfile(run / COST):
        raise ConfigError(
            f"{run}: the run has not finished; continue it with `embedkit train --resume {run}`"
        )
    if not ENTRY_NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r}: expected <method>-<arch>.<data> in small letters, such as simclr-r10.fmnist"
        )
    check_zoo(Path(zoo))
    if checkpoint not in (None, "best", "last"):
        raise ConfigError(f"--checkpoint: expected best or last, found {checkpoint!r}")
    kept: Kept = "best" if (checkpoint or kept_in(run)) == "best" else "last"
    config, method = load_run(run, kept)
    license = license_of(config.parents, license)
    if checkpoint is None and kept == "best":
        print(
            f"embedkit: {run}: exported are the best weights, of step {method.batches_seen} of {method.total_steps}; "
            "--checkpoint last takes the last ones",
            file=sys.stderr,
        )
    encoder = method.encoder().eval()
    preprocess = config.data.preprocess(method.facts.mean, method.facts.std)
    network = encoder.net if isinstance(encoder, Backbone) else encoder
    # at the size that the encoder takes, not at that of stored images
    images, held_out = load_parts(dataclasses.replace(config.data, load_size=0), config.seed)
    samples = _samples(held_out if len(held_out) else images)
    outputs = {"embedding": (_width(network, samples),)}
    classes = tuple(images.classes) if with_head else ()
    if with_head:
        network = add_head(encoder, method.class_head())
        outputs["logits"] = (len(classes),)
    png = pretext_png(method, held_out)
    entry = EntryConfig(
        architecture=encoder.architecture if isinstance(encoder, Backbone) else config.backbone,
        outputs=outputs,
        method=method_name(config),
        dim=outputs["embedding"][0],
        preprocess=preprocess,
        data=" ".join((data or _data_in_words(config, method)).split()),
        license=license,
        provenance=_provenance(run, config, method, held_out) | _of_the_weights(kept, method),
        card=_card(method_name(config), method, encoder, limits),
        classes=classes,
        timm=_timm(encoder, preprocess, name, license, network if with_head else None),
    )
    write_entry(
        folder,
        network=network,
        config=entry,
        samples=samples,
        extra={**method.files(), **({PRETEXT_IMAGE: png} if png else {})},
    )
    update_index(Path(zoo))
    return folder


def _timm(
    encoder: nn.Module, preprocess: Preprocess, name: str, license: str, network: nn.Module | None
) -> dict[str, Any]:
    """The keys that timm reads, with a classifier those of `network`; none for more than a timm network."""
    if not isinstance(encoder, Backbone) or encoder.model_args is None:
        return {}
    head = (
        {"num_classes": network.num_classes, "classifier": classifier_name(network)}
        if network is not None
        else None
    )
    return timm_config(
        encoder.net if network is None else network,
        preprocess,
        model_args=encoder.model_args,
        tag=name.partition(".")[2],
        license=license,
        head=head,
    )


def _samples(chosen: ImageSet) -> np.ndarray:
    """Pixels to compare on, uint8 (64, C, H, W), repeated where there are fewer."""
    images = chosen.batch(torch.arange(min(SAMPLES, len(chosen)))).images.numpy()
    return np.resize(images, (SAMPLES, *images.shape[1:]))


def _width(network: nn.Module, samples: np.ndarray) -> int:
    with torch.inference_mode():
        return network(torch.from_numpy(samples[:2]).float() / 255).shape[1]


def _data_in_words(config: RunConfig, method: Method) -> str:
    channels, height, width = method.facts.image_shape
    name = Path(config.data.path).name or config.data.path
    return f"{name}: {method.facts.num_images:,} training images of {channels}x{height}x{width}"


def _provenance(run: Path, config: RunConfig, method: Method, held_out: ImageSet) -> dict[str, Any]:
    stored = configuration.to_json(config)
    # The full path would help no reader, and could disclose a name.
    stored["data"]["path"] = Path(config.data.path).name
    if stored["method"].get("weights"):
        stored["method"]["weights"] = Path(stored["method"]["weights"]).name
    stored["init"] = Path(config.init).name
    provenance: dict[str, Any] = {"trained_by": "embedkit train", "recipe": config.recipe, "run": stored}
    if stored.pop("parents"):
        provenance["parents"] = [dict(parent) for parent in config.parents]
    if pretext := pretext_on(method, held_out):
        provenance["pretext"] = {name: round(value, 6) for name, value in pretext.items()}
    if intervals := pretext_intervals(method, held_out):
        provenance["pretext_intervals"] = {
            name: [round(bound, 6) for bound in bounds] for name, bounds in intervals.items()
        }
    return {**provenance, "cost": json.loads((run / COST).read_text("utf-8"))}


def _of_the_weights(kept: Kept, method: Method) -> dict[str, Any]:
    """Which step the weights are of, where that is not the last."""
    return {"weights": {"kept": kept, "step": method.batches_seen}} if kept == "best" else {}


def _card(name: str, method: Method, encoder: nn.Module, limits: Sequence[str]) -> Card:
    needs = (
        ()
        if not isinstance(encoder, Backbone)
        or encoder.model_args is None
        or not encoder.architecture.startswith("embedkit_")
        else (
            f"`{encoder.architecture}` is registered with timm by `import embedkit.training.models.backbones`; "
            "import that before timm loads this entry.",
        )
    )
    height, width = method.facts.image_shape[1:]
    return Card(
        summary=summary_of(name),
        limits=(
            f"It was trained on images of {height} x {width} pixels and scales every image to that size.",
            "It suits images like those that it was trained on; test it on yours before relying on it.",
            *needs,
            *(" ".join(limit.split()) for limit in limits if limit.strip()),
        ),
    )
