"""Crops are cut out of images that are stored larger than the encoder's, and held-out images follow the contract."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

from embedkit.errors import ConfigError
from embedkit.images.transform import read_pixels
from embedkit.training import run
from embedkit.training.augment import Compose, RandomHorizontalFlip, RandomResizedCrop, RandomShift
from embedkit.training.config import with_overrides
from embedkit.training.data import DataConfig, load_images, load_parts
from embedkit.training.data import config as data_config
from embedkit.training.methods import simclr
from embedkit.training.recipes import recipe

#: A pixel black, a pixel white: gone in an image of any smaller size.
BOARD = (np.indices((128, 128)).sum(0) % 2 * 255).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """20 images of 128x128 and one of 300x200: checkerboards beside noise, in two classes."""
    root, rng = tmp_path_factory.mktemp("stored"), np.random.default_rng(0)
    for kind in "ab":
        (root / kind).mkdir()
    for number in range(20):
        pixels = BOARD if number % 2 else rng.integers(0, 256, (128, 128), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "ab"[number % 2] / f"{number:02}.png")
    noise = rng.integers(0, 256, (200, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((1200, 800)).save(root / "a" / "wide.jpg", quality=95)
    return root


def config(folder, **changes):
    return DataConfig(
        **{"path": str(folder), "image_size": 32, "load_size": 128, "validation": 0.2, **changes}
    )


@pytest.fixture(scope="module")
def method(folder):
    """SimCLR for 32 pixels over images of 128."""
    settings = ["data.image_size=32", "data.load_size=128", "batch_size=8", "threads=1", "precision=fp32"]
    made = with_overrides(recipe("simclr"), settings)
    made = dataclasses.replace(made, data=dataclasses.replace(made.data, path=str(folder)))
    images, _ = run.open_data(made)
    return run.build_method(made, run.facts_of(made, images, 8)), images


@pytest.mark.parametrize("stream", [False, True])
def test_training_images_are_stored_large_and_held_out_ones_by_the_contract(folder, stream):
    own = config(folder, stream=stream)
    train, validation = load_parts(own, seed=0)
    assert len(train) == 17 and len(validation) == 4
    files = sorted(folder.rglob("*.*"))
    for images, side in ((train, 128), (validation, 32)):
        contract = dataclasses.replace(own.contract(), size=(side, side), resize_size=side)
        found = images.batch(torch.arange(len(images)))
        assert found.images.shape[1:] == (1, side, side)
        # rows are those of the sorted files; in memory the held-out images are decoded apart, in the same order
        expected = [read_pixels(file, contract) for file in files]
        for pixels in found.images.numpy():
            assert any((pixels == one).all() for one in expected)
    assert load_images(own).batch(torch.arange(21)).images.shape == (21, 1, 32, 32)


def test_the_detail_of_the_file_survives_in_a_crop(method, folder):
    module, images = method
    batch = images.batch(torch.nonzero(images.labels == 1)[:, 0])  # the checkerboards
    exactly = RandomResizedCrop(scale=(1 / 16, 1 / 16), ratio=(1.0, 1.0))  # 32x32 of 128x128: no resampling
    crops = module.pixels(batch.images, exactly, torch.Generator().manual_seed(0))
    assert crops.shape[1:] == (1, 32, 32)
    place = exactly.draw(len(crops), torch.Generator().manual_seed(0))["place"]
    for crop, (down, right) in zip(crops, (place * 97).int().T.tolist(), strict=True):
        by_hand = BOARD[down : down + 32, right : right + 32] / np.float32(255)
        assert np.abs(crop[0].numpy() - by_hand).max() < 1e-6
    # of the image at the encoder's size nothing of the pattern is left to crop
    shrunk = load_images(config(folder))
    small = shrunk.images[shrunk.labels == 1]
    assert int(small.max()) - int(small.min()) <= 8


def test_a_crop_is_pillows_crop_of_the_stored_image(method):
    module, images = method
    batch = images.batch(torch.arange(len(images)))
    augment = RandomResizedCrop(scale=(0.2, 1.0))
    crops = module.pixels(batch.images, augment, torch.Generator().manual_seed(3))
    boxes = augment.boxes(augment.draw(len(crops), torch.Generator().manual_seed(3)), 128, 128)
    for stored, crop, *box in zip(batch.images, crops, *(side.int().tolist() for side in boxes), strict=True):
        top, left, height, width = box
        part = Image.fromarray(stored[0].numpy()).crop((left, top, left + width, top + height))
        by_hand = np.asarray(part.resize((32, 32), Image.Resampling.BILINEAR), np.float32)
        assert np.abs(crop[0].numpy() * 255 - by_hand).max() <= 1.01  # Pillow rounds twice


def test_every_view_has_the_size_of_the_encoder(method):
    module, images = method
    batch = images.batch(torch.arange(8))
    crop, flip, shift = RandomResizedCrop(), RandomHorizontalFlip(), RandomShift(pixels=2)
    for augment in (None, crop, flip, shift, Compose(steps=(flip, crop)), Compose(steps=(shift, flip))):
        assert module.view(batch.images, augment).shape == (8, 1, 32, 32)
    own = RandomResizedCrop(size=(16, 16))  # a local crop keeps the size that it was given
    assert module.view(batch.images, own).shape == (8, 1, 16, 16)
    # a shift is one of the encoder's pixels: it moves what it would move in the image at that size
    whole = module.pixels(batch.images)
    moved = module.pixels(batch.images, shift, torch.Generator().manual_seed(1))
    assert torch.equal(moved, shift(whole, torch.Generator().manual_seed(1)))
    assert torch.equal(module.pixels(batch.images[..., ::4, ::4]), batch.images[..., ::4, ::4] / 255)


def test_a_run_trains_on_crops_and_is_checked_on_whole_images(folder, tmp_path, monkeypatch):
    seen = []
    loss, metric = simclr.SimCLR.loss, simclr.SimCLR.pretext_metric

    def noted(inner):
        def call(self, batch, generator):
            seen.append((self.training, *batch.images.shape[2:]))
            return inner(self, batch, generator)

        return call

    monkeypatch.setattr(simclr.SimCLR, "loss", noted(loss))
    monkeypatch.setattr(simclr.SimCLR, "pretext_metric", noted(metric))
    settings = ["data.image_size=32", "data.load_size=64", "data.validation=0.2", "batch_size=8", "steps=2"]
    made = with_overrides(recipe("simclr"), [*settings, "threads=1", "method.hidden_dim=32"])
    result = run.train(made, data=str(folder), out=tmp_path / "run", progress=False)
    assert result.finished and seen == [(True, 64, 64), (True, 64, 64), (False, 32, 32)]


def test_a_large_jpeg_is_decoded_at_a_reduced_scale(folder):
    own = config(folder, validation=0.0)
    stored = load_images(dataclasses.replace(own, image_size=128, load_size=0)).images[-11]
    contract = dataclasses.replace(own.contract(), size=(128, 128), resize_size=128)
    file = folder / "a" / "wide.jpg"
    reduced, exact = (read_pixels(file, contract, decode=mode) for mode in ("auto", "exact"))
    assert (stored.numpy() == reduced).all() and (reduced != exact).any()


def test_sizes_that_do_not_fit_are_refused(folder, monkeypatch, capsys):
    with pytest.raises(ConfigError, match=r"data.load_size: expected 0, or 32 .* found 24"):
        load_parts(config(folder, load_size=24), seed=0)
    monkeypatch.setattr(data_config, "free_memory", lambda: 100_000)
    with pytest.raises(ConfigError, match=r"21 images of 128x128 .* 0.0 GB are free; --set data.stream=true"):
        load_parts(config(folder), seed=0)
    load_parts(config(folder, stream=True), seed=0)
    monkeypatch.setattr(data_config, "free_memory", lambda: None)
    monkeypatch.setattr(data_config, "_LARGE", 21 * 128 * 128)
    load_parts(config(folder), seed=0)
    assert "21 images of 128x128 pixels take 0.0 GB of memory" in capsys.readouterr().err
