"""A zoo's tar by its bytes: what `bundle` writes is read, and a header that lies costs nothing."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from embedkit.errors import EntryError, OutputError
from embedkit.hub.bundle import write_archive
from embedkit.hub.resolve import find_entry
from embedkit.storage.tar import ArchiveStorage, read_members

NAME = "linear-tiny.noise"


def bomb(path: Path, kind: bytes, size: int) -> Path:
    """A header of `size` bytes, all of them a hole in the file."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = kind, size
    with open(path, "wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(512 + size + 1024)
    return path


@pytest.mark.parametrize(
    "kind",
    [
        tarfile.GNUTYPE_LONGNAME,
        tarfile.GNUTYPE_LONGLINK,
        tarfile.XHDTYPE,
        tarfile.XGLTYPE,
        tarfile.GNUTYPE_SPARSE,
    ],
)
def test_a_header_that_claims_a_terabyte_is_refused_in_little_memory(kind, tmp_path):
    path = bomb(tmp_path / "zoo.tar", kind, 1 << 40)
    code = (
        "import sys, pathlib, resource\nfrom embedkit.storage.tar import ArchiveStorage\n"
        "from embedkit.errors import EntryError\n"
        "resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n"
        "try: ArchiveStorage(pathlib.Path(sys.argv[1]))\nexcept EntryError as error: print(error)"
    )
    said = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=60)
    assert "is not an archive of a zoo" in said.stdout and said.stderr == ""


def raw(*members: tuple[bytes, bytes, bytes]) -> bytes:
    """A tar of (kind, name, content), its headers as they are said to be."""
    data = b""
    for kind, name, content in members:
        info = tarfile.TarInfo(name.decode())
        info.type, info.size = kind, len(content)
        data += info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)
    return data + bytes(1024)


def pax(**records: str) -> bytes:
    lines = b""
    for key, value in records.items():
        body = f" {key}={value}\n".encode()
        size = len(body) + len(str(len(body) + 2))
        lines += f"{size}".encode() + body
    return lines


def members(data: bytes, tmp_path: Path) -> list[tuple[str, int, int]]:
    (tmp_path / "x.tar").write_bytes(data)
    with open(tmp_path / "x.tar", "rb") as file:
        return list(read_members(file))


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        ({"GNU.sparse.major": "1"}, "a pax header with 'GNU.sparse.major'"),
        ({"linkpath": "/etc/passwd"}, "a pax header with 'linkpath'"),
        ({"size": "-5"}, "a size that cannot be read"),
        ({"size": "\u0665"}, "a size that cannot be read"),
        ({"size": "99999999"}, "is cut off"),
    ],
)
def test_a_pax_header_says_a_path_and_a_size_alone(records, reason, tmp_path):
    data = raw((tarfile.XHDTYPE, b"pax", pax(**records)), (tarfile.REGTYPE, b"a", b"x"))
    with pytest.raises(ValueError, match=reason):
        members(data, tmp_path)


def test_long_names_and_sizes_are_read_as_pythons_tarfile_reads_them(tmp_path):
    long = "a" * 90 + "/" + "b" * 110
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with tarfile.open(tmp_path / "z.tar", "w", format=form) as archive:
            for name, content in ((long, b"long"), ("short", b""), ("ü" * 60, bytes(1000))):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        with tarfile.open(tmp_path / "z.tar") as archive:
            expected = [(one.name, one.offset_data, one.size) for one in archive]
        assert members((tmp_path / "z.tar").read_bytes(), tmp_path) == expected and len(expected) == 3
    data = raw((tarfile.XHDTYPE, b"pax", pax(size="700")), (tarfile.REGTYPE, b"a", bytes(700)))
    assert members(data, tmp_path) == [("a", 1536, 700)]


def test_negative_sizes_and_cut_archives(tmp_path):
    block = bytearray(raw((tarfile.REGTYPE, b"a", b"x")))
    block[124:136] = b"\xff" * 10 + b"\xfc\x00"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block[:512])
    whole = raw((tarfile.REGTYPE, b"a", bytes(5000)))
    for data in (bytes(block), whole[:600], whole[:-1024], b""):
        with pytest.raises((ValueError, tarfile.TarError)):
            members(data, tmp_path)


def test_an_archive_that_is_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "zoo.tar")
    with pytest.raises(EntryError, match="is not a regular file"):
        ArchiveStorage(tmp_path / "zoo.tar")


def test_a_tar_of_somebody_else_is_not_overwritten(zoo, tmp_path):
    out = tmp_path / "photos.tar"
    with tarfile.open(out, "w") as archive:
        archive.add(zoo / NAME / "README.md", "holiday.jpg")
    before = out.read_bytes()
    with pytest.raises(OutputError, match="was not written by embedkit"):
        write_archive([find_entry(zoo / NAME)], out)
    assert out.read_bytes() == before
    for _ in range(2):  # one of ours is
        assert write_archive([find_entry(zoo / NAME)], tmp_path / "zoo.tar") == [NAME]
    assert sorted(ArchiveStorage(tmp_path / "zoo.tar")._members) == sorted(
        ["index.json", *(f"{NAME}/{path.name}" for path in (zoo / NAME).iterdir())]
    )


def test_a_bundle_does_not_overwrite_what_it_reads(zoo, tmp_path):
    from embedkit.hub.bulk import bundle
    from embedkit.hub.cache import open_only

    out = tmp_path / "zoo.tar"
    write_archive([find_entry(zoo / NAME)], out)
    before = out.read_bytes()
    for names, zoo in (([], str(out)), ([str(out)], None)):
        with pytest.raises(OutputError, match="is also the input"):
            bundle(names, out, zoo=zoo, gate=open_only)
    assert out.read_bytes() == before
