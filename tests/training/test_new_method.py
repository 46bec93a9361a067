"""A new method is new files alone: one that lies outside the package is discovered, trained, checked and exported."""

import sys
import textwrap

import pytest

torch = pytest.importorskip("torch")

import contract

from embedkit.training import methods, recipes, run
from embedkit.training.config import to_json
from embedkit.training.export.from_run import export_run

METHOD = '''
"""Quadrants: a tile of an image is told its place by a network without BatchNorm."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedkit.training.augment import Augmentation, RandomHorizontalFlip
from embedkit.training.data.targets import accuracy
from embedkit.training.method import Method, float32_loss
from embedkit.training.models.tiles import TileGrid, standardize_tiles

FAMILY = "a pretext task"
SUMMARY = "Quadrants: a tile of an image is told its place."


@dataclass(frozen=True, kw_only=True)
class Config:
    tile: int = 10
    augment: Augmentation = RandomHorizontalFlip()


@float32_loss
def place_loss(logits: Tensor, places: Tensor) -> Tensor:
    return F.cross_entropy(logits, places)


class Quadrants(Method):
    streams = ("tiles",)

    @classmethod
    def build_backbone(cls, request, config, facts):
        return request(image_size=config.tile, norm="layer")

    def __init__(self, backbone, config, facts):
        super().__init__(backbone, config, facts)
        self.grid = TileGrid(grid=2, cell=facts.image_shape[1] // 2, tile=config.tile)
        self.places = nn.Linear(backbone.dim, 4)

    def loss(self, batch, generator):
        logits, places = self._tell(self.view(batch.images, self.config.augment, generator), self.generator("tiles"))
        return {"loss": place_loss(logits, places), "accuracy": accuracy(logits, places)}

    def pretext_metric(self, batch, generator):
        return {"place_accuracy": accuracy(*self._tell(self.view(batch.images), generator))}

    def _tell(self, x, generator):
        tiles = standardize_tiles(self.grid.apply(x, self.grid.draw(len(x), generator)))
        places = torch.arange(4, device=x.device).repeat(len(x))
        return self.places(self.backbone(tiles.flatten(0, 1))), places
'''

RECIPE = '''
"""Recipe of `quadrants`."""

from embedkit.training.config import RunConfig
from embedkit.training.data import DataConfig
from embedkit.training.methods import quadrants

__all__ = ["recipe"]


def recipe() -> RunConfig:
    """Quadrants of gray images."""
    return RunConfig(recipe="quadrants", method=quadrants.Config(), data=DataConfig(image_size=28), batch_size=16)
'''


@pytest.fixture
def quadrants(tmp_path, monkeypatch):
    """The name of the new method."""
    for package, text in ((methods, METHOD), (recipes, RECIPE)):
        folder = tmp_path / package.__name__.rpartition(".")[2]
        folder.mkdir()
        (folder / "quadrants.py").write_text(textwrap.dedent(text))
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    yield "quadrants"
    for package in (methods, recipes):
        sys.modules.pop(f"{package.__name__}.quadrants", None)
        package.__dict__.pop("quadrants", None)


def test_a_new_method_touches_no_shared_file(quadrants, tmp_path, monkeypatch):
    assert quadrants in methods.names() and quadrants in methods.families()["a pretext task"]
    assert recipes.summaries()[quadrants] == "Quadrants of gray images; not measured yet."
    config = contract.tiny(quadrants)
    assert to_json(config)["method"]["type"] == "methods.quadrants.Config"
    contract.check_augmentations_reach_the_backbone(config)
    contract.check_labels(config)
    contract.check_streams(config)
    contract.check_gradient(config, monkeypatch)
    contract.check_fields(config)
    contract.check_overfits(config)
    result = run.train(config, out=tmp_path / "run", progress=False)
    contract.check_resume(config, tmp_path / "run", tmp_path / "again", monkeypatch)
    assert result.finished
    method = run.load_run(tmp_path / "run")[1]
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in method.modules())
    folder = export_run(tmp_path / "run", "quadrants-r10.toy", tmp_path / "zoo", license="CC0-1.0")
    assert '"family": "a pretext task"' in (folder / "config.json").read_text()
