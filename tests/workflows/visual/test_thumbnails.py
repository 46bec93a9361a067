"""Images by their ids, whatever they lie in, and thumbnails of them: upright, in order, and with gaps filled."""

from __future__ import annotations

import io
import os
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from embedkit.errors import ConfigError, ImageError, SourceError
from embedkit.images.originals import Originals
from embedkit.images.sources import list_sources
from embedkit.workflows.visual.thumbnails import encoded, placeholder, thumbnail, thumbnails


def png(color, size=(40, 20)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def tree(tmp_path):
    """A folder with images in all that images may lie in."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    top = tmp_path / "images"
    (top / "deep").mkdir(parents=True)
    names = ["a.png", "deep/b.png", "with::colons.png", "file:c.png", "d#1.png", "100%25.png"]
    for number, name in enumerate(names):
        (top / name).write_bytes(png((number, 0, 0)))
    with open(os.fsencode(top) + b"/\xff\xfe.png", "wb") as file:
        file.write(png((50, 0, 0)))
    with tarfile.open(top / "some.tar", "w") as archive:
        for number, name in enumerate(("e.png", "deep/f.png", "deep/g::h.png")):
            member = tarfile.TarInfo(name)
            data = png((100 + number, 0, 0))
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    for stem, paths in (("named", ["i.png", "j.png"]), ("bare", [None, None])):
        images = [
            {"bytes": png((150 + number, len(stem), 0)), "path": path} for number, path in enumerate(paths)
        ]
        pq.write_table(pa.table({"image": images}), top / f"{stem}.parquet")
    return top


def sources(top):
    return [top, top / "some.tar", top / "named.parquet", top / "bare.parquet"]


@pytest.mark.parametrize("way", ["absolute", "relative", "root"])
def test_every_id_leads_back_to_its_image(tree, monkeypatch, way):
    monkeypatch.chdir(tree.parent)
    given = tree if way == "absolute" else tree.relative_to(tree.parent)
    root = tree if way == "root" else None
    items = list_sources(sources(given), root=root).items
    assert len(items) == 14 and sum(item.id.startswith("file:") for item in items) >= 1
    originals = Originals(root)
    for item in items:
        assert originals.has(item.id)
        assert originals.read(item.id) == originals.read(f"{item.id}#3") == item.read(), item.id


def test_images_that_were_moved_are_found_by_their_root(tree, tmp_path):
    items = list_sources(sources(tree), root=tree).items
    content = {item.id: item.read() for item in items}
    moved = tmp_path / "elsewhere"
    shutil.move(tree, moved)
    originals = Originals(moved)
    assert {name: originals.read(name) for name in content} == content
    gone = Originals(tmp_path)
    for name in content:
        assert not gone.has(name)
        with pytest.raises(SourceError, match="no longer exists"):
            gone.read(name)


def test_a_root_leaves_absolute_ids_alone_and_a_whole_name_goes_first(tree, tmp_path):
    (tmp_path / "other").mkdir()
    for item in list_sources(sources(tree)).items:
        assert Originals(tmp_path / "other").read(item.id) == item.read(), item.id
    (tree / "a.png#1").write_bytes(png((9, 9, 9)))
    originals = Originals(tree)
    assert originals.read("a.png#1") == png((9, 9, 9)) and originals.read("a.png#2") == png((0, 0, 0))


def test_what_went_out_of_a_container_and_a_container_that_is_none(tree):
    name = f"{tree}/some.tar::e.png"
    with tarfile.open(tree / "some.tar", "w"):
        pass
    assert not Originals().has(name)
    (tree / "some.tar").write_bytes(b"no archive")
    originals = Originals()
    assert not originals.has(name)
    with pytest.raises(SourceError, match="not a plain tar archive"):
        originals.read(name)
    with pytest.raises(SourceError, match="not a folder"):
        Originals(tree / "a.png")


def test_a_thumbnail_is_upright_and_keeps_its_shape(jpeg_maker):
    left_red = Image.new("RGB", (200, 100), "blue")
    left_red.paste("red", (0, 0, 100, 100))
    for orientation, corner in ((1, (2, 2)), (6, (47, 2)), (3, (97, 47)), (8, (2, 97))):
        exif = Image.Exif()
        exif[0x0112] = orientation
        file = io.BytesIO()
        left_red.save(file, "JPEG", exif=exif, quality=95)
        small = thumbnail(file.getvalue(), 100)
        assert small.mode == "RGB" and small.size == ((100, 50) if orientation < 5 else (50, 100))
        red, _, blue = small.getpixel(corner)
        assert red > 240 and blue < 20, orientation  # where the stored upper left corner is
    assert thumbnail(png("red", (40, 20)), 160).size == (40, 20)  # never larger than it is
    assert thumbnail(png("red", (400, 1)), 100).size == (100, 1)
    clear = io.BytesIO()
    Image.new("RGBA", (9, 9), (0, 0, 0, 0)).save(clear, "PNG")
    assert thumbnail(clear.getvalue(), 9).getpixel((4, 4)) == (255, 255, 255)


def test_a_large_jpeg_at_a_reduced_scale_looks_the_same(jpeg_maker, photograph):
    small = np.asarray(thumbnail(jpeg_maker(3, 1600, 1200, quality=95), 160), float)
    exact = np.asarray(photograph(3, 1600, 1200).resize((160, 120), Image.Resampling.BICUBIC), float)
    assert small.shape == exact.shape and np.abs(small - exact).mean() < 2


@pytest.mark.parametrize("data", [b"", b"no image", b"\xff\xd8\xff\xe0 cut", png("red")[:60]])
def test_what_is_no_image(data):
    with pytest.raises(ImageError):
        thumbnail(data, 64)


def test_an_edge_that_is_none():
    for edge in (0, 5000):
        with pytest.raises(ConfigError, match="edge"):
            thumbnail(png("red"), edge)


@pytest.mark.parametrize("form", [None, "webp", "jpeg"])
def test_many_come_in_order_and_a_gap_is_a_placeholder(tmp_path, form):
    for number in range(30):
        (tmp_path / f"{number}.png").write_bytes(png((8 * number, 0, 0)))
    (tmp_path / "7.png").write_bytes(b"damaged")
    (tmp_path / "9.png").unlink()
    names = [f"{number}.png" for number in range(30)]
    found = list(thumbnails(names, Originals(tmp_path), edge=32, form=form, threads=3))
    assert [one.name for one in found] == names
    for number, one in enumerate(found):
        if number in (7, 9):
            assert one.fault == ("the image no longer exists" if number == 9 else one.fault) != ""
            assert one.image.tobytes() == placeholder(32).tobytes()
        else:
            assert one.fault == "" and one.image.getpixel((5, 5)) == (8 * number, 0, 0)
        assert bool(one.data) == (form is not None)
        if form:
            again = Image.open(io.BytesIO(one.data))
            assert again.format == form.upper() and again.size == one.image.size
    with pytest.raises(ConfigError, match="form"):
        thumbnails(names, Originals(tmp_path), edge=32, form="gif")
    assert encoded(placeholder(8), "webp")[:4] == b"RIFF"


def test_only_a_few_are_in_flight(tmp_path):
    (tmp_path / "a.png").write_bytes(png("red"))
    taken = 0

    def names():
        nonlocal taken
        for _ in range(1000):
            taken += 1
            yield "a.png"

    small = thumbnails(names(), Originals(tmp_path), edge=8, threads=2)
    next(small)
    assert taken <= 10
    small.close()
