"""Locks: who waits, who is refused, and what a deleted lock file means."""

from __future__ import annotations

import errno
import os
import threading
import time

import pytest

from embedkit._io.locks import LockedError, locked, locked_folder

pytestmark = pytest.mark.skipif(os.name == "nt", reason="flock")


def test_a_second_holder_is_refused_or_waits(tmp_path):
    path = tmp_path / "lock"
    order: list[str] = []

    def second() -> None:
        with locked(path):
            order.append("second")

    with locked(path) as held:
        assert held
        with pytest.raises(LockedError), locked(path, wait=False):
            pass
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.1)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_two_threads_that_delete_their_lock_file_never_hold_it_at_once(tmp_path):
    path = tmp_path / "lock"
    inside, most = 0, 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(50):
            with locked(path, remove=True):
                inside += 1
                most = max(most, inside)
                time.sleep(0.0002)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert not path.exists()


def test_a_file_system_without_locks_keeps_nobody_out(tmp_path, monkeypatch):
    import fcntl

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path / "lock", wait=False) as held, locked_folder(tmp_path, wait=False) as folder:
        assert (held, folder) == (False, False)


def test_any_other_failure_of_a_lock_is_one(tmp_path, monkeypatch):
    import fcntl

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output"), locked(tmp_path / "lock"):
        pass


def test_a_link_or_a_pipe_is_no_lock_file(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe"):
        with pytest.raises(OSError), locked(tmp_path / name):
            pass
    assert not (tmp_path / "elsewhere").exists()


def test_a_folder_is_locked_by_itself(tmp_path):
    with locked_folder(tmp_path), pytest.raises(LockedError), locked_folder(tmp_path, wait=False):
        pass
    assert list(tmp_path.iterdir()) == []
