"""One protocol for every encoder: fit on the training part of a data set, measure on its test part.

The encoder is compared with three baselines: the same network at random initialization, raw pixels, and their principal
components. The modules `metrics` and `probe` define the metrics and cite their sources.

A label column whose test classes all occur in the training part is a closed set and gets all metrics. Where test
classes are new (identities, as in face verification) nothing can be fitted to them, and only retrieval, clustering and
verification are measured.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embedkit.errors import ConfigError, EntryError
from embedkit.model.mixture import GaussianMixture
from embedkit.training.config import RunConfig
from embedkit.training.data import ImageSet
from embedkit.training.data.datasets import open_source
from embedkit.training.data.source import Source
from embedkit.training.evaluation import cache, metrics
from embedkit.training.evaluation.baselines import pca_features, pixel_features, random_features
from embedkit.training.evaluation.features import (
    SEED,
    EvaluatedModel,
    Features,
    device,
    open_model,
)
from embedkit.training.evaluation.probe import choose_probe
from embedkit.training.method import Method
from embedkit.training.pretext import pretext_on
from embedkit.training.run_folder import load_run

__all__ = ["PROTOCOL", "Evaluation", "Result", "evaluate", "pretext_metric"]

#: Written into entries and cards. Metrics of two protocols are not compared: change it with any change of a metric.
PROTOCOL = (
    "Protocol 3 of `embedkit evaluate`: fitted on the training part of the data and reported on its test part; "
    "features as the encoder gives them, neither centered nor whitened. knn_top1: vote of the 20 nearest training "
    "images, weights exp(cosine / 0.1). probe_top1: multinomial logistic regression on standardized features, L2 "
    "chosen on a tenth of the training part. map_at_r, p_at_1: each test image queries all others by cosine. "
    "kmeans_acc, kmeans_nmi, kmeans_ari: k-means on L2-normalized features, as many clusters as classes, best of 10 "
    "starts. mixture_acc, mixture_nmi, mixture_ari: the likeliest cluster of the entry's own mixture. auc, eer, "
    "tar_at_far: cosines of pairs of test images. rankme: effective rank of the features. Baselines: the same "
    "network at random initialization with BatchNorm calibrated on training images, its residual branches as they "
    "are created or all switched on, whichever has the higher map_at_r; the pixels that the network is given, "
    "averaged down to 32 a side where they are more; and their principal components, as many as the embedding has "
    "columns, fitted on up to 10,000 training images. Intervals: 95 %, bootstrap over test images."
)

FAR_LEVELS = {"tar_at_far_1e-2": 1e-2, "tar_at_far_1e-3": 1e-3}
#: Training images that a random network's BatchNorm is calibrated on, and test images of the pretext metric.
_SAMPLE = 2048
#: Training images that principal components are fitted on.
_FITTED = 10_000

Notify = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Result:
    """The metrics of one model by one label column.

    Attributes:
        model: `encoder`, `random`, `pixels` or `pca`.
        label: The column.
        metrics: Name -> number; None where there are too few data.
        per_image: Name -> float64 (test images,) for the metrics that are means over images: 1 or 0, or an
            average precision; NaN where an image has none. The mean of the others is the metric.
        l2: The strength that the probe chose; None without a probe.
    """

    model: str
    label: str
    metrics: Mapping[str, float | None]
    per_image: Mapping[str, np.ndarray] = field(repr=False, compare=False)
    l2: float | None = None

    def intervals(self, *, replicates: int = 1000, seed: int = SEED) -> dict[str, tuple[float, float]]:
        """95 % of the metrics that are means over images: percentiles of a bootstrap over test images."""
        found = {}
        for name, values in self.per_image.items():
            values = values[~np.isnan(values)]
            if len(values):
                rng = np.random.default_rng(seed)
                means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(replicates)]
                low, high = np.quantile(means, (0.025, 0.975))
                found[name] = float(low), float(high)
        return found


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        source: The entry's or the run's name.
        weights_sha256: Of an entry's weights; empty for a run.
        data: The data set's name: the last part of its path.
        train: Training images that were fitted on.
        test: Test images that were measured.
        limit: As asked; 0 for all images.
        classes: Label column -> number of classes in the test part.
        open_set: The label columns whose test classes are new.
        results: By model, then by label column.
        pretext: A run's pretext metrics on the test part.
    """

    source: str
    weights_sha256: str
    data: str
    train: int
    test: int
    limit: int
    classes: Mapping[str, int]
    open_set: tuple[str, ...]
    results: tuple[Result, ...]
    pretext: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """JSON values; without the arrays per image."""
        facts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "results"}
        results = [
            {
                "model": one.model,
                "label": one.label,
                "l2": one.l2,
                "metrics": dict(one.metrics),
                "intervals": one.intervals(),
            }
            for one in self.results
        ]
        return {**facts, "open_set": list(self.open_set), "protocol": PROTOCOL, "results": results}

    def table(self) -> str:
        """A text table per label column: metrics down, models across; `-` where there are too few data."""
        lines: list[str] = []
        for label, classes in self.classes.items():
            new = "new " if label in self.open_set else ""
            own = [result for result in self.results if result.label == label]
            lines += [
                f"{self.source} on {self.data}, {label}: {classes} {new}classes, {self.train} training and "
                f"{self.test} test images",
                f"{'':<18}" + "".join(f"{result.model:>10}" for result in own),
            ]
            for name in own[0].metrics:
                values = (result.metrics.get(name) for result in own)
                cells = ("-" if v is None else f"{v:.4g}" if v >= 10 else f"{v:.4f}" for v in values)
                lines.append(f"{name:<18}" + "".join(f"{cell:>10}" for cell in cells))
            lines.append("")
        lines += [f"{f'pretext {name}':<18}{value:>10.4f}" for name, value in self.pretext.items()]
        return "\n".join(lines).rstrip()


@dataclass(frozen=True)
class _Labels:
    """One column of both parts, numbered alike: classes of the training part first; -1 where there is none."""

    column: str
    train: Tensor
    test: Tensor
    train_classes: tuple[str, ...]
    open_set: bool

    @property
    def test_classes(self) -> int:
        return len(self.test[self.test >= 0].unique())


@dataclass(frozen=True)
class _Data:
    """Both parts of a data set, the rows that are used, and the label columns of these rows."""

    train: Source
    test: Source
    train_rows: np.ndarray
    test_rows: np.ndarray
    columns: tuple[_Labels, ...]


@dataclass(frozen=True)
class _Embedded:
    """One model's features of the training part (none where no label column needs them) and of the test part."""

    name: str
    train: Tensor
    test: Tensor
    notify: Notify
    mixture: GaussianMixture | None

    @functools.cached_property
    def rankme(self) -> float:
        """The same for all label columns; not computed where all metrics come from the cache."""
        return _timed(self.notify, f"{self.name}: RankMe", lambda: metrics.rankme(self.test))


def evaluate(
    source: str | os.PathLike[str],
    *,
    data: str,
    labels: Sequence[str] = ("label",),
    baselines: bool = True,
    limit: int = 0,
    notify: Notify = lambda message: None,
) -> Evaluation:
    """Evaluate an entry or a run; a second call gives equal metrics.

    Args:
        source: An entry by name or folder, as `load_encoder` takes it, or a run's folder.
        data: As `DataConfig.path`; it must have a training and a test part.
        labels: Columns of Parquet files; other data have one, whatever its name.
        baselines: Whether the random network, raw pixels and their principal components are evaluated too.
        limit: At most so many evenly spread images of each part; 0 for all.
        notify: Told what was done, with the seconds that it took.

    Raises:
        ConfigError: Data without a test part or without labels.
        EntryNotFoundError: No such entry.
        OutputError: A run's folder without a checkpoint.
        SourceError: An image that cannot be read.
        EntryError: Not an entry, or features that are not finite.
    """
    model = open_model(source)
    opened = _open_data(data, labels, limit)
    for column in opened.columns:
        if not column.test_classes:
            named = f"one of {', '.join(opened.test.columns)}" if opened.test.columns else "one"
            raise ConfigError(
                f"{data}: no test image has a label in the column {column.column!r}; name {named} with --label"
            )
    results = _evaluate("encoder", model.features, opened, notify, model.mixture)
    for name, features in _baselines(model, opened, notify) if baselines else ():
        results += _evaluate(name, features, opened, notify)
    pretext: dict[str, float] = {}
    if model.trained is not None:
        config, method = model.trained
        pretext = _timed(notify, "encoder: pretext metric", lambda: _pretext(config, method, data, limit))
    return Evaluation(
        source=model.name,
        weights_sha256=model.weights_sha256,
        data=Path(data).resolve().name,
        train=len(opened.train_rows),
        test=len(opened.test_rows),
        limit=limit,
        classes={column.column: column.test_classes for column in opened.columns},
        open_set=tuple(column.column for column in opened.columns if column.open_set),
        results=tuple(results),
        pretext=pretext,
    )


def pretext_metric(run: str | os.PathLike[str], data: str) -> dict[str, float]:
    """How well a run solves its pretext task on the test part of `data`; an entry has no heads, so it has none.

    Returns:
        The method's metrics by name, means over up to 2,048 images; {} for a method without one, or one that was
        trained with labels which these data do not have.

    Raises:
        ConfigError: Data without a test part.
        OutputError: No run there, or none with a checkpoint.
    """
    return _pretext(*load_run(run), data, 0)


def _open_data(path: str, labels: Sequence[str], limit: int) -> _Data:
    if limit < 0:
        raise ConfigError(f"limit: expected a number of images, or 0 for all; found {limit}")
    if not labels:
        raise ConfigError("labels: expected one label column or more, found none")
    columns: list[_Labels] = []
    for label in dict.fromkeys(labels):
        train, test = open_source(path, "train", label=label), open_source(path, "test", label=label)
        train_rows, test_rows = _spread(len(train), limit), _spread(len(test), limit)
        numbers = {name: number for number, name in enumerate(train.classes)}
        for name in test.classes:
            numbers.setdefault(name, len(numbers))
        renumber = np.array([*(numbers[name] for name in test.classes), -1])  # the index -1 finds the last
        own, tested = train.labels[train_rows], renumber[test.labels[test_rows]]
        seen = own[own >= 0]
        open_set = not np.isin(tested[tested >= 0], seen).all()
        columns.append(
            _Labels(label, torch.from_numpy(own), torch.from_numpy(tested), train.classes, bool(open_set))
        )
    return _Data(train, test, train_rows, test_rows, tuple(columns))


def _spread(count: int, limit: int) -> np.ndarray:
    """All rows, or `limit` evenly spread ones."""
    return np.linspace(0, count - 1, limit).astype(np.int64) if 0 < limit < count else np.arange(count)


def _baselines(model: EvaluatedModel, data: _Data, notify: Notify) -> list[tuple[str, Features]]:
    fitted = data.train_rows[_spread(len(data.train_rows), _FITTED)]
    pixels = [
        ("pixels", pixel_features(model.preprocess)),
        ("pca", pca_features(model.preprocess, model.dim, data.train, fitted)),
    ]
    rows = data.train_rows[_spread(len(data.train_rows), _SAMPLE)]
    calibration = data.train.decode(rows, model.preprocess)
    try:
        return [("random", _harder_to_beat(random_features(model, calibration), data)), *pixels]
    except ConfigError as error:
        notify(f"no random baseline: {error}")
        return pixels


def _harder_to_beat(networks: tuple[Features, ...], data: _Data) -> Features:
    """Of random networks the one with the higher MAP@R, over the queries of all label columns.

    What was embedded to choose it, the test part, is not embedded again.
    """
    if len(networks) == 1:
        return networks[0]

    def map_at_r(x: Tensor) -> float:
        labeled = [(column.test, column.test >= 0) for column in data.columns]
        found = torch.cat([metrics.retrieval(x[rows], labels[rows]).map_at_r for labels, rows in labeled])
        return float(found.mean()) if len(found) else 0.0

    tests = [features(data.test, data.test_rows) for features in networks]
    test, chosen = max(zip(tests, networks, strict=True), key=lambda pair: map_at_r(pair[0]))
    return lambda source, rows: test if rows is data.test_rows else chosen(source, rows)


def _evaluate(
    name: str, features: Features, data: _Data, notify: Notify, mixture: GaussianMixture | None = None
) -> list[Result]:
    """One model by every label column."""

    def embed(part: str, source: Source, rows: np.ndarray) -> Tensor:
        found = _timed(notify, f"{name}: {len(rows)} {part} images", lambda: features(source, rows))
        if not torch.isfinite(found).all():
            raise EntryError(
                f"the {name} gives features that are not finite: train it again, with a lower lr"
            )
        return found

    test = embed("test", data.test, data.test_rows)
    train = test[:0]
    if not all(column.open_set for column in data.columns):
        train = embed("training", data.train, data.train_rows)

    embedded = _Embedded(name, train, test, notify, mixture)
    return [_evaluate_by(embedded, column) for column in data.columns]


def _evaluate_by(embedded: _Embedded, labels: _Labels) -> Result:
    name = embedded.name
    if name == "encoder":
        return _measure(embedded, labels)
    words = (PROTOCOL, str(labels.open_set), str(len(labels.train_classes)))
    key = cache.key_of(words, (embedded.train, embedded.test, labels.train, labels.test))
    found = cache.load(key)
    if found is not None:
        embedded.notify(
            f"{name}: the metrics of these features by {labels.column} are taken from an earlier evaluation"
        )
        return Result(model=name, label=labels.column, per_image=found[1], **found[0])
    measured = _measure(embedded, labels)
    cache.store(key, {"metrics": dict(measured.metrics), "l2": measured.l2}, measured.per_image)
    return measured


def _measure(embedded: _Embedded, labels: _Labels) -> Result:
    name, train, test = embedded.name, embedded.train, embedded.test
    labeled = torch.nonzero(labels.test >= 0)[:, 0]
    x, y = test[labeled], labels.test[labeled]
    found: dict[str, float | None] = {}
    per_image: dict[str, np.ndarray] = {}
    l2 = None

    def mean_over(metric: str, images: Tensor, values: Tensor) -> None:
        per_image[metric] = np.full(len(test), np.nan)
        per_image[metric][images.numpy()] = values.double().numpy()
        found[metric] = float(values.double().mean()) if len(values) else None

    def timed(what: str, work: Callable[[], Any]) -> Any:
        return _timed(embedded.notify, f"{name}: {what} by {labels.column}", work)

    if not labels.open_set:
        fit_on = labels.train >= 0
        fitted, own, k = train[fit_on], labels.train[fit_on], len(labels.train_classes)
        knn = timed("kNN", lambda: metrics.knn_predict(fitted, own, x, num_classes=k))
        mean_over("knn_top1", labeled, knn == y)
        probe = timed("linear probe", lambda: choose_probe(fitted, own, num_classes=k, seed=SEED))
        l2 = probe.l2
        mean_over("probe_top1", labeled, probe.predict(x) == y)
    ranked = timed("retrieval", lambda: metrics.retrieval(x, y))
    mean_over("map_at_r", labeled[ranked.queries], ranked.map_at_r)
    mean_over("p_at_1", labeled[ranked.queries], ranked.p_at_1)
    clusters = {"kmeans": timed("k-means", lambda: metrics.kmeans(x, labels.test_classes, seed=SEED))}
    if embedded.mixture is not None:
        clusters["mixture"] = torch.from_numpy(embedded.mixture.assign(x.numpy()).labels)
    for by, partition in clusters.items():
        scores = metrics.clustering_scores(partition, y)
        found |= {f"{by}_{key}": value for key, value in dataclasses.asdict(scores).items()}
    genuine, impostor = timed("verification pairs", lambda: metrics.pair_scores(x, y, seed=SEED))
    if len(genuine) and len(impostor):
        curve = metrics.roc(genuine, impostor)
        found |= {"auc": curve.auc, "eer": curve.eer}
        found |= {key: curve.tar_at_far(far) for key, far in FAR_LEVELS.items()}
    else:  # one class, or only classes of one image
        found |= dict.fromkeys(("auc", "eer", *FAR_LEVELS))
    found["rankme"] = embedded.rankme
    # features that are all alike have no rank, and their metrics are not finite
    finite = {
        key: value if value is not None and math.isfinite(value) else None for key, value in found.items()
    }
    return Result(model=name, label=labels.column, metrics=finite, per_image=per_image, l2=l2)


def _pretext(config: RunConfig, method: Method, path: str, limit: int) -> dict[str, float]:
    data = _open_data(path, (config.data.label,), limit)
    column = data.columns[0]
    # a run without labels needs none; one with labels can only be measured on the classes that it was trained on
    trained_classes = method.facts.num_classes
    if trained_classes and (column.open_set or trained_classes != len(column.train_classes)):
        return {}
    preprocess = config.data.preprocess(method.facts.mean, method.facts.std)
    chosen = _spread(len(data.test_rows), _SAMPLE)
    labels = column.test[chosen] if trained_classes else torch.full((len(chosen),), -1)
    images = ImageSet(
        data.test, labels, column.train_classes, torch.from_numpy(data.test_rows[chosen]), preprocess
    )
    method = method.to(device())
    return pretext_on(method, images, method.generator("evaluation"))


def _timed(notify: Notify, what: str, work: Callable[[], Any]) -> Any:
    started = time.monotonic()
    done = work()
    notify(f"{what}, {time.monotonic() - started:.1f} s")
    return done
