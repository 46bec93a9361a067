"""Several publishers of one index, and several pins of one lock file, at once: no line is lost."""

from __future__ import annotations

import json
import subprocess
import sys
import threading

import pytest

from embedkit.errors import ConfigError, ZooError
from embedkit.hub.listing import list_encoders
from embedkit.hub.lockfile import LockFile
from embedkit.hub.publish.bucket import change_index
from embedkit.hub.publish.publish import publish, unpublish
from embedkit.hub.resolve import find_entry
from embedkit.model.layout import INDEX
from embedkit.storage.fsspec import BucketStorage

#: Waits for a line, so that all begin at once, and stops between reading an index and writing it.
PUBLISHER = """
import sys, time
from embedkit.storage.fsspec import BucketStorage
from embedkit.hub.publish.publish import publish
from embedkit.hub.resolve import find_entry
read = BucketStorage.read
def slow(self, path, limit):
    try:
        return read(self, path, limit)
    finally:
        time.sleep(0.1 * (path == "index.json"))
BucketStorage.read = slow
entries = [find_entry(folder) for folder in sys.argv[3:]]
print("ready", flush=True)
sys.stdin.readline()
for entry in entries: publish(entry, sys.argv[1], token=sys.argv[2] or None)
"""
PIN = """
import sys
from pathlib import Path
from embedkit.hub.lockfile import LockFile
locks = LockFile(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for n in range(3): locks.write(f"{sys.argv[2]}-{n}", zoo="p", revision="", manifest_sha256="0" * 64)
"""


def all_at_once(code: str, *arguments: list[str]) -> None:
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, *one], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for one in arguments
    ]
    for one in running:
        assert one.stdout is not None and one.stdout.readline() == "ready\n"
    for one in running:
        assert one.stdin is not None
        one.stdin.write("\n")
        one.stdin.flush()
    for one in running:
        one.communicate(timeout=120)
    assert [one.returncode for one in running] == [0] * len(running)


@pytest.mark.parametrize("kind", ["s3", "hub"])
def test_two_publishers_lose_no_line_of_an_index(kind, request, by_hand, tmp_path):
    zoo = request.getfixturevalue(kind)
    to, token = (zoo, "") if kind == "s3" else ("hf://team", "hf_writer")
    names = [f"linear-tiny.n{number}" for number in range(6)]
    folders = [str(by_hand.TinyEntry(seed=n).write(tmp_path / "from" / name)) for n, name in enumerate(names)]
    all_at_once(PUBLISHER, *([to, token, *folders[start::2]] for start in (0, 1)))
    assert sorted(row.name for row in list_encoders(zoo=to)) == names


def test_eight_pins_at_once(tmp_path):
    """Without a lock on the file, 4 to 7 of 8 were lost."""
    path = tmp_path / "embedkit.lock"
    all_at_once(PIN, *([str(path), f"p{number}"] for number in range(8)))
    assert len(json.loads(path.read_bytes())["entries"]) == 24
    assert [item.name for item in tmp_path.iterdir() if item.is_file()] == ["embedkit.lock"]
    assert LockFile(path).pin("p7-2") is not None


def rows(zoo, name: str) -> dict:
    return {name: json.loads((zoo / INDEX).read_bytes())["entries"]["linear-tiny.noise"]}


def race(monkeypatch, storage: BucketStorage, change, times: int) -> list[int]:
    """Let another publisher change the index between our reading and our writing it, `times` times."""
    left = [times]
    read = BucketStorage.read

    def then_another(self, path, limit):
        try:
            return read(self, path, limit)
        finally:
            if path == INDEX and left[0] > 0 and threading.current_thread() is threading.main_thread():
                left[0] -= 1
                number = left[0]
                other = threading.Thread(target=change, args=(number,))
                other.start()
                other.join(30)

    monkeypatch.setattr(BucketStorage, "read", then_another)
    return left


@pytest.mark.parametrize("kind", ["s3", "memory"])
def test_an_index_that_changes_after_it_was_read_is_read_again(kind, request, zoo, monkeypatch):
    """S3 refuses the write; a store without conditions takes it, and the line that it cost is found missing."""
    url = request.getfixturevalue("s3") if kind == "s3" else f"memory://zoo-{id(zoo)}"
    storage = BucketStorage(url)
    publish(find_entry(zoo / "linear-tiny.noise"), url)
    row = rows(zoo, "linear-tiny.noise")["linear-tiny.noise"]

    def another(number: int) -> None:
        mine = BucketStorage(url)
        change_index(mine, lambda entries: {**entries, f"linear-other.n{number}": row})

    race(monkeypatch, storage, another, times=2 if kind == "s3" else 0)
    assert change_index(storage, lambda entries: {**entries, "linear-mine.noise": row})
    monkeypatch.undo()
    names = {name.name for name in list_encoders(zoo=url)}
    expected = {"linear-tiny.noise", "linear-mine.noise"}
    assert names == expected | ({"linear-other.n0", "linear-other.n1"} if kind == "s3" else set())


def test_a_store_without_conditions_finds_the_line_that_another_overwrote(zoo, monkeypatch):
    url = f"memory://zoo-{id(zoo)}-2"
    publish(find_entry(zoo / "linear-tiny.noise"), url)
    storage = BucketStorage(url)
    row = rows(zoo, "linear-tiny.noise")["linear-tiny.noise"]
    before = storage.read(INDEX, 10**6)
    write, overwritten = BucketStorage.write, []

    def then_overwritten(self, path, content):
        write(self, path, content)
        if path == INDEX and not overwritten:
            overwritten.append(True)
            write(self, path, before)  # by another publisher, who read the index before us

    monkeypatch.setattr(BucketStorage, "write", then_overwritten)
    assert change_index(storage, lambda entries: {**entries, "linear-mine.noise": row})
    assert overwritten and {one.name for one in list_encoders(zoo=url)} == {
        "linear-tiny.noise",
        "linear-mine.noise",
    }


def test_an_index_that_always_changes_is_given_up(s3, zoo, monkeypatch):
    publish(find_entry(zoo / "linear-tiny.noise"), s3)
    monkeypatch.setattr("embedkit.hub.publish.bucket.SETTLE", 0.0)
    monkeypatch.setattr(BucketStorage, "write_if", lambda *_: False)
    with pytest.raises(ZooError, match="other publishers changed it 20 times in a row"):
        unpublish("linear-tiny.noise", s3)
    with pytest.raises(ConfigError, match="lists no entry"):
        unpublish("linear-none.noise", s3)


def test_a_condition_that_fails_writes_nothing(s3):
    storage = BucketStorage(s3)
    assert storage.version("x") is None and storage.write_if("x", b"1", None) is True
    first = storage.version("x")
    assert storage.write_if("x", b"2", None) is False and storage.write_if("x", b"2", first) is True
    assert storage.write_if("x", b"3", first) is False and storage.read("x", 10) == b"2"
    storage.remove("x")
    assert storage.write_if("x", b"3", storage.version("x") or first) is False
    storage.remove("x")
