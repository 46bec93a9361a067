"""Files of this machine that lie: an entry's folder, a cache and a lock file that somebody else prepared."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from pinning import pin, pin_for_ever

from embedkit.encoder import load_encoder
from embedkit.errors import ConfigError, EntryError, EntryNotFoundError, IntegrityError
from embedkit.hub.bulk import pull
from embedkit.hub.cache import Cache
from embedkit.hub.folder import FolderZoo
from embedkit.hub.listing import list_encoders
from embedkit.hub.lockfile import LockFile
from embedkit.hub.resolve import find_entry
from embedkit.model.manifest import Manifest
from embedkit.workflows.check_entry import verify_entry

NAME = "linear-tiny.noise"
NAMES = ("config.json", "model.onnx", "model.safetensors")

posix = pytest.mark.skipif(os.name == "nt", reason="owners, modes and pipes of POSIX")


def everything(arrival) -> None:
    """Every license is taken."""


# --- an entry's folder ------------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize("name", [*NAMES, "manifest.json"])
@pytest.mark.parametrize("kind", ["/dev/zero", "a pipe", "a sparse file"])
def test_devices_pipes_and_endless_files_are_not_read(by_hand, tmp_path, name, kind):
    """Read whole before its size was looked at, /dev/zero took all memory, and a pipe waited for ever."""
    folder = by_hand.TinyEntry().write(tmp_path / NAME)
    file = folder / name
    file.unlink()
    if kind == "a pipe":
        os.mkfifo(file)
    elif kind == "/dev/zero":
        file.symlink_to("/dev/zero")
    else:
        with open(file, "wb") as sparse:
            sparse.truncate(100 << 30)
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
import embedkit
try:
    embedkit.load_encoder({str(folder)!r}, threads=1)
except embedkit.EmbedkitError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1 and str(folder) in done.stdout
    found = {"/dev/zero": "is not a regular file", "a pipe": "is not a regular file"}
    assert found.get(kind, "larger than 1000000" if name == "manifest.json" else "found more") in done.stdout


@posix
def test_an_index_that_is_a_device_is_an_error_of_its_zoo(zoo, monkeypatch):
    monkeypatch.setenv("EMBEDKIT_ZOO", str(zoo))
    (zoo / "index.json").unlink()
    (zoo / "index.json").symlink_to("/dev/zero")
    with pytest.raises(EntryError, match=r"index.json cannot be read \(is not a regular file\)"):
        find_entry("linear-tiny")


@pytest.mark.parametrize(
    ("name", "limit"), [("config.json", 16 << 20), ("model.onnx", 64 << 20), ("README.md", 16 << 20)]
)
def test_a_manifest_that_is_true_of_a_huge_file(by_hand, tmp_path, name, limit):
    """Text, configuration and graph have a size of their own, whatever the manifest says."""
    entry = by_hand.TinyEntry()
    folder = entry.write(tmp_path / NAME)
    records = json.loads(Manifest.encode(entry.files()))
    records["files"][name]["size"] = 100 << 30
    (folder / "manifest.json").write_text(json.dumps(records))
    with open(folder / name, "wb") as sparse:
        sparse.truncate(100 << 30)
    with pytest.raises(EntryError, match=f"{name} has {100 << 30} bytes; expected at most {limit}"):
        _ = load_encoder(folder).card


def test_golden_vectors_that_unpack_to_gigabytes_are_refused(by_hand, tmp_path):
    """3 MB of zip that hold 3 GB of zeros."""
    rows = np.zeros((2, 4), np.float32)
    file = BytesIO()
    np.savez_compressed(file, embedding=rows, tolerance_fp32=np.float64(1e-4))
    with (
        zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED) as archive,
        archive.open("images.npy", "w", force_zip64=True) as out,
    ):
        np.lib.format.write_array_header_1_0(
            out, {"descr": "|u1", "fortran_order": False, "shape": (2, 10000, 10000, 3)}
        )
        for _ in range(600):
            out.write(bytes(1_000_000))
    entry = by_hand.TinyEntry()
    folder = entry.write(tmp_path / NAME, {**entry.files(), "golden.npz": file.getvalue()})
    assert len(file.getvalue()) < 1_000_000
    result = verify_entry(folder)
    assert not result.ok and "golden.npz is damaged (" in result.detail


# --- a cache ----------------------------------------------------------------------------------------------


@pytest.fixture
def pulled(site, cache, monkeypatch) -> Path:
    """A cache that holds the site's entry, by its name."""
    monkeypatch.setenv("EMBEDKIT_ZOO", site.url)
    pull([NAME], gate=everything)
    return cache


FOLDERS = ["", "zoo", "zoo/entries", "zoo/seen"]


@posix
@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_cache_that_others_can_write_is_not_used(pulled, folder, mode):
    assert load_encoder(NAME, local_files_only=True).dim == 4
    (pulled / folder).chmod(mode)
    for offline in (True, False):
        with pytest.raises(
            ConfigError, match="the cache is not used, since .* can be written by other users"
        ) as caught:
            load_encoder(NAME, local_files_only=offline)
        assert str(pulled / folder) in str(caught.value) and "EMBEDKIT_CACHE" in str(caught.value)
    (pulled / folder).chmod(0o755)
    assert load_encoder(NAME, local_files_only=True).dim == 4


@posix
@pytest.mark.parametrize("folder", FOLDERS)
def test_a_cache_of_another_user_is_not_used(pulled, folder, monkeypatch):
    """As another user sees it: the same folders, and an identity that is not their owner's."""
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    owner = (pulled / folder).stat().st_uid
    if owner != 0:
        with pytest.raises(ConfigError, match=f"belongs to another user .{owner}"):
            load_encoder(NAME, local_files_only=True)
        return
    os.chown(pulled / folder, 54321, -1)
    with pytest.raises(ConfigError, match="belongs to another user .54321"):
        load_encoder(NAME, local_files_only=True)


@posix
def test_a_cache_in_a_sticky_folder_is_ours(site, tmp_path, monkeypatch):
    """As in /tmp: others may write beside our folders, and cannot replace them."""
    monkeypatch.setenv("EMBEDKIT_ZOO", site.url)
    (tmp_path / "sticky").mkdir()
    (tmp_path / "sticky").chmod(0o1777)
    monkeypatch.setenv("EMBEDKIT_CACHE", str(tmp_path / "sticky"))
    assert load_encoder(NAME).dim == 4


@posix
def test_a_new_cache_is_its_owners_alone_under_any_umask(site, cache, monkeypatch):
    monkeypatch.setenv("EMBEDKIT_ZOO", site.url)
    before = os.umask(0)
    try:
        pull([NAME], gate=everything)
    finally:
        os.umask(before)
    assert {(cache / folder).stat().st_mode & 0o777 for folder in FOLDERS} == {0o700}
    assert load_encoder(NAME, local_files_only=True).dim == 4


# --- names ------------------------------------------------------------------------------------------------


def test_a_folder_that_bears_a_name_changes_nothing(zoo, by_hand, tmp_path, monkeypatch):
    """A data set is unpacked, and its folder holds an entry that is called as the one that is asked for."""
    monkeypatch.setenv("EMBEDKIT_ZOO", str(zoo))
    mine = find_entry("linear-tiny").revision
    for name in ("linear-tiny", NAME, "linear-new"):
        by_hand.TinyEntry(seed=7).write(Path(name))
    for name in ("linear-tiny", NAME):
        assert find_entry(name).revision == mine
        assert find_entry(f"./{name}").revision != mine
        assert verify_entry(name).ok
    with pytest.raises(EntryNotFoundError, match=r"write its path: \.[/\\]linear-new"):
        find_entry("linear-new")


# --- a zoo/ folder that is not the checkout's ----------------------------------------------------------------


@pytest.fixture
def known(by_hand, tmp_path, monkeypatch) -> str:
    """The digest of `linear-tiny.noise`, which the package knows by its index alone; `zoo/` is to be filled."""
    package = tmp_path / "package"
    revision = find_entry(by_hand.TinyEntry().write(package / NAME)).revision
    by_hand.write_index(package)
    shutil.move(package / NAME, tmp_path / "good" / NAME)
    monkeypatch.setattr("embedkit.hub.resolve.package_zoo", lambda: FolderZoo(package))
    Path("zoo").mkdir()
    return revision


def refused(name: str) -> str:
    with pytest.raises(EntryNotFoundError) as caught:
        load_encoder(name)
    return str(caught.value)


def test_a_zoo_folder_with_other_bytes_under_a_pinned_name(known, by_hand):
    """Another entry, with a manifest and an index that are true for it."""
    by_hand.TinyEntry(seed=3).write(Path("zoo") / NAME)
    by_hand.write_index(Path("zoo"))
    for name in ("linear-tiny", NAME, f"linear-tiny@{known}", "linear-tiny@latest"):
        message = refused(name)
        assert "EMBEDKIT_ZOO" in message
    assert f"to load the other version in ./zoo/{NAME}, write its path" in refused("linear-tiny")
    assert not list_encoders("linear-tiny")[0].at_hand
    assert load_encoder(f"./zoo/{NAME}").revision != known, "asked for as a path, it is what the user wants"


@pytest.mark.parametrize("file", ["model.safetensors", "model.onnx", "config.json", "README.md"])
def test_a_zoo_folder_with_the_pinned_manifest_and_other_files(known, by_hand, tmp_path, file):
    shutil.copytree(tmp_path / "good" / NAME, Path("zoo") / NAME)
    other = by_hand.TinyEntry(seed=3).write(tmp_path / "other" / NAME) / file
    content = other.read_bytes()
    if content == (tmp_path / "good" / NAME / file).read_bytes():
        content = content[:-1] + bytes([content[-1] ^ 1])
    (Path("zoo") / NAME / file).write_bytes(content)
    with pytest.raises(IntegrityError, match=f"{file}: expected"):
        load_encoder("linear-tiny").card  # noqa: B018


def test_a_zoo_folder_with_a_name_that_the_package_does_not_know(known, by_hand):
    by_hand.TinyEntry(seed=3).write(Path("zoo") / "linear-other.noise")
    by_hand.TinyEntry(seed=3).write(Path("zoo") / "zoo.x")
    by_hand.write_index(Path("zoo"))
    for name in ("linear-other", "linear-other.noise", "zoo.x", "zoo"):
        refused(name)
    assert "linear-other.noise" not in {row.name for row in list_encoders()}


def test_a_zoo_folder_whose_index_lies(known, by_hand, tmp_path):
    """Its index says that another entry has the pinned name and digest, or is no index at all: it is not read."""
    other = by_hand.TinyEntry(seed=3).write(Path("zoo") / "linear-other.noise")
    by_hand.write_index(
        Path("zoo"), aliases={"linear-tiny": "linear-other.noise"}, manifest_sha256=known, path="../x"
    )
    refused("linear-tiny")
    shutil.copytree(tmp_path / "good" / NAME, Path("zoo") / NAME)
    assert load_encoder("linear-tiny").revision == known
    for text in (b"{", b"[" * 100_000, b'{"schema": 99}'):
        (Path("zoo") / "index.json").write_bytes(text)
        assert load_encoder("linear-tiny").revision == known
        assert list_encoders("linear-tiny")[0].at_hand
    assert other.is_dir()


@posix
def test_a_zoo_folder_of_links_and_pipes(known, by_hand, tmp_path):
    """A link leads to the pinned bytes, or to nothing; a pipe in the place of a file ends at once."""
    by_hand.TinyEntry(seed=3).write(tmp_path / "evil" / NAME)
    shutil.rmtree("zoo")
    for target, found in ((tmp_path / "good", True), (tmp_path / "evil", False), (Path("zoo"), False)):
        Path("zoo").symlink_to(target)
        assert (load_encoder("linear-tiny").revision == known) if found else refused("linear-tiny")
        Path("zoo").unlink()
    Path("zoo").mkdir()
    entry = Path("zoo") / NAME
    entry.symlink_to(tmp_path / "evil" / NAME)
    refused("linear-tiny")
    entry.unlink()
    entry.mkdir()
    (entry / "manifest.json").symlink_to("/etc/passwd")
    assert "root:" not in refused("linear-tiny")
    (entry / "manifest.json").unlink()
    os.mkfifo(entry / "manifest.json")
    refused("linear-tiny")
    shutil.rmtree(entry)
    shutil.copytree(tmp_path / "good" / NAME, entry)
    (entry / "model.onnx").unlink()
    os.mkfifo(entry / "model.onnx")
    with pytest.raises(EntryError, match="model.onnx cannot be read"):
        load_encoder("linear-tiny")
    shutil.rmtree("zoo")
    Path("zoo").write_text("a file")
    refused("linear-tiny")


def test_a_lock_file_does_not_open_a_zoo_folder_for_other_bytes(known, by_hand):
    """A stranger's folder that brings both: a pin of its own bytes, and the bytes."""
    other = find_entry(by_hand.TinyEntry(seed=3).write(Path("zoo") / NAME).absolute()).revision
    by_hand.TinyEntry(seed=3).write(Path("zoo") / "linear-other.noise")
    lock(linear_tiny=other, linear_other=other)
    for name in ("linear-tiny", "linear-other"):
        refused(name)


@posix
def test_a_working_directory_that_is_gone(known, tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    refused("linear-tiny")


# --- a lock file ------------------------------------------------------------------------------------------


def lock(**pins: str) -> None:
    """The lock file of a stranger's folder, which is the working folder."""
    entries = {
        name.replace("__", "."): {"zoo": "x", "revision": sha, "manifest_sha256": sha}
        for name, sha in pins.items()
    }
    entries = {name.replace("_", "-"): facts for name, facts in entries.items()}
    Path("embedkit.lock").write_text(json.dumps({"schema": 1, "entries": entries}))


def test_a_lock_file_picks_a_version_and_no_other_entry(pulled, monkeypatch):
    """The name of what no zoo holds, and the digest of another entry that was pulled once."""
    other = find_entry(NAME).revision
    monkeypatch.delenv("EMBEDKIT_ZOO")
    lock(linear_other=other)
    with pytest.raises(EntryNotFoundError, match="there is no encoder 'linear-other'"):
        load_encoder("linear-other")
    lock(supervised_efficientnet__lite0=other)
    lock_text = Path("embedkit.lock").read_text().replace("efficientnet.lite0", "efficientnet_lite0")
    Path("embedkit.lock").write_text(lock_text)
    with pytest.raises(IntegrityError, match="pins"):
        load_encoder()
    lock(linear_tiny=other)  # what it is there for
    assert load_encoder("linear-tiny").revision == other


def test_a_lock_file_moves_no_name_of_the_packages_index_to_another_version(
    pulled, by_hand, tmp_path, monkeypatch
):
    """The package knows the name, does not carry it, and another version of it was pulled once."""
    other = find_entry(NAME).revision
    monkeypatch.delenv("EMBEDKIT_ZOO")
    by_hand.TinyEntry(seed=3).write(tmp_path / "package" / NAME)
    by_hand.write_index(tmp_path / "package")
    shutil.rmtree(tmp_path / "package" / NAME)
    monkeypatch.setattr("embedkit.hub.resolve.package_zoo", lambda: FolderZoo(tmp_path / "package"))
    lock(linear_tiny=other)
    with pytest.raises(IntegrityError, match="which none of the zoos holds, and the index of this package"):
        load_encoder("linear-tiny")


def test_the_lock_file_holds_no_path_of_this_machine(zoo, site, tmp_path, monkeypatch):
    for uri in (str(zoo), zoo.as_uri()):
        monkeypatch.setenv("EMBEDKIT_ZOO", uri)
        find_entry("linear-tiny", lock=True)
        find_entry(NAME, lock=True)
    load_encoder(lock=True)
    find_entry(f"{site.url}/{NAME}", lock=True)
    text = Path("embedkit.lock").read_text()
    assert str(tmp_path) not in text and str(Path.home()) not in text and os.getcwd() not in text
    zoos = {facts["zoo"] for facts in json.loads(text)["entries"].values()}
    assert zoos == {"local", site.url}


def test_eight_processes_that_pin_at_once_lose_nothing(tmp_path):
    """Before: 4 to 7 of 8 pins were lost."""
    context = multiprocessing.get_context("spawn")
    path = tmp_path / "pins" / "embedkit.lock"
    path.parent.mkdir()
    workers = [context.Process(target=pin, args=(str(path), number)) for number in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 8
    assert len(json.loads(path.read_text())["entries"]) == 40
    assert [file.name for file in path.parent.iterdir()] == ["embedkit.lock"]


@posix
def test_a_kill_leaves_a_whole_lock_file_that_others_can_write(tmp_path):
    context = multiprocessing.get_context("spawn")
    path = tmp_path / "pins" / "embedkit.lock"
    path.parent.mkdir()
    rng = np.random.default_rng(0)
    for _ in range(5):
        before = path.stat().st_mtime_ns if path.exists() else 0
        writer = context.Process(target=pin_for_ever, args=(str(path),))
        writer.start()
        end = time.monotonic() + 60
        while (not path.exists() or path.stat().st_mtime_ns == before) and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(float(rng.uniform(0, 0.2)))
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        found = LockFile(path)
        assert found.pin("linear-e0") is not None
        found.write("linear-mine", zoo="x", revision="r", manifest_sha256="1" * 64)
        assert LockFile(path).pin("linear-mine") is not None
    assert [file.name for file in path.parent.iterdir()] == ["embedkit.lock"]


def test_a_lock_file_is_written_through_a_link(tmp_path):
    real = tmp_path / "shared" / "embedkit.lock"
    real.parent.mkdir()
    real.write_text('{"schema": 1, "entries": {}}')
    (tmp_path / "embedkit.lock").symlink_to(real)
    LockFile(tmp_path / "embedkit.lock").write("linear-x", zoo="x", revision="r", manifest_sha256="0" * 64)
    assert (tmp_path / "embedkit.lock").is_symlink() and "linear-x" in real.read_text()


@posix
def test_a_lock_file_that_is_no_file_is_one_sentence(tmp_path):
    os.mkfifo(tmp_path / "embedkit.lock")
    with pytest.raises(ConfigError, match="cannot be read .*is not a regular file"):
        LockFile(tmp_path / "embedkit.lock")


def test_the_cache_gives_nothing_that_is_not_whole(tmp_path):
    assert Cache(tmp_path / "nothing").get("0" * 64) is None and not (tmp_path / "nothing").exists()
