"""Delete lists against real files: whatever is listed is deleted, and every image must still be there in some file."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from embedkit.analysis.duplicates import find_duplicates
from embedkit.embeddings.metadata import Metadata
from embedkit.embeddings.parquet import write_rows
from embedkit.embeddings.schema import schema_of
from embedkit.errors import OutputError
from embedkit.images.sources import list_sources

METADATA = Metadata(
    entry="linear-tiny.noise", manifest_sha256="a" * 64, fingerprint="b" * 64, dim=64, normalized=True
)

pytestmark = pytest.mark.skipif(os.name == "nt", reason="links and bytes in names")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    """The working folder, with a folder `p` for images."""
    monkeypatch.chdir(tmp_path)
    Path("p").mkdir()
    return tmp_path


def put(name: str | bytes, content: str) -> None:
    """An image file: equal contents have equal embeddings."""
    Path(os.fsdecode(name)).parent.mkdir(parents=True, exist_ok=True)
    Path(os.fsdecode(name)).write_bytes(content.encode())


def scan(*sources: str, root: str | None = None) -> dict[str, tuple[int, int, bytes]]:
    """What `embed` would record of each image now: id -> size, modification time, content."""
    items = list_sources(sources, root=root).items
    return {item.id: (item.size, item.mtime_ns, item.read()) for item in items}


def embed(path: str, *runs: dict[str, tuple[int, int, bytes]]) -> str:
    """A file of embeddings with the rows of all these runs; rows of a file that is gone stay."""
    rows = {name: row for run in runs for name, row in run.items()}
    kinds = sorted({data for _, _, data in rows.values()})
    schema = schema_of(METADATA, {}, sha256=False)
    columns = {
        "id": list(rows),
        "part": [0] * len(rows),
        "embedding": [np.eye(64, dtype=np.float32)[kinds.index(data)] for _, _, data in rows.values()],
        "size": [size for size, _, _ in rows.values()],
        "mtime_ns": [time for _, time, _ in rows.values()],
    }
    write_rows([pa.table(columns, schema=schema)], Path(path), schema)
    return path


def contents(folder: str = ".") -> set[bytes]:
    """What can still be read anywhere, through links too."""
    return {
        path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file() and path.suffix in (".jpg", ".tar")
    }


def delete(path: str, root: str | None = None, null: bool = False):
    """Find duplicates, write the list and delete what it names. Nothing may be lost."""
    before = contents()
    listed = find_duplicates(path, 0.99, root=root).write_delete_list("del.txt", null=null)
    names = Path("del.txt").read_bytes().split(b"\0" if null else b"\n")[:-1]
    assert [os.fsdecode(name) for name in names] == listed.files
    for name in names:
        os.unlink(name)
    assert contents() == before
    return listed


def reasons(listed) -> dict[str, int]:
    return {reason: len(names) for reason, names in listed.left_out.items()}


def test_copies_are_listed_by_absolute_paths(here):
    for name in ("p/a.jpg", "p/b.jpg", "p/c/a.jpg"):
        put(name, "one")
    put("p/d.jpg", "two")
    listed = delete(embed("e.parquet", scan("p")))
    assert listed.files == [str(here.resolve() / "p/b.jpg"), str(here.resolve() / "p/c/a.jpg")]
    assert listed.left_out == {} and listed.why() == ""


def test_a_link_to_a_folder():
    put("p/2020/a.jpg", "one")
    put("p/2020/b.jpg", "two")
    os.symlink("2020", "p/all")
    listed = delete(embed("e.parquet", scan("p")))
    assert len(listed) == 0 and reasons(listed) == {"the same file as one that is kept": 2}


def test_a_link_that_sorts_before_its_file():
    put("p/originals/1.jpg", "one")
    put("p/z/z.jpg", "one")
    Path("p/album").mkdir()
    os.symlink("../originals/1.jpg", "p/album/1.jpg")
    found = find_duplicates(path := embed("e.parquet", scan("p")), 0.99)
    assert [found.names[row] for row in found.groups[0].kept] == [
        "p/originals/1.jpg"
    ]  # the file, not the link
    listed = delete(path)
    assert [os.path.basename(name) for name in listed.files] == ["z.jpg"]
    assert reasons(listed) == {"a link": 1}


def test_a_link_to_what_was_not_embedded_keeps_nothing_alive():
    put("q/one.jpg", "one")
    put("p/b.jpg", "one")
    os.symlink("../q/one.jpg", "p/a.jpg")
    assert len(delete(embed("e.parquet", scan("p")))) == 0  # the file is kept, and links are not listed


def test_one_folder_by_several_spellings(here, monkeypatch):
    put("p/q/a.jpg", "one")
    put("p/q/b.jpg", "two")
    runs = [scan("p/q"), scan(str(here / "p/q")), scan("p/q", root=".")]
    monkeypatch.chdir("p")
    runs.append(scan("q"))
    monkeypatch.chdir(here)
    path = embed("e.parquet", *runs)
    assert len(delete(path)) == 0
    assert len(delete(path, root="p")) == 0
    monkeypatch.chdir("p")
    assert len(delete("../e.parquet")) == 0
    monkeypatch.chdir(here)
    shutil.copytree("p/q", "q")  # what ids of another working folder name here: copies
    assert {os.path.dirname(name) for name in delete(path).files} == {str(here.resolve() / "q")}


def test_one_file_by_two_names_is_listed_once(here):
    put("p/a.jpg", "one")
    put("q/b.jpg", "one")
    os.symlink("q", "r")
    listed = delete(embed("e.parquet", scan("p"), scan("q"), scan("r")))
    assert listed.files == [str(here.resolve() / "q/b.jpg")]
    assert reasons(listed) == {"already listed under another name": 1}


def test_files_that_moved_between_two_runs():
    put("p/1.jpg", "one")
    put("p/2.jpg", "two")
    first = scan("p")
    Path("p/holiday").mkdir()
    os.rename("p/1.jpg", "p/holiday/beach.jpg")
    listed = delete(embed("e.parquet", first, scan("p")))
    assert len(listed) == 0 and reasons(listed) == {"the file no longer exists": 1}


def test_names_that_changed_places():
    """The row of `b` is a duplicate of `a` as it was; now `a` is another image."""
    put("p/a.jpg", "one")
    put("p/b.jpg", "one")
    put("p/c.jpg", "two, longer")
    path = embed("e.parquet", scan("p"))
    os.replace("p/c.jpg", "p/a.jpg")
    listed = delete(path)
    assert len(listed) == 0
    assert reasons(listed) == {"changed since it was embedded: embed again": 1}


def test_hard_links():
    put("p/a.jpg", "one")
    os.link("p/a.jpg", "p/b.jpg")
    put("p/c.jpg", "one")
    os.link("p/c.jpg", "p/d.jpg")
    listed = delete(embed("e.parquet", scan("p")))
    assert [os.path.basename(name) for name in listed.files] == ["c.jpg", "d.jpg"]
    assert reasons(listed) == {"the same file as one that is kept": 1}


def test_members_of_archives_are_left_and_files_come_first():
    put("p/z.jpg", "one")
    with tarfile.open("a.tar", "w") as tar:
        tar.add("p/z.jpg", "x.jpg")
        tar.add("p/z.jpg", "y.jpg")
    path = embed("e.parquet", scan("a.tar"), scan("p"))
    listed = delete(path)
    assert len(listed) == 0 and reasons(listed) == {"inside an archive": 2}
    assert "2 left out (2: inside an archive), the first is 'a.tar::x.jpg'" in listed.why()
    os.unlink("p/z.jpg")
    assert reasons(delete(path)) == {"inside an archive": 1, "the file no longer exists": 1}


def test_names_that_a_list_cannot_hold_as_they_are(here):
    odd = [b"p/b\xff.jpg", b"p/c\nd.jpg", b"p/-rf.jpg", b"p/e 'f\".jpg"]
    put("p/-a.jpg", "one")
    for name in odd:
        put(name, "one")
    os.chdir("p")  # so that ids begin with a dash
    path = embed("../e.parquet", scan("."))
    os.chdir("..")
    listed = find_duplicates(path.removeprefix("../"), 0.99, root="p").write_delete_list("del.txt")
    assert reasons(listed) == {"a line break in its name: use --null": 1}
    assert all(os.path.isabs(name) for name in listed.files) and len(listed) == 3
    listed = find_duplicates("e.parquet", 0.99, root="p").write_delete_list("del.txt", null=True)
    assert len(listed) == 4
    with open("del.txt") as names:
        subprocess.run(["xargs", "-0", "rm", "--"], stdin=names, check=True)
    assert os.listdir("p") == ["-a.jpg"]


def test_a_list_never_takes_the_place_of_an_image():
    put("p/a.jpg", "one")
    put("p/b.jpg", "one")
    found = find_duplicates(embed("e.parquet", scan("p")), 0.99)
    os.symlink("p/a.jpg", "list")
    for path in ("p/a.jpg", "list"):
        with pytest.raises(OutputError, match="one of the embedded images"):
            found.write_delete_list(path)
    assert Path("p/a.jpg").read_text() == "one"


# --- the image that is kept -------------------------------------------------------------------------------


def picture(name: str, width: int, quality: int = 90, age: int = 0) -> None:
    """A JPEG; scanning it gives an embedding of its own, so `embed_equal` writes the rows."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    image.resize((width, width * 3 // 4), Image.Resampling.BICUBIC).save(name, quality=quality)
    os.utime(name, ns=(0, 10**18 - age))


def embed_equal(*names: str) -> str:
    """Rows in this order, all with one vector."""
    found = scan(*names)
    return embed("e.parquet", {name: (*found[name][:2], b"same") for name in names})


def command(capsys, *arguments: str) -> tuple[int, str, str]:
    from embedkit import cli

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr("sys.argv", ["embedkit", "duplicates", "e.parquet", "--threshold", "0.99", *arguments])
        cli.main()
    return int(end.value.code or 0), *capsys.readouterr()


def listed_by(capsys, *arguments: str) -> tuple[list[str], str]:
    status, _, err = command(capsys, "--write-delete-list", "del.txt", *arguments)
    assert status == 0, err
    return [os.path.basename(line) for line in Path("del.txt").read_text().splitlines()], err


def test_the_full_size_original_is_kept(capsys):
    picture("p/a-half.jpg", 200, quality=100)  # more bytes than the next one, and the first row
    picture("p/b-full.jpg", 400, quality=20)
    assert os.path.getsize("p/a-half.jpg") > os.path.getsize("p/b-full.jpg")
    embed_equal("p/a-half.jpg", "p/b-full.jpg")
    names, err = listed_by(capsys)
    assert names == ["a-half.jpg"] and "warning" not in err
    names, err = listed_by(capsys, "--keep", "first")
    assert names == ["b-full.jpg"]
    assert "warning: 1 of the listed files are larger than the images that are kept instead" in err
    assert "'p/b-full.jpg', of which 'p/a-half.jpg' is kept" in err


def test_of_equal_pixels_the_most_bytes_then_the_oldest_is_kept(capsys):
    picture("p/a.jpg", 200, quality=60)
    picture("p/b.jpg", 200, quality=95)
    picture("p/c.jpg", 200, quality=95, age=5)
    picture("p/d.jpg", 200, quality=60, age=9)
    embed_equal("p/a.jpg", "p/b.jpg", "p/c.jpg", "p/d.jpg")
    assert listed_by(capsys)[0] == ["a.jpg", "b.jpg", "d.jpg"]
    assert listed_by(capsys, "--keep", "oldest")[0] == ["a.jpg", "b.jpg", "c.jpg"]
    assert listed_by(capsys, "--keep", "first")[0] == ["b.jpg", "c.jpg", "d.jpg"]
    assert command(capsys, "--keep", "best")[0] == 2


def test_bytes_decide_where_no_header_can_be_read_and_this_is_told(capsys):
    put("p/a.jpg", "short")
    put("p/b.jpg", "longer than this")
    embed_equal("p/a.jpg", "p/b.jpg")
    names, err = listed_by(capsys)
    assert names == ["a.jpg"]
    assert "warning: the pixels of 1 of the listed files, or of their kept images, cannot be counted" in err
    names, err = listed_by(capsys, "--keep", "first")
    assert names == ["b.jpg"] and "1 of the listed files are larger" in err


def test_pixels_are_counted_without_decoding():
    """Ten thousand by ten thousand pixels by the header, and no data behind it."""
    Image.new("L", (8, 8)).save("p/a.png")
    data = bytearray(Path("p/a.png").read_bytes())
    data[16:24] = (10000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    Path("p/b.png").write_bytes(data)
    found = find_duplicates(embed_equal("p/a.png", "p/b.png"), 0.99)
    assert [found.names[row] for row in found.groups[0].kept] == ["p/b.png"]
