"""Bounded reads and outputs that are inputs."""

from __future__ import annotations

import errno
import os

import pytest

from embedkit._io.outputs import check_ours, check_outputs
from embedkit._io.reading import open_regular, read_regular
from embedkit.errors import OutputError


def test_a_file_of_the_greatest_size_is_read_and_a_larger_one_is_not(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    assert read_regular(path, 5) == b"12345"
    with pytest.raises(OSError) as caught:
        read_regular(path, 4)
    assert caught.value.errno == errno.EFBIG


def test_a_sparse_file_of_a_terabyte_costs_nothing(tmp_path):
    path = tmp_path / "a"
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(OSError) as caught:
        read_regular(path, 1 << 20)
    assert caught.value.errno == errno.EFBIG


@pytest.mark.skipif(os.name == "nt", reason="POSIX devices")
@pytest.mark.timeout(10)
def test_pipes_devices_and_folders_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises(OSError, match="is not a regular file"):
            open_regular(path)


def test_an_output_is_no_input_whatever_its_spelling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").write_bytes(b"")
    (tmp_path / "link").symlink_to("a")
    for name in ("a", "./a", str(tmp_path / "a"), "link", "../" + tmp_path.name + "/a"):
        with pytest.raises(OutputError, match="-o: .* is also the input EMB"):
            check_outputs({"-o": name}, {"EMB": "a"})
    with pytest.raises(OutputError, match="also written by --write-pairs"):
        check_outputs({"--write-pairs": "new", "--write-delete-list": "./new"})
    with pytest.raises(OutputError, match="empty"):
        check_outputs({"-o": ""})
    check_outputs({"-o": "b", "--draw-sheet": None, "--write-pairs": "-"}, {"EMB": "a"})


def test_only_what_embedkit_wrote_is_replaced(tmp_path):
    path = tmp_path / "a"
    check_ours(path, lambda path: False, "a table")
    path.write_bytes(b"mine")
    check_ours(path, lambda path: True, "a table")
    for judge in (lambda path: False, lambda path: 1 / 0):
        with pytest.raises(OutputError, match="not written by embedkit, which would put a table there"):
            check_ours(path, judge, "a table")
    assert path.read_bytes() == b"mine"
