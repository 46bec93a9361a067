"""Recipes for color: what their views do to color, and that each trains, at every size that its docstring names."""

import colorsys
import dataclasses

import pytest

torch = pytest.importorskip("torch")

from embedkit.training import recipes, run
from embedkit.training.augment import RandomHorizontalFlip
from embedkit.training.config import with_overrides
from embedkit.training.methods import method_class

COLOR = ["simclr:color", "mae:color", "fixmatch:color"]
IDENTITIES = ["sphereface:finetune", "triplet:finetune", "contrastive:finetune"]
ALL = [*COLOR, "supervised:finetune", *IDENTITIES]


def hues(name, saturation=0.8):
    """Hue and saturation of 512 views of one color without any shape."""
    augment = recipes.recipe(name).method.augment
    color = colorsys.hsv_to_rgb(0.5, saturation, 0.6)
    images = torch.tensor(color)[None, :, None, None].expand(512, 3, 32, 32)
    views = augment(images, torch.Generator().manual_seed(0)).mean((2, 3)).tolist()
    found = torch.tensor([colorsys.rgb_to_hsv(*view)[:2] for view in views])
    return found[:, 0], found[:, 1]


def test_the_color_of_a_view_does_not_tell_which_image_it_is_of():
    hue, saturation = hues("simclr:color")
    gray = saturation < 1e-3
    # A fifth is gray. Of the rest four fifths are jittered: hue is uniform in 0.3..0.7, of deviation 0.4 / 12^.5.
    assert abs(gray.float().mean() - 0.2) < 0.06
    turned = (hue[~gray] - 0.5).abs() > 1e-3
    assert abs(turned.float().mean() - 0.8) < 0.06
    assert (hue[~gray][turned] - 0.5).abs().max() < 0.2 + 1e-3
    assert abs(hue[~gray][turned].std() - 0.4 / 12**0.5) < 0.012
    assert saturation[~gray].std() > 0.1
    mild = hues("simclr:photos")[0]
    assert (mild[mild > 0] - 0.5).abs().max() < 0.03  # milder by its docstring's choice


def test_identities_are_not_mirrored_and_are_set_aside_whole():
    for name in IDENTITIES:
        config = recipes.recipe(name)
        assert not any(isinstance(step, RandomHorizontalFlip) for step in config.method.augment.steps)
        config = with_overrides(config, ["data.path=synthetic:200", "data.validation=0.3"])
        train, held = run.open_data(config)
        assert len(train.classes) == 7 and int(train.labels.max()) == 6
        assert set(held.labels.tolist()) == {7, 8, 9} and len(held.classes) == 10
        assert len(train) + len(held) == 200


@pytest.mark.parametrize("name", ALL)
def test_every_color_recipe_trains_and_cuts_crops_from_larger_images(name, tmp_path, monkeypatch):
    config = recipes.recipe(name)
    assert config.data.color == "rgb" and config.data.load_size > config.data.image_size >= 64
    small = ["threads=1", "steps=2", "data.path=synthetic:160", "evaluation.images=32"]
    small += ["data.image_size=32", "data.load_size=48", "data.validation=0.3"]
    # of ten identities seven are trained on, and each stands once in a batch
    small += ["batch_size=8" if name == "sphereface:finetune" else "batch_size=16"]
    if name != "mae:color":
        small += ["backbone=r10"]
    seen = []
    kind = method_class(name.partition(":")[0])
    view = kind.view

    def watched(self, images, augment=None, generator=None):
        out = view(self, images, augment, generator)
        if self.training and augment is not None:  # not of held-out images
            seen.append((images.shape[2], out.shape[2]))
        return out

    monkeypatch.setattr(kind, "view", watched)
    result = run.train(
        with_overrides(dataclasses.replace(config, init=""), small), out=tmp_path / "run", progress=False
    )
    assert result.finished and set(seen) == {(48, 32)}
    assert (result.best_step is not None) == bool(config.evaluation.every)
    if config.evaluation.every:
        metric = "map_at_r" if name in IDENTITIES else "knn_top1"
        assert 0 < result.metrics[f"validation_{metric}"] <= 1


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("supervised:finetune", ["data.image_size=64", "data.load_size=80"]),
        ("supervised:finetune", ["data.image_size=224", "data.load_size=256", "batch_size=32"]),
        ("mae:color", ["data.image_size=96", "data.load_size=128"]),
        (
            "mae:color",
            [
                "data.image_size=224",
                "data.load_size=256",
                "backbone=vit_small_patch16_224",
                "backbone_args.patch_size=16",
            ],
        ),
    ],
)
def test_the_sizes_of_the_docstrings_build(name, settings):
    config = dataclasses.replace(recipes.recipe(name), init="")
    config = with_overrides(config, ["data.path=synthetic:40", "data.validation=0.2", *settings])
    images, held = run.open_data(config)
    facts = run.facts_of(dataclasses.replace(config, batch_size=4), images, 1)
    method = run.build_method(config, facts).eval()
    side = config.data.image_size
    assert images.batch(torch.arange(2)).images.shape[2] == config.data.load_size
    with torch.no_grad():
        features = method.encoder()(method.view(held.batch(torch.arange(2)).images))
    assert features.shape[0] == 2 and facts.image_shape == (3, side, side)


def test_fine_tuning_starts_from_the_default_encoder(tmp_path):
    config = with_overrides(
        recipes.recipe("supervised:finetune"),
        ["threads=1", "steps=1", "batch_size=4", "data.validation=0.2", "data.image_size=64", "data.load_size=0",
         "evaluation.images=8"],
    )  # fmt: skip
    result = run.train(config, data="synthetic:40", out=tmp_path / "run", progress=False)
    stored, method = run.load_run(tmp_path / "run", "last")
    assert [parent["name"] for parent in stored.parents] == ["supervised-efficientnet_lite0.in1k"]
    assert stored.data.interpolation == "bicubic" and stored.data.image_size == 64
    assert method.facts.mean == pytest.approx((127 / 255,) * 3, abs=1e-4) and result.steps == 1
