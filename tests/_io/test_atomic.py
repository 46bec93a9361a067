"""Whole writes: what is left when a writer is killed, when two write at once, and when somebody plants a name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from embedkit._io import atomic
from embedkit._io.atomic import clear_leftovers, remove_folder, replacing, replacing_folder, write_file
from embedkit._io.locks import LockedError, try_lock
from embedkit.errors import OutputError

posix = pytest.mark.skipif(os.name == "nt", reason="POSIX signals and locks")


def hold(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A child that runs `code` and then waits inside its block, after printing a line."""
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    return child


WRITER = """
    import sys, time
    from pathlib import Path
    from embedkit._io.atomic import replacing
    with replacing(Path(sys.argv[1])) as file:
        file.write(b"half")
        file.flush()
        print("ready", flush=True)
        time.sleep(60)
"""
FOLDER_WRITER = """
    import sys, time
    from pathlib import Path
    from embedkit._io.atomic import replacing_folder
    with replacing_folder(Path(sys.argv[1])) as folder:
        (folder / "a").write_text("half")
        print("ready", flush=True)
        time.sleep(60)
"""


def stop(child: subprocess.Popen[str]) -> None:
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert child.stdout is not None
    child.stdout.close()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a"
    write_file(path, b"old")
    with pytest.raises(RuntimeError), replacing(path) as file:
        file.write(b"new")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


@posix
def test_the_scratch_of_a_living_writer_stays_and_that_of_a_killed_one_goes(tmp_path):
    path = tmp_path / "a"
    child = hold(WRITER, path)
    try:
        write_file(path, b"mine")
        assert len(names(tmp_path)) == 2  # the other's scratch is untouched
    finally:
        stop(child)
    assert path.read_bytes() == b"mine"
    write_file(path, b"again")
    assert names(tmp_path) == ["a"]


@posix
def test_the_scratch_folder_of_a_living_writer_stays_and_that_of_a_killed_one_goes(tmp_path):
    path = tmp_path / "a"
    child = hold(FOLDER_WRITER, path)
    try:
        with replacing_folder(path) as folder:
            (folder / "b").write_text("whole")
        assert len(names(tmp_path)) == 2
    finally:
        stop(child)
    clear_leftovers(path)
    assert names(tmp_path) == ["a"] and names(path) == ["b"]


def test_two_threads_that_write_one_file_never_mix(tmp_path):
    path = tmp_path / "a"
    contents = [bytes([65 + index]) * 100_000 for index in range(4)]
    failures: list[BaseException] = []

    def write(content: bytes) -> None:
        try:
            for _ in range(40):
                write_file(path, content)
                assert path.read_bytes() in contents
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert names(tmp_path) == ["a"]


@posix
def test_a_link_is_written_through_and_keeps_its_permissions(tmp_path):
    real = tmp_path / "real"
    real.write_bytes(b"old")
    real.chmod(0o640)
    link = tmp_path / "link"
    link.symlink_to(real)
    write_file(link, b"new")
    assert link.is_symlink() and real.read_bytes() == b"new"
    assert real.stat().st_mode & 0o777 == 0o640


@posix
def test_new_files_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_file(tmp_path / "a", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


@posix
def test_a_planted_link_or_another_name_is_not_taken_for_scratch(tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "x").write_text("x")
    (tmp_path / ".a.0123456789abcdef.partial").symlink_to(precious)
    mine = [".a.partial", ".a.1234.partial", ".a.notes.partial"]
    for name in mine:
        (tmp_path / name).write_text("mine")
    write_file(tmp_path / "a", b"")
    assert set(mine) <= set(names(tmp_path)) and names(precious) == ["x"]


@posix
def test_a_folder_and_a_pipe_are_no_target(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        with pytest.raises(OutputError, match="is not a regular file"):
            write_file(tmp_path / name, b"")
    assert names(tmp_path) == ["folder", "pipe"]


def test_a_folder_is_replaced_whole_or_refused(tmp_path):
    path = tmp_path / "a"
    for text in ("one", "two"):
        with replacing_folder(path) as folder:
            (folder / text).write_text(text)
    assert names(path) == ["two"] and names(tmp_path) == ["a"]
    with pytest.raises(OutputError), replacing_folder(path, replace=False) as folder:
        (folder / "three").write_text("three")
    assert names(path) == ["two"] and names(tmp_path) == ["a"]


def test_without_an_exchange_in_one_step_the_old_folder_comes_back(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "_exchange", lambda left, right: False)
    path = tmp_path / "a"
    with replacing_folder(path) as folder:
        (folder / "one").write_text("one")
    with replacing_folder(path) as folder:
        (folder / "two").write_text("two")
    assert names(path) == ["two"] and names(tmp_path) == ["a"]
    path.rename(tmp_path / ".a.0123456789abcdef.old.partial")  # killed between the two renames
    clear_leftovers(path)
    assert names(path) == ["two"] and names(tmp_path) == ["a"]


def test_the_longest_name_can_be_written(tmp_path):
    path = tmp_path / ("n" * 255)
    write_file(path, b"x")
    with pytest.raises(OutputError):
        write_file(tmp_path / ("n" * 256), b"x")
    assert names(tmp_path) == [path.name]


def test_a_folder_goes_with_all_in_it(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    remove_folder(tmp_path / "a")
    assert names(tmp_path) == []


def test_scratch_is_locked_while_it_is_cleared(tmp_path, monkeypatch):
    """A writer between the creation of its scratch and its lock must not lock what is about to be deleted."""
    left = tmp_path / ".a.0123456789abcdef.partial"
    left.write_bytes(b"")
    seen = []

    def unlink(path, **options):
        descriptor = os.open(path, os.O_RDWR)
        try:
            try_lock(descriptor)
            seen.append("locked by the writer")
        except LockedError:
            seen.append("refused")
        finally:
            os.close(descriptor)
        os.unlink(path)

    monkeypatch.setattr(Path, "unlink", unlink)
    clear_leftovers(tmp_path / "a")
    assert seen == ["refused"] and not left.exists()
