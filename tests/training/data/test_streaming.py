"""Streaming keeps its workers over epochs, gives the order of a resumed run, and tells how long training waited."""

import csv
import itertools
import os
import time
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from PIL import Image
from safetensors.torch import load_file

from embedkit.training import run
from embedkit.training.config import with_overrides
from embedkit.training.data import ImageSet, Loader, Shuffled
from embedkit.training.data.config import DataConfig
from embedkit.training.data.source import Source
from embedkit.training.recipes import recipe


class Numbered(Source):
    """Images of one pixel's value; each read leaves the number of the reading process in a folder."""

    def __init__(self, count, folder, seconds=0.0):
        super().__init__()
        self.labels, self.classes = np.arange(count), tuple(map(str, range(count)))
        self.folder, self.seconds = Path(folder), seconds

    def read(self, row):
        (self.folder / str(os.getpid())).touch()
        time.sleep(self.seconds)
        return np.full((4, 4), row, np.uint8)

    def where(self, row):
        return str(row)


def streamed(source):
    contract = DataConfig(image_size=4).contract()
    labels = torch.from_numpy(source.labels)
    return ImageSet(source, labels, source.classes, torch.arange(len(source)), contract)


def loader(source, **more):
    return Loader(streamed(source), Shuffled(), batch_size=4, seed=7, **more)


def test_the_same_workers_read_all_epochs(tmp_path):
    read = loader(Numbered(22, tmp_path), workers=2)  # 5 batches an epoch
    pixels = [batch.images[:, 0, 0, 0] for batch in itertools.islice(read, 23)]
    assert all(len(epoch.unique()) == 20 for epoch in torch.cat(pixels[:20]).reshape(4, 20))
    assert len(list(tmp_path.iterdir())) == 2 and str(os.getpid()) not in os.listdir(tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_goes_on_where_it_was(tmp_path, workers):
    source = Numbered(22, tmp_path)
    whole = [batch.indices.tolist() for batch in itertools.islice(loader(source), 14)]
    for start in (0, 3, 5, 11):
        later = loader(source, workers=workers, position=lambda start=start: start)
        for expected, batch in zip(whole[start:], later, strict=False):
            assert batch.indices.tolist() == expected == batch.images[:, 0, 0, 0].tolist()


def test_the_share_of_waiting_is_that_of_the_slower_side(tmp_path):
    slow_data = loader(Numbered(40, tmp_path, seconds=0.02))
    for _ in itertools.islice(slow_data, 8):  # 0.08 s of reading a batch, and no training
        pass
    slow_training = loader(Numbered(40, tmp_path))
    for _ in itertools.islice(slow_training, 8):
        time.sleep(0.08)
    assert loader(Numbered(40, tmp_path)).wait == 0 and slow_training.wait < 0.5 < slow_data.wait <= 1


def test_a_streamed_run_says_its_waiting_and_gives_the_weights_of_memory(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for number in range(24):
        pixels = rng.integers(0, 256, (20, 20), dtype=np.uint8)
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number:02}.png")
    settings = [
        "threads=1",
        "batch_size=8",
        "steps=7",
        "data.image_size=16",
        "data.load_size=20",
        "precision=fp32",
    ]
    settings += ["method.hidden_dim=32", "log_every=2", "data.workers=1"]
    weights = {}
    for stream in ("false", "true"):
        config = with_overrides(recipe("simclr"), [*settings, f"data.stream={stream}"])
        result = run.train(config, data=str(tmp_path / "images"), out=tmp_path / stream, progress=True)
        said = capsys.readouterr().err
        assert ("of the time went to waiting for images" in said) == (stream == "true")
        with open(tmp_path / stream / "metrics.csv", newline="") as file:
            assert all(0 <= float(row["data/wait"]) <= 1 for row in csv.DictReader(file))
        assert 0 <= result.metrics["data/wait"] <= 1
        weights[stream] = load_file(tmp_path / stream / "encoder.safetensors")
    assert all(torch.equal(value, weights["true"][name]) for name, value in weights["false"].items())
