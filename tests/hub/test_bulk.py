"""Pulling: what goes wrong on the way ends in the right entry or in a typed error, and never in a wrong entry."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import stat
import time
from pathlib import Path

import numpy as np
import pytest

from embedkit.encoder import load_encoder
from embedkit.errors import (
    AccessError,
    ConfigError,
    EmbedkitError,
    EntryError,
    IntegrityError,
    OutputError,
    UnreachableError,
    ZooError,
)
from embedkit.hub.access import Access
from embedkit.hub.bulk import pull
from embedkit.hub.cache import Cache, open_only
from embedkit.hub.publish.publish import publish
from embedkit.hub.resolve import find_entry
from embedkit.model.layout import MANIFEST
from embedkit.model.manifest import Manifest

NAME = "linear-tiny.noise"
IMAGE = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)


def entries(cache: Path) -> list[Path]:
    """The entries that a reader can see."""
    return [path for path in (cache / "zoo" / "entries").glob("*/*") if not path.parent.name.startswith(".")]


def outside(tmp_path: Path) -> set[Path]:
    """Every file but those of the cache."""
    return {path for path in tmp_path.rglob("*") if path.is_file() and tmp_path / "cache" not in path.parents}


# --- faults of a server -----------------------------------------------------------------------------------

#: Fault -> what one of them in a row of right answers leads to: the entry, or an error.
ONCE = {
    "cut": None, "close": None, "ignore range": None, "corrupt": None, "lie": IntegrityError, "429": None, "503": None,
    "500": None, "408": None, "short": IntegrityError, "long": IntegrityError, "html": IntegrityError,
    "wrong range": None, "gzip": ZooError, "loop": ZooError, "403": AccessError, "401": AccessError,
    "404": EntryError, "410": EntryError, "416": IntegrityError, "to file": ZooError, "to net": ZooError,
}  # fmt: skip


@pytest.mark.parametrize("fault", sorted(ONCE))
@pytest.mark.parametrize("kind", ["site", "hub"])
def test_one_fault_of_a_file(request, zoo, tmp_path, cache, fault, kind):
    server = request.getfixturevalue(kind)
    if kind == "hub":
        publish(find_entry(zoo / NAME), "hf://team", token="hf_writer")
        server, url = server.cdn, f"hf://team/{NAME}"
    else:
        url = f"{server.url}/{NAME}"
    server.faults = [fault]
    server.spoil = re.compile(r"/model\.safetensors$" if kind == "site" else r"/cdn/")
    before = outside(tmp_path)
    expected = ONCE[fault]
    if expected is None:
        assert load_encoder(url).encode(IMAGE).tobytes() == load_encoder(zoo / NAME).encode(IMAGE).tobytes()
    else:
        with pytest.raises(expected) as caught:
            load_encoder(url)
        assert "\n" not in str(caught.value) and "signature" not in str(caught.value)
        assert entries(cache) == [] and outside(tmp_path) == before
        server.faults = []
        load_encoder(url)  # and the next try is good
    assert len(entries(cache)) == 1 and outside(tmp_path) == before


@pytest.mark.parametrize("fault", ["429", "503", "close", "cut", "corrupt", "lie"])
def test_a_fault_that_does_not_end_is_a_typed_error(site, cache, fault):
    site.faults = [fault] * 1000
    with pytest.raises((ZooError, EntryError)) as caught:
        load_encoder(f"{site.url}/{NAME}")
    assert "\n" not in str(caught.value) and entries(cache) == []
    assert len(site.requests) < 300


@pytest.mark.parametrize("fault", ["slow", "stall", "drip"])
def test_a_server_that_dawdles_is_left(site, cache, monkeypatch, fault):
    monkeypatch.setenv("EMBEDKIT_TIMEOUT", "0.3")
    site.faults = [fault] * 4
    started = time.monotonic()
    with pytest.raises(UnreachableError):
        load_encoder(f"{site.url}/{NAME}")
    assert time.monotonic() - started < 10 and entries(cache) == []


def test_an_index_that_is_spoilt(site):
    for fault, kind in (("html", EntryError), ("gzip", ZooError), ("403", AccessError)):
        site.faults = [fault]
        with pytest.raises(kind):
            find_entry(f"{site.url}/{NAME}")


def test_a_version_that_changes_between_list_and_get(site, zoo, by_hand, cache):
    """The index and the manifest are of two versions: refused, or else an old index would unpin everything."""
    by_hand.TinyEntry(seed=1).write(zoo / NAME)
    with pytest.raises(IntegrityError, match="the zoo's index says"):
        find_entry(f"{site.url}/{NAME}")
    assert entries(cache) == []


def random_faults(server, url: str, rounds: int, seed: int) -> dict[str, int]:
    """Pull again and again from a server that spoils answers at random; how the pulls ended."""
    rng = random.Random(seed)
    faults = [name for name in ONCE if name != "loop"]
    ends: dict[str, int] = {}
    cache = Cache(os.environ["EMBEDKIT_CACHE"])
    for _ in range(rounds):
        server.faults = [rng.choice([*faults, "", ""]) for _ in range(rng.randrange(1, 9))]
        try:
            encoder = load_encoder(url)
            end = "right"
        except EmbedkitError as error:
            end = type(error).__name__
            assert cache.revisions() == []
        if end == "right":
            for name in Manifest.from_json(encoder._entry.manifest_bytes).files:
                encoder._entry.read(name)
            cache.remove(encoder.revision)
        ends[end] = ends.get(end, 0) + 1
    server.faults = []
    assert load_encoder(url).dim == 4
    return ends


def test_random_faults_in_a_row_lose_nothing(site):
    rounds = int(os.environ.get("EMBEDKIT_TEST_FAULTS", "25"))
    ends = random_faults(site, f"{site.url}/{NAME}", rounds, seed=1)
    print(f"{rounds} pulls under faults: {ends}")
    assert sum(ends.values()) == rounds and ends.get("right", 0) > 0


# --- resume -----------------------------------------------------------------------------------------------


@pytest.fixture
def heavy(by_hand, zoo):
    """The entry with a file of 300 kB in it."""
    files = by_hand.TinyEntry().files()
    files["big.safetensors"] = np.random.default_rng(0).bytes(300_000)
    by_hand.TinyEntry().write(zoo / NAME, files)
    by_hand.write_index(zoo)
    return files["big.safetensors"]


def partial(cache: Path) -> list[Path]:
    return list((cache / "zoo" / "entries").glob(".*.partial/*/big.safetensors.part"))


def test_a_download_goes_on_in_another_process(site, heavy, cache, python):
    site.spoil, site.faults = re.compile("big"), ["cut", "close", "close", "close", "close", "close"]
    with pytest.raises(UnreachableError):
        find_entry(f"{site.url}/{NAME}")
    (part,) = partial(cache)
    assert part.stat().st_size == 150_000
    site.faults = []
    site.requests.clear()
    python(
        "import sys; from embedkit.hub.resolve import find_entry; find_entry(sys.argv[1])",
        f"{site.url}/{NAME}",
    )
    ranges = {path: headers.get("Range") for _, path, headers in site.requests}
    assert ranges[f"/{NAME}/big.safetensors"] == "bytes=150000-"
    assert f"/{NAME}/config.json" not in ranges, "what was whole was fetched again"
    assert (entries(cache)[0] / "big.safetensors").read_bytes() == heavy


@pytest.mark.parametrize("beginning", ["another version's", "too long", "whole and wrong"])
def test_a_beginning_of_something_else_is_no_harm(site, heavy, cache, beginning):
    site.faults = [""] * 3 + ["close"] * 50
    with pytest.raises(UnreachableError):
        find_entry(f"{site.url}/{NAME}")
    folder = next((cache / "zoo" / "entries").glob(".*.partial/*"))
    size = {"another version's": 1000, "too long": 400_000, "whole and wrong": 300_000}[beginning]
    (folder / "big.safetensors.part").write_bytes(b"x" * size)
    site.faults = []
    find_entry(f"{site.url}/{NAME}")
    assert (entries(cache)[0] / "big.safetensors").read_bytes() == heavy


def test_a_server_without_ranges_starts_over(site, heavy, cache):
    site.spoil, site.faults = re.compile("big"), ["cut", "ignore range"]
    find_entry(f"{site.url}/{NAME}")
    assert (entries(cache)[0] / "big.safetensors").read_bytes() == heavy


def test_a_bucket_goes_on_with_a_part(s3, heavy, zoo, cache, monkeypatch):
    from embedkit.storage import fsspec as buckets

    publish(find_entry(zoo / NAME), s3)
    monkeypatch.setattr(buckets, "PART", 100_000)
    asked = []
    plain = buckets.BucketStorage._parts

    def counting(self, path, start, size):
        asked.append((path.rsplit("/")[-1], start))
        for index, chunk in enumerate(plain(self, path, start, size)):
            if path.endswith("big.safetensors") and index == 1 and len(asked) < 20:
                raise UnreachableError("cut")
            yield chunk

    monkeypatch.setattr(buckets.BucketStorage, "_parts", counting)
    find_entry(f"{s3}/{NAME}")
    assert [start for name, start in asked if name == "big.safetensors"] == [0, 100_000, 200_000]
    assert (entries(cache)[0] / "big.safetensors").read_bytes() == heavy


# --- several processes, and their end ---------------------------------------------------------------------

PULL = """
import sys, numpy, embedkit
encoder = embedkit.load_encoder(sys.argv[1], threads=1)
print(encoder.encode(numpy.zeros((8, 8, 3), numpy.uint8)).tobytes().hex())
"""


def test_four_processes_make_one_download(site, heavy, python):
    running = [python(PULL, f"{site.url}/{NAME}", wait=False) for _ in range(4)]
    rows = [process.communicate(timeout=60)[0] for process in running]
    assert [process.returncode for process in running] == [0] * 4 and len(set(rows)) == 1
    for name in ("big.safetensors", "model.safetensors", "model.onnx", "config.json"):
        assert site.paths().count(f"/{NAME}/{name}") == 1, name


def kill_pulls(site, python, url: str, times: int, seed: int) -> dict[str, int]:
    """Kill pulls at random moments; after each, what is visible is whole, and at the end a pull completes."""
    rng = random.Random(seed)
    cache = Cache(os.environ["EMBEDKIT_CACHE"])
    ends = {"killed": 0, "done": 0}
    for _ in range(times):
        process = python(
            "import sys; from embedkit.hub.resolve import find_entry; print('on', flush=True); find_entry(sys.argv[1])",
            url,
            wait=False,
        )
        process.stdout.readline()  # the imports are done: now the pull begins
        time.sleep(rng.uniform(0, 0.25))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        ends["killed" if process.returncode == -signal.SIGKILL else "done"] += 1
        for sha256 in cache.revisions():
            folder = cache.get(sha256)
            manifest = Manifest.from_json((folder.path / MANIFEST).read_bytes())
            for name, record in manifest.files.items():
                assert (folder.path / name).stat().st_size == record.size
        if cache.revisions() and rng.random() < 0.7:
            cache.remove(cache.revisions()[0])
    assert load_encoder(url).dim == 4
    assert not list((cache.root / "entries").glob(".*.partial"))
    return ends


def test_pulls_that_are_killed(site, heavy, python):
    times = int(os.environ.get("EMBEDKIT_TEST_KILLS", "4"))
    plain = site.RequestHandlerClass.answer_file

    def slow(handler, data, **headers):
        time.sleep(0.02)
        plain(handler, data, **headers)

    site.RequestHandlerClass = type("Slow", (site.RequestHandlerClass,), {"answer_file": slow})
    ends = kill_pulls(site, python, f"{site.url}/{NAME}", times, seed=2)
    print(f"{times} pulls: {ends}")


# --- the cache --------------------------------------------------------------------------------------------


def test_the_cache_is_the_owners_alone(site, cache):
    find_entry(f"{site.url}/{NAME}")
    assert stat.S_IMODE((cache / "zoo").stat().st_mode) == 0o700


def test_a_damaged_entry_is_refused_and_mended(site, cache):
    url = f"{site.url}/{NAME}"
    for name, change in (
        ("model.safetensors", lambda data: bytes([data[0] ^ 1]) + data[1:]),
        ("model.safetensors", lambda data: data[:-1]),
        ("config.json", lambda data: data.replace(b"noise", b"n0ise")),
        ("manifest.json", lambda data: data.replace(b"1", b"2")),
        ("golden.npz", lambda data: b""),
    ):
        find_entry(url)
        file = entries(cache)[0] / name
        file.write_bytes(change(file.read_bytes()))
        try:
            load_encoder(url).encode(IMAGE)
        except IntegrityError as error:
            assert "pull the entry again" in str(error)
        (done,) = pull([url], gate=open_only)
        for entry_file in ("model.safetensors", "config.json", "manifest.json", "golden.npz"):
            assert (Path(done.location) / entry_file).read_bytes() == (
                site.root / NAME / entry_file
            ).read_bytes()


def test_a_cache_that_cannot_be_written(site, tmp_path, monkeypatch):
    find_entry(f"{site.url}/{NAME}")  # imports everything: the other user may not be able to
    (tmp_path / "shut").mkdir(mode=0o500)
    monkeypatch.setenv("EMBEDKIT_CACHE", str(tmp_path / "shut"))
    child = os.fork()
    if child == 0:
        if os.geteuid() == 0:  # who writes anywhere
            os.setuid(65534)
        try:
            find_entry(f"{site.url}/{NAME}")
        except OutputError as error:
            os._exit(0 if "cannot be written" in str(error) and "EMBEDKIT_CACHE" in str(error) else 2)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_cache_that_is_a_file(site, tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(OutputError, match="name another cache with EMBEDKIT_CACHE"):
        find_entry(f"{site.url}/{NAME}")


def test_a_read_only_cache_serves_what_it_has(site, cache, monkeypatch):
    url = f"{site.url}/{NAME}"
    find_entry(url)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("embedkit._io.atomic._create_file", refuse)
    assert load_encoder(url).dim == 4


def test_a_full_disk(site, heavy, cache, python, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OutputError, match="and 1000 are free; make room"):
        find_entry(f"{site.url}/{NAME}")
    assert entries(cache) == []
    said = python(
        "import resource, signal, sys, embedkit\nfrom embedkit.hub.resolve import find_entry\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: find_entry(sys.argv[1])\nexcept embedkit.OutputError as error: print(error)",
        f"{site.url}/{NAME}",
    )
    assert "the disk is full" in said and entries(cache) == []
    monkeypatch.undo()


def test_without_links_and_locks(site, cache, monkeypatch):
    """A network file system without flock: nobody is kept out, and nothing breaks."""
    import errno
    import fcntl

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(os, "symlink", no_locks)
    assert load_encoder(f"{site.url}/{NAME}").dim == 4
    assert not list((cache / "zoo" / "entries").glob(".*"))


def test_a_proxy_of_the_environment_does_not_see_loopback(site, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert load_encoder(f"{site.url}/{NAME}").dim == 4


def test_a_proxy_of_the_environment_is_gone_through(monkeypatch):
    from urllib.parse import urlsplit

    from embedkit.storage.answer import _connection

    monkeypatch.setenv("https_proxy", "http://me:pass%20word@proxy.example:3128")
    monkeypatch.delenv("no_proxy", raising=False)
    connection, path, headers = _connection(urlsplit("https://zoo.example:8443/x"), "/x", {"A": "b"}, 5)
    assert (connection.host, connection.port, path, headers) == ("proxy.example", 3128, "/x", {"A": "b"})
    assert (connection._tunnel_host, connection._tunnel_port) == ("zoo.example", 8443)
    assert connection._tunnel_headers["Proxy-Authorization"] == "Basic bWU6cGFzcyB3b3Jk"
    monkeypatch.setenv("no_proxy", "zoo.example")
    assert _connection(urlsplit("https://zoo.example/x"), "/x", {}, 5)[0].host == "zoo.example"


# --- licenses ---------------------------------------------------------------------------------------------


def test_a_non_commercial_entry_is_not_pulled_unasked(site, zoo, by_hand, cache):
    entry = by_hand.TinyEntry()
    entry.config = dataclasses.replace(entry.config, license="CC-BY-NC-4.0")
    entry.write(zoo / NAME)
    by_hand.write_index(zoo)
    with pytest.raises(
        ConfigError, match="under CC-BY-NC-4.0, which forbids commercial use.*--accept-license"
    ):
        load_encoder(f"{site.url}/{NAME}")
    assert entries(cache) == [] and f"/{NAME}/model.safetensors" not in site.paths()
    seen = []
    find_entry(f"{site.url}/{NAME}", access=Access(gate=seen.append))
    assert [(one.license, one.name) for one in seen] == [("CC-BY-NC-4.0", NAME)]
    assert load_encoder(f"{site.url}/{NAME}").dim == 4  # accepted once, and here now


def test_what_a_bare_cache_entry_looks_like(site, cache):
    entry = find_entry(f"{site.url}/{NAME}")
    (folder,) = entries(cache)
    assert (folder.parent.name, folder.name) == (entry.revision, NAME)
    assert sorted(os.listdir(folder)) == sorted([*json.loads(entry.manifest_bytes)["files"], MANIFEST])
