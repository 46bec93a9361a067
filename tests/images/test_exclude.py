"""What is left out of a listing by its path, and labels from class folders."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedkit.errors import SourceError
from embedkit.images.exclude import Excludes
from embedkit.images.originals import Originals
from embedkit.images.sources import PathList, list_sources

NAMES = (
    "flat.jpg",
    "cat/1.jpg",
    "cat/raw/2.jpg",
    "cat/thumb_1.jpg",
    "dog/raw/3.jpg",
    "dog/@eaDir/1.jpg",
    "#recycle/dog/1.jpg",
)


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder as on a NAS: class folders, its thumbnails and its trash."""
    folder = tmp_path / "photos"
    for name in NAMES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return folder


@pytest.fixture
def tar(photos, tmp_path) -> Path:
    """The same files as members of an archive, from the folder above the class folders."""
    path = tmp_path / "photos.tar"
    with tarfile.open(path, "w") as archive:
        for name in NAMES:
            member = tarfile.TarInfo(f"train/{name}")
            member.size = len(name)
            archive.addfile(member, io.BytesIO(name.encode()))
    return path


def names(*sources, root=None, **options) -> list[str]:
    return sorted(item.id for item in list_sources([str(s) for s in sources], root=root, **options).items)


@pytest.mark.parametrize(
    ("patterns", "path", "left_out"),
    [
        ((), "a/._x.jpg", True),
        ((), "a/@eaDir/x.jpg/SYNO.jpg", True),
        ((), "a/recycle/x.jpg", False),
        (("",), "a/@eaDir/x.jpg", False),
        (("", "b"), "a/@eaDir/b", True),
        (("b*",), "a/@eaDir/b", True),
        (("thumb_*",), "a/b/thumb_1.jpg", True),
        (("thumb_*",), "a/b/my_thumb_1.jpg", False),
        (("raw/",), "a/raw/1.jpg", True),
        (("a/*.jpg",), "a/1.jpg", True),
        (("a/*.jpg",), "a/b/1.jpg", False),
        (("/1.jpg",), "1.jpg", True),
        (("/1.jpg",), "a/1.jpg", False),
        (("a/**/1.jpg",), "a/1.jpg", True),
        (("a/**/1.jpg",), "a/b/c/1.jpg", True),
        (("**/raw/*",), "a/b/raw/1.jpg", True),
        (("**/raw/*",), "a/b/rawer/1.jpg", False),
        (("[ab].jpg",), "x/b.jpg", True),
        (("M\u00fcller*",), "Mu\u0308ller/1.jpg", True),
        (("./a",), "a/1.jpg", False),
    ],
)
def test_patterns(patterns, path, left_out):
    excludes = Excludes(patterns)
    assert excludes.leaves_out(path) is left_out
    assert any(note.startswith("excluded ") for note in excludes.notes()) is left_out


def test_a_folder_without_thumbnails_and_trash(photos):
    listing = list_sources([photos], root=photos)
    assert [item.id for item in listing.items] == [
        "flat.jpg", "cat/1.jpg", "cat/thumb_1.jpg", "cat/raw/2.jpg", "dog/raw/3.jpg"
    ]  # fmt: skip
    assert listing.notes == [
        "excluded 2 files or folders by @eaDir, #recycle; --exclude '' turns the default patterns off"
    ]
    assert names(photos, root=photos, exclude=("",)) == sorted(NAMES)
    assert names(photos, root=photos, exclude=("raw", "thumb_*")) == ["cat/1.jpg", "flat.jpg"]
    assert names(photos, root=photos, exclude=("cat/raw", "/*.jpg")) == [
        "cat/1.jpg", "cat/thumb_1.jpg", "dog/raw/3.jpg"
    ]  # fmt: skip


def test_archives_lists_patterns_and_files(photos, tar, monkeypatch):
    inner = [name.partition("::")[2] for name in names(tar, exclude=("raw", "train/flat.jpg"))]
    assert inner == ["train/cat/1.jpg", "train/cat/thumb_1.jpg"]
    monkeypatch.chdir(photos)
    listed = list_sources(PathList(["dog/@eaDir/1.jpg", "cat/1.jpg", "raw/missing.jpg"]), exclude=["raw"])
    assert ([item.id for item in listed.items], listed.errors) == (["cat/1.jpg"], [])
    assert names("*/*.jpg", exclude=("thumb_*",)) == ["cat/1.jpg"]
    assert names("cat/1.jpg", "cat/thumb_1.jpg", exclude=("thumb_*",)) == ["cat/1.jpg"]
    # of what is a source itself only the name counts, not the folders that it lies in
    assert names("dog/@eaDir/1.jpg") == ["dog/@eaDir/1.jpg"] and names("#recycle") == ["#recycle/dog/1.jpg"]


def test_a_pattern_that_leaves_nothing(photos):
    listing = list_sources([photos], exclude=["*.jpg"])
    assert listing.items == []
    assert str(listing.empty("photos")) == (
        "no images in photos; excluded 7 files or folders by @eaDir, #recycle, *.jpg; --exclude '' turns the default "
        "patterns off"
    )


def test_a_row_of_a_job_without_default_patterns_is_found_again(tar):
    member = f"{tar}::train/dog/@eaDir/1.jpg"
    assert member in names(tar, exclude=("",)) and Originals().has(member)


# --- labels ------------------------------------------------------------------------------------------------


def labels(*sources, **options) -> dict[str, object]:
    listing = list_sources([*sources], label_from_folder=True, **options)
    return {item.id: item.labels.get(listing.folder_column) for item in listing.items}


def test_the_first_folder_below_the_source(photos):
    found = labels(photos, root=photos)
    assert found == {
        "flat.jpg": None, "cat/1.jpg": "cat", "cat/thumb_1.jpg": "cat", "cat/raw/2.jpg": "cat", "dog/raw/3.jpg": "dog"
    }  # fmt: skip
    listing = list_sources([photos], label_from_folder=True)
    assert (listing.folder_column, listing.label_schema) == ("label", {"label": "string"})


def test_the_folder_that_holds_a_member_or_a_listed_image(photos, tar, monkeypatch):
    found = {name.partition("::")[2]: label for name, label in labels(tar).items()}
    assert found["train/cat/1.jpg"] == "cat" and found["train/flat.jpg"] == "train"
    monkeypatch.chdir(photos)
    assert labels(PathList(["flat.jpg", "./cat/1.jpg", "dog/raw/3.jpg"])) == {
        "flat.jpg": None, "cat/1.jpg": "cat", "dog/raw/3.jpg": "raw"
    }  # fmt: skip


def test_a_flat_folder_is_refused(photos):
    with pytest.raises(SourceError, match="none of the 1 images lies in a folder below its source; give the"):
        labels(photos / "dog" / "raw")


def test_a_parquet_source_with_a_label_keeps_it(photos, tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"image": [b"x"], "label": ["bird"]}), path)
    listing = list_sources([path, photos / "cat"], label_from_folder=True)
    assert listing.label_schema == {"label": "string", "folder_label": "string"}
    assert "the folders of images are the column 'folder_label'" in " ".join(listing.notes)
    row, *files = listing.items
    assert dict(row.labels) == {"label": "bird"}
    assert [dict(item.labels) for item in files] == [{}, {}, {"folder_label": "raw"}]


def test_a_name_that_is_not_utf8(tmp_path):
    folder = tmp_path / "caf\udce9"
    folder.mkdir()
    (folder / "1.jpg").write_bytes(b"x")
    assert list(labels(tmp_path).values()) == ["caf\ufffd"]
