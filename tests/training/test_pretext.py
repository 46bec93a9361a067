"""The record of a pretext task: levels by chance, and intervals that hold as often as they say."""

import dataclasses
import statistics
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

import contract

from embedkit.training import methods, run
from embedkit.training.pretext import pretext_intervals, pretext_on


class Measured:
    """A method whose metric is the mean of the images' first pixels, in units of 255."""

    device = torch.device("cpu")
    facts = SimpleNamespace(num_classes=0)

    def eval(self):
        return self

    def generator(self, purpose):
        return torch.Generator().manual_seed(0)

    def pretext_metric(self, batch, generator):
        values = batch.images[:, 0, 0, 0].float() / 255
        return {
            "share": values.mean(),
            "share_by_chance": values.max(),
            "seldom": values.mean() * float("nan"),
        }

    def pretext_chance(self):
        return {"share": 0.5, "another": 0.25}


def coins(n, seed):
    """n images that are white with a probability of 0.3."""
    images, _ = run.open_data(contract.tiny("rotnet"))
    white = torch.rand(n, generator=torch.Generator().manual_seed(seed)) < 0.3
    pixels = (255 * white.byte())[:, None, None, None].expand(-1, 1, 4, 4).contiguous()
    return dataclasses.replace(
        images, images=pixels, labels=torch.full((n,), -1), rows=torch.arange(n), targets={}
    )


def test_what_is_known_by_chance_stands_beside_the_metric():
    found = pretext_on(Measured(), coins(512, 0))
    assert found == {"share": pytest.approx(0.3, abs=0.06), "share_by_chance": 0.5}


def test_nineteen_intervals_of_twenty_hold_the_truth():
    held, widths = 0, []
    for seed in range(200):
        low, high = pretext_intervals(Measured(), coins(512, seed))["share"]
        held += low <= 0.3 <= high
        widths.append(high - low)
    # 190 expected, with a deviation of 3.1
    assert 180 <= held <= 199
    # a mean of 512 draws has a deviation of sqrt(0.3 * 0.7 / 512); Student's t of 15 degrees of freedom is 2.131
    assert statistics.mean(widths) == pytest.approx(2 * 2.131 * (0.21 / 512) ** 0.5, rel=0.06)


def test_the_interval_lies_around_the_metric_and_needs_images():
    images = coins(2048, 1)
    (low, high), value = (
        pretext_intervals(Measured(), images)["share"],
        pretext_on(Measured(), images)["share"],
    )
    assert (low + high) / 2 == pytest.approx(value) and set(pretext_intervals(Measured(), images)) == {
        "share"
    }
    assert pretext_intervals(Measured(), coins(63, 0)) == {}
    assert set(pretext_intervals(Measured(), coins(64, 0))) == {"share"}


#: Of each method, the metrics whose level by chance is known: those of the tasks that images give of themselves.
BY_CHANCE = {
    "autoencoder": {"explained_variance"},
    "bigan": {"reconstruction_ratio"},
    "bigbigan": {"reconstruction_ratio"},
    "colorization": {"color_accuracy"},
    "context_encoder": {"hole_explained"},
    "cooccurrence": {"pair_accuracy"},
    "cpc": {"patch_accuracy"},
    "damaged_jigsaw": {"order_accuracy", "painting_ratio", "color_accuracy"},
    "denoising": {"error_removed"},
    "egomotion": {"shift_accuracy", "turn_accuracy", "single_view_turn_accuracy"},
    "jigsaw": {"jigsaw_accuracy"},
    "mae": {"explained_energy"},
    "mixae": {"explained_variance"},
    "rotnet": {"rotation_accuracy"},
    "split_brain": {"color_accuracy", "lightness_accuracy"},
    "vim": {"token_accuracy", "unexplained"},
    "vqgan": {"unexplained"},
}


@pytest.mark.parametrize("name", methods.names())
def test_every_method_is_recorded_with_intervals_and_levels_by_chance(name):
    config = contract.tiny(name)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, path="synthetic:64"))
    method, _ = contract.build(config)
    images, _ = run.open_data(config)
    found, intervals = pretext_on(method, images), pretext_intervals(method, images)
    known = {metric.removesuffix("_by_chance") for metric in found if metric.endswith("_by_chance")}
    if name == "ubernet":
        assert {"rotation_accuracy", "edges_unexplained"} <= known
    else:
        assert known == BY_CHANCE.get(name, set())
    assert set(intervals) >= known and all(
        low <= found[key] <= high for key, (low, high) in intervals.items()
    )
