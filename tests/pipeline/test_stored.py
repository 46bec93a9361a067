"""What a job stores of an image: numbers of a chosen type, the label of its folder; what a later job may ask."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import embedkit
from embedkit.embeddings.formats import open_rows
from embedkit.embeddings.metadata import Metadata
from embedkit.embeddings.table import Embeddings
from embedkit.images.sources import PathList
from embedkit.workflows.adopt import adopt

OUTPUTS = ["o.parquet", "o.npy", "shards/", "lance"]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two class folders of six images each."""
    for index in range(12):
        path = tmp_path / "images" / ("cat" if index % 2 else "dog") / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (9, 12, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(path)
    return tmp_path / "images"


def target(tmp_path: Path, output: str) -> str:
    if output == "lance":
        pytest.importorskip("lance")
        return f"lance://{tmp_path}/db/photos"
    return f"{tmp_path}/{output}"


@pytest.mark.parametrize("output", OUTPUTS)
def test_rows_of_float16_are_read_as_float32_by_every_reader(folder, tiny, tmp_path, output):
    pytest.importorskip("faiss", reason="pip install '.[analysis]'")
    name = target(tmp_path, output)
    embedkit.embed(folder, name, encoder=tiny, dtype="float16")
    stored = open_rows(name)
    assert stored.metadata.dtype == "float16" and stored.metadata.fingerprint == tiny.fingerprint
    expected = tiny.encode(stored.column("id")).astype(np.float16).astype(np.float32)
    rows = stored.vectors(3, 9)
    assert rows.dtype == np.float32 and np.array_equal(rows, expected[3:9])

    found = Embeddings.load(name)
    assert found.vectors.dtype == np.float32 and np.array_equal(found.vectors, expected)
    hits = embedkit.SearchIndex.build(name).search(tiny.encode(found.ids), k=1)
    assert [names[0] for names in hits.ids] == found.ids and hits.cosines.min() > 0.99999
    clusters = embedkit.cluster(name, n_clusters=2)
    assert np.array_equal(clusters.labels, embedkit.cluster(found, n_clusters=2).labels)
    assert len(embedkit.find_duplicates(name, threshold=0.9999).groups) == 0
    np.testing.assert_allclose(embedkit.similarity(name), embedkit.similarity(found), atol=1e-6)
    assert embedkit.lint(name) == embedkit.lint(found)
    for other in ("again.parquet", "again.npy"):
        found.save(tmp_path / other)
        again = Embeddings.load(tmp_path / other)
        assert again.metadata == found.metadata and np.array_equal(again.vectors, expected)


def test_float16_comes_back_through_arrow_pandas_and_adopt(folder, tiny, tmp_path):
    pytest.importorskip("pandas", reason="pip install pandas")
    name = tmp_path / "o.parquet"
    embedkit.embed(folder, name, encoder=tiny, dtype="float16")
    found = Embeddings.load(name)
    for again in (
        Embeddings.from_arrow(found.to_arrow()),
        Embeddings.from_pandas(found.to_pandas()),
        Embeddings.concat([found[:5], found[5:]]),
    ):
        assert again.metadata == found.metadata and again.vectors.dtype == np.float32
        assert np.array_equal(again.vectors, found.vectors)
    adopt(name, tiny, tmp_path / "same.parquet", images=folder)
    assert Embeddings.load(tmp_path / "same.parquet").metadata == found.metadata
    pq.write_table(pq.read_table(name).replace_schema_metadata(), tmp_path / "bare.parquet")
    done = adopt(tmp_path / "bare.parquet", tiny, tmp_path / "wide.parquet", images="/")
    assert done.compared == 12 and done.cosine > 0.9999
    wide = Embeddings.load(tmp_path / "wide.parquet")
    assert wide.metadata.dtype == "float32" and np.array_equal(wide.vectors, found.vectors)


@pytest.mark.parametrize("output", OUTPUTS)
def test_what_lies_on_the_disk(folder, tiny, tmp_path, output):
    name = target(tmp_path, output)
    embedkit.embed(folder, name, encoder=tiny, dtype="float16")
    if output == "o.npy":
        array = np.load(name)
        assert (
            array.dtype == np.dtype("<f2") and json.loads((tmp_path / "o.metadata.json").read_text())["dtype"]
        )
        assert np.array_equal(array, Embeddings.load(name).vectors)
        return
    if output == "lance":
        import lance

        schema = lance.dataset(f"{tmp_path}/db/photos.lance").schema
    else:
        [path] = [Path(name)] if output == "o.parquet" else Path(name).glob("part-*.parquet")
        schema = pq.read_schema(path)
    assert schema.field("embedding").type == pa.list_(pa.float16(), tiny.dim)


@pytest.mark.parametrize("output", OUTPUTS)
def test_a_later_job_keeps_the_type_and_refuses_another(folder, tiny, tmp_path, output):
    name = target(tmp_path, output)
    embedkit.embed(folder / "cat", name, encoder=tiny, dtype="float16")
    with pytest.raises(
        embedkit.ConfigError, match="holds rows of float16, and float32 was given; leave it out"
    ):
        embedkit.embed(folder, name, encoder=tiny, dtype="float32")
    report = embedkit.embed(folder, name, encoder=tiny)
    assert (report.images, report.kept) == (6, 6) and open_rows(name).metadata.dtype == "float16"
    if output != "shards/":
        assert len(Embeddings.load(name)) == 12
    report = embedkit.embed(folder, name, encoder=tiny, dtype="float32", overwrite=True)
    assert report.images == 12 and open_rows(name).metadata.dtype == "float32"


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"dtype": "float16"}, {"dtype": "float32"}, "dtype: the unfinished job here runs with 'float16'"),
        ({}, {"dtype": "float16"}, "dtype: the unfinished job here runs with 'float32'"),
        ({"exclude": ["a"]}, {"exclude": ["b"]}, r"exclude: the unfinished job here runs with \('a',\)"),
        ({}, {"exclude": ["b"]}, r"exclude: the unfinished job here runs with \(\)"),
        ({}, {"label_from_folder": True}, "label_from_folder: the unfinished job here runs with False"),
        ({"dtype": "float16", "exclude": ["dog"], "label_from_folder": True}, {}, None),
        ({"exclude": ["a"]}, {"exclude": ("a",)}, None),
    ],
)
def test_an_unfinished_job_is_continued_as_it_began(folder, tiny, tmp_path, first, second, message):
    (folder / "cat" / "zzz.png").write_bytes(b"no image")
    output, fixed = tmp_path / "o.parquet", {"encoder": tiny, "batch_size": 2}
    with pytest.raises(embedkit.ImageError):
        embedkit.embed(folder, output, **fixed, **first, on_error="stop")
    if message is not None:
        with pytest.raises(
            embedkit.ConfigError, match=f"{message}; leave it out, or start again with --overwrite"
        ):
            embedkit.embed(folder, output, **fixed, **second)
    report = embedkit.embed(folder, output, **fixed, **(second if message is None else {}))
    assert report.kept > 0
    found = Embeddings.load(output)
    assert found.metadata.dtype == first.get("dtype", "float32")
    assert len(found) == (6 if "dog" in first.get("exclude", ()) else 12)
    assert found.labels == ({"label": ["cat"] * 6} if first.get("label_from_folder") else {})


def test_shards_of_two_types_are_refused(folder, tiny, tmp_path):
    name = f"{tmp_path}/shards/"
    for part, dtype in enumerate(("float16", "float32"), 1):
        embedkit.embed(folder, name, encoder=tiny, dtype=dtype, worker=(part, 2))
    with pytest.raises(embedkit.OutputError, match=r"mixes rows of float16 and, in part-00002-.* of float32"):
        Embeddings.load(name)


def test_a_number_that_float16_cannot_hold_is_refused(tmp_path):
    metadata = Metadata(
        entry="e-x.d",
        manifest_sha256="0" * 64,
        fingerprint="1" * 64,
        dim=2,
        normalized=False,
        dtype="float16",
    )
    rows = Embeddings(["a"], np.zeros(1, np.int32), np.array([[1.0, 7e4]], np.float32), metadata)
    with pytest.raises(
        embedkit.OutputError, match="holds 7e\\+04, and float16 at most 65504: store the rows as"
    ):
        rows.save(tmp_path / "o.parquet")
    assert list(tmp_path.iterdir()) == []


def test_an_option_out_of_range(tmp_path):
    with pytest.raises(embedkit.ConfigError, match="dtype: expected float32 or float16, found 'half'"):
        embedkit.embed(tmp_path, tmp_path / "o.parquet", dtype="half")
    for patterns in ("raw", [Path("raw")]):
        with pytest.raises(embedkit.ConfigError, match="exclude: expected a list of patterns such as"):
            embedkit.embed(tmp_path, tmp_path / "o.parquet", exclude=patterns)


def test_metadata_of_an_unknown_type_is_refused_and_none_is_float32():
    metadata = Metadata(entry="e-x.d", manifest_sha256="0" * 64, fingerprint="1" * 64, dim=2, normalized=True)
    card = json.loads(metadata.to_json())
    assert Metadata.from_json(json.dumps({**card, "dtype": "float16"})).dtype == "float16"
    with pytest.raises(
        embedkit.OutputError, match="dtype: expected one of float32, float16, found 'bfloat16'"
    ):
        Metadata.from_json(json.dumps({**card, "dtype": "bfloat16"}))
    del card["dtype"]
    assert Metadata.from_json(json.dumps(card)) == metadata


# --- labels and exclusions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("output", OUTPUTS)
def test_class_folders_are_a_column(folder, tiny, tmp_path, output):
    name = target(tmp_path, output)
    embedkit.embed(folder, name, encoder=tiny, label_from_folder=True)
    found = Embeddings.load(name)
    assert found.labels == {"label": ["cat"] * 6 + ["dog"] * 6}


def test_new_rows_without_the_labels_of_earlier_ones_are_noted(folder, tiny, tmp_path):
    output = tmp_path / "o.parquet"
    embedkit.embed(folder, output, encoder=tiny, exclude=["00.png"], label_from_folder=True)
    report = embedkit.embed(folder, output, encoder=tiny)
    assert (
        "1 new row has no 'label', which rows of earlier runs have; --label-from-folder gives one"
        in report.notes
    )
    assert Embeddings.load(output).labels["label"].count(None) == 1
    assert embedkit.embed(folder, output, encoder=tiny).notes == ()


@pytest.mark.parametrize("output", ["o.parquet", "shards/"])
def test_rows_without_labels_get_none_in_silence(folder, tiny, tmp_path, output):
    name = f"{tmp_path}/{output}"
    embedkit.embed(folder, name, encoder=tiny)
    with pytest.raises(
        embedkit.ConfigError, match="label_from_folder: the rows of .* have no column 'label'; leave"
    ):
        embedkit.embed(folder, name, encoder=tiny, label_from_folder=True)
    embedkit.embed(folder, name, encoder=tiny, label_from_folder=True, overwrite=True)
    assert Embeddings.load(name).labels["label"] == ["cat"] * 6 + ["dog"] * 6


def test_prune_drops_what_is_excluded_now(folder, tiny, tmp_path):
    output = tmp_path / "o.parquet"
    embedkit.embed(folder, output, encoder=tiny)
    report = embedkit.embed(folder, output, encoder=tiny, exclude=["dog"])
    assert (report.kept, report.removed) == (12, 0)
    report = embedkit.embed(folder, output, encoder=tiny, exclude=["dog"], prune=True)
    assert (report.kept, report.removed) == (6, 6)


def test_nothing_is_left_or_labeled(folder, tiny, tmp_path):
    output = tmp_path / "o.parquet"
    with pytest.raises(
        embedkit.SourceError, match="no images in .*; excluded 2 files or folders by cat, dog$"
    ):
        embedkit.embed(folder, output, encoder=tiny, exclude=["cat", "dog"])
    with pytest.raises(embedkit.SourceError, match="none of the 6 images lies in a folder below its source"):
        embedkit.embed(folder / "cat", output, encoder=tiny, label_from_folder=True)
    with pytest.raises(
        embedkit.SourceError, match="no images in a list of 1 path; excluded 1 file or folder by"
    ):
        embedkit.embed(PathList([str(folder / "cat" / "01.png")]), output, encoder=tiny, exclude=["cat"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]


def test_the_command_takes_all_of_them(run, folder, tiny_entry, tmp_path):
    out = tmp_path / "o.parquet"
    words = ["embed", folder, "-o", out, "--encoder", tiny_entry, "--label-from-folder", "--dtype", "float16"]
    status, _, err = run(*words, "--exclude", "dog", "--exclude", "01.*")
    assert status == 0 and "excluded 2 files or folders by dog, 01.*" in err
    found = Embeddings.load(out)
    assert found.labels == {"label": ["cat"] * 5} and found.metadata.dtype == "float16"
    status, _, err = run(*words[:-1], "float32")
    assert status == 2 and "--dtype: " in err and err.count("\n") == 1
