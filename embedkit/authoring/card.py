"""The model card of an entry: YAML front matter for the Hub, then what a reader needs before using it."""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import yaml

from embedkit.hub.leaderboard import BASELINES
from embedkit.hub.markdown import code, escape
from embedkit.model.config import BY_CHANCE, EntryConfig
from embedkit.model.layout import MIXTURE, PRETEXT_IMAGE
from embedkit.model.preprocess import Preprocess

_RESIZE = {
    "shortest": "the shorter side is brought to {0} pixels, keeping the aspect ratio",
    "longest": "the longer side is brought to {0} pixels, keeping the aspect ratio",
    "squash": "the image is brought to {1} x {2} pixels (height x width), whatever its aspect ratio",
}
#: The Hub's name of the task, by kind.
_TASK = {
    "encoder": "image-feature-extraction",
    "detector": "object-detection",
    "landmarks": "keypoint-detection",
}
_COLOR = {
    "rgb": "Three channels, RGB",
    "gray": "One channel, ITU-R 601 luma",
    "lab_l": "One channel, CIE L* (D65) scaled to 0..255",
}
_NO_LIMITS = "- None recorded yet."
_USUAL_USE = "```python\nimport embedkit\n\nencoder = embedkit.load_encoder("
_PRETEXT = f"![What is given, predicted and true in the pretext task, on held-out images]({PRETEXT_IMAGE})"
#: What the card says of an entry with `mixture.safetensors`.
_ASSIGN = """The entry holds a mixture of Gaussians over its embeddings, too: the clusters that training found.

```python
labels, probabilities = encoder.assign(["a.jpg", "b.jpg"])  # the likeliest cluster of each, and how likely
```"""

#: What the card says of an entry with the output `logits`.
_CLASSIFY = """The entry holds a classifier of {} classes, too; their names are in `config.json`.

```python
probabilities = encoder.classify(["a.jpg", "b.jpg"])  # float32, a column for each of encoder.classes
```"""


def render_card(name: str, config: EntryConfig, files: Container[str] = ()) -> str:
    """The text of `README.md`, the same text for the same entry.

    Args:
        name: The entry's folder name.
        config: Its final configuration. Of `metrics` the card reads what `write_metrics` puts there; of `provenance`
            it reads `stored`, `parity`, `parents`, `run` and `cost` (of which `co2_grams` also goes to the front
            matter) and lists the rest.
        files: Names of the entry's files: a fitted mixture is shown in the usual words on its use, and
            `pretext.png` beside the metrics of the pretext task.
    """
    card = config.card
    shown = {"stored", "parity", "cost", "run", "parents"}
    if "pretext_intervals" in config.provenance:
        shown |= {"pretext", "pretext_intervals"}
    blocks = [
        f"---\n{yaml.safe_dump(_front_matter(name, config), sort_keys=False, width=110)}---",
        f"# {name}",
        card.summary,
        f"Trained by {code(config.method)} on {escape(config.data)}. Network {code(config.architecture)}, "
        f"{_gives(config)}. License of the weights: {escape(config.license)}.",
        _parents(config.provenance.get("parents", ())),
        "## Use",
        card.use or _use(name, config, MIXTURE in files),
        *_pretext(config.provenance, PRETEXT_IMAGE in files),
        "## Preprocessing",
        _preprocessing(config.preprocess),
        "## Metrics",
        *_metrics(config.metrics),
        *_cost(config.provenance.get("cost")),
        "## Stored weights and parity",
        _stored(config.provenance),
        "## Limits",
        "\n".join(f"- {limit}" for limit in card.limits) or _NO_LIMITS,
        "## Provenance",
        _list({key: value for key, value in config.provenance.items() if key not in shown}),
        *_run(config.provenance.get("run")),
    ]
    return "\n\n".join(block.strip() for block in blocks if block.strip()) + "\n"


def _front_matter(name: str, config: EntryConfig) -> dict[str, Any]:
    card = config.card
    library = "timm" if config.timm else "embedkit"
    front: dict[str, Any] = {
        "library_name": library,
        "pipeline_tag": _TASK[config.kind],
        "license": config.license.lower(),
    }
    if card.datasets:
        front["datasets"] = list(card.datasets)
    own = ("image-embeddings", config.method) if config.kind == "encoder" else ()
    tags = ("embedkit", "onnx", *own, *card.tags)
    front["tags"] = list(dict.fromkeys(tags if library == "embedkit" else (*tags, "timm")))
    results = config.metrics.get("results", {})
    if results:
        front["model-index"] = [
            {
                "name": name,
                "results": [
                    {
                        "task": {"type": "image-feature-extraction"},
                        "dataset": {"name": data, "type": data.lower().replace(" ", "-")},
                        "metrics": [
                            {"type": key, "value": values[key], "name": key} for key in sorted(values)
                        ],
                    }
                    for data, values in sorted(results.items())
                ],
            }
        ]
    cost = config.provenance.get("cost", {})
    if "co2_grams" in cost:
        assumed = ", ".join(f"{key} {value}" for key, value in _flat(cost.get("assumptions", {})))
        front["co2_eq_emissions"] = {
            "emissions": cost["co2_grams"],
            "source": f"an estimate by embedkit ({assumed})" if assumed else "an estimate by embedkit",
            "training_type": "fine-tuning" if config.provenance.get("parents") else "pre-training",
        }
    return front


def _parents(parents: Sequence[Mapping[str, str]]) -> str:
    """The weights that the training started from, with their licenses."""
    lines = []
    for parent in parents:
        digests = [
            f"{escape(key)} {code(value[:12])}" for key, value in parent.items() if key.endswith("sha256")
        ]
        facts = [*digests, *([f"license {escape(parent['license'])}"] if "license" in parent else [])]
        lines.append(f"- {code(parent['name'])}: {', '.join(facts)}")
    return "\n".join(["Its training started from the weights of", "", *lines]) if lines else ""


def _gives(config: EntryConfig) -> str:
    if config.kind == "encoder":
        return f"D = {config.dim}"
    outputs = (f"{code(key)} {' x '.join(map(str, shape))}" for key, shape in config.outputs.items())
    return f"which gives {' and '.join(outputs)} an image"


def _use(name: str, config: EntryConfig, mixture: bool) -> str:
    if config.kind != "encoder":
        return "`model.onnx` takes `pixels` as said below; its weights are in `model.safetensors` beside it."
    text = f"""{_USUAL_USE}"{name}")
rows = encoder.encode(["a.jpg", "b.jpg"])  # float32 (2, {config.dim}), L2-normalized
print(rows[0] @ rows[1])  # cosine
```"""
    plain = (
        "`model.onnx` holds the graph alone and takes its weights from `model.safetensors`; for one ordinary ONNX "
        f"file:\n`embedkit export-onnx {name} -o encoder.onnx`."
    )
    if mixture:
        plain += f"\n\n{_ASSIGN}"
    if config.classes:
        plain += f"\n\n{_CLASSIFY.format(len(config.classes))}"
    if not config.timm or config.preprocess.color == "lab_l":
        return f"{text}\n\n{plain}"
    mode = "RGB" if config.preprocess.color == "rgb" else "L"
    ours = config.architecture.startswith("embedkit_")
    register = (
        "import embedkit.training.models.backbones  # registers the network with timm\n" if ours else ""
    )
    return f"""{text}

With timm, from this entry's folder (rows are not normalized there):

```python
import timm
from PIL import Image
{register}network = timm.create_model("local-dir:path/to/{name}", pretrained=True, num_classes=0).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
features = network(transform(Image.open("a.jpg").convert("{mode}"))[None])  # (1, {config.dim})
```

{plain}"""


def _pretext(provenance: Mapping[str, Any], drawn: bool) -> Iterator[str]:
    """How well the pretext task is solved on held-out training images: the image, and each metric with its interval."""
    metrics, intervals = provenance.get("pretext", {}), provenance.get("pretext_intervals", {})
    if drawn or intervals:
        yield "## The pretext task"
    if drawn:
        yield _PRETEXT
    if intervals:
        yield "On held-out training images. Chance: without any learning."
        lines = ["| metric | value | 95 % | by chance |", "|---|---|---|---|"]
        for name, value in metrics.items():
            if not name.endswith(BY_CHANCE):
                interval = " to ".join(map(_metric, intervals.get(name, ())))
                chance = _metric(metrics.get(f"{name}{BY_CHANCE}"))
                lines.append(f"| {escape(name)} | {_metric(value)} | {interval} | {chance} |")
        yield "\n".join(lines)


def _preprocessing(preprocess: Preprocess) -> str:
    height, width = preprocess.size
    steps = [_RESIZE[preprocess.resize].format(preprocess.resize_size, height, width)]
    steps[0] += f" ({preprocess.interpolation}, antialiased)"
    if preprocess.resize != "squash":
        if preprocess.crop == "center":
            steps.append(f"the middle {height} x {width} pixels (height x width) are kept")
        if preprocess.resize == "longest" or preprocess.resize_size < max(preprocess.size):
            steps.append(f"what is smaller is padded with {preprocess.pad}")
    return (
        f"{_COLOR[preprocess.color]}; {'; '.join(steps)}. EXIF orientation is applied, transparency is "
        "composited on white, an embedded color profile is converted to sRGB. The graph takes these pixels "
        f"as uint8 (N, {preprocess.channels}, {height}, {width}) and normalizes them itself: x / 255, minus "
        f"{_numbers(preprocess.mean)}, divided by {_numbers(preprocess.std)}."
    )


def _metrics(metrics: Mapping[str, Any]) -> Iterator[str]:
    """The protocol, then a table for each data set: every metric, its interval and the baselines'."""
    if not metrics.get("results"):
        yield "None measured yet by `embedkit evaluate`."
        return
    yield escape(metrics.get("protocol", "By `embedkit evaluate`."))
    for data, values in sorted(metrics["results"].items()):
        intervals, baselines, images = (
            metrics.get(part, {}).get(data, {}) for part in ("intervals", "baselines", "images")
        )
        beside = [name for name in BASELINES if name in baselines]
        yield f"### {escape(data)}"
        if images:
            yield f"{images['train']:,} training images, {images['test']:,} test images."
        lines = [f"| metric | this encoder | 95 % |{''.join(f' {name} |' for name in beside)}"]
        lines.append("|---" * (3 + len(beside)) + "|")
        for key, value in values.items():
            cells = [escape(key), _metric(value), " to ".join(map(_metric, intervals.get(key, ())))]
            cells += [_metric(baselines[name].get(key)) for name in beside]
            lines.append(f"| {' | '.join(cells)} |")
        yield "\n".join(lines)


def _metric(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _cost(cost: Mapping[str, Any] | None) -> list[str]:
    if not cost:
        return []
    return ["## Cost of training", _list(cost)]


def _run(run: Mapping[str, Any] | None) -> list[str]:
    if not run:
        return []
    return [f"Every field of the training run:\n\n```json\n{json.dumps(run, indent=1)}\n```"]


def _stored(provenance: Mapping[str, Any]) -> str:
    parity = provenance["parity"]
    if "stored" not in provenance:  # an imported graph
        return (
            "The weights are stored in the precision that they had. ONNX Runtime gives the same for this entry and for "
            f"the file that it was made from, up to {parity['max_difference']:.1e} on L2-normalized rows (limit "
            f"{parity['limit']:.0e}). `golden.npz` holds four images and their embeddings."
        )
    stored = provenance["stored"]
    kept = (
        "so they are stored in float16."
        if stored["dtype"] == "float16"
        else f"which is below {escape(stored['threshold'])}, so they are stored in float32."
        if "min_cosine" in stored
        else f"where {_differences(stored['threshold'])} is allowed, so they are stored in float32."
    )
    if "min_cosine" in stored:
        cost, compared, held = (
            f"gives embeddings at cosine {escape(stored['min_cosine'])} (lowest) and "
            f"{escape(stored['mean_cosine'])} (mean) to the float32 original",
            "L2-normalized rows",
            "embeddings",
        )
    else:
        cost, compared, held = (
            f"moves {_differences(stored['max_difference'])} at the most (boxes that score 0.1 or more, and points, "
            "in shares of the input's side)",
            "any output",
            "outputs",
        )
    return (
        f"Rounding the weights to float16 {cost} on {escape(stored['images'])} images, {kept} "
        "ONNX Runtime and torch, both holding the stored weights, differ by at most "
        f"{parity['max_difference']:.1e} on {compared} (limit {parity['limit']:.0e}). `golden.npz` "
        f"holds four images and their {held}."
    )


def _differences(by_output: Mapping[str, float]) -> str:
    return ", ".join(f"{escape(name)} by {value:.2g}" for name, value in by_output.items())


def _list(mapping: Mapping[str, Any]) -> str:
    return "\n".join(f"- {escape(key)}: {escape(value)}" for key, value in _flat(mapping))


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested keys joined by dots, lists as JSON."""
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.6g}" for value in (values if len(set(values)) > 1 else values[:1]))
