import contextlib
import gc
import io
import json
import os
import random
import stat
import subprocess
import sys
import tarfile
import tracemalloc
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import unquote_to_bytes

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedkit.errors import ImageError, SourceError
from embedkit.images import archives, tables
from embedkit.images.originals import Originals
from embedkit.images.sources import Listing, PathList, list_sources

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    """Ids are paths as given, so tests give relative ones."""
    monkeypatch.chdir(tmp_path)


def make(*names: str | bytes) -> None:
    """Files that hold their own name."""
    for name in map(os.fsencode, names):
        os.makedirs(os.path.dirname(name) or b".", exist_ok=True)
        with open(name, "wb") as file:
            file.write(name)


def ids(listing: Listing) -> list[str]:
    return [item.id for item in listing.items]


def contents(listing: Listing) -> dict[str, bytes]:
    return {item.id: item.read() for item in listing.items}


def make_tar(path: str, members: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> None:
    with tarfile.open(path, "w", format=format, encoding="utf-8", errors="surrogateescape") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def images(paths: list[str | None]) -> pa.Array:
    """One distinct image per row."""
    return pa.array([{"bytes": b"row %d" % row, "path": path} for row, path in enumerate(paths)], IMAGE)


# Files and folders


def test_a_file_is_taken_whatever_its_suffix():
    make("scan.dcm", "photo")
    (item, _) = list_sources(["scan.dcm", Path("photo")]).items
    status = os.stat("scan.dcm")
    assert (item.id, item.path, item.size, item.mtime_ns) == (
        "scan.dcm", "scan.dcm", status.st_size, status.st_mtime_ns,
    )  # fmt: skip
    assert item.read() == b"scan.dcm" and dict(item.labels) == {}


def test_one_path_is_one_source():
    make("photos/a.jpg")
    assert ids(list_sources("photos")) == ids(list_sources(Path("photos"))) == ["photos/a.jpg"]


def test_a_folder_gives_images_in_the_order_of_name_bytes():
    # As text, U+DCFF (the byte 0xff) sorts before U+FF5A; as bytes it sorts after.
    names = [b"B.JPG", b"a.jpeg", b"a.webp", b"\xc3\xa9.png", b"\xef\xbd\x9a.tiff", b"\xff.heic"]
    make(*(b"one/" + name for name in names), "one/sub/z.gif", "one/a/y.bmp")
    make("two/a/y.bmp", "two/sub/z.gif", *(b"two/" + name for name in reversed(names)))
    want = ["B.JPG", "a.jpeg", "a.webp", "é.png", "\uff5a.tiff", "\udcff.heic", "a/y.bmp", "sub/z.gif"]
    for folder in ("one", "two"):
        assert [item.path for item in list_sources([folder]).items] == [f"{folder}/{name}" for name in want]


def test_what_a_folder_holds_beside_images_is_counted_and_said():
    make(
        "p/a.jpg",
        "p/.hidden.jpg",
        "p/.git/b.jpg",
        "p/c.txt",
        "p/d/e.txt",
        "p/README",
        "p/x.tar",
        "p/y.parquet",
    )
    listing = list_sources(["p"])
    assert ids(listing) == ["p/a.jpg"] and not listing.errors
    other, closed = listing.notes
    assert "3 files without an image's suffix (.txt, no suffix)" in other
    assert "2 files" in closed and "name them as sources" in closed


def test_a_file_passed_over_in_a_folder_is_taken_when_named():
    make("p/a.jpg", "p/b.txt")
    listing = list_sources(["p", "p/b.txt"])
    assert ids(listing) == ["p/a.jpg", "p/b.txt"] and listing.notes == []


def test_not_recursive_stays_on_the_first_level():
    make("p/a.jpg", "p/sub/b.jpg")
    assert ids(list_sources(["p"], recursive=False)) == ["p/a.jpg"]


@pytest.mark.parametrize(
    "given", [["p", "p/b.jpg"], ["p", "p"], ["p", "./p/", "q/../p"], ["p", "p/sub", "p/sub/../a.jpg"]]
)
def test_overlapping_sources_give_each_image_once(given):
    make("p/a.jpg", "p/b.jpg", "p/sub/c.jpg", "q/d.jpg")
    assert ids(list_sources(given)) == ["p/a.jpg", "p/b.jpg", "p/sub/c.jpg"]


def test_the_first_position_is_kept():
    make("p/a.jpg", "p/b.jpg")
    assert ids(list_sources(["p/b.jpg", "p"])) == ["p/b.jpg", "p/a.jpg"]


def test_absolute_stays_absolute(tmp_path):
    make("p/a.jpg")
    assert ids(list_sources([tmp_path / "p" / ".." / "p"])) == [f"{tmp_path}/p/a.jpg"]


def test_dot_dot_behind_a_link_reads_what_the_system_opens():
    make("x.jpg", "other/x.jpg", "other/deep/y.jpg")
    os.symlink("other/deep", "link")
    (item,) = list_sources(["link/../x.jpg"]).items
    assert item.id == "x.jpg" and item.read() == b"other/x.jpg"


def test_root_makes_ids_relative(tmp_path):
    make("data/p/a.jpg", "data2/b.jpg")
    make_tar("data/t.tar", {"m.png": b"1"})
    want = ["p/a.jpg", "t.tar::m.png"]
    assert ids(list_sources(["data/p", tmp_path / "data/t.tar"], root="data")) == want
    assert ids(list_sources(["data/p"], root="/")) == [f"{tmp_path}/data/p/a.jpg"[1:]]
    # A common prefix of the names is not a common folder.
    with pytest.raises(SourceError, match=r"data2/b\.jpg.*outside the root '.*/data'"):
        list_sources(["data2/b.jpg"], root="data")
    with pytest.raises(SourceError, match="not a folder"):
        list_sources(["data/p"], root="data/p/a.jpg")


# Links, odd names, closed doors


def test_a_loop_of_links_is_entered_once():
    make("p/a.jpg", "p/sub/b.jpg")
    os.symlink("..", "p/sub/up")
    os.symlink(".", "p/self")
    os.symlink("ouroboros.jpg", "p/ouroboros.jpg")
    listing = list_sources(["p"])
    assert ids(listing) == ["p/a.jpg", "p/sub/b.jpg"]
    assert [(name, kind) for name, kind, _ in listing.errors] == [("p/ouroboros.jpg", "OSError")]


def test_links_to_folders_are_followed():
    make("store/cat/a.jpg")
    os.makedirs("train")
    os.makedirs("val")
    os.symlink("../store/cat", "train/cat")
    os.symlink("../store/cat", "val/cat")
    assert ids(list_sources(["train", "val"])) == ["train/cat/a.jpg", "val/cat/a.jpg"]
    assert contents(list_sources(["val"])) == {"val/cat/a.jpg": b"store/cat/a.jpg"}
    # Two links in one tree as well: both names are real, and neither leads back.
    assert ids(list_sources(["."])) == ["store/cat/a.jpg", "train/cat/a.jpg", "val/cat/a.jpg"]


def test_a_web_of_links_ends():
    """12 folders that all link to each other have more than 10^8 paths without a repetition."""
    folders = [f"web/{i:02d}" for i in range(12)]
    make(*(f"{folder}/x.jpg" for folder in folders))
    for folder in folders:
        for other in folders:
            os.symlink(f"../{other[4:]}", f"{folder}/to{other[4:]}")
    names = ids(list_sources(["web"]))
    assert {f"{folder}/x.jpg" for folder in folders} <= set(names) and len(names) < 12**3


def test_a_dangling_link_and_a_fifo_are_error_rows():
    make("p/a.jpg")
    os.symlink("nowhere.jpg", "p/b.jpg")
    os.mkfifo("p/c.jpg")
    listing = list_sources(["p"])
    assert ids(listing) == ["p/a.jpg"]
    assert [row[:2] for row in listing.errors] == [
        ("p/b.jpg", "FileNotFoundError"),
        ("p/c.jpg", "SourceError"),
    ]
    with pytest.raises(SourceError, match="neither a file nor a folder"):
        list_sources(["p/c.jpg"])
    with pytest.raises(SourceError, match="is a link to 'nowhere.jpg'"):
        list_sources(["p/b.jpg"])


def test_a_name_that_is_not_utf8_becomes_a_uri():
    raw = b"p/100% \xff.jpg"
    make(raw, "file:p/100%25%20%FF.jpg")
    make_tar("t.tar", {"\udcff.jpg": b"member"}, tarfile.GNU_FORMAT)
    (item, other, member) = list_sources(["p", "file:p/100%25%20%FF.jpg", "t.tar"]).items
    assert item.id == "file:p/100%25%20%FF.jpg" and unquote_to_bytes(item.id[5:]) == raw
    assert item.read() == raw and os.fsencode(item.path) == raw
    # A file whose name looks like that URI is another image, and stays one.
    assert other.id != item.id and other.read() == b"file:p/100%25%20%FF.jpg"
    assert member.id == "file:t.tar::%FF.jpg" and member.read() == b"member"


@contextlib.contextmanager
def without_privileges():
    """Root passes every permission, so root becomes `nobody` for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_what_cannot_be_entered_is_an_error_row(tmp_path):
    make("p/a.jpg", "p/closed/b.jpg", "p/listed/c.jpg", "p/d.jpg", "q/e.jpg")
    tmp_path.chmod(0o755)
    os.chmod("p/closed", 0)
    os.chmod("p/listed", stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH)
    os.chmod("p/d.jpg", 0)
    try:
        with without_privileges():
            listing = list_sources(["p", "q"])
            with pytest.raises(PermissionError):
                listing.items[1].read()
            with pytest.raises(SourceError, match="cannot be opened: Permission denied"):
                list_sources(["p/closed/b.jpg"])
    finally:
        os.chmod("p/closed", 0o755)
        os.chmod("p/listed", 0o755)
    assert ids(listing) == ["p/a.jpg", "p/d.jpg", "q/e.jpg"]
    assert listing.errors == [
        ("p/closed", "PermissionError", "Permission denied"),
        ("p/listed/c.jpg", "PermissionError", "Permission denied"),
    ]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("photo/a.jpg", r"'photo/a\.jpg' does not exist; did you mean 'photos'\?"),
        ("photos/aa.jpg", r"did you mean 'photos/a\.jpg'\?"),
        ("photos/sub/zzz/q.jpg", r"the nearest folder that exists is 'photos'"),
        ("photos/a.jpg/b", r"does not exist"),
        ("", r"does not exist"),
        ("a\0b.jpg", r"null"),
        ("https://example.org/a.jpg", r"is a URL; download"),
        ("s3://bucket/photos", r"is a URL; download or mount"),
        ("photos/*.png", r"nothing matches the pattern 'photos/\*\.png'"),
        ("set.tar.gz", r"is compressed; unpack it"),
        ("set.zip", r"is compressed; unpack it"),
    ],
)
def test_a_source_that_cannot_be_is_one_sentence(given, words):
    make("photos/a.jpg", "set.tar.gz", "set.zip")
    with pytest.raises(SourceError, match=words) as caught:
        list_sources([given])
    assert "\n" not in str(caught.value)
    str(caught.value).encode()


# Patterns and lists


@pytest.mark.parametrize(
    ("pattern", "want"),
    [
        ("p/*.jpg", ["p/a.jpg", "p/b.jpg"]),
        ("p/[b-z].jpg", ["p/b.jpg"]),
        ("p/**/*.jpg", ["p/a.jpg", "p/b.jpg", "p/s/c.jpg", "p/s/t/d.jpg"]),
        ("./p/s*/?.jpg", ["p/s/c.jpg"]),
        ("p/**/t", ["p/s/t/d.jpg"]),
        ("p/**", ["p/a.jpg", "p/b.jpg", "p/s/c.jpg", "p/s/t/d.jpg"]),
        ("*/notes.txt", ["p/notes.txt"]),
        ("p/.h*/*", ["p/.hid/e.jpg"]),
        ("**/s", ["p/s/c.jpg", "p/s/loop/a.jpg", "p/s/loop/b.jpg", "p/s/t/d.jpg"]),
    ],
)
def test_a_pattern_stands_for_its_matches(pattern, want, tmp_path):
    make("p/a.jpg", "p/b.jpg", "p/s/c.jpg", "p/s/t/d.jpg", "p/.hid/e.jpg", "p/notes.txt")
    os.symlink("..", "p/s/loop")
    assert ids(list_sources([pattern])) == want
    assert ids(list_sources([tmp_path / pattern])) == [f"{tmp_path}/{name}" for name in want]


def test_a_pattern_goes_deeper_than_the_recursion_limit():
    depth = sys.getrecursionlimit() + 50
    os.makedirs("d")
    here = os.getcwd()
    for _ in range(depth):  # the whole path is short enough, makedirs would itself recurse
        os.chdir("d" if os.path.isdir("d") else here)
        os.mkdir("d")
    make("x.jpg")
    os.chdir(here)
    name = "d/" * depth + "x.jpg"
    assert ids(list_sources(["**/*.jpg"])) == ids(list_sources(["d"])) == [name]
    for level in range(depth, 0, -400):  # rmtree would recurse too
        os.rename("d/" * level + "d", f"cut{level}")


def test_a_path_that_exists_is_no_pattern():
    make("p/a[1].jpg", "p/a1.jpg")
    assert ids(list_sources(["p/a[1].jpg"])) == ["p/a[1].jpg"]


def test_a_list_on_standard_input():
    make("a.jpg", "b c.jpg ", "p/d.jpg", "star*.jpg")
    text = b"star*.jpg\nb c.jpg \n\nmissing.jpg\r\n\r\na.jpg\r\np\na.jpg\n*.jpg"
    listing = list_sources([PathList.parse(text)])
    assert ids(listing) == ["star*.jpg", "b c.jpg ", "a.jpg", "p/d.jpg"]
    assert listing.errors == [
        ("missing.jpg", "FileNotFoundError", "No such file or directory"),
        ("*.jpg", "FileNotFoundError", "No such file or directory"),
    ]


def test_a_name_with_a_newline_survives_a_nul_list():
    names = ["two\nlines.jpg", "cr\r", "\udcff.png"]
    make(*names)
    text = b"\0".join(map(os.fsencode, names)) + b"\0\0"
    listing = list_sources([PathList.parse(text, null=True)])
    assert [item.path for item in listing.items] == names and not listing.errors
    assert ids(listing) == ["two\nlines.jpg", "cr\r", "file:%FF.png"]
    with pytest.raises(SourceError, match="--null"):
        list_sources([PathList.parse(text)])


def test_nothing_is_an_empty_listing():
    os.makedirs("p")
    listing = list_sources(["p"])
    assert (listing.items, listing.errors, listing.notes, listing.label_schema) == ([], [], [], {})


@pytest.mark.parametrize("kind", ["list", "pattern"])
def test_what_a_list_or_a_pattern_names_and_cannot_be_read_is_an_error_row(kind, tmp_path):
    make("p/a.jpg", "p/b.zip", "p/c.tar", "p/d.parquet", "p/e.tar.gz")
    os.mkfifo("p/f.jpg")
    os.symlink("/dev/zero", "p/g.jpg")
    os.symlink("gone", "p/h.jpg")
    if kind == "pattern":
        listing = list_sources(["p/*"])
    else:
        text = "".join(f"p/{name}\n" for name in sorted(os.listdir("p"))) + "https://example.org/x.jpg\n"
        listing = list_sources([PathList.parse(text.encode())])
        assert listing.errors.pop()[:2] == ("https://example.org/x.jpg", "SourceError")
    assert ids(listing) == ["p/a.jpg"]
    assert [row[:2] for row in listing.errors] == [
        *(
            (f"p/{name}", "SourceError")
            for name in ("b.zip", "c.tar", "d.parquet", "e.tar.gz", "f.jpg", "g.jpg")
        ),
        ("p/h.jpg", "FileNotFoundError"),
    ]
    assert "is compressed" in listing.errors[0][2] and "neither a file nor a folder" in listing.errors[4][2]


def test_a_list_may_leave_the_root_in_one_row():
    make("r/a.jpg", "b.jpg")
    listing = list_sources([PathList.parse(b"r/a.jpg\nb.jpg\n")], root="r")
    assert ids(listing) == ["a.jpg"]
    assert [row[:2] for row in listing.errors] == [("b.jpg", "SourceError")]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_the_byte_order_mark_of_a_list_is_not_part_of_its_first_name(encoding):
    make("é.jpg", "b.jpg")
    mark = "\ufeff" if encoding.endswith(("-le", "-be")) else ""
    text = f"{mark}é.jpg\r\nb.jpg\r\n".encode(encoding)
    listing = list_sources([PathList.parse(text)])
    assert ids(listing) == ["é.jpg", "b.jpg"] and not listing.errors


def test_a_file_that_becomes_a_fifo_or_huge_is_refused_when_it_is_read():
    make("a.jpg", "b.jpg")
    a, b = list_sources(["a.jpg", "b.jpg"]).items
    os.remove("a.jpg")
    os.mkfifo("a.jpg")
    os.truncate("b.jpg", 1 << 40)
    with pytest.raises(OSError, match="not a regular file"):
        a.read()
    with pytest.raises(OSError, match="is larger than"):
        b.read()


def test_a_time_after_2262_fits_into_an_int64():
    make("a.jpg")
    try:
        os.utime("a.jpg", (0, 2**34))
    except OverflowError:
        pytest.skip("this system has no such times")
    (item,) = list_sources(["a.jpg"]).items
    assert item.mtime_ns <= 2**63 - 1 and item.read() == b"a.jpg"


def test_brackets_in_a_folder_before_a_pattern():
    make("[2023] photos/a.jpg", "[2023] photos/b.png", "2/c.jpg")
    assert ids(list_sources(["[2023] photos/*.jpg"])) == ["[2023] photos/a.jpg"]
    assert ids(list_sources(["[2023] ph*/*.jpg"])) == ["[2023] photos/a.jpg"]
    assert ids(list_sources(["[2023]/*.jpg"])) == ["2/c.jpg"]


@pytest.mark.parametrize(("have", "ask"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_the_other_unicode_form_of_a_name_is_found(have, ask):
    stored, asked = (unicodedata.normalize(form, "Fotos Köln/Müller.jpg") for form in (have, ask))
    make(stored)
    folder = os.path.dirname(asked)
    for given in (asked, folder, f"{folder}/M*r.jpg", f"Fotos*/{os.path.basename(asked)[:-4]}*"):
        assert ids(list_sources([given])) == [stored]
    assert ids(list_sources([PathList.parse(asked.encode())])) == [stored]


def test_tar_inside_a_name_is_no_packed_archive():
    make("lake.tar.jpg")
    assert ids(list_sources(["lake.tar.jpg"])) == ["lake.tar.jpg"]


def test_no_file_shares_the_id_of_a_member():
    make("a.tar::in.jpg", "file:x::y.jpg", "d/a.tar::b/in.jpg")
    make_tar("a.tar", {"in.jpg": b"member", "b.tar::in.jpg": b"odd"})
    make_tar("a.tar::b.tar", {"in.jpg": b"inner"})
    listing = list_sources(["a.tar", "a.tar::in.jpg", "a.tar::b.tar", "file:x::y.jpg", "d"])
    assert contents(listing) == {
        "a.tar::in.jpg": b"member",
        "a.tar::b.tar::in.jpg": b"odd",
        "file:a.tar%3A%3Ain.jpg": b"a.tar::in.jpg",
        "file:a.tar%3A%3Ab.tar::in.jpg": b"inner",
        "file:file:x%3A%3Ay.jpg": b"file:x::y.jpg",
        "file:d/a.tar%3A%3Ab/in.jpg": b"d/a.tar::b/in.jpg",
    }
    originals = Originals()
    assert {name: originals.read(name) for name in ids(listing)} == contents(listing)
    assert originals.file("a.tar::in.jpg") is None
    assert originals.file("file:a.tar%3A%3Ain.jpg") == os.path.abspath("a.tar::in.jpg")


# Tar


def sparse_header(path: str, kind: bytes) -> None:
    """An archive whose first header says that a name or its attributes take 1 TB, which are holes."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = kind, 1 << 40
    with open(path, "wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(512 + info.size + 1024)


@pytest.mark.parametrize(
    "kind", [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE]
)
def test_a_header_of_a_terabyte_is_not_read(kind):
    sparse_header("t.tar", kind)
    tracemalloc.start()
    with pytest.raises(SourceError, match=r"not a plain tar archive \(a header of 1099511627776 bytes\)"):
        list_sources(["t.tar"])
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()
    make_tar("u.tar", {"a.jpg": b"a"}, tarfile.GNU_FORMAT)
    os.truncate("t.tar", 512)
    Path("u.tar").write_bytes(Path("u.tar").read_bytes()[:1024] + Path("t.tar").read_bytes())
    os.truncate("u.tar", 1 << 40)
    listing = list_sources(["u.tar"])  # what stands before it is whole
    assert ids(listing) == ["u.tar::a.jpg"] and "damaged after 1 members" in listing.errors[0][2]


def test_a_member_of_a_terabyte_is_an_error_when_it_is_read():
    info = tarfile.TarInfo("a.jpg")
    info.size = 1 << 40
    with open("t.tar", "wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(512 + info.size + 1024)
    (item,) = list_sources(["t.tar"]).items
    with pytest.raises(OSError, match="1099511627776 bytes"):
        item.read()


def test_members_without_a_images_suffix_are_counted_and_said():
    make_tar("0.tar", {"a.jpg": b"a", "a.json": b"{}", "b.img": b"b", "c": b"c", ".d": b"d"})
    make_tar("1.tar", {"a.jpg": b"a", "a.json": b"{}"})
    (note,) = list_sources(["0.tar", "1.tar"]).notes
    assert "skipped 4 members of archives without an image's suffix (.json, .img, no suffix)" in note


def test_what_stands_behind_the_end_mark_is_said():
    make_tar("a.tar", {"a.jpg": b"a"})
    make_tar("b.tar", {"b.jpg": b"b"})
    a, b = Path("a.tar").read_bytes(), Path("b.tar").read_bytes()
    Path("cat.tar").write_bytes(a + b)
    listing = list_sources(["cat.tar"])
    assert ids(listing) == ["cat.tar::a.jpg"] and not listing.errors
    assert f"skipped {len(b)} bytes of 'cat.tar' after its end mark" in listing.notes[0]
    Path("padded.tar").write_bytes(a + bytes(1 << 20))
    assert list_sources(["padded.tar"]).notes == []
    os.truncate("padded.tar", 1 << 40)
    assert "after its end mark" in list_sources(["padded.tar"]).notes[0]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_of_a_tar_are_read_by_many_threads(format):
    rng = random.Random(0)
    members = {f"shard/{i:04d}.jpg": rng.randbytes(rng.randrange(3000)) for i in range(300)}
    members["/".join(["long" * 12] * 4) + "/name.png"] = b"long"
    make_tar("t.tar", members, format)
    listing = list_sources(["t.tar"])
    assert ids(listing) == [f"t.tar::{name}" for name in members] and not listing.errors
    order = listing.items * 3
    rng.shuffle(order)
    with ThreadPoolExecutor(8) as pool:
        for item, data in zip(order, pool.map(lambda item: item.read(), order), strict=True):
            assert data == members[item.id.removeprefix("t.tar::")]
            assert (item.size, item.mtime_ns) == (len(data), os.stat("t.tar").st_mtime_ns)
            assert item.path is None


def test_a_webdataset_gives_its_images():
    files = {
        f"{key}.{suffix}": f"{key}{suffix}".encode() for key in "ab" for suffix in ("jpg", "json", "cls")
    }
    make_tar("0.tar", files)
    make_tar("1.tar", {"c.png": b"c"})
    assert contents(list_sources(["*.tar"])) == {
        "0.tar::a.jpg": b"ajpg",
        "0.tar::b.jpg": b"bjpg",
        "1.tar::c.png": b"c",
    }


def test_odd_members():
    with tarfile.open("t.tar", "w") as archive:
        for name, data in [
            ("./a.jpg", b"old"), ("../b.jpg", b"b"), ("/c.jpg", b"c"), ("__MACOSX/._a.jpg", b"fork"),
            (".hid/d.jpg", b"d"), ("a.jpg", b"new"),
        ]:  # fmt: skip
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for kind, name in (
            (tarfile.SYMTYPE, "l.jpg"),
            (tarfile.LNKTYPE, "h.jpg"),
            (tarfile.DIRTYPE, "dir.jpg"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.jpg"
            archive.addfile(info)
    listing = list_sources(["t.tar", "./t.tar"])
    # The later member of a name is what extraction would leave.
    assert contents(listing) == {"t.tar::a.jpg": b"new", "t.tar::../b.jpg": b"b", "t.tar::/c.jpg": b"c"}
    assert len(listing.notes) == 1 and "links" in listing.notes[0]


@pytest.mark.parametrize(
    ("size", "readable", "row"),
    [
        (512 + 1024 + 512 + 100, 1, "t.tar::1.jpg"),  # inside the second member's data
        (512 + 1024 + 512 + 1000, 2, "t.tar"),  # its data is whole, the padding is not
        (512 + 1024 + 512 + 1024 + 100, 2, "t.tar"),  # inside the third header
        (512 + 1024 + 512 + 1024, 2, "t.tar"),  # between two members: only the end mark is missing
    ],
)
def test_a_truncated_tar_gives_what_is_whole_and_an_error_row(size, readable, row):
    make_tar("t.tar", {f"{i}.jpg": bytes([i]) * 1000 for i in range(3)}, tarfile.USTAR_FORMAT)
    os.truncate("t.tar", size)
    listing = list_sources(["t.tar"])
    assert contents(listing) == {f"t.tar::{i}.jpg": bytes([i]) * 1000 for i in range(readable)}
    assert [error[:2] for error in listing.errors] == [(row, "SourceError")]
    assert "truncated" in listing.errors[0][2]


def test_a_tar_with_a_broken_header_in_the_middle_says_so():
    make_tar("t.tar", {f"{i}.jpg": bytes([i]) * 1000 for i in range(3)}, tarfile.USTAR_FORMAT)
    with open("t.tar", "r+b") as file:
        file.seek(512 + 1024)
        file.write(b"\xa5" * 512)
    listing = list_sources(["t.tar"])
    assert ids(listing) == ["t.tar::0.jpg"] and [row[0] for row in listing.errors] == ["t.tar"]


@pytest.mark.parametrize(("size", "row"), [(-1024, "t.tar"), (-100, "t.tar::c.jpg")])
def test_a_member_of_negative_size_does_not_loop(size, row):
    """The third header says a size that leads back to the second one, or a negative one that leads on."""
    make_tar("t.tar", {"a.jpg": b"a", "b.jpg": b"", "c.jpg": b""}, tarfile.USTAR_FORMAT)
    data = bytearray(Path("t.tar").read_bytes())
    third = 1536  # the second is at 1024
    header = data[third : third + 512]
    header[124:136] = b"\xff" + (256**11 + size).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    data[third : third + 512] = header
    Path("t.tar").write_bytes(data)
    listing = list_sources(["t.tar"])
    assert ids(listing) == ["t.tar::a.jpg", "t.tar::b.jpg"]
    assert [error[:2] for error in listing.errors] == [(row, "SourceError")]


def test_what_is_no_plain_tar_is_refused():
    with tarfile.open("packed.tar", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.jpg"))
    make("text.tar")
    Path("empty.tar").write_bytes(b"")
    for name in ("packed.tar", "text.tar", "empty.tar"):
        with pytest.raises(SourceError, match=rf"'{name}' is not a plain tar archive.*decompress it"):
            list_sources([name])


def test_a_tar_that_changes_after_listing_is_not_read():
    make_tar("t.tar", {"a.jpg": b"a", "b.jpg": b"b" * 2000})
    (a, b) = list_sources(["t.tar"]).items
    assert a.read() == b"a"
    os.truncate("t.tar", 1024)
    with pytest.raises(SourceError, match="became shorter"):
        b.read()
    (c,) = list_sources(["t.tar"]).items
    os.utime("t.tar", ns=(1, 1))
    with pytest.raises(SourceError, match="changed after it was listed"):
        c.read()


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors by /proc")
def test_many_archives_need_few_descriptors():
    for i in range(40):
        make_tar(f"{i:02d}.tar", {"a.jpg": b"%d" % i})
    before = len(os.listdir("/proc/self/fd"))
    listing = list_sources(["*.tar"])
    assert len(os.listdir("/proc/self/fd")) == before
    assert [item.read() for item in listing.items] == [b"%d" % i for i in range(40)]
    assert len(os.listdir("/proc/self/fd")) <= before + archives._OPEN_ARCHIVES
    del listing
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


# Parquet


def test_a_parquet_row_is_called_by_its_path_or_its_number():
    paths = ["a.jpg", None, "dup.jpg", "", "dup.jpg", "#0", "b/c.jpg"]
    pq.write_table(pa.table({"image": images(paths)}), "t.parquet")
    listing = list_sources(["t.parquet"])
    want = ["a.jpg", "#1", "#2", "#3", "#4", "#5", "b/c.jpg"]
    assert contents(listing) == {f"t.parquet::{name}": b"row %d" % row for row, name in enumerate(want)}
    status = os.stat("t.parquet")
    for item in listing.items:
        assert (item.size, item.mtime_ns, item.path) == (status.st_size, status.st_mtime_ns, None)


def test_labels_are_the_scalar_columns():
    table = pa.table(
        {
            "image": images(["a", "b", "c"]),
            "label": pa.array([3, None, 5], pa.int64()),
            "weight": pa.array([0.5, 1.5, 2.5], pa.float32()),
            "half": pa.array([1, 2, None], pa.float16()),
            "good": [True, False, None],
            "text": ["x", "é", None],
            "big": pa.array(["p", "q", "r"], pa.large_string()),
            "category": pa.array(["u", "v", "u"]).dictionary_encode(),
            "box": [[1, 2], [3], []],
            "when": pa.array([1, 2, 3], pa.timestamp("s")),
        }
    )
    pq.write_table(table, "t.parquet", row_group_size=2)
    make("a.jpg")
    listing = list_sources(["a.jpg", "t.parquet"])
    assert listing.label_schema == {
        "label": "int64", "weight": "float", "half": "halffloat", "good": "bool", "text": "string", "big": "string",
        "category": "string",
    }  # fmt: skip
    rows = table.select(list(listing.label_schema)).to_pylist()
    assert [dict(item.labels) for item in listing.items] == [{}, *rows]
    for type_name in listing.label_schema.values():
        assert str(pa.type_for_alias(type_name)) == type_name
    (note,) = listing.notes
    assert "'box'" in note and "'when'" in note and "'label'" not in note


def test_two_files_must_agree_on_a_label():
    for name, kind in (("a", pa.int64()), ("b", pa.string()), ("c", pa.int64())):
        column = pa.array([1], pa.int64()).cast(kind)
        pq.write_table(pa.table({"image": images([f"{name}.jpg"]), "label": column}), f"{name}.parquet")
    assert list_sources(["a.parquet", "c.parquet"]).label_schema == {"label": "int64"}
    with pytest.raises(SourceError, match="'label' is int64 in 'a.parquet', string in 'b.parquet'"):
        list_sources(["a.parquet", "b.parquet"])


@pytest.mark.parametrize(
    ("columns", "row"),
    [
        ({"photo_data": pa.array([b"x", b"y"])}, b"y"),
        ({"thumb": pa.array([b"t", b"t"]), "Image": pa.array([b"x", b"y"], pa.large_binary())}, b"y"),
        ({"hash": pa.array([b"h", b"h"]), "image": pa.array([{"bytes": b"x"}, {"bytes": b"y"}])}, b"y"),
        ({"img": images(["", ""]), "audio": images(["", ""])}, b"row 1"),
    ],
)
def test_which_column_is_the_image(columns, row):
    pq.write_table(pa.table(columns), "t.parquet")
    assert list(contents(list_sources(["t.parquet"])).values())[1] == row


@pytest.mark.parametrize(
    "columns",
    [
        {"one": [b"x"], "two": [b"y"]},
        {"image": [[b"x"]]},
        {"image": ["text"]},
        {"image": [b"x"], "jpg": [b"y"]},
    ],
)
def test_no_image_column_or_two_name_the_columns(columns):
    pq.write_table(pa.table(columns), "t.parquet")
    with pytest.raises(SourceError, match=f"found the columns {', '.join(map(repr, columns))}"):
        list_sources(["t.parquet"])


def test_null_images_fail_when_read():
    values = [{"bytes": b"x", "path": "a"}, {"bytes": None, "path": "b"}, None, {"bytes": b"y", "path": "d"}]
    pq.write_table(pa.table({"image": pa.array(values, IMAGE)}), "s.parquet")
    pq.write_table(pa.table({"image": pa.array([b"x", None, None, b"y"])}), "b.parquet")
    for name in ("s.parquet", "b.parquet"):
        first, second, third, last = list_sources([name]).items
        assert (first.read(), last.read()) == (b"x", b"y")
        for item, row in ((second, 1), (third, 2)):
            with pytest.raises(ImageError, match=f"row {row} of '{name}'"):
                item.read()
    assert third.id == "b.parquet::#2"


def test_a_row_without_bytes_is_read_by_its_path_below_the_folder_alone(tmp_path):
    make("d/in/x.jpg", "out.jpg")
    os.symlink("../out.jpg", "d/link.jpg")
    paths = ["in/x.jpg", "../out.jpg", f"{tmp_path}/d/in/x.jpg", "link.jpg", "in/gone.jpg", "in", "a\0b"]
    values = [{"bytes": None, "path": path} for path in paths]
    pq.write_table(pa.table({"image": pa.array(values, IMAGE)}), "d/t.parquet")
    first, *others = list_sources(["d/t.parquet"]).items
    assert first.read() == b"d/in/x.jpg"
    for item, words in zip(
        others,
        [
            *["is not below the folder of the Parquet file"] * 3,
            "No such file",
            "not a regular file",
            "bytes are null",
        ],
        strict=True,
    ):
        with pytest.raises(ImageError, match=words):
            item.read()


def test_the_image_column_can_be_chosen():
    pq.write_table(pa.table({"image": [b"x"], "jpg": [b"y"], "text": ["z"]}), "t.parquet")
    with pytest.raises(SourceError, match="--image-column"):
        list_sources(["t.parquet"])
    for column, row in (("image", b"x"), ("jpg", b"y")):
        (item,) = list_sources(["t.parquet"], image_column=column).items
        assert item.read() == row
    for column in ("text", "none"):
        with pytest.raises(
            SourceError, match=f"expected images in the column '{column}'.*found 'image', 'jpg'"
        ):
            list_sources(["t.parquet"], image_column=column)


def test_class_names_become_the_labels_text():
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}, "count": {"_type": "Value"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table(
        {"image": [b"1", b"2", b"3", b"4", b"5"], "label": [1, 0, -1, None, 7], "count": [5] * 5}
    )
    pq.write_table(table.replace_schema_metadata(metadata), "t.parquet")
    listing = list_sources(["t.parquet"])
    assert listing.label_schema == {"label": "string", "count": "int64"}
    assert [item.labels["label"] for item in listing.items] == ["dog", "cat", None, None, "7"]
    for broken in ("[]", "{", '{"info": {"features": {"label": {"_type": "ClassLabel", "names": [1]}}}}'):
        pq.write_table(table.replace_schema_metadata({"huggingface": broken}), "t.parquet")
        assert list_sources(["t.parquet"]).label_schema["label"] == "int64"


def test_a_dictionary_does_not_blow_up_labels_or_paths():
    labels = pa.DictionaryArray.from_arrays(pa.array([0] * 500, pa.int32()), pa.array(["x" * 4_000_000]))
    table = pa.table({"image": [b"x"] * 500, "note": labels, "short": ["s"] * 500})
    pq.write_table(
        table, "t.parquet", compression="zstd", store_schema=False, dictionary_pagesize_limit=1 << 30
    )
    before = pa.total_allocated_bytes()
    listing = list_sources(["t.parquet"])
    assert pa.total_allocated_bytes() - before < 20 << 20  # of 2 GB
    assert listing.label_schema == {"short": "string"} and "'note'" in listing.notes[0]
    long = pa.array(["x" * 400_000]).take(pa.array([0] * 50))
    struct = pa.StructArray.from_arrays([pa.array([b"x"] * 50), long], ["bytes", "path"])
    pq.write_table(
        pa.table({"image": struct}), "p.parquet", compression="zstd", dictionary_pagesize_limit=1 << 30
    )
    listing = list_sources(["p.parquet"])
    assert ids(listing)[:2] == ["p.parquet::#0", "p.parquet::#1"] and "named the rows" in listing.notes[0]


def test_a_dictionary_does_not_blow_up_images():
    """64 rows of 10 MB each in a file of a few kB: one at a time in memory, and what the window keeps."""
    values = pa.DictionaryArray.from_arrays(pa.array([0] * 64, pa.int32()), pa.array([bytes(10_000_000)]))
    pq.write_table(
        pa.table({"image": values}), "t.parquet", compression="zstd", store_schema=False,
        dictionary_pagesize_limit=1 << 30,
    )  # fmt: skip
    assert os.path.getsize("t.parquet") < 100_000
    items = list_sources(["t.parquet"]).items
    tracemalloc.start()
    assert all(len(item.read()) == 10_000_000 for item in items)
    assert tracemalloc.get_traced_memory()[1] < tables._WINDOW_BYTES + 30_000_000
    tracemalloc.stop()


def test_a_damaged_parquet_file_is_one_sentence():
    make("text.parquet")
    with pytest.raises(SourceError, match="is not a Parquet file that can be read"):
        list_sources(["text.parquet"])
    pq.write_table(pa.table({"image": images(["a.jpg"])}), "t.parquet")
    (item,) = list_sources(["t.parquet"]).items
    os.utime("t.parquet", ns=(1, 1))
    with pytest.raises(SourceError, match="changed after it was listed"):
        item.read()


def test_a_label_that_is_not_utf8_is_found_while_listing():
    text = pa.array([b"ok", b"\xff"]).view(pa.string())
    pq.write_table(pa.table({"image": images(["a", "b"]), "text": text}), "t.parquet")
    with pytest.raises(SourceError, match="UTF8"):
        list_sources(["t.parquet"])


def test_a_damaged_page_costs_its_row_group_alone():
    column = pa.array([b"%06d" % row for row in range(300)])
    pq.write_table(pa.table({"image": column}), "t.parquet", row_group_size=100, use_dictionary=False)
    chunk = pq.ParquetFile("t.parquet").metadata.row_group(1).column(0)
    with open("t.parquet", "r+b") as file:
        file.seek(chunk.data_page_offset)
        file.write(b"\xff" * 40)
    items = list_sources(["t.parquet"]).items
    for row in [299, 150, 0, 100, 99, 199, 200]:
        if 100 <= row < 200:
            with pytest.raises(SourceError, match=f"row {row} of 't.parquet' is in a damaged page"):
                items[row].read()
        else:
            assert items[row].read() == b"%06d" % row


def test_a_parquet_file_whose_name_is_not_utf8():
    name = os.fsdecode(b"\xff.parquet")
    pq.write_table(pa.table({"image": images(["a.jpg"])}), "t.parquet")
    os.rename("t.parquet", name)
    assert contents(list_sources([name])) == {"file:%FF.parquet::a.jpg": b"row 0"}


def count_seeks(monkeypatch) -> list[int]:
    seeks: list[int] = []
    seek = tables._OpenTable._seek

    def counted(self, number):
        seeks.append(number)
        seek(self, number)

    monkeypatch.setattr(tables._OpenTable, "_seek", counted)
    return seeks


@pytest.mark.parametrize("group", [37, 5000])
def test_rows_asked_for_out_of_order_by_threads_are_decoded_once(group, monkeypatch):
    rows = 3000
    column = pa.array([b"%d" % row * 50 for row in range(rows)])
    pq.write_table(pa.table({"image": column}), "t.parquet", row_group_size=group)
    items = list_sources(["t.parquet"]).items
    rng = random.Random(0)
    seeks = count_seeks(monkeypatch)
    with ThreadPoolExecutor(8) as pool:
        for start in range(0, rows, 400):
            window = rng.sample(range(start, min(rows, start + 400)), k=min(400, rows - start))
            for row, data in zip(window, pool.map(lambda row: items[row].read(), window), strict=True):
                assert data == b"%d" % row * 50
    assert len(seeks) == -(-rows // group)  # every row group begun once
    # Again from the start, as when the content is verified before it is embedded.
    assert items[0].read() == b"0" * 50 and items[rows - 1].read() == column[-1].as_py()
    table = items[0].read._opened()
    assert table._window_bytes == sum(map(len, table._window.values()))


def test_rows_that_nobody_asks_for_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(tables, "_WINDOW_BYTES", 1 << 20)
    size, rows = 10_000, 4000  # 40 MB in all
    column = pa.array([row.to_bytes(4, "big") * (size // 4) for row in range(rows)])
    pq.write_table(pa.table({"image": column}), "t.parquet", row_group_size=500)
    del column
    items = list_sources(["t.parquet"]).items
    assert items[0].read()[:4] == bytes(4)
    table = items[0].read._opened()
    tracemalloc.start()
    for row in range(0, rows, 10):
        assert items[row].read()[:4] == row.to_bytes(4, "big")
        assert table._window_bytes == sum(map(len, table._window.values())) <= 1 << 20
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The window, and one batch twice: as it comes and as it is added.
    assert peak < (1 << 20) + 2 * 64 * size + 100_000
    assert items[rows - 1].read._opened() is table


def test_one_huge_row_group_is_not_read_at_once():
    column = pa.array([os.urandom(10_000) for _ in range(2000)])
    pq.write_table(pa.table({"image": column}), "t.parquet", use_dictionary=False, write_batch_size=16)
    del column
    items = list_sources(["t.parquet"]).items
    before = pa.total_allocated_bytes()
    items[0].read()
    assert pa.total_allocated_bytes() - before < 6 << 20  # pages of 1 MB; the row group has 20


def test_the_window_is_bounded_by_rows():
    pq.write_table(pa.table({"image": pa.array([b"%d" % row for row in range(5000)])}), "t.parquet")
    items = list_sources(["t.parquet"]).items
    items[4999].read()
    assert len(items[0].read._opened()._window) == tables._WINDOW_ROWS


def test_skipped_row_groups_are_not_read(monkeypatch):
    pq.write_table(
        pa.table({"image": pa.array([b"%d" % row for row in range(10_000)])}), "t.parquet", row_group_size=100
    )
    items = list_sources(["t.parquet"]).items
    seeks = count_seeks(monkeypatch)
    assert [items[row].read() for row in (9950, 9951, 9850)] == [b"9950", b"9951", b"9850"]
    assert seeks == [9950, 9850]


def test_few_tables_stay_open():
    for i in range(5):
        pq.write_table(pa.table({"image": images(["a.jpg"])}), f"{i}.parquet")
    items = list_sources(["*.parquet"]).items
    opened = [item.read._opened() for item in items]
    assert items[4].read._opened() is opened[4] and items[0].read._opened() is not opened[0]


def test_pyarrow_and_torch_are_not_imported_for_a_folder():
    make("p/a.jpg")
    code = (
        "import sys; from embedkit.images.sources import list_sources; assert len(list_sources(['p']).items) == 1; "
        "print(sorted({'pyarrow', 'torch', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_listing_is_a_few_hundred_bytes_per_image():
    count = 2000
    os.makedirs("p")
    for i in range(count):
        Path(f"p/{i:06d}.jpg").touch()
    make_tar("t.tar", {f"p/{i:06d}.jpg": b"" for i in range(count)})
    list_sources(["p", "t.tar"])
    for source in ("p", "t.tar"):
        tracemalloc.start()
        listing = list_sources([source])
        held, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(listing.items) == count and held < 400 * count and peak < 650 * count
