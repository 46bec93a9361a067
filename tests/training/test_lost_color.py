"""Color images are not trained gray by a recipe for gray ones, unless gray was asked for."""

import dataclasses

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

torch = pytest.importorskip("torch")

from embedkit.cli import app
from embedkit.errors import ConfigError
from embedkit.training import lost_color, recipes

SMALL = ("steps=1", "batch_size=4", "threads=1", "data.image_size=16")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Twenty gray JPEGs and one in color, as 16 evenly spread ones show; and the gray ones alone."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name in ("mixed", "gray"):
        (root / name).mkdir()
        for number in range(20):
            pixels = np.repeat(rng.integers(0, 256, (32, 32, 1), dtype=np.uint8), 3, axis=2)
            Image.fromarray(pixels).save(root / name / f"{number:02}.jpg")
    Image.new("RGB", (32, 32), (200, 80, 40)).save(root / "mixed" / "99.jpg")
    return root


def train(folder, recipe, data, *settings):
    settings = [word for line in (*SMALL, *settings) for word in ("--set", line)]
    return CliRunner().invoke(
        app, ["train", recipe, "--data", str(data), "-o", str(folder / "run"), *settings]
    )


def test_a_gray_recipe_refuses_color_images_and_names_one_for_color(photos, tmp_path):
    refused = train(tmp_path, "simclr", photos / "mixed")
    assert isinstance(refused.exception, ConfigError) and not (tmp_path / "run").exists()
    said = str(refused.exception)
    assert f"images of {photos / 'mixed'} have color, and simclr is for gray ones of 16x16 pixels" in said
    named = said.partition("embedkit train ")[2].split()[0]
    assert named.startswith("simclr:") and recipes.recipe(named).data.color == "rgb"
    assert "--set data.color=gray" in said


def test_gray_images_and_gray_on_purpose_are_trained(photos, tmp_path):
    (tmp_path / "purpose").mkdir()
    assert train(tmp_path, "simclr", photos / "gray").exit_code == 0
    chosen = train(tmp_path / "purpose", "simclr", photos / "mixed", "data.color=gray")
    assert chosen.exit_code == 0 and "have color, and are trained gray at 16x16" in chosen.stderr


@pytest.mark.parametrize(
    ("names", "instead"),
    [
        (("gan", "gan:small"), "--set data.color=rgb --set data.image_size=64"),
        (("gan", "gan:small", "gan:photos"), "embedkit train gan:photos"),
        (("gan", "gan:photos", "gan:color", "simclr:color"), "embedkit train gan:color"),
    ],
)
def test_the_recipe_for_color_is_looked_up(photos, monkeypatch, names, instead):
    gray = recipes.recipe("gan")
    gray = dataclasses.replace(gray, data=dataclasses.replace(gray.data, path=str(photos / "mixed")))
    color = dataclasses.replace(gray, data=dataclasses.replace(gray.data, color="rgb"))
    monkeypatch.setattr(lost_color.recipes, "summaries", lambda: dict.fromkeys(names, ""))
    monkeypatch.setattr(lost_color.recipes, "recipe", lambda name: color if name.endswith("photos") else gray)
    with pytest.raises(ConfigError, match=f"; {instead}"):
        lost_color.check_color(gray, given=False)
