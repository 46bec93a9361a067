"""The protocol from end to end: entries, runs, baselines, closed and open sets, and metrics that enter an entry."""

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("sklearn")

import typer
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from embedkit.authoring.golden import sample_pixels
from embedkit.cli.evaluate import evaluate as command
from embedkit.encoder import load_encoder
from embedkit.errors import ConfigError, EntryError, IntegrityError, OutputError, SourceError
from embedkit.hub.resolve import find_entry
from embedkit.model.card import Card
from embedkit.model.config import EntryConfig
from embedkit.model.layout import CARD, CONFIG, INDEX, MANIFEST, MIXTURE
from embedkit.model.manifest import Manifest
from embedkit.model.mixture import GaussianMixture
from embedkit.model.preprocess import Preprocess
from embedkit.training import recipes, run
from embedkit.training.config import with_overrides
from embedkit.training.data.arrays import ArraySource
from embedkit.training.data.datasets import open_source
from embedkit.training.evaluation import baselines, cache, protocol
from embedkit.training.evaluation.baselines import pca_features, pixel_features, random_network
from embedkit.training.evaluation.features import open_model, timm_network
from embedkit.training.evaluation.metrics import knn_predict
from embedkit.training.evaluation.protocol import evaluate, pretext_metric
from embedkit.training.evaluation.record import write_metrics
from embedkit.training.export.torch_to_onnx import PixelEncoder
from embedkit.training.export.writer import timm_config, update_index, write_entry
from embedkit.workflows.check_entry import verify_entry

NAME = "random-tiny.digits"
CONTRACT = Preprocess(color="gray", size=(8, 8), resize_size=8, mean=(0.3,), std=(0.4,))
ARGS = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 24], "in_chans": 1}
WORDS = Card(
    summary="A network that nobody has trained.\n\nIt shows what a figure has to beat.",
    datasets=("digits",),
    tags=("tests",),
    limits=("It knows nothing.", "It is small."),
)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> Path:
    """One entry, written as entries are, and an index."""
    folder = tmp_path_factory.mktemp("zoo")
    torch.manual_seed(0)
    network = timm.create_model("resnet18", num_classes=0, **ARGS).eval()
    config = EntryConfig(
        card=WORDS,
        architecture="resnet18",
        outputs={"embedding": (24,)},
        method="random",
        dim=24,
        preprocess=CONTRACT,
        data="nothing",
        license="Apache-2.0",
        timm=timm_config(network, CONTRACT, model_args=ARGS, tag="digits", license="Apache-2.0"),
    )
    write_entry(folder / NAME, network=network, config=config, samples=sample_pixels(CONTRACT))
    update_index(folder)
    return folder


@pytest.fixture(scope="module")
def on_digits(zoo):
    return evaluate(zoo / NAME, data="sklearn:digits")


@pytest.fixture
def own_zoo(zoo, tmp_path) -> Path:
    """A copy to write into."""
    import shutil

    return Path(shutil.copytree(zoo, tmp_path / "zoo"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "first"
    fields = ("steps=3", "batch_size=64", "data.image_size=8", "threads=1", "precision=fp32")
    config = with_overrides(recipes.recipe("supervised"), fields)
    run.train(config, data="sklearn:digits", out=folder, progress=False)
    return folder


def by(evaluation, model, label="label"):
    return next(one for one in evaluation.results if (one.model, one.label) == (model, label))


# --- entries ----------------------------------------------------------------------------------------------


def test_every_metric_of_an_entry_and_its_baselines(on_digits):
    assert [result.model for result in on_digits.results] == ["encoder", "random", "pixels", "pca"]
    names = "knn_top1 probe_top1 map_at_r p_at_1 kmeans_acc kmeans_nmi kmeans_ari auc eer tar_at_far_1e-2 "
    for result in on_digits.results:
        assert list(result.metrics) == [*names.split(), "tar_at_far_1e-3", "rankme"]
        assert all(0 <= value <= 1 for name, value in result.metrics.items() if name != "rankme")
    # well above chance, and 8x8 digits are easy for their pixels
    assert by(on_digits, "pixels").metrics["knn_top1"] > 0.95
    assert by(on_digits, "pixels").metrics["probe_top1"] > 0.9
    assert by(on_digits, "random").metrics["probe_top1"] > 0.2
    assert 1 < by(on_digits, "encoder").metrics["rankme"] < 24
    assert (on_digits.train, on_digits.test, on_digits.classes) == (1437, 360, {"label": 10})


def test_the_clusters_of_an_entrys_mixture_are_measured(own_zoo):
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    folder, test = own_zoo / NAME, open_source("sklearn:digits", "test")
    images = test.decode(np.arange(len(test)), CONTRACT)[:, 0].numpy()
    rows = load_encoder(folder).encode(list(images), normalize=False, decode="exact")
    means = rows[[0, 1, 2, 5]]
    # equal weights and unit variances: the likeliest cluster is the nearest mean
    nearest = ((rows[:, None] - means) ** 2).sum(2).argmin(1)
    GaussianMixture(np.full(4, 0.25), means, np.tile(np.eye(24), (4, 1, 1)), np.zeros(24), np.eye(24)).save(
        folder / MIXTURE
    )
    entry = find_entry(own_zoo / NAME)
    files = {name: (folder / name).read_bytes() for name in (*entry.manifest.files, MIXTURE)}
    (folder / MANIFEST).write_bytes(Manifest.encode(files))

    found = evaluate(folder, data="sklearn:digits")
    own = by(found, "encoder").metrics
    assert own["mixture_nmi"] == pytest.approx(normalized_mutual_info_score(test.labels, nearest))
    assert own["mixture_ari"] == pytest.approx(adjusted_rand_score(test.labels, nearest))
    assert 0 < own["mixture_acc"] < 0.5  # four clusters for ten classes
    assert "mixture_acc" not in by(found, "random").metrics
    (line,) = (line for line in found.table().splitlines() if line.startswith("mixture_nmi"))
    assert line.split()[1:] == [f"{own['mixture_nmi']:.4f}", "-", "-", "-"]


def test_means_over_images_can_be_taken_apart(on_digits):
    for result in on_digits.results:
        assert list(result.per_image) == ["knn_top1", "probe_top1", "map_at_r", "p_at_1"]
        for name, values in result.per_image.items():
            assert values.shape == (360,)
            assert values.mean() == pytest.approx(result.metrics[name], abs=1e-12)
            if name != "map_at_r":
                assert set(np.unique(values)) <= {0.0, 1.0}


def test_intervals_hold_the_figure_and_narrow_as_images_come(on_digits):
    result = by(on_digits, "random")
    found = result.intervals()
    assert found.keys() == result.per_image.keys()
    for name, (low, high) in found.items():
        values = result.per_image[name]
        values = values[~np.isnan(values)]
        assert low < result.metrics[name] < high
        # a mean's standard error, 1.96 of them to either side
        error = values.std() / np.sqrt(len(values))
        assert high - low == pytest.approx(2 * 1.96 * error, rel=0.15)


def test_principal_components_are_the_training_images(on_digits):
    contract = dataclasses.replace(CONTRACT)
    train, test = open_source("sklearn:digits", "train"), open_source("sklearn:digits", "test")
    rows = np.arange(0, len(train), 3)
    found = pca_features(contract, 5, train, rows)(test, np.arange(len(test))).double()
    fitted = pixel_features(contract)(train, rows).double()
    pixels = pixel_features(contract)(test, np.arange(len(test))).double() - fitted.mean(0)
    _, _, axes = torch.linalg.svd(fitted - fitted.mean(0), full_matrices=False)
    torch.testing.assert_close(found.abs(), (pixels @ axes[:5].T).abs(), atol=1e-5, rtol=1e-5)


def test_features_are_the_runtimes(zoo, on_digits):
    """Raw rows of the entry's contract, at full scale; the metrics from them, once more and by hand."""
    train, test = open_source("sklearn:digits", "train"), open_source("sklearn:digits", "test")
    rows = np.arange(50)
    encoder = load_encoder(zoo / NAME)
    expected = encoder.encode([test.read(row) for row in rows], normalize=False, decode="exact")
    found = open_model(zoo / NAME).features
    np.testing.assert_allclose(found(test, rows).numpy(), expected, atol=1e-5)
    assert torch.equal(found(test, rows[:5]), found(test, rows)[:5])  # whatever else is asked for

    x, y = found(train, np.arange(len(train))), torch.from_numpy(train.labels)
    predicted = knn_predict(x, y, found(test, np.arange(len(test))), num_classes=10)
    right = predicted.numpy() == test.labels
    assert np.array_equal(by(on_digits, "encoder").per_image["knn_top1"], right)


def test_a_second_call_is_equal(zoo, on_digits, monkeypatch, tmp_path):
    monkeypatch.setenv("EMBEDKIT_CACHE", str(tmp_path))  # an empty cache
    again = evaluate(zoo / NAME, data="sklearn:digits")
    assert again == on_digits
    for one, two in zip(again.results, on_digits.results, strict=True):
        assert all(np.array_equal(values, two.per_image[name]) for name, values in one.per_image.items())


def test_baselines_are_measured_once_and_an_encoder_every_time(zoo, monkeypatch, tmp_path):
    measured = []
    measure = protocol._measure
    monkeypatch.setattr(protocol, "_measure", lambda x, labels: measured.append(x) or measure(x, labels))
    monkeypatch.setenv("EMBEDKIT_CACHE", str(tmp_path))

    def evaluated(**kw):
        measured.clear()
        return evaluate(zoo / NAME, data="sklearn:digits", **kw), len(measured)

    first, times = evaluated()
    assert times == 4
    second, times = evaluated()
    assert (second, times) == (first, 1)
    for one, two in zip(first.results, second.results, strict=True):
        assert all(np.array_equal(values, two.per_image[name]) for name, values in one.per_image.items())
    assert evaluated(limit=40)[1] == 4, "other images have metrics of their own"
    cached = sorted((tmp_path / "metrics").iterdir())
    for path in cached:
        path.write_bytes(path.read_bytes()[:100])
    assert evaluated() == (first, 4), "what cannot be read is measured again"
    monkeypatch.setattr(protocol, "PROTOCOL", "another")
    assert evaluated()[1] == 4


def test_a_cached_file_of_another_form_is_not_used(monkeypatch, tmp_path):
    monkeypatch.setenv("EMBEDKIT_CACHE", str(tmp_path))
    facts, arrays = {"metrics": {"auc": 0.5, "eer": None}, "l2": None}, {"p_at_1": np.array([1.0, np.nan])}
    file = tmp_path / "metrics" / "x.npz"
    cache.store("x", facts, arrays)
    found = cache.load("x")
    assert found is not None and found[0] == facts
    assert np.array_equal(found[1]["p_at_1"], arrays["p_at_1"], equal_nan=True)
    for bad in (
        3,
        {},
        {"metrics": {}},
        {**facts, "more": 1},
        {**facts, "metrics": []},
        {**facts, "metrics": {"auc": "0.5"}},
        {**facts, "l2": "1"},
    ):
        cache.store("x", bad, arrays)
        assert cache.load("x") is None, bad
    for bad in (np.zeros((2, 2)), np.zeros(2, np.float32), np.array(["a"])):
        cache.store("x", facts, {"p_at_1": bad})
        assert cache.load("x") is None, bad
    deep = io.BytesIO()
    np.savez(deep, facts="[" * 100_000)
    for content in (b"", b"PK\x03\x04", b"\x93NUMPY", deep.getvalue()):
        file.write_bytes(content)
        assert cache.load("x") is None
    cache.store("x", facts, arrays)
    assert cache.load("x") is not None
    monkeypatch.setattr(cache, "MOST_BYTES", 10)
    assert cache.load("x") is None


def test_test_labels_fit_nothing(zoo, monkeypatch, on_digits):
    """With test labels shuffled, the probe and its strength stay, and what they say is measured as chance."""

    def shuffled(path, split, *, label="label"):
        source = open_source(path, split, label=label)
        if split == "test":
            order = np.random.default_rng(0).permutation(len(source))
            return ArraySource(source.arrays, source.labels[order], source.classes, source.name)
        return source

    probes = []
    choose = protocol.choose_probe
    monkeypatch.setattr(
        protocol, "choose_probe", lambda *a, **k: probes.append(choose(*a, **k)) or probes[-1]
    )
    as_it_is = evaluate(zoo / NAME, data="sklearn:digits", baselines=False)
    monkeypatch.setattr(protocol, "open_source", shuffled)
    other = evaluate(zoo / NAME, data="sklearn:digits", baselines=False)
    assert as_it_is.results == on_digits.results[:1]
    assert by(other, "encoder").l2 == by(on_digits, "encoder").l2
    assert torch.equal(probes[0].weight, probes[1].weight)
    assert by(other, "encoder").metrics["probe_top1"] < 0.2
    assert by(other, "encoder").metrics["rankme"] == by(on_digits, "encoder").metrics["rankme"]


def test_a_limit_spreads_over_the_classes(zoo):
    some = evaluate(zoo / NAME, data="sklearn:digits", limit=40, baselines=False)
    assert (some.train, some.test, some.limit) == (40, 40, 40)
    assert some.classes["label"] >= 8


def test_features_that_are_not_numbers(tiny_entry, monkeypatch):
    nothing = dataclasses.replace(
        open_model(tiny_entry), features=lambda source, rows: torch.full((len(rows), 4), torch.nan)
    )
    monkeypatch.setattr(protocol, "open_model", lambda source: nothing)
    with pytest.raises(EntryError, match="not finite"):
        evaluate(tiny_entry, data="sklearn:digits")


# --- labels -----------------------------------------------------------------------------------------------


def parquet(file: Path, identities, groups, seed: int) -> None:
    """Noisy images of identities: a pattern each, with a weaker one of the group."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(seed)
    images = []
    for identity, group in zip(identities, groups, strict=True):
        own = np.random.default_rng([7, ord(identity[-1])]).uniform(0, 180, (12, 10, 3))
        shared = np.random.default_rng([8, ord((group or "z")[-1])]).uniform(0, 60, (12, 10, 3))
        pixels = np.clip(own + shared + rng.normal(0, 8, (12, 10, 3)), 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        images.append({"bytes": buffer.getvalue(), "path": None})
    pq.write_table(pa.table({"image": images, "identity": identities, "group": groups}), file)


@pytest.fixture(scope="module")
def identities(tmp_path_factory) -> str:
    """Train identities a-f, test identities g-l, four images each; groups in both, one image without."""
    folder = tmp_path_factory.mktemp("identities")
    for split, letters in (("train", "abcdef"), ("test", "ghijkl")):
        names = [f"id {letter}" for letter in letters for _ in range(4)]
        groups = [f"group {'xy'[number // 4 % 2]}" for number in range(24)]
        parquet(folder / f"{split}.parquet", names, [None, *groups[1:]], seed=split == "test")
    return str(folder)


def test_new_classes_are_retrieved_and_verified_but_not_predicted(tiny_entry, identities):
    notes: list[str] = []
    found = evaluate(tiny_entry, data=identities, labels=["identity"], notify=notes.append)
    assert found.open_set == ("identity",)
    assert [result.model for result in found.results] == ["encoder", "pixels", "pca"]
    assert any("no random baseline" in note and "linear" in note for note in notes)
    assert not any("training images" in note for note in notes)  # nothing is fitted
    for result in found.results:
        assert list(result.metrics)[:2] == ["map_at_r", "p_at_1"] and result.l2 is None
        assert result.metrics["p_at_1"] > 0.8 and result.metrics["auc"] > 0.8
        # 24 * 20 / 2 = 240 impostor pairs: too few for one in a hundred
        assert result.metrics["tar_at_far_1e-2"] is result.metrics["tar_at_far_1e-3"] is None
    assert "6 new classes" in found.table() and f"{'tar_at_far_1e-3':<18}{'-':>10}" in found.table()


def test_two_columns_at_once(tiny_entry, identities):
    found = evaluate(tiny_entry, data=identities, labels=["identity", "group"], baselines=False)
    assert found.open_set == ("identity",) and found.classes == {"identity": 6, "group": 2}
    identity, group = by(found, "encoder", "identity"), by(found, "encoder", "group")
    assert "knn_top1" not in identity.metrics
    assert group.metrics["knn_top1"] > 0.5
    # the image without a group is left out
    assert np.isnan(group.per_image["knn_top1"]).tolist() == [True, *[False] * 23]
    assert np.nanmean(group.per_image["map_at_r"]) == pytest.approx(group.metrics["map_at_r"])
    assert identity.per_image["map_at_r"].shape == (24,)


def test_classes_are_matched_by_name(tiny_entry, tmp_path):
    """The test part lacks the first class, so that its own numbers are others than the training part's."""
    parquet(tmp_path / "train.parquet", [f"id {c}" for c in "aaaabbbbcccc"], ["g"] * 12, seed=0)
    parquet(tmp_path / "test.parquet", [f"id {c}" for c in "bbbcccb"], ["g"] * 7, seed=1)
    found = evaluate(tiny_entry, data=str(tmp_path), labels=["identity"], baselines=False)
    assert found.open_set == () and found.classes == {"identity": 2}
    assert by(found, "encoder", "identity").metrics["knn_top1"] == 1.0


def test_one_class_alone(tiny_entry, tmp_path):
    for split in ("train", "test"):
        parquet(tmp_path / f"{split}.parquet", ["id a"] * 5, ["g"] * 5, seed=split == "test")
    own = by(
        evaluate(tiny_entry, data=str(tmp_path), labels=["group"], baselines=False), "encoder", "group"
    ).metrics
    assert own["knn_top1"] == own["map_at_r"] == 1.0
    assert own["auc"] is own["eer"] is None


def test_data_that_cannot_be_measured_on(tiny_entry, identities, tmp_path):
    with pytest.raises(ConfigError, match="'nothing'.*--label"):
        evaluate(tiny_entry, data=identities, labels=["nothing"])
    with pytest.raises(ConfigError, match="no test part"):
        evaluate(tiny_entry, data=f"{identities}/train.parquet", labels=["identity"])
    with pytest.raises(ConfigError, match="limit"):
        evaluate(tiny_entry, data="sklearn:digits", limit=-1)
    with pytest.raises(ConfigError, match="labels"):
        evaluate(tiny_entry, data="sklearn:digits", labels=[])
    for part in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / part).mkdir(parents=True)
        Image.new("L", (9, 9), 50).save(tmp_path / part / "1.png")
    (tmp_path / "test" / "b" / "2.png").write_bytes(b"no image")
    with pytest.raises(SourceError, match=r"2\.png.*fix or remove"):
        evaluate(tiny_entry, data=str(tmp_path))


# --- baselines --------------------------------------------------------------------------------------------


def test_a_random_network_passes_its_input_on():
    """BatchNorm has the statistics of the images, and no residual branch is switched off."""
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (300, 1, 8, 8), dtype=np.uint8))
    pixels = torch.cat([pixels, pixels // 4])  # two batches of different statistics
    state = torch.random.get_rng_state()
    network = random_network(
        lambda: timm_network("resnet18", ARGS, CONTRACT), pixels, CONTRACT, open_branches=True
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 13 and all((norm.weight == 1).all() for norm in norms)
    assert not any(module.training for module in network.modules())

    with torch.inference_mode():
        first = network.conv1((pixels.float() / 255 - 0.3) / 0.4)
        batches = first.split(256)
        mean = torch.stack([part.mean(dim=(0, 2, 3)) for part in batches]).mean(0)
        torch.testing.assert_close(norms[0].running_mean, mean, atol=1e-5, rtol=1e-4)
        variance = torch.stack([part.movedim(1, 0).flatten(1).var(1) for part in batches]).mean(0)
        torch.testing.assert_close(norms[0].running_var, variance, atol=1e-5, rtol=1e-4)

    again = random_network(
        lambda: timm_network("resnet18", ARGS, CONTRACT), pixels, CONTRACT, open_branches=True
    ).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in network.state_dict().items())
    other = random_network(
        lambda: timm_network("resnet18", ARGS, CONTRACT), pixels, CONTRACT, open_branches=True, seed=1
    )
    assert not torch.equal(other.conv1.weight, network.conv1.weight)


class Sees(nn.Module):
    """In the place of a network: its pixels as they are, or nothing at all."""

    def __init__(self, network, pixels):
        super().__init__()
        self.network, self.pixels = network, pixels

    def forward(self, x):
        return x.flatten(1) if self.pixels else torch.ones(len(x), 2)


@pytest.mark.parametrize("better", [True, False])
def test_the_random_baseline_is_the_start_that_is_harder_to_beat(better, trained, monkeypatch):
    built, closed = baselines.random_network, {}

    def network(*args, open_branches, **more):
        found = built(*args, open_branches=open_branches, **more)
        closed[open_branches] = len(baselines._closed(found))
        return Sees(found, open_branches is better)

    monkeypatch.setattr(baselines, "random_network", network)
    found = by(evaluate(trained, data="sklearn:digits"), "random").metrics
    assert closed == {True: 0, False: 4}  # r10 has four residual branches
    assert found["knn_top1"] > 0.9


def test_random_networks_of_entries_that_timm_cannot_build():
    pixels = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    assert random_network(lambda: timm_network("r10", None, CONTRACT), pixels, CONTRACT, open_branches=True)(
        torch.zeros(2, 1, 8, 8)
    ).shape == (2, 256)
    for args in (None, {"in_chans": 1}):
        with pytest.raises(ConfigError, match="no network"):
            timm_network("resnet_of_nobody", args, CONTRACT)


def test_pixels_are_the_contracts():
    rng = np.random.default_rng(0)
    rows = np.arange(3)
    small = ArraySource(rng.integers(0, 256, (3, 8, 8), dtype=np.uint8), np.zeros(3), ["a"], "small")
    found = pixel_features(CONTRACT)(small, rows)
    np.testing.assert_allclose(found.numpy(), small.arrays.reshape(3, -1) / 255, atol=1e-7)

    large = dataclasses.replace(CONTRACT, size=(64, 32), resize="squash")
    source = ArraySource(rng.integers(0, 256, (3, 64, 32), dtype=np.uint8), np.zeros(3), ["a"], "large")
    found = pixel_features(large)(source, rows)
    expected = source.arrays.reshape(3, 32, 2, 16, 2).mean(axis=(2, 4)) / 255
    np.testing.assert_allclose(found.numpy(), expected.reshape(3, -1), atol=1e-6)


# --- runs -------------------------------------------------------------------------------------------------


def test_a_run_is_evaluated_by_its_network_and_its_pretext_task(trained):
    found = evaluate(trained, data="sklearn:digits")
    assert (found.source, found.weights_sha256) == ("first", "")
    assert [result.model for result in found.results] == ["encoder", "random", "pixels", "pca"]

    _, method = run.load_run(trained)
    test = open_source("sklearn:digits", "test")
    contract = Preprocess(
        color="gray", size=(8, 8), resize_size=8, mean=method.facts.mean, std=method.facts.std
    )
    pixels = test.decode(np.arange(len(test)), contract)
    with torch.inference_mode():
        features = PixelEncoder(method.encoder(), contract)(pixels)
        logits = method.classifier(features)
    own = open_model(trained).features(test, np.arange(len(test)))
    torch.testing.assert_close(own, features, atol=1e-4, rtol=1e-4)

    right = logits.argmax(1)[:256].numpy() == test.labels[:256]  # whole batches
    assert found.pretext == {"accuracy": pytest.approx(right.mean(), abs=0.01)}
    assert pretext_metric(trained, "sklearn:digits") == found.pretext
    assert "pretext accuracy" in found.table()
    assert pretext_metric(trained, "synthetic:100") != {}  # ten classes of the same names
    with pytest.raises(ConfigError, match="export"):
        write_metrics(found, trained)


@pytest.mark.filterwarnings(
    "ignore:Number of distinct clusters"
)  # scikit-learn's, of images that are all alike
def test_metrics_that_are_not_finite_are_left_out(own_zoo, tmp_path):
    folder = tmp_path / "black"
    for part, count in (("train", 6), ("test", 4)):
        for number in range(count):
            (folder / part / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8)).save(folder / part / "ab"[number % 2] / f"{number}.png")
    found = evaluate(own_zoo / NAME, data=str(folder))  # all images are alike: their pixels have no rank
    assert by(found, "pixels").metrics["rankme"] is None
    write_metrics(found, own_zoo / NAME)
    assert verify_entry(own_zoo / NAME).ok and json.loads((own_zoo / INDEX).read_text())["entries"]


def test_metrics_are_written_into_a_folder_and_say_what_they_drop(own_zoo, on_digits, monkeypatch, tmp_path):
    monkeypatch.setenv("EMBEDKIT_ZOO", str(own_zoo))
    app = typer.Typer()
    app.command()(command)
    monkeypatch.setattr(protocol, "evaluate", None)  # refused before minutes of work
    error = CliRunner().invoke(app, [NAME, "--data", "sklearn:digits", "--write"]).exception
    assert isinstance(error, ConfigError) and "give the folder of an entry" in str(error)
    told: list[str] = []
    write_metrics(on_digits, own_zoo / NAME, told.append)
    monkeypatch.setattr("embedkit.training.evaluation.record.PROTOCOL", "Protocol 9.")
    (tmp_path / "link").symlink_to(own_zoo / NAME)
    write_metrics(on_digits, tmp_path / "link", told.append)
    assert told == ["older metrics, of other weights or another protocol, are dropped: sklearn:digits"]
    assert (tmp_path / "link").is_symlink()
    assert find_entry(own_zoo / NAME).config.metrics["protocol"] == "Protocol 9."


def test_a_task_with_labels_is_not_asked_about_classes_that_it_does_not_know(trained, identities):
    config, method = run.load_run(trained)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, label="identity"))
    assert protocol._pretext(config, method, identities, 0) == {}


def test_a_run_that_was_stopped_too_early(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(OutputError):
        evaluate(tmp_path, data="sklearn:digits")


# --- metrics in the entry ---------------------------------------------------------------------------------


def test_metrics_enter_the_entry(own_zoo, on_digits):
    folder = own_zoo / NAME
    before = EntryConfig.from_json((folder / CONFIG).read_bytes())
    (folder / "notes.txt").write_text("not in the manifest")
    manifest = write_metrics(on_digits, folder)

    assert verify_entry(folder).ok
    config = EntryConfig.from_json((folder / CONFIG).read_bytes())
    assert dataclasses.replace(config, metrics={}) == before
    assert config.metrics["weights_sha256"] == manifest.files["model.safetensors"].sha256
    assert config.metrics["protocol"] == protocol.PROTOCOL
    assert config.metrics["images"] == {"sklearn:digits": {"train": 1437, "test": 360}}
    own = config.metrics["results"]["sklearn:digits"]
    assert own == {
        name: round(value, 6) for name, value in by(on_digits, "encoder").metrics.items() if value is not None
    }
    beside = config.metrics["baselines"]["sklearn:digits"]
    assert beside["pixels"]["knn_top1"] == round(by(on_digits, "pixels").metrics["knn_top1"], 6)
    assert set(beside) == {"random", "pixels", "pca"}

    card = (folder / CARD).read_text()
    low, high = config.metrics["intervals"]["sklearn:digits"]["knn_top1"]
    images = f"{on_digits.train:,} training images, {on_digits.test:,} test images."
    assert f"### sklearn:digits\n\n{images}" in card and "model-index" in card
    assert f"| knn_top1 | {own['knn_top1']:.4f} | {low:.4f} to {high:.4f} |" in card
    for words in (WORDS.summary, *(f"- {limit}" for limit in WORDS.limits), "- digits\n", "- tests\n"):
        assert words in card
    assert card.count(WORDS.summary) == card.count("None measured") + 1 == 1
    assert json.loads((own_zoo / INDEX).read_text())["entries"][NAME]["metrics"] == config.metrics
    assert (folder / "notes.txt").read_text() == "not in the manifest"

    # once more: the same bytes
    assert write_metrics(on_digits, folder) == manifest


def test_other_data_and_older_protocols(own_zoo, on_digits, monkeypatch):
    folder = own_zoo / NAME
    write_metrics(on_digits, folder)
    other = dataclasses.replace(
        on_digits,
        data="things",
        classes={"group": 3},
        results=tuple(dataclasses.replace(one, label="group") for one in on_digits.results),
    )
    write_metrics(other, folder)
    metrics = EntryConfig.from_json((folder / CONFIG).read_bytes()).metrics
    assert list(metrics["results"]) == ["sklearn:digits", "things by group"] == list(metrics["baselines"])
    monkeypatch.setattr("embedkit.training.evaluation.record.PROTOCOL", "Protocol 2")
    write_metrics(other, folder)
    metrics = EntryConfig.from_json((folder / CONFIG).read_bytes()).metrics
    assert list(metrics["results"]) == ["things by group"] and metrics["protocol"] == "Protocol 2"


def test_metrics_that_do_not_belong_to_the_entry(own_zoo, on_digits):
    folder = own_zoo / NAME
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(ConfigError, match="weights"):
        write_metrics(dataclasses.replace(on_digits, weights_sha256="0" * 64), folder)
    with pytest.raises(ConfigError, match="limit"):
        write_metrics(dataclasses.replace(on_digits, limit=100), folder)
    (folder / CARD).write_text("by hand")
    with pytest.raises(IntegrityError, match=r"README\.md"):
        write_metrics(on_digits, folder)
    (folder / CARD).write_bytes(before[CARD])
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_no_index_is_made_where_there_is_none(own_zoo, on_digits):
    (own_zoo / INDEX).unlink()
    (own_zoo / "README.md").write_text("mine")
    write_metrics(on_digits, own_zoo / NAME)
    assert not (own_zoo / INDEX).exists() and (own_zoo / "README.md").read_text() == "mine"


# --- the command ------------------------------------------------------------------------------------------


def call(*arguments: str):
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def test_the_command_prints_and_writes(own_zoo, on_digits):
    folder = own_zoo / NAME
    before = (folder / MANIFEST).read_bytes()
    result = call(str(folder), "--data", "sklearn:digits", "--json", "--no-baselines", "--limit", "60")
    assert result.exit_code == 0 and (folder / MANIFEST).read_bytes() == before
    found = json.loads(result.stdout)
    assert found["limit"] == 60 and [one["model"] for one in found["results"]] == ["encoder"]
    assert "encoder: kNN by label" in result.stderr

    result = call(str(folder), "--data", "sklearn:digits", "--write")
    assert result.exit_code == 0
    value = by(on_digits, "encoder").metrics["knn_top1"]
    head, *lines = result.stdout.splitlines()
    assert head.startswith("label\tmetric\tencoder\t") and "\tpixels" in head
    assert any(line.startswith(f"label\tknn_top1\t{value:.4f}\t") for line in lines)
    stored = EntryConfig.from_json((folder / CONFIG).read_bytes()).metrics
    assert stored["results"]["sklearn:digits"]["knn_top1"] == round(value, 6)
