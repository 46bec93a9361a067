"""`config.json` of a zoo entry: shaped for timm, with one key (`embedkit`) for everything that the runtime needs.

This module parses and checks; it opens no model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from reprlib import repr as _short
from typing import Any

from embedkit.errors import EntryError
from embedkit.model.card import Card
from embedkit.model.layout import CONFIG, SCHEMA_VERSION, _check_schema, _object, _text, parse_json
from embedkit.model.preprocess import Preprocess

KINDS = ("encoder", "detector", "landmarks")


#: What follows the name of a pretext metric in the name of its level without learning.
BY_CHANCE = "_by_chance"


@dataclass(frozen=True, kw_only=True)
class EntryConfig:
    """`config.json`: what timm reads at the top level, and what embedkit reads under its own key.

    Attributes:
        architecture: The timm name of the network.
        kind: `encoder`, `detector` or `landmarks`.
        outputs: Name -> shape without the batch axis; schema version 1 of an encoder has `embedding` (D,), of a
            detector `boxes` (A, 4) and `scores` (A,), of landmarks `points` (P, 2). Boxes are left, top, right and
            bottom, points x and y, all as shares of the input's width and height; scores are in [0, 1].
        method: The method that trained it, for example `simclr`.
        dim: Width D of the embedding; for another kind, how many numbers an image gives.
        preprocess: The contract from a decoded image to the graph's pixels.
        data: What it was trained on, in words.
        license: SPDX identifier of the weights' license.
        provenance: Where the weights come from: source, commit, run configuration.
        metrics: Results of `embedkit evaluate`, bound to the weights' sha256.
        card: The sentences of the model card.
        classes: Names of the classes of the output `logits`, in order; empty for an entry without a classifier.
        timm: The other top-level keys (`model_args`, `pretrained_cfg`, ...), in timm's form.
    """

    architecture: str
    kind: str = "encoder"
    outputs: Mapping[str, tuple[int, ...]]
    method: str
    dim: int
    preprocess: Preprocess
    data: str
    license: str
    provenance: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    card: Card = Card()
    classes: tuple[str, ...] = ()
    timm: Mapping[str, Any] = field(default_factory=dict)

    @property
    def takes_aligned_faces(self) -> bool:
        """Whether the encoder requires aligned faces instead of whole photographs."""
        return self.method == "face"

    def to_json(self) -> dict[str, Any]:
        """The whole of `config.json`."""
        return {
            "architecture": self.architecture,
            **self.timm,
            "embedkit": {
                "schema": SCHEMA_VERSION,
                "kind": self.kind,
                "outputs": {name: list(shape) for name, shape in self.outputs.items()},
                "method": self.method,
                "dim": self.dim,
                "preprocess": self.preprocess.to_json(),
                "data": self.data,
                "license": self.license,
                "provenance": dict(self.provenance),
                "metrics": dict(self.metrics),
                "card": self.card.to_json(),
                **({"classes": list(self.classes)} if self.classes else {}),
            },
        }

    @classmethod
    def from_json(cls, text: bytes | str, where: str = CONFIG) -> EntryConfig:
        """Parse and check `config.json`.

        Raises:
            EntryError: Not JSON, another schema version, or a key that is missing or of the wrong type.
        """
        data = _object(parse_json(text, where), where)
        ours = _object(data.get("embedkit"), f"{where}: embedkit")
        _check_schema(ours, where)
        if _text(ours, "kind", where) not in KINDS:
            raise EntryError(
                f"{where}: embedkit.kind: expected one of {', '.join(KINDS)}, found {_short(ours['kind'])}"
            )
        outputs: dict[str, tuple[int, ...]] = {}
        for name, shape in _object(ours.get("outputs"), f"{where}: embedkit.outputs").items():
            if not isinstance(shape, list) or not all(type(n) is int and n > 0 for n in shape):
                raise EntryError(
                    f"{where}: embedkit.outputs.{name}: expected a shape such as [512], found {_short(shape)}"
                )
            outputs[name] = tuple(shape)
        dim = ours.get("dim")
        if type(dim) is not int or not 1 <= dim <= 1 << 20:
            raise EntryError(
                f"{where}: embedkit.dim: expected a whole number of 1..{1 << 20}, found {_short(dim)}"
            )
        if ours["kind"] == "encoder" and outputs.get("embedding") != (dim,):
            raise EntryError(
                f"{where}: embedkit.outputs.embedding: expected [{dim}] as embedkit.dim says, "
                f"found {list(outputs.get('embedding', ()))}"
            )
        numbers = sum(math.prod(shape) for shape in outputs.values())
        if ours["kind"] != "encoder" and dim != numbers:
            raise EntryError(
                f"{where}: embedkit.dim: expected {numbers} as embedkit.outputs says, found {dim}"
            )
        provenance = _object(ours.get("provenance", {}), f"{where}: embedkit.provenance")
        metrics = _object(ours.get("metrics", {}), f"{where}: embedkit.metrics")
        _check_metrics(metrics, provenance, f"{where}: embedkit")
        _check_parents(provenance.get("parents", []), f"{where}: embedkit.provenance.parents")
        return cls(
            architecture=_text(data, "architecture", where),
            kind=ours["kind"],
            outputs=outputs,
            method=_text(ours, "method", where),
            dim=dim,
            preprocess=Preprocess.from_json(ours.get("preprocess"), f"{where}: embedkit.preprocess"),
            data=_text(ours, "data", where),
            license=_text(ours, "license", where),
            provenance=provenance,
            metrics=metrics,
            card=Card.from_json(
                _object(ours.get("card", {}), f"{where}: embedkit.card"), f"{where}: embedkit.card"
            ),
            classes=_classes(
                ours.get("classes", []), outputs.get("logits", (0,)), f"{where}: embedkit.classes"
            ),
            timm={key: value for key, value in data.items() if key not in ("architecture", "embedkit")},
        )


def _classes(classes: object, shape: tuple[int, ...], where: str) -> tuple[str, ...]:
    """The names of the classes: as many as there are logits, each once."""
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise EntryError(f"{where}: expected a list of names, found {_short(classes)}")
    if shape != (len(classes),) or len(set(classes)) != len(classes):
        raise EntryError(
            f"{where}: expected a name for each of the logits, {list(shape)}, and no name twice; found {len(classes)}"
        )
    return tuple(classes)


def _check_parents(parents: object, where: str) -> None:
    """Refuse what is no list of the weights that the training started from: a name, a digest and a license each."""
    if not isinstance(parents, list):
        raise EntryError(f"{where}: expected a list, found {_short(parents)}")
    for index, parent in enumerate(parents):
        at = f"{where}.{index}"
        for key in {"name", *_object(parent, at)}:
            _text(parent, key, at)


def _check_metrics(metrics: Mapping[str, Any], provenance: Mapping[str, Any], where: str) -> None:
    """Refuse metrics that no table or card could show: these are written from the metrics of all entries of a zoo."""

    def check(value: object, at: str, keys: int) -> None:
        """Check the numbers below this many levels of keys."""
        if keys:
            for name, inner in _object(value, at).items():
                check(inner, f"{at}.{name}", keys - 1)
        # JSON allows infinity (1e999) and whole numbers that no float can hold
        elif type(value) not in (int, float) or not abs(value) < 1e300:  # type: ignore[arg-type]
            raise EntryError(f"{at}: expected a number, found {_short(value)}")

    for part, keys in (("results", 2), ("baselines", 3), ("images", 2)):
        check(metrics.get(part, {}), f"{where}.metrics.{part}", keys)
    at = f"{where}.metrics.intervals"
    intervals = {f"{at}.{data}": bounds for data, bounds in _object(metrics.get("intervals", {}), at).items()}
    intervals[f"{where}.provenance.pretext_intervals"] = provenance.get("pretext_intervals", {})
    for at, bounds_by_name in intervals.items():
        for name, bounds in _object(bounds_by_name, at).items():
            if not isinstance(bounds, list) or len(bounds) != 2:
                raise EntryError(f"{at}.{name}: expected two bounds, found {_short(bounds)}")
            check(dict(enumerate(bounds)), f"{at}.{name}", 1)
    at = f"{where}.provenance.cost"
    cost = _object(provenance.get("cost", {}), at)
    check({key: cost[key] for key in ("images", "training_flops", "seconds") if key in cost}, at, 1)
    check(provenance.get("pretext", {}), f"{where}.provenance.pretext", 1)
