"""Data as people have them: folders with unlabeled images beside, and tables of paths and labels."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

from embedkit.errors import ConfigError, SourceError
from embedkit.training import run
from embedkit.training.config import with_overrides
from embedkit.training.data import DataConfig, IdentityBalanced, load_images, load_parts
from embedkit.training.data.datasets import open_source
from embedkit.training.recipes import recipe


def shade(value):
    """An image that its pixels tell from every other."""
    return Image.fromarray(np.full((6, 6), value, np.uint8))


@pytest.fixture
def folder(tmp_path):
    """Twelve images below `photos`, the n-th of the gray value 20 n."""
    (tmp_path / "photos").mkdir()
    for number in range(12):
        shade(20 * number).save(tmp_path / "photos" / f"{number}.png")
    return tmp_path


def opened(path, **changes):
    return load_images(DataConfig(path=str(path), image_size=6, **changes))


def values(images):
    """The numbers of the images, told by their pixels."""
    return (images.batch(torch.arange(len(images))).images[:, 0, 0, 0] // 20).tolist()


def test_unlabeled_images_stand_beside_class_folders(tmp_path):
    names = ("cat/0", "ant/1", "stray", "unlabeled/2", "unlabeled/deeper/3", "cat/unlabeled/4")
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shade(20 * number).save(tmp_path / f"{name}.png")
    found = opened(tmp_path)
    assert found.classes == ("ant", "cat")
    assert dict(zip(values(found), found.labels.tolist(), strict=True)) == {
        0: 1,
        1: 0,
        2: -1,
        3: -1,
        4: -1,
        5: 1,
    }


@pytest.mark.parametrize("kind", ["csv", "excel", "parquet"])
@pytest.mark.parametrize("column", ["path", "image", "file"])
def test_a_table_names_images_labels_and_targets(folder, kind, column):
    rows = [
        ("photos/3.png", "cat", "round"),
        ("photos/1.png", "ant", None),
        (str(folder / "photos/7.png"), None, "long"),
    ]
    if kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = folder / "labels.parquet"
        pq.write_table(
            pa.table(dict(zip((column, "kind", "shape"), zip(*rows, strict=True), strict=True))), table
        )
    else:
        table = folder / "labels.csv"
        # what a spreadsheet writes: a byte order mark, semicolons, and lines that end as on Windows
        comma, end, mark = (";", "\r\n", "\ufeff") if kind == "excel" else (",", "\n", "")
        lines = [(column, "kind", "shape"), *rows]
        text = end.join(comma.join(cell or "" for cell in line) for line in lines)
        table.write_bytes((mark + text + end).encode())
    for stream in (False, True):
        found = opened(table, label="kind", targets=("shape",), stream=stream)
        assert values(found) == [3, 1, 7] and found.classes == ("ant", "cat")
        assert found.labels.tolist() == [1, 0, -1] and found.targets["shape"].tolist() == [1, -1, 0]
        assert found.target_classes == {"shape": ("long", "round")}
        batch = found.subset(torch.tensor([2, 0])).batch(torch.tensor([1, 0]))
        assert batch.labels.tolist() == [1, -1] and batch.targets["shape"].tolist() == [1, 0]
    assert opened(table, label="").labels.tolist() == [-1] * 3
    with pytest.raises(
        ConfigError, match="data.label: .* no column 'kin'; did you mean 'kind'. it has kind, shape"
    ):
        opened(table, label="kin")
    with pytest.raises(ConfigError, match="data.targets: .* no column 'shapes'; did you mean 'shape'"):
        opened(table, label="kind", targets=("shapes",))


def test_a_table_without_paths_or_a_header_is_refused(folder):
    table = folder / "labels.csv"
    for text in ("photo,label\n0.png,cat\n", "photos/0.png,cat\nphotos/1.png,ant\n"):
        table.write_text(text)
        with pytest.raises(
            ConfigError, match="a header with one of the columns file, path, image, .* found photo"
        ):
            opened(table)
    table.write_text("")
    with pytest.raises(ConfigError, match="found no rows"):
        opened(table)
    table.write_bytes(b"file,label\n\xff\xfe.png,cat\n")
    with pytest.raises(SourceError, match="labels.csv: not a CSV file that can be read"):
        opened(table)


def test_bytes_win_over_paths_in_a_parquet_file(folder):
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = []
    for number in (5, 6):
        file = io.BytesIO()
        shade(20 * number).save(file, "PNG")
        data.append(file.getvalue())
    table = folder / "train.parquet"
    pq.write_table(pa.table({"path": ["photos/0.png"] * 2, "jpg": data, "score": [0.5, 0.25]}), table)
    found = opened(table, label="score")
    assert values(found) == [5, 6] and found.classes == ("0.25", "0.5") and found.labels.tolist() == [1, 0]
    with pytest.raises(ConfigError, match="the column 'jpg' holds no labels; take one of path, score"):
        opened(table, label="jpg")


def test_missing_files_of_a_table_are_left_out(folder, capsys):
    table = folder / "labels.csv"
    table.write_text(
        "path,label\nphotos/1.png,cat\nphotos/gone.png,cat\n,ant\nphotos/2.png,ant\nphotos/3.png,\n"
    )
    found = opened(table)
    assert values(found) == [1, 2, 3] and found.labels.tolist() == [1, 0, -1]
    said = capsys.readouterr().err
    assert "2 of 5 images cannot be read" in said and "gone.png" in said and said.count("\n") == 1


def test_images_that_share_a_value_of_a_column_are_pairs(folder):
    # photographs of six people, two of each, and the room that they were taken in
    table = folder / "labels.csv"
    lines = [f"photos/{number}.png,person{number % 6},room{number % 2}" for number in range(12)]
    table.write_text("\n".join(["path,person,room", *lines]))
    config = DataConfig(path=str(table), image_size=6, label="person", validation=0.0)
    train, _ = load_parts(config, seed=0)
    for row in IdentityBalanced(images_per_identity=2).epoch(train, 4, seed=0, epoch=0):
        a, b, c, d = (train.batch(row).images[:, 0, 0, 0] // 20).tolist()
        assert abs(a - b) == 6 == abs(c - d)
    settings = [
        f"data.path={table}",
        "data.label=person",
        "data.sampler.images_per_identity=2",
        "batch_size=8",
    ]
    made = with_overrides(recipe("contrastive"), [*settings, "data.image_size=16", "data.validation=0"])
    images, _ = run.open_data(made)
    method = run.build_method(made, run.facts_of(made, images, 4))
    batch = images.batch(made.data.sampler.epoch(images, 8, 0, 0)[0])
    assert torch.isfinite(method.loss(batch, method.generator())["loss"])


# --- tables that do not say which ---------------------------------------------------------------------------


def test_two_columns_of_one_name(tmp_path):
    table = tmp_path / "labels.csv"
    table.write_text("file,label,label\na.png,1,2\n")
    with pytest.raises(ConfigError, match="labels.csv: there are two columns 'label'; rename one"):
        open_source(str(table), "train")


def test_a_path_that_holds_a_nul_is_an_image_that_cannot_be_read(tmp_path):
    Image.new("L", (28, 28)).save(tmp_path / "a.png")
    table = tmp_path / "labels.csv"
    table.write_text("file,label\na.png,1\nb\0.png,1\na.png,2\n")
    assert len(load_images(DataConfig(path=str(table)))) == 2


@pytest.mark.parametrize("second", [{"file": ["a.png"]}, {"file": ["a.png"], "label": ["one"]}])
def test_parquet_files_of_different_columns(tmp_path, second):
    pq.write_table(pa.table({"file": ["a.png"], "label": [1]}), tmp_path / "train-0.parquet")
    pq.write_table(pa.table(second), tmp_path / "train-1.parquet")
    with pytest.raises(
        ConfigError, match=r"train-1.parquet: expected the column 'label' as int64, as .*train-0"
    ):
        open_source(str(tmp_path), "train")
