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
    ImageSet,
    LabeledAndUnlabeled,
    Loader,
    Shuffled,
    keep_labels,
    load_images,
    split_validation,
)

RNG = np.random.default_rng(0)


def made(labels, classes=3, size=4):
    labels = torch.as_tensor(labels)
    images = torch.from_numpy(RNG.integers(0, 256, (len(labels), 1, size, size), dtype=np.uint8))
    return ImageSet(images, labels, tuple(map(str, range(classes))), torch.arange(len(labels)))


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
def colors():
    """Eight 6x6 color images and their three labels, one of them missing."""
    return RNG.integers(0, 256, (8, 6, 6, 3), dtype=np.uint8), ["b", "a", "b", "c", "a", "c", None, "b"]


@pytest.fixture(scope="module")
def parquet(tmp_path_factory, colors):
    import pyarrow as pa
    import pyarrow.parquet as pq

    images, labels = colors
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
        found = load_images(DataConfig(path=str(tmp_path)), split)
        batch = found.batch(torch.arange(len(found)))
        assert batch.images.dtype == torch.uint8 and batch.images.shape == (len(images), 1, 28, 28)
        assert (batch.images[:, 0].numpy() == images).all() and (batch.labels.numpy() == labels).all()
    assert found.classes == ("0", "1", "2", "3")
    smaller = load_images(DataConfig(path=str(tmp_path), image_size=14, color="rgb"))
    assert smaller.images.shape == (20, 3, 14, 14)


def test_damaged_idx_files_are_named(tmp_path):
    write_idx(tmp_path, "train", np.zeros((2, 4, 4), np.uint8), np.zeros(2, np.uint8), False)
    file = tmp_path / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(SourceError, match="train-images-idx3-ubyte: .* 31 follow"):
        load_images(DataConfig(path=str(tmp_path)))


@pytest.mark.parametrize("stream", [False, True])
def test_parquet(parquet, colors, stream):
    images, labels = colors
    found = load_images(DataConfig(path=str(parquet), label="kind", color="rgb", image_size=6, stream=stream))
    assert found.streamed == stream and found.classes == ("a", "b", "c")
    indices = torch.tensor([5, 0, 6, 3])
    batch = found.batch(indices)
    assert (batch.images.permute(0, 2, 3, 1).numpy() == images[indices.numpy()]).all()
    assert batch.labels.tolist() == [2, 1, -1, 2]
    for none in ("label", ""):  # the default may be missing
        assert load_images(DataConfig(path=str(parquet), label=none)).labels.tolist() == [-1] * 8
    with pytest.raises(
        ConfigError, match="no column 'kinds'; did you mean 'kind'. it has kind; data.label= "
    ):
        load_images(DataConfig(path=str(parquet), label="kinds"))
    with pytest.raises(ConfigError, match="'test'"):
        load_images(DataConfig(path=str(parquet)), "test")


def test_a_streamed_order_uses_row_groups_together():
    # 64 groups of 10: a window of 8 groups is used up before the next begins, and the windows differ by epoch
    images = made([0] * 640)
    blocks = np.arange(640) // 10

    class Grouped(ImageSet):
        blocks = torch.from_numpy(np.arange(640) // 10)

    grouped = Grouped(images.images, images.labels, images.classes, images.rows)
    orders = [Shuffled().epoch(grouped, 80, 0, epoch) for epoch in range(2)]
    for order in orders:
        assert sorted(order.flatten().tolist()) == list(range(640))
        assert all(len(set(blocks[row])) == 8 for row in order.numpy())
    assert set(blocks[orders[0][0].numpy()]) != set(blocks[orders[1][0].numpy()])


def test_workers_give_what_memory_gives(parquet):
    config = DataConfig(path=str(parquet), label="kind", image_size=6)
    streamed = load_images(DataConfig(path=str(parquet), label="kind", image_size=6, stream=True))
    assert Shuffled().epoch(streamed, 4, 0, 0).shape == (2, 4)
    loader = Loader(streamed, Shuffled(), batch_size=4, seed=0, workers=2)
    whole = load_images(config)
    for batch in itertools.islice(loader, 3):
        assert torch.equal(batch.images, whole.batch(batch.indices).images)


def test_class_folders(tmp_path, colors):
    images, _ = colors
    for part, kind, number in (("train", "cat", 0), ("train", "ant", 1), ("test", "ant", 2)):
        (tmp_path / part / kind).mkdir(parents=True)
        (tmp_path / part / kind / f"{number}.png").write_bytes(png(images[number]))
    found = load_images(DataConfig(path=str(tmp_path), color="rgb", image_size=6))
    assert found.classes == ("ant", "cat") and found.labels.tolist() == [0, 1]
    assert (found.images[0].permute(1, 2, 0).numpy() == images[1]).all()
    assert len(load_images(DataConfig(path=str(tmp_path), image_size=6), "test")) == 1
    (tmp_path / "train" / "ant" / "1.png").write_bytes(b"no image")
    with pytest.raises(SourceError, match="2 of 2 images cannot be read, more than half"):
        (tmp_path / "train" / "cat" / "0.png").write_bytes(b"nor this")
        load_images(DataConfig(path=str(tmp_path)))


def test_digits_and_synthetic_images_need_no_files():
    parts = [load_images(DataConfig(path="sklearn:digits", image_size=8), part) for part in ("train", "test")]
    assert [len(part) for part in parts] == [1437, 360] and parts[0].classes == tuple("0123456789")
    rows = {row.tobytes() for row in parts[0].images.numpy()}
    assert (
        sum(row.tobytes() in rows for row in parts[1].images.numpy()) <= 2
    )  # a few digits are equal by chance
    config = DataConfig(path="synthetic:50", color="rgb", image_size=32)
    first, again = load_images(config), load_images(config)
    assert first.images.shape == (50, 3, 32, 32) and torch.equal(first.images, again.images)
    assert first.labels.bincount().tolist() == [5] * 10


def test_no_data_says_what_to_do():
    with pytest.raises(ConfigError, match="--data PATH"):
        load_images(DataConfig())
    with pytest.raises(ConfigError, match="sklearn:digits"):
        load_images(DataConfig(path="nowhere"))


def test_validation_takes_its_share_of_every_class():
    images = made([0] * 40 + [1] * 20 + [2] * 10)
    train, validation = split_validation(images, 0.1, seed=3)
    assert validation.labels.bincount().tolist() == [4, 2, 1]
    assert sorted([*train.rows.tolist(), *validation.rows.tolist()]) == list(range(70))
    assert split_validation(images, 0.1, seed=3)[1].rows.tolist() == validation.rows.tolist()
    assert split_validation(images, 0.1, seed=4)[1].rows.tolist() != validation.rows.tolist()


def test_a_labeled_fraction_hides_the_other_labels():
    images = made([0] * 40 + [1] * 20 + [2] * 10)
    kept = keep_labels(images, 4, seed=0)
    known = kept.labels >= 0
    assert kept.labels[known].bincount().tolist() == [4, 4, 4] and len(kept) == 70
    assert torch.equal(kept.labels[known], images.labels[known])
    with pytest.raises(ConfigError, match="1 to 10"):
        keep_labels(images, 11, seed=0)


def test_statistics_are_those_of_the_pixels():
    images = made([0] * 10)
    values = images.images.double() / 255
    mean, std = images.statistics()
    assert mean[0] == pytest.approx(float(values.mean()), abs=1e-5)
    assert std[0] == pytest.approx(float(values.std(correction=0)), abs=1e-5)


def test_shuffled_takes_every_image_once():
    images = made([0] * 23)
    order = Shuffled().epoch(images, 5, seed=1, epoch=0)
    assert order.shape == (4, 5) and len(order.unique()) == 20
    assert not torch.equal(order, Shuffled().epoch(images, 5, seed=1, epoch=1))
    assert not torch.equal(order, Shuffled().epoch(images, 5, seed=2, epoch=0))
    with pytest.raises(ConfigError, match="the training set has 23"):
        Shuffled().epoch(images, 24, seed=0, epoch=0)


def test_identity_balanced_has_p_identities_of_k():
    # identities of 1, 2, 5 and 8 images, and two images without label
    labels = [0] + [1] * 2 + [2] * 5 + [3] * 8 + [-1] * 2
    images = made(labels, classes=4)
    order = IdentityBalanced(images_per_identity=2).epoch(images, 4, seed=0, epoch=0)
    for row in images.labels[order].reshape(-1, 2, 2):
        assert (row[:, 0] == row[:, 1]).all() and row[0, 0] != row[1, 0]
    assert (images.labels[order] >= 0).all()
    several = order.reshape(-1, 2)[images.labels[order].reshape(-1, 2)[:, 0] > 0]
    assert (several[:, 0] != several[:, 1]).all()  # only the identity of one image repeats it
    assert len(several.unique()) == several.numel()
    lengths = {len(IdentityBalanced(images_per_identity=2).epoch(images, 4, 0, e)) for e in range(5)}
    assert len(lengths) == 1
    with pytest.raises(ConfigError, match="5 identities of 2 images are asked for, and the data have 4"):
        IdentityBalanced(images_per_identity=2).epoch(images, 10, seed=0, epoch=0)


def test_labeled_images_come_first():
    images = keep_labels(made([0] * 30 + [1] * 30, classes=2), 3, seed=0)
    order = LabeledAndUnlabeled(ratio=3).epoch(images, 16, seed=0, epoch=0)
    assert order.shape == (5, 16)
    assert (images.labels[order[:, :4]] >= 0).all()
    assert len(order[:, 4:].unique()) == 60  # one pass over all images
    assert order[:, :4].flatten().bincount().max() <= 4  # 20 places for 6 images: 3 or 4 times each


@pytest.mark.parametrize("start", [0, 1, 4, 5, 11])
def test_a_loader_starts_at_any_batch(start):
    images = made([0, 1] * 11, classes=2)  # 5 batches of 4 an epoch
    whole = Loader(images, Shuffled(), batch_size=4, seed=7)
    later = Loader(images, Shuffled(), batch_size=4, seed=7, position=lambda: start)
    assert whole.steps_per_epoch == 5
    for expected, found in zip(itertools.islice(whole, start, start + 7), later, strict=False):
        assert all(torch.equal(a, b) for a, b in zip(expected[:3], found[:3], strict=True))


def test_ranks_share_the_batches_of_one_process():
    images = made([0] * 20)
    whole = Loader(images, Shuffled(), batch_size=6, seed=0)
    ranks = [Loader(images, Shuffled(), batch_size=6, seed=0, rank=rank, world=2) for rank in range(2)]
    for one, first, second in itertools.islice(zip(whole, *ranks, strict=False), 5):
        assert one.indices.tolist() == torch.stack([first.indices, second.indices], 1).flatten().tolist()
    with pytest.raises(ConfigError, match="a multiple of the 4 devices"):
        Loader(images, Shuffled(), batch_size=6, seed=0, world=4)


def with_damage(folder, images, count, damaged):
    """`count` images in the folders a and b in turn, those numbered `damaged` with other bytes."""
    for number in range(count):
        file = folder / "ab"[number % 2] / f"{number:02}.png"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"no image" if number in damaged else png(images[number % len(images)]))


def test_unreadable_images_are_left_out_with_one_count(tmp_path, colors, capsys):
    with_damage(tmp_path, colors[0], 20, damaged=(2, 3, 6, 8, 9))
    found = load_images(DataConfig(path=str(tmp_path), image_size=6))
    said = capsys.readouterr().err
    assert len(found) == 15 and (found.batch(torch.arange(15)).images.flatten(1).amax(1) > 0).all()
    assert found.labels.tolist() == [0] * 7 + [1] * 8
    # in order of rows: the class a, then b
    names = [str(tmp_path / name) for name in ("a/02.png", "a/06.png", "a/08.png", "b/03.png")]
    assert said.count("\n") == 1 and "5 of 20 images cannot be read and are left out" in said
    assert all(name in said for name in names[:3]) and names[3] not in said and "and 2 more" in said


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_streamed_images_are_replaced_and_counted_once(tmp_path, colors, workers, capfd):
    with_damage(tmp_path, colors[0], 20, damaged=(2, 3, 6, 8, 9))
    found = load_images(DataConfig(path=str(tmp_path), image_size=6, stream=True))
    batch = found.batch(torch.arange(10))  # class a; rows 1, 3 and 4 are damaged
    assert batch.indices.tolist() == [0, 2, 2, 5, 5, 5, 6, 7, 8, 9] and batch.labels.tolist() == [0] * 10
    assert torch.equal(batch.images[1], batch.images[2])
    loader = Loader(found, Shuffled(), batch_size=5, seed=0, workers=workers)
    for batch in itertools.islice(loader, 12):  # three epochs
        assert not set(batch.indices.tolist()) & {1, 3, 4, 11, 14}
        assert torch.equal(batch.labels, found.labels[batch.indices])
    assert capfd.readouterr().err == ""
    loader.say()
    said = capfd.readouterr().err
    assert "5 of 20 images cannot be read and are replaced by others of their batch" in said


@pytest.mark.parametrize("workers", [0, 1])
def test_more_than_half_unreadable_is_an_error_and_half_is_not(tmp_path, colors, workers):
    def stream(batch_size):
        found = load_images(DataConfig(path=str(tmp_path), image_size=6, stream=True))
        return list(
            itertools.islice(Loader(found, Shuffled(), batch_size=batch_size, seed=0, workers=workers), 20)
        )

    with_damage(tmp_path, colors[0], 20, damaged=range(10))
    assert len(load_images(DataConfig(path=str(tmp_path), image_size=6))) == 10
    # a batch of which none can be read does not end the run
    assert all(set(batch.indices.tolist()) <= {5, 6, 7, 8, 9, *range(15, 20)} for batch in stream(10))
    with_damage(tmp_path, colors[0], 20, damaged=range(11))
    for refused in (lambda: load_images(DataConfig(path=str(tmp_path))), lambda: stream(20)):
        with pytest.raises(
            SourceError, match="11 of 20 images cannot be read, more than half: .*png"
        ) as error:
            refused()
        assert "Traceback" not in str(error.value)


def test_images_without_a_label_are_no_class(capsys):
    images = made([0] * 30 + [1] * 30 + [-1] * 40, classes=2)
    train, validation = split_validation(images, 0.1, seed=3)
    assert validation.labels[validation.labels >= 0].bincount().tolist() == [3, 3]
    assert int((validation.labels < 0).sum()) == 4 and len(train) == 90
    assert keep_labels(images, 5, seed=0).labels.unique().tolist() == [-1, 0, 1]
