"""The encoder: every kind of input, rows that do not depend on how they were batched, and streams that stay small."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save

import embedkit
from embedkit.encoder import WINDOW, l2_normalize, load_encoder
from embedkit.errors import ConfigError, EntryError, ImageError, IntegrityError
from embedkit.images.transform import read_pixels


@pytest.fixture(scope="module")
def images(jpeg_maker) -> list[bytes]:
    return [jpeg_maker(seed, 260 + 3 * seed, 240) for seed in range(7)]


@pytest.fixture(scope="module")
def rows(encoder, images) -> np.ndarray:
    """One row per image, each embedded alone."""
    return np.concatenate([encoder.encode(image) for image in images])


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    """Forty images for the tiny encoder, uint8 (40, 9, 11, 3)."""
    return np.random.default_rng(0).integers(0, 256, (40, 9, 11, 3), dtype=np.uint8)


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("embedkit")]


# --- facts ------------------------------------------------------------------------------------------------


def test_what_an_encoder_says_of_itself(encoder, default_entry):
    assert encoder.name == default_entry.name and encoder.dim == 1280
    assert encoder.card == (default_entry / "README.md").read_text()
    assert encoder.config.architecture == "tf_efficientnet_lite0"
    assert (encoder.threads, encoder.precision, encoder.note) == (2, "fp32", "")
    assert repr(encoder) == (
        f"<Encoder {encoder.name}@{encoder.revision[:12]} dim=1280 provider=CPUExecutionProvider>"
    )
    assert encoder.fingerprint == encoder._space(normalized=True) != encoder._space(normalized=False)
    assert len(encoder.fingerprint) == 64
    metadata, raw = encoder.metadata(), encoder.metadata(normalize=False)
    assert (metadata.entry, metadata.manifest_sha256) == (encoder.name, encoder.revision)
    assert (metadata.dim, metadata.normalized, metadata.runs) == (1280, True, ())
    assert metadata.fingerprint == encoder.fingerprint and not raw.normalized
    assert raw.fingerprint == encoder._space(normalized=False)


def test_the_tiny_encoder_is_its_matrix(tiny, by_hand, noise):
    """End to end against numpy: preprocess by the contract, multiply, add, normalize."""
    entry = by_hand.TinyEntry()
    pixels = np.stack([read_pixels(image, entry.preprocess) for image in noise])
    np.testing.assert_allclose(tiny.encode(noise), entry.embed(pixels), atol=2e-6)
    raw = tiny.encode(noise, normalize=False)
    np.testing.assert_allclose(raw, entry.embed(pixels, normalize=False), rtol=1e-5, atol=1e-5)


# --- inputs -----------------------------------------------------------------------------------------------


def test_every_kind_of_one_image_gives_one_row(encoder, images, rows, tmp_path):
    path = tmp_path / "a kind.jpg"
    path.write_bytes(images[0])
    image = Image.open(path)
    array = np.asarray(Image.open(io.BytesIO(images[0])))
    kinds = [path, str(path), images[0], bytearray(images[0]), memoryview(images[0]), image, array]
    for kind in kinds:
        row = encoder.encode(kind, decode="exact")
        assert row.shape == (1, 1280) and row.dtype == np.float32
        np.testing.assert_array_equal(row, rows[:1])
        np.testing.assert_array_equal(encoder.encode([kind], decode="exact"), rows[:1])
    np.testing.assert_array_equal(encoder.encode(kinds, decode="exact"), rows[[0] * len(kinds)])


def test_gray_arrays_are_images(tiny):
    gray = np.random.default_rng(1).integers(0, 256, (12, 10), dtype=np.uint8)
    color = np.stack([gray] * 3, axis=2)
    alpha = np.dstack([color, np.full((12, 10), 255, np.uint8)])
    for image in (gray, gray[:, :, None], alpha):
        np.testing.assert_array_equal(tiny.encode(image), tiny.encode(color))


def test_many_images_in_any_iterable(tiny, noise):
    expected = tiny.encode(noise)
    assert expected.shape == (40, 4)
    many = list(noise)
    for images in (
        many,
        tuple(many),
        iter(many),
        (image for image in many),
        dict.fromkeys(range(40), 0),
        noise,
    ):
        if isinstance(images, dict):
            images = {index: many[index] for index in images}.values()
        np.testing.assert_allclose(tiny.encode(images), expected, atol=1e-6)
    mixed = [Image.fromarray(image) if index % 2 else image for index, image in enumerate(many)]
    np.testing.assert_allclose(tiny.encode(mixed), expected, atol=1e-6)


def test_arrays_of_four_axes_are_many_and_of_three_are_one(tiny, noise):
    assert tiny.encode(noise[0]).shape == (1, 4)
    assert tiny.encode(noise[:1]).shape == (1, 4)
    assert tiny.encode(noise[:, :, :, :1]).shape == (40, 4)
    assert tiny.encode(noise[:0]).shape == (0, 4)


def test_nothing_gives_no_rows(tiny):
    for nothing in ([], (), iter([]), (x for x in ()), np.empty((0, 9, 11, 3), np.uint8), {}, set()):
        empty = tiny.encode(nothing)
        assert empty.shape == (0, 4) and empty.dtype == np.float32
    assert list(tiny.stream([])) == []


def test_paths_that_do_not_exist_are_named(tiny, tmp_path):
    with pytest.raises(ImageError, match="gone.png: No such file or directory"):
        tiny.encode(tmp_path / "gone.png")
    with pytest.raises(ImageError, match="is not a regular file"):
        tiny.encode(str(tmp_path))


# --- rows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 7, 32])
def test_rows_agree_at_every_batch_size(encoder, images, rows, batch_size):
    many = (images * 5)[:33]
    found = encoder.encode(many, batch_size=batch_size)
    assert np.abs(found - rows[np.arange(33) % 7]).max() <= 1e-6


def test_rows_have_length_one_or_not(encoder, images, rows):
    raw = encoder.encode(images[:2], normalize=False)
    lengths = np.linalg.norm(raw, axis=1)
    assert (np.abs(lengths - 1) > 0.1).all()
    np.testing.assert_allclose(raw / lengths[:, None], rows[:2], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)


def test_normalizing_leaves_a_row_of_zeros():
    table = np.array([[3, 4], [0, 0], [1e-10, 0]], np.float32)
    found = l2_normalize(table)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [[0.6, 0.8], [0, 0], [1, 0]], atol=1e-6)


def test_rows_tell_images_apart(rows):
    cosines = rows @ rows.T
    assert cosines[~np.eye(len(rows), dtype=bool)].max() < 0.9999


def test_threads_do_not_change_a_bit(default_entry, encoder, images):
    one = load_encoder(default_entry, device="cpu", threads=1)
    for size in (2, 3):
        np.testing.assert_array_equal(
            one.encode(images, batch_size=size), encoder.encode(images, batch_size=size)
        )


def test_eight_threads_share_one_encoder(tiny, noise):
    expected = tiny.encode(noise, batch_size=4)
    barrier = threading.Barrier(8)

    def task(index: int) -> np.ndarray:
        barrier.wait()
        order = np.roll(np.arange(40), index)
        for _ in range(5):
            table = tiny.encode(noise[order], batch_size=4)
        return np.roll(table, -index, axis=0)

    with ThreadPoolExecutor(8) as pool:
        for table in pool.map(task, range(8)):
            np.testing.assert_allclose(table, expected, atol=1e-6)


def test_padding_a_batch_does_not_change_its_rows(encoder, images):
    [(alone, faults)] = encoder._flow([images[:3]])
    [(padded, more)] = encoder._flow([images[:3]], pad_to=8)
    assert alone.shape == padded.shape == (3, 1280) and faults == more == {}
    assert np.abs(alone - padded).max() <= 1e-6


def test_batches_of_one_size_are_the_same_whatever_stands_beside(tiny, noise):
    """What a resumed job relies on: a batch padded to a size gives the same bits every time, at any threads."""
    chunks = [list(noise[at : at + 4]) for at in range(0, 38, 4)]
    first = [block for block, _ in tiny._flow(chunks, pad_to=4)]
    again = [next(iter(tiny._flow([chunk], pad_to=4)))[0] for chunk in chunks]
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, two)


def test_progress_is_drawn_on_stderr_and_changes_nothing(tiny, noise, capsys):
    table = tiny.encode(noise, show_progress=True)
    np.testing.assert_array_equal(table, tiny.encode(noise))
    tiny.encode(iter(noise), show_progress=True)
    assert capsys.readouterr().out == ""


# --- errors -----------------------------------------------------------------------------------------------


def test_an_error_names_its_image_and_the_workers_end(tiny, noise, tmp_path):
    path = tmp_path / "bad.jpg"
    path.write_bytes(b"\xff\xd8\xff nothing")
    many: list = list(noise)
    many[17] = path
    for size in (1, 4, 40, None):
        with pytest.raises(ImageError) as caught:
            tiny.encode(many, batch_size=size)
        assert str(caught.value).startswith(f"{path}: ")
        assert not workers()  # although the error, and with it every frame, is still held
    many[17] = b"nothing"
    with pytest.raises(ImageError, match="^image 17: "):
        tiny.encode(iter(many), batch_size=3)


def test_wrong_arguments(tiny, noise):
    for wrong in (0, -1):
        with pytest.raises(ConfigError, match=f"batch_size: expected at least 1, found {wrong}"):
            tiny.encode(noise, batch_size=wrong)
        with pytest.raises(ConfigError, match="batch_size"):
            next(tiny.stream(list(noise), batch_size=wrong))
    with pytest.raises(ConfigError, match="decode: expected one of auto, exact"):
        tiny.encode(noise, decode="fast")
    with pytest.raises(ConfigError, match="decode: expected one of auto, exact"):
        list(tiny.stream(noise, decode="fast"))


def test_what_the_source_raises_comes_out(tiny, noise):
    def source():
        yield from noise[:9]
        raise KeyError("the caller's own")

    with pytest.raises(KeyError, match="the caller's own"):
        tiny.encode(source(), batch_size=2)
    with pytest.raises(KeyError, match="the caller's own"):
        list(tiny.stream(source(), batch_size=2))
    assert not workers()


# --- streams ----------------------------------------------------------------------------------------------


def test_a_stream_goes_on_past_faults(tiny, noise):
    many: list = list(noise)
    many[5], many[11], many[12] = b"", b"text", np.zeros((2, 2), np.float32)
    batches = list(tiny.stream(many, batch_size=4))
    assert [len(batch.ids) + len(batch.errors) for batch in batches] == [4] * 10
    assert [name for batch in batches for name in batch.ids] == [
        str(i) for i in range(40) if i not in (5, 11, 12)
    ]
    faults = {name: str(error) for batch in batches for name, error in batch.errors}
    assert set(faults) == {"5", "11", "12"} and faults["5"] == "the file is empty"
    assert all(isinstance(error, ImageError) for batch in batches for _, error in batch.errors)
    table = np.concatenate([batch.embeddings for batch in batches])
    good = np.delete(noise, [5, 11, 12], axis=0)
    np.testing.assert_allclose(table, tiny.encode(good), atol=1e-6)


def test_a_batch_of_faults_alone(tiny):
    batches = list(tiny.stream([b"", b"x", b""], batch_size=2))
    assert [batch.embeddings.shape for batch in batches] == [(0, 4), (0, 4)]
    assert [name for batch in batches for name, _ in batch.errors] == ["0", "1", "2"]


def test_a_stream_over_a_folder_takes_its_ids_from_the_paths(tiny, noise, tmp_path):
    for index in (0, 1, 2):
        Image.fromarray(noise[index]).save(tmp_path / f"{index}.png")
    (tmp_path / "1.png").write_bytes(b"cut")
    (tmp_path / "below").mkdir()
    Image.fromarray(noise[3]).save(tmp_path / "below" / "3.png")
    batches = list(tiny.stream(tmp_path))
    ids = [Path(name).name for batch in batches for name in batch.ids]
    assert sorted(ids) == ["0.png", "2.png", "3.png"]
    assert [Path(name).name for batch in batches for name, _ in batch.errors] == ["1.png"]
    table = dict(zip(ids, np.concatenate([batch.embeddings for batch in batches]), strict=True))
    np.testing.assert_allclose(table["2.png"], tiny.encode(noise[2])[0], atol=1e-6)
    assert sum(len(batch.ids) for batch in tiny.stream(tmp_path, recursive=False)) == 2
    paths = [tmp_path / "0.png", str(tmp_path / "2.png")]
    assert [name for batch in tiny.stream(paths) for name in batch.ids] == [str(path) for path in paths]


def test_a_stream_pulls_no_more_than_it_needs(tiny, noise):
    """`WINDOW` batches a worker are in flight, one is handed out, and one is being gathered."""
    size, pulled, taken = 2, 0, 0
    ahead = size * (WINDOW * tiny.threads + 2)

    def endless():
        nonlocal pulled
        while True:
            pulled += 1
            yield noise[pulled % 40]

    stream = tiny.stream(endless(), batch_size=size)
    assert pulled == 0  # nothing before the first batch is asked for
    furthest = 0
    for batch in stream:
        taken += len(batch.ids)
        furthest = max(furthest, pulled - taken)
        if taken >= 10 * ahead:
            break
    stream.close()
    assert furthest <= ahead
    assert pulled <= 11 * ahead


def test_closing_a_stream_ends_its_workers(tiny, noise):
    many = list(noise) * 5
    stream = tiny.stream(many, batch_size=2)
    next(stream)
    assert workers()
    stream.close()
    assert not workers()
    for _ in tiny.stream(many, batch_size=2):
        break
    stop = time.monotonic() + 10
    while workers() and time.monotonic() < stop:
        time.sleep(0.01)
    assert not workers()
    assert tiny.encode(many[0]).shape == (1, 4)  # and the encoder goes on


def test_two_streams_at_once(tiny, noise):
    one, two = tiny.stream(noise, batch_size=8), tiny.stream(noise[::-1], batch_size=8)
    first, second = [], []
    for a, b in zip(one, two, strict=True):
        first.append(a.embeddings)
        second.append(b.embeddings)
    np.testing.assert_allclose(np.concatenate(first), np.concatenate(second)[::-1], atol=1e-6)


# --- pickling ---------------------------------------------------------------------------------------------


def test_an_encoder_is_rebuilt_in_a_process_of_its_own(tiny_entry, noise, tmp_path):
    """By name and manifest, not by its megabytes; also from another working directory."""
    place = os.path.relpath(tiny_entry)
    encoder = load_encoder(f"{os.curdir}{os.sep}{place}", threads=2)
    text = pickle.dumps(encoder)
    assert len(text) < 2000
    (tmp_path / "encoder.pickle").write_bytes(text)
    np.save(tmp_path / "noise.npy", noise)
    code = (
        "import pickle, numpy as np\n"
        "encoder = pickle.load(open('encoder.pickle', 'rb'))\n"
        "np.save('rows.npy', encoder.encode(np.load('noise.npy'), batch_size=4))\n"
        "print(encoder.name, encoder.threads, encoder.fingerprint)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [encoder.name, "2", encoder.fingerprint]
    np.testing.assert_array_equal(np.load(tmp_path / "rows.npy"), encoder.encode(noise, batch_size=4))


def test_a_pickle_refuses_another_entry_in_the_same_place(by_hand, tmp_path):
    folder = by_hand.TinyEntry().write(tmp_path / "linear-tiny.noise")
    text = pickle.dumps(load_encoder(folder))
    assert pickle.loads(text).fingerprint == load_encoder(folder).fingerprint
    by_hand.TinyEntry(seed=1).write(folder)
    with pytest.raises(IntegrityError, match="the index pins"):
        pickle.loads(text)


def test_the_public_encoder_is_this_one(encoder):
    assert isinstance(encoder, embedkit.Encoder)


def test_memory_of_images_is_kept_while_a_stream_runs_and_no_longer(tiny, noise, monkeypatch):
    monkeypatch.delenv("PILLOW_BLOCKS_MAX", raising=False)
    assert Image.core.get_blocks_max() == 0
    first, second = (tiny.stream(noise, batch_size=4) for _ in range(2))
    next(first), next(second)
    both = Image.core.get_blocks_max()
    first.close()
    assert both == 2 * Image.core.get_blocks_max() > 0
    second.close()
    assert Image.core.get_blocks_max() == 0
    monkeypatch.setenv("PILLOW_BLOCKS_MAX", "3")  # somebody has chosen
    with contextlib.closing(tiny.stream(noise, batch_size=4)) as stream:
        next(stream)
        assert Image.core.get_blocks_max() == 0


# --- clusters ---------------------------------------------------------------------------------------------


def test_images_are_assigned_by_the_entrys_mixture(by_hand, noise, tmp_path, tiny):
    entry = by_hand.TinyEntry()
    raw = tiny.encode(noise, normalize=False).astype(np.float64)
    center, means = raw.mean(0), np.stack([raw[0], raw[1]]) - raw.mean(0)
    mixture = {
        "weights": np.array([0.25, 0.75]),
        "means": means,
        "precision_cholesky": np.stack([np.eye(4) * 3, np.eye(4) * 2]),
        "center": center,
        "components": np.eye(4),
    }
    files = {**entry.files(), "mixture.safetensors": save(mixture, {"transform": "none"})}
    encoder = load_encoder(entry.write(tmp_path / "deepdpm-tiny.data", files))
    found = encoder.assign(noise)
    # by the definition: log weight + log N(h; mean, I / s^2), s being 3 and 2
    distance = ((raw[:, None] - center - means) ** 2).sum(2)
    joint = np.log([0.25, 0.75]) + 4 * np.log([3, 2]) - distance * np.array([9, 4]) / 2
    np.testing.assert_array_equal(found.labels, joint.argmax(1))
    share = np.exp(joint - joint.max(1, keepdims=True))
    np.testing.assert_allclose(found.probabilities, share.max(1) / share.sum(1), rtol=1e-4)
    assert found.labels[0] == 0
    with pytest.raises(EntryError, match=r"has no mixture\.safetensors"):
        tiny.assign(noise)
