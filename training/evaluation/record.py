"""From an evaluation to its entry: the only way by which metrics enter a zoo."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from embedkit._io.locks import locked_folder
from embedkit.authoring.reissue import issued, replace_files
from embedkit.errors import ConfigError
from embedkit.hub.publish.index import update_index
from embedkit.hub.resolve import find_entry
from embedkit.model.layout import INDEX, MANIFEST, WEIGHTS
from embedkit.model.manifest import Manifest
from embedkit.training.evaluation.protocol import PROTOCOL, Evaluation

__all__ = ["check_writable", "write_metrics"]


def check_writable(source: str | os.PathLike[str]) -> None:
    """Refuse what is not an entry's folder: a name could lead to the cache, or to the package itself.

    Raises:
        ConfigError: A name, or the folder of a run.
    """
    if not os.path.isfile(Path(source) / MANIFEST):
        raise ConfigError(
            f"metrics are written into an entry's folder, and {os.fspath(source)} is a name or a run: give the folder "
            "of an entry (export a run first)"
        )


def write_metrics(
    evaluation: Evaluation,
    source: str | os.PathLike[str],
    notify: Callable[[str], None] = lambda message: None,
) -> Manifest:
    """Put an evaluation's metrics into its entry: configuration, card, manifest, and the index of a zoo that has one.

    `metrics` of `config.json` becomes `weights_sha256`, `protocol`, and by data set `results` (the encoder's
    metrics), `intervals` (of those that are means over test images), `baselines` (of `random`, `pixels` and `pca`)
    and `images` (of the training and the test part).
    Metrics of other data sets stay if they were measured on these weights by this protocol.

    Args:
        evaluation: Of this entry, with all images.
        source: The entry's folder.
        notify: Told which older metrics were dropped.

    Returns:
        The new manifest.

    Raises:
        ConfigError: The metrics are a run's, of part of the data, or of other weights, or no folder of an entry.
        EntryError: Not an entry, or (IntegrityError) its bytes are not those of its manifest.
        OutputError: The folder cannot be written.
    """
    if not evaluation.weights_sha256:
        raise ConfigError(f"{evaluation.source} is a run: export it, and evaluate the entry")
    if evaluation.limit:
        raise ConfigError(
            "metrics of a part of the data are not written into an entry: evaluate it without a limit"
        )
    check_writable(source)
    folder = Path(source).resolve()  # what a link names is written, and the link stays
    with locked_folder(folder.parent):
        manifest = _write(evaluation, folder, notify)
    if os.path.isfile(folder.parent / INDEX):
        update_index(folder.parent)
    return manifest


def _write(evaluation: Evaluation, folder: Path, notify: Callable[[str], None]) -> Manifest:
    entry = find_entry(folder)
    weights = entry.manifest.files[WEIGHTS].sha256
    if evaluation.weights_sha256 != weights:
        raise ConfigError(
            f"{folder}: the metrics were measured on weights {evaluation.weights_sha256[:12]}..., and these are "
            f"{weights[:12]}...: evaluate this entry"
        )
    old = entry.config.metrics
    if (old.get("weights_sha256"), old.get("protocol")) != (weights, PROTOCOL):
        if old.get("results"):
            notify(
                f"older metrics, of other weights or another protocol, are dropped: {', '.join(old['results'])}"
            )
        old = {}
    merged = {key: {**old.get(key, {}), **value} for key, value in _by_data(evaluation).items()}
    config = dataclasses.replace(
        entry.config, metrics={"weights_sha256": weights, "protocol": PROTOCOL, **merged}
    )
    files = issued(entry.name, config, {name: entry.read(name) for name in entry.manifest.files})
    replace_files(folder, files)
    return Manifest.from_json(files[MANIFEST])


def _by_data(evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    """What goes into `metrics`, by data set and label column; metrics that are None are left out."""
    results: dict[str, Any] = {}
    baselines: dict[str, Any] = {}
    intervals: dict[str, Any] = {}
    for result in evaluation.results:
        by = "" if result.label == "label" else f" by {result.label}"
        data = evaluation.data + by
        own = {name: round(value, 6) for name, value in result.metrics.items() if value is not None}
        if result.model == "encoder":
            results[data] = own
            intervals[data] = {
                name: [round(bound, 6) for bound in bounds] for name, bounds in result.intervals().items()
            }
        else:
            baselines.setdefault(data, {})[result.model] = own
    images = {data: {"train": evaluation.train, "test": evaluation.test} for data in results}
    return {"results": results, "intervals": intervals, "baselines": baselines, "images": images}
