"""Formats are read back as written, and batches are a function of (seed, epoch) at every place of a run."""

import gzip
import io
import itertools
import struct

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

from embedkit.errors import ConfigError, SourceError
from embedkit.training.data import (
    DataConfig,
    IdentityBalanced,
    LabelledAndUnlabelled,
    Loader,
    Pictures,
    Shuffled,
    keep_labels,
    load_pictures,
    split_validation,
)

RNG = np.random.default_rng(0)


def made(labels, classes=3, size=4):
    labels = torch.as_tensor(labels)
    images = torch.from_numpy(RNG.integers(0, 256, (len(labels), 1, size, size), dtype=np.uint8))
    return Pictures(images, labels, tuple(map(str, range(classes))), torch.arange(len(labels)))


def png(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def write_idx(folder, part, images, labels, zipped):
    for kind, array in (("images", images), ("labels", labels)):
        data = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
        name = f"{part}-{kind}-idx{array.ndim}-ubyte"
        (folder / (name + ".gz" if zipped else name)).write_bytes(gzip.compress(data) if zipped else data)


@pytest.fixture(scope="module")
def colours():
    """Eight 6x6 colour pictures and their three labels, one of them missing."""
    return RNG.integers(0, 256, (8, 6, 6, 3), dtype=np.uint8), ["b", "a", "b", "c", "a", "c", None, "b"]


@pytest.fixture(scope="module")
def parquet(tmp_path_factory, colours):
    import pyarrow as pa
    import pyarrow.parquet as pq

    images, labels = colours
    folder = tmp_path_factory.mktemp("parquet")
    rows = {"image": [{"bytes": png(image), "path": None} for image in images], "kind": labels}
    pq.write_table(pa.table(rows), folder / "train.parquet", row_group_size=2)
    return folder


@pytest.mark.parametrize("zipped", [True, False])
def test_idx_files(tmp_path, zipped):
    train = RNG.integers(0, 256, (20, 28, 28), dtype=np.uint8), np.arange(20, dtype=np.uint8) % 4
    test = RNG.integers(0, 256, (6, 28, 28), dtype=np.uint8), np.arange(6, dtype=np.uint8) % 4
    write_idx(tmp_path, "train", *train, zipped)
    write_idx(tmp_path, "t10k", *test, zipped)
    for split, (images, labels) in (("train", train), ("test", test)):
        pictures = load_pictures(DataConfig(path=str(tmp_path)), split)
        batch = pictures.batch(torch.arange(len(pictures)))
        assert batch.images.dtype == torch.uint8 and batch.images.shape == (len(images), 1, 28, 28)
        assert (batch.images[:, 0].numpy() == images).all() and (batch.labels.numpy() == labels).all()
    assert pictures.classes == ("0", "1", "2", "3")
    smaller = load_pictures(DataConfig(path=str(tmp_path), image_size=14, color="rgb"))
    assert smaller.images.shape == (20, 3, 14, 14)


def test_damaged_idx_files_are_named(tmp_path):
    write_idx(tmp_path, "train", np.zeros((2, 4, 4), np.uint8), np.zeros(2, np.uint8), False)
    file = tmp_path / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(SourceError, match="train-images-idx3-ubyte: .* 31 follow"):
        load_pictures(DataConfig(path=str(tmp_path)))


@pytest.mark.parametrize("stream", [False, True])
def test_parquet(parquet, colours, stream):
    images, labels = colours
    pictures = load_pictures(
        DataConfig(path=str(parquet), label="kind", color="rgb", image_size=6, stream=stream)
    )
    assert pictures.streamed == stream and pictures.classes == ("a", "b", "c")
    indices = torch.tensor([5, 0, 6, 3])
    batch = pictures.batch(indices)
    assert (batch.images.permute(0, 2, 3, 1).numpy() == images[indices.numpy()]).all()
    assert batch.labels.tolist() == [2, 1, -1, 2]
    assert load_pictures(DataConfig(path=str(parquet), label="species")).labels.tolist() == [-1] * 8
    with pytest.raises(ConfigError, match="'test'"):
        load_pictures(DataConfig(path=str(parquet)), "test")


def test_a_streamed_order_uses_row_groups_together():
    # 64 groups of 10: a window of 8 groups is used up before the next begins, and the windows differ by epoch
    pictures = made([0] * 640)
    blocks = np.arange(640) // 10

    class Grouped(Pictures):
        blocks = torch.from_numpy(np.arange(640) // 10)

    grouped = Grouped(pictures.images, pictures.labels, pictures.classes, pictures.rows)
    orders = [Shuffled().epoch(grouped, 80, 0, epoch) for epoch in range(2)]
    for order in orders:
        assert sorted(order.flatten().tolist()) == list(range(640))
        assert all(len(set(blocks[row])) == 8 for row in order.numpy())
    assert set(blocks[orders[0][0].numpy()]) != set(blocks[orders[1][0].numpy()])


def test_workers_give_what_memory_gives(parquet):
    config = DataConfig(path=str(parquet), label="kind", image_size=6)
    streamed = load_pictures(DataConfig(path=str(parquet), label="kind", image_size=6, stream=True))
    assert Shuffled().epoch(streamed, 4, 0, 0).shape == (2, 4)
    loader = Loader(streamed, Shuffled(), batch_size=4, seed=0, workers=2)
    whole = load_pictures(config)
    for batch in itertools.islice(loader, 3):
        assert torch.equal(batch.images, whole.batch(batch.indices).images)


def test_class_folders(tmp_path, colours):
    images, _ = colours
    for part, kind, number in (("train", "cat", 0), ("train", "ant", 1), ("test", "ant", 2)):
        (tmp_path / part / kind).mkdir(parents=True)
        (tmp_path / part / kind / f"{number}.png").write_bytes(png(images[number]))
    pictures = load_pictures(DataConfig(path=str(tmp_path), color="rgb", image_size=6))
    assert pictures.classes == ("ant", "cat") and pictures.labels.tolist() == [0, 1]
    assert (pictures.images[0].permute(1, 2, 0).numpy() == images[1]).all()
    assert len(load_pictures(DataConfig(path=str(tmp_path), image_size=6), "test")) == 1
    (tmp_path / "train" / "ant" / "1.png").write_bytes(b"no picture")
    with pytest.raises(SourceError, match="1.png: not a picture"):
        load_pictures(DataConfig(path=str(tmp_path)))


def test_digits_and_synthetic_pictures_need_no_files():
    parts = [
        load_pictures(DataConfig(path="sklearn:digits", image_size=8), part) for part in ("train", "test")
    ]
    assert [len(part) for part in parts] == [1437, 360] and parts[0].classes == tuple("0123456789")
    rows = {row.tobytes() for row in parts[0].images.numpy()}
    assert (
        sum(row.tobytes() in rows for row in parts[1].images.numpy()) <= 2
    )  # a few digits are equal by chance
    config = DataConfig(path="synthetic:50", color="rgb", image_size=32)
    first, again = load_pictures(config), load_pictures(config)
    assert first.images.shape == (50, 3, 32, 32) and torch.equal(first.images, again.images)
    assert first.labels.bincount().tolist() == [5] * 10


def test_no_data_says_what_to_do():
    with pytest.raises(ConfigError, match="--data PATH"):
        load_pictures(DataConfig())
    with pytest.raises(ConfigError, match="sklearn:digits"):
        load_pictures(DataConfig(path="nowhere"))


def test_validation_takes_its_share_of_every_class():
    pictures = made([0] * 40 + [1] * 20 + [2] * 10)
    train, validation = split_validation(pictures, 0.1, seed=3)
    assert validation.labels.bincount().tolist() == [4, 2, 1]
    assert sorted([*train.rows.tolist(), *validation.rows.tolist()]) == list(range(70))
    assert split_validation(pictures, 0.1, seed=3)[1].rows.tolist() == validation.rows.tolist()
    assert split_validation(pictures, 0.1, seed=4)[1].rows.tolist() != validation.rows.tolist()


def test_a_labelled_fraction_hides_the_other_labels():
    pictures = made([0] * 40 + [1] * 20 + [2] * 10)
    kept = keep_labels(pictures, 4, seed=0)
    known = kept.labels >= 0
    assert kept.labels[known].bincount().tolist() == [4, 4, 4] and len(kept) == 70
    assert torch.equal(kept.labels[known], pictures.labels[known])
    with pytest.raises(ConfigError, match="1 to 10"):
        keep_labels(pictures, 11, seed=0)


def test_statistics_are_those_of_the_pixels():
    pictures = made([0] * 10)
    values = pictures.images.double() / 255
    mean, std = pictures.statistics()
    assert mean[0] == pytest.approx(float(values.mean()), abs=1e-5)
    assert std[0] == pytest.approx(float(values.std(correction=0)), abs=1e-5)


def test_shuffled_takes_every_picture_once():
    pictures = made([0] * 23)
    order = Shuffled().epoch(pictures, 5, seed=1, epoch=0)
    assert order.shape == (4, 5) and len(order.unique()) == 20
    assert not torch.equal(order, Shuffled().epoch(pictures, 5, seed=1, epoch=1))
    assert not torch.equal(order, Shuffled().epoch(pictures, 5, seed=2, epoch=0))
    with pytest.raises(ConfigError, match="the training set has 23"):
        Shuffled().epoch(pictures, 24, seed=0, epoch=0)


def test_identity_balanced_has_p_identities_of_k():
    # identities of 1, 2, 5 and 8 pictures, and two pictures without label
    labels = [0] + [1] * 2 + [2] * 5 + [3] * 8 + [-1] * 2
    pictures = made(labels, classes=4)
    order = IdentityBalanced(pictures_per_identity=2).epoch(pictures, 4, seed=0, epoch=0)
    for row in pictures.labels[order].reshape(-1, 2, 2):
        assert (row[:, 0] == row[:, 1]).all() and row[0, 0] != row[1, 0]
    assert (pictures.labels[order] >= 0).all()
    several = order.reshape(-1, 2)[pictures.labels[order].reshape(-1, 2)[:, 0] > 0]
    assert (several[:, 0] != several[:, 1]).all()  # only the identity of one picture repeats it
    assert len(several.unique()) == several.numel()
    lengths = {len(IdentityBalanced(pictures_per_identity=2).epoch(pictures, 4, 0, e)) for e in range(5)}
    assert len(lengths) == 1
    with pytest.raises(ConfigError, match="5 identities of 2 pictures are asked for, and the data have 4"):
        IdentityBalanced(pictures_per_identity=2).epoch(pictures, 10, seed=0, epoch=0)


def test_labelled_pictures_come_first():
    pictures = keep_labels(made([0] * 30 + [1] * 30, classes=2), 3, seed=0)
    order = LabelledAndUnlabelled(ratio=3).epoch(pictures, 16, seed=0, epoch=0)
    assert order.shape == (5, 16)
    assert (pictures.labels[order[:, :4]] >= 0).all()
    assert len(order[:, 4:].unique()) == 60  # one pass over all pictures
    assert order[:, :4].flatten().bincount().max() <= 4  # 20 places for 6 pictures: 3 or 4 times each


@pytest.mark.parametrize("start", [0, 1, 4, 5, 11])
def test_a_loader_starts_at_any_batch(start):
    pictures = made([0, 1] * 11, classes=2)  # 5 batches of 4 an epoch
    whole = Loader(pictures, Shuffled(), batch_size=4, seed=7)
    later = Loader(pictures, Shuffled(), batch_size=4, seed=7, position=lambda: start)
    assert whole.steps_per_epoch == 5
    for expected, found in zip(itertools.islice(whole, start, start + 7), later, strict=False):
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_ranks_share_the_batches_of_one_process():
    pictures = made([0] * 20)
    whole = Loader(pictures, Shuffled(), batch_size=6, seed=0)
    ranks = [Loader(pictures, Shuffled(), batch_size=6, seed=0, rank=rank, world=2) for rank in range(2)]
    for one, first, second in itertools.islice(zip(whole, *ranks, strict=False), 5):
        assert one.indices.tolist() == torch.stack([first.indices, second.indices], 1).flatten().tolist()
    with pytest.raises(ConfigError, match="a multiple of the 4 devices"):
        Loader(pictures, Shuffled(), batch_size=6, seed=0, world=4)
