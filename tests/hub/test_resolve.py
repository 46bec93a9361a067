"""From a name to an entry: the look-up order, aliases, revisions, pins, zoos, and the caches of the Hub."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import embedkit
from embedkit.encoder import load_encoder, resolve_threads
from embedkit.errors import ConfigError, EntryError, EntryNotFoundError, IntegrityError, UnreachableError
from embedkit.hub import resolve
from embedkit.hub.access import default_cache_dir
from embedkit.hub.bulk import bundle, pull
from embedkit.hub.cache import open_only
from embedkit.hub.catalog import Index
from embedkit.hub.folder import FolderZoo
from embedkit.hub.listing import list_encoders
from embedkit.hub.resolve import find_entry
from embedkit.model.layout import sha256_hex

IMAGE = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)


@pytest.fixture
def package(by_hand, tmp_path, monkeypatch) -> Path:
    """A package's zoo that carries `linear-tiny.noise` and knows `linear-far.noise` by its index alone."""
    zoo = tmp_path / "package"
    by_hand.TinyEntry().write(zoo / "linear-tiny.noise")
    by_hand.TinyEntry(seed=1).write(zoo / "linear-far.noise")
    by_hand.write_index(zoo)
    shutil.move(zoo / "linear-far.noise", tmp_path / "far" / "linear-far.noise")
    monkeypatch.setattr(resolve, "package_zoo", lambda: FolderZoo(zoo))
    return zoo


@pytest.fixture
def zoo(by_hand, tmp_path, monkeypatch, package):
    """Make a zoo of one entry: `zoo(folder, folder_name, seed)`, with an index."""

    def make(folder: str, name: str, seed: int, index: bool = True) -> Path:
        by_hand.TinyEntry(seed=seed).write(tmp_path / folder / name)
        if index:
            by_hand.write_index(tmp_path / folder)
        return tmp_path / folder

    return make


def seed_of(encoder: embedkit.Encoder, by_hand) -> int:
    """Which of the seeds 0..9 an encoder was made with."""
    row = encoder.encode(IMAGE)
    for seed in range(10):
        expected = by_hand.TinyEntry(seed=seed).embed(IMAGE.transpose(2, 0, 1)[None])
        if np.allclose(row, expected, atol=1e-5):
            return seed
    raise AssertionError("no seed gives this row")


def not_found(name: str, **options) -> str:
    with pytest.raises(EntryNotFoundError) as caught:
        find_entry(name, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- the default encoder ----------------------------------------------------------------------------------


def test_no_name_gives_the_default_encoder(encoder, default_entry):
    assert encoder.name == default_entry.name == "supervised-efficientnet_lite0.in1k"
    assert (encoder.dim, encoder.preprocess.size, encoder.provider) == (
        1280,
        (224, 224),
        "CPUExecutionProvider",
    )
    assert encoder.revision == sha256_hex((default_entry / "manifest.json").read_bytes())
    for name in ("supervised-efficientnet_lite0", "supervised-efficientnet_lite0.in1k", default_entry):
        assert find_entry(name).revision == encoder.revision


def test_the_packages_index_pins_its_default_entry(default_entry):
    row = Index.from_json((default_entry.parent / "index.json").read_bytes(), "index.json").rows[
        default_entry.name
    ]
    assert row.manifest_sha256 == find_entry().revision
    assert row.dim == 1280


# --- names ------------------------------------------------------------------------------------------------


def test_aliases_whole_names_and_paths(package, by_hand):
    for name in (
        "linear-tiny",
        "linear-tiny.noise",
        package / "linear-tiny.noise",
        f"{package}/linear-tiny.noise/",
    ):
        encoder = load_encoder(name)
        assert encoder.name == "linear-tiny.noise" and seed_of(encoder, by_hand) == 0


def test_a_bare_name_completes_where_no_index_decides(zoo, monkeypatch, by_hand):
    folder = zoo("folder", "byol-r18.photos", 3, index=False)
    monkeypatch.setenv("EMBEDKIT_ZOO", str(folder))
    assert seed_of(load_encoder("byol-r18"), by_hand) == 3
    by_hand.TinyEntry(seed=4).write(folder / "byol-r18.emoji")
    with pytest.raises(
        EntryError, match=r"'byol-r18' could be byol-r18.emoji, byol-r18.photos; give the whole"
    ):
        load_encoder("byol-r18")
    assert seed_of(load_encoder("byol-r18.emoji"), by_hand) == 4
    by_hand.write_index(folder, aliases={"byol-r18": "byol-r18.emoji"})
    assert seed_of(load_encoder("byol-r18"), by_hand) == 4


def test_an_unknown_name_gives_the_nearest_ones_and_the_line_that_names_a_zoo(package):
    message = not_found("linear-tinny")
    assert message.startswith("there is no encoder 'linear-tinny' (did you mean 'linear-tiny'")
    assert message.endswith("export EMBEDKIT_ZOO=/path/to/embedkit/zoo")
    assert "nearest" not in not_found("zzzzzzzz")


def test_a_name_that_only_the_index_knows_gives_the_exact_line(package, tmp_path, monkeypatch, by_hand):
    for name in ("linear-far", "linear-far.noise"):
        message = not_found(name)
        assert message == (
            f"{name!r} is an entry of the zoo that this package does not contain: name a zoo that has it, with "
            "export EMBEDKIT_ZOO=/path/to/embedkit/zoo, or bring it into the cache, with `embedkit zoo pull "
            f"{name} --zoo URL`, or from a bundle, with `embedkit zoo pull BUNDLE.tar`"
        )
    monkeypatch.setenv("EMBEDKIT_ZOO", str(tmp_path / "far"))
    assert seed_of(load_encoder("linear-far"), by_hand) == 1


ODD_NAMES = ["", "*", "linear-*", "[a-z]*", "a\0b", "a\nb", "x" * 5000, "\udcff", "linear tiny", "-x", "CON"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_names_that_cannot_be_one(package, name):
    assert not_found(name).startswith(f"there is no encoder {name!r}")


ODD_PATHS = ["./no/such", "/no/such/entry", "~nobody-of-that-name/x", "..x", "/" + "y" * 5000, "./a\0b"]


@pytest.mark.parametrize("path", ODD_PATHS)
def test_paths_that_are_no_folder(package, path):
    assert not_found(path) == f"{path!r} is not a folder; give a name, or the path of an entry's folder"


def test_a_file_and_an_empty_folder_are_no_entries(package, tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"x")
    assert "is not a folder" in not_found(str(tmp_path / "model.onnx"))
    with pytest.raises(EntryError, match=r"is not a zoo entry: it has no readable manifest.json"):
        find_entry(tmp_path)


def test_urls_that_can_be_no_entry_or_no_zoo(package, monkeypatch):
    for name in (
        "hf://org",
        "https://example.org",
        "hf://org/name/more",
        "s3://bucket",
        "https://host/zoo/*",
    ):
        with pytest.raises(ConfigError, match="is not the URL of an entry: expected"):
            find_entry(name)
    for name, why in (
        ("http://example.org/zoo/x", "is not encrypted: expected https://"),
        ("https://user:secret@example.org/zoo/x", "with a user or a password in it is refused"),
        ("https://example.org/a/../x", "between the slashes"),
        ("https://example.org/zoo/x@", "is not a revision"),
    ):
        with pytest.raises(ConfigError, match=why) as caught:
            find_entry(name)
        assert "secret" not in str(caught.value)
    monkeypatch.setenv("EMBEDKIT_ZOO", "http://example.org/zoo")
    with pytest.raises(ConfigError, match="'http://example.org/zoo' is not encrypted"):
        find_entry("linear-tiny")


# --- revisions --------------------------------------------------------------------------------------------


def test_revisions(package, zoo, monkeypatch, by_hand):
    revision = find_entry("linear-tiny").revision
    for text in (revision, revision[:12], revision[:40]):
        assert find_entry(f"linear-tiny@{text}").revision == revision
        assert find_entry("linear-tiny", revision=text).revision == revision
        assert find_entry(package / "linear-tiny.noise", revision=text).revision == revision
    message = not_found("linear-tiny@" + "0" * 12)
    assert message == f"'linear-tiny' has no revision 000000000000: {package} has {revision[:12]}"
    assert "has revision" in not_found(str(package / "linear-tiny.noise"), revision="0" * 12)
    for wrong in (revision[:11], "v1.0", revision.upper(), revision + "0", "", "0" * 12 + "\n"):
        with pytest.raises(ConfigError, match="revision: expected at least 12 hex digits"):
            find_entry("linear-tiny", revision=wrong)
    with pytest.raises(ConfigError, match="both name a revision"):
        find_entry(f"linear-tiny@{revision}", revision=revision)


def test_a_revision_is_looked_for_in_all_zoos(package, zoo, monkeypatch, by_hand):
    """A zoo with another version is passed over for one that has the revision, and both are named if none has."""
    old = find_entry("linear-tiny").revision
    folder = zoo("newer", "linear-tiny.noise", 5)
    new = find_entry(folder / "linear-tiny.noise").revision
    monkeypatch.setenv("EMBEDKIT_ZOO", str(folder))
    assert find_entry(f"linear-tiny@{old[:12]}").location == str(package / "linear-tiny.noise")
    assert find_entry(f"linear-tiny@{new[:12]}").location == str(folder / "linear-tiny.noise")
    message = not_found("linear-tiny@" + "f" * 12)
    assert f"{folder} has {new[:12]}; {package} has {old[:12]}" in message


def test_a_pin_of_the_packages_index_is_held_everywhere(package, zoo, monkeypatch, by_hand):
    folder = zoo("newer", "linear-tiny.noise", 5)
    old = find_entry("linear-tiny").revision
    monkeypatch.setenv("EMBEDKIT_ZOO", str(folder))
    new = find_entry(folder / "linear-tiny.noise").revision
    with pytest.raises(IntegrityError) as caught:
        load_encoder("linear-tiny")
    message = str(caught.value)
    assert f"sha256 is {new[:12]}..., and the index pins {old[:12]}... for linear-tiny.noise" in message
    assert "ask for linear-tiny.noise@latest" in message and str(folder) in message
    # Out of the pin by name, by revision or by path; never by accident.
    for name in (
        "linear-tiny@latest",
        "linear-tiny.noise@latest",
        f"linear-tiny@{new}",
        folder / "linear-tiny.noise",
    ):
        assert seed_of(load_encoder(name), by_hand) == 5
    assert seed_of(load_encoder("linear-tiny", revision="latest"), by_hand) == 5
    by_hand.write_index(folder, aliases={"linear-tiny": "linear-tiny.noise"}, manifest_sha256=new)
    with pytest.raises(IntegrityError):  # a zoo cannot overrule the package's index with its own
        load_encoder("linear-tiny")


# --- zoos -----------------------------------------------------------------------------------------------


def test_the_order_of_zoos(package, zoo, monkeypatch, tmp_path, by_hand):
    """EMBEDKIT_ZOO from left to right, then config.toml, then the package."""
    first, second, third = (zoo(f"folder{i}", "moco-r18.photos", i) for i in (1, 2, 3))
    config = tmp_path / "config" / "embedkit" / "config.toml"
    config.parent.mkdir(parents=True)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    config.write_text(f'zoo = ["{third}"]\n')
    assert seed_of(load_encoder("moco-r18"), by_hand) == 3
    monkeypatch.setenv("EMBEDKIT_ZOO", f" {first} , {second},,")
    assert seed_of(load_encoder("moco-r18"), by_hand) == 1
    monkeypatch.setenv("EMBEDKIT_ZOO", f"{second},{first}")
    assert seed_of(load_encoder("moco-r18"), by_hand) == 2
    monkeypatch.setenv("EMBEDKIT_ZOO", str(package))
    assert seed_of(load_encoder("moco-r18"), by_hand) == 3
    assert seed_of(load_encoder("linear-tiny"), by_hand) == 0
    config.write_text(f'zoo = "{second}"\n')  # one zoo may stand without brackets
    assert seed_of(load_encoder("moco-r18"), by_hand) == 2
    monkeypatch.setenv("EMBEDKIT_ZOO", first.as_uri())
    assert seed_of(load_encoder("moco-r18"), by_hand) == 1


def test_a_zoo_that_is_missing_is_named_not_passed_over(package, zoo, monkeypatch, tmp_path):
    there = zoo("there", "moco-r18.photos", 1)
    for value in (f"{there},{tmp_path}/gone", f"{tmp_path}/gone,{there}"):
        monkeypatch.setenv("EMBEDKIT_ZOO", value)
        with pytest.raises(ConfigError) as caught:
            load_encoder("moco-r18")
        assert f"the zoo '{tmp_path}/gone' is not a folder" in str(caught.value)
    (tmp_path / "file").write_text("x")
    for wrong in (f"{tmp_path}/file", "~nobody-of-that-name/zoo", "/" + "x" * 5000):
        monkeypatch.setenv("EMBEDKIT_ZOO", wrong)
        with pytest.raises(ConfigError, match="is not a folder"):
            find_entry("linear-tiny")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"zoo = ", "is not TOML"),
        (b"zoo = '\xff'", "is not TOML"),
        (b"zoo = 5", r"zoo: expected a list such as \[\"/data/zoo\"\], found 5"),
        (b"zoo = ['/a', 5]", "zoo: expected a list"),
        (b"zoo = ['/no/such/zoo']", "the zoo '/no/such/zoo' is not a folder"),
    ],
)
def test_a_configuration_file_that_is_wrong(package, monkeypatch, tmp_path, text, why):
    (tmp_path / "embedkit").mkdir()
    (tmp_path / "embedkit" / "config.toml").write_bytes(text)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=why):
        find_entry("linear-tiny")


def test_a_configuration_file_without_zoos(package, monkeypatch, tmp_path):
    (tmp_path / "embedkit").mkdir()
    (tmp_path / "embedkit" / "config.toml").write_text("[other]\nkey = 1\n")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert find_entry("linear-tiny").name == "linear-tiny.noise"


INDEX = {
    "schema": 1,
    "entries": {
        "moco-r18.photos": {
            "manifest_sha256": "0" * 64,
            "method": "moco",
            "architecture": "resnet18",
            "data": "photos",
            "dim": 512,
            "license": "MIT",
        }
    },
    "aliases": {"moco-r18": "moco-r18.photos"},
}


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 2},
        {"schema": None},
        {"entries": [1, 2]},
        {"entries": None},
        {"entries": 5},
        {"aliases": ["a"]},
        {"aliases": None},
        {"entries": {"../../x": {}}},
        {"entries": {"no name": {}}},
        {"entries": {"moco-r18.photos": 5}},
        {"entries": {"moco-r18.photos": []}},
        {"entries": {"moco-r18.photos": {}}},
        *(
            {key: value}
            for key, value in (("dim", "512"), ("dim", None), ("manifest_sha256", 5), ("bytes", 1.5))
        ),
        *({key: value} for key, value in (("data", ["a"]), ("metrics", []), ("license", None))),
    ],
)
def test_an_index_that_is_wrong_is_an_entry_error(package, monkeypatch, tmp_path, change):
    index = json.loads(json.dumps(INDEX))
    if set(change) <= set(INDEX):
        index.update(change)
    else:
        index["entries"]["moco-r18.photos"].update(change)
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo" / "index.json").write_text(json.dumps(index))
    monkeypatch.setenv("EMBEDKIT_ZOO", str(tmp_path / "zoo"))
    with pytest.raises(EntryError) as caught:
        find_entry("moco-r18")
    assert str(tmp_path / "zoo" / "index.json") in str(caught.value) and "\n" not in str(caught.value)


def test_an_index_may_grow_and_its_dangling_aliases_lead_nowhere(tmp_path):
    index = json.loads(json.dumps(INDEX))
    index["entries"]["moco-r18.photos"]["new_fact"] = {"of": "a later version"}
    index["later"] = True
    index["aliases"] |= {"gone": "gone-r18.x", "odd": 5, "list": ["a"]}
    parsed = Index.from_json(json.dumps(index).encode(), "index.json")
    assert parsed.aliases == {"moco-r18": "moco-r18.photos"}
    assert parsed.names == ["moco-r18", "moco-r18.photos"]
    assert parsed.folder_of("gone") is None
    assert Index.from_json(b'{"schema": 1}', "x").names == []


# --- the zoo/ folder of the working directory ---------------------------------------------------------------


@pytest.fixture
def checkout(package, tmp_path, monkeypatch) -> Path:
    """A working directory whose `zoo/` has what the package knows by its index alone."""
    folder = tmp_path / "checkout"
    shutil.copytree(tmp_path / "far", folder / "zoo")
    monkeypatch.chdir(folder)
    return folder


def test_a_checkouts_zoo_gives_the_entries_that_the_package_knows(checkout, package, by_hand, monkeypatch):
    revision = find_entry("./zoo/linear-far.noise").revision
    for name in ("linear-far", "linear-far.noise", f"linear-far@{revision[:12]}", f"linear-far@{revision}"):
        encoder = load_encoder(name)
        assert seed_of(encoder, by_hand) == 1 and encoder.revision == revision
    assert [(row.name, row.zoo, row.at_hand) for row in list_encoders("linear-far")] == [
        ("linear-far.noise", "zoo", True)
    ]
    with pytest.raises(EntryNotFoundError, match="has no entry 'linear-far'"):
        find_entry("linear-far", zoo=str(package))  # that zoo only
    encoder = load_encoder("linear-far")
    monkeypatch.chdir(package)
    assert encoder.card.startswith("---"), "the folder is remembered as an absolute path"
    assert "does not contain" in not_found("linear-far")


def test_a_checkouts_zoo_is_asked_last(checkout, package, zoo, tmp_path, monkeypatch, by_hand):
    (checkout / "zoo" / "linear-far.noise" / "model.safetensors").write_bytes(b"damaged")
    for variable in (str(tmp_path / "far"), f"{package},{tmp_path / 'far'}"):
        monkeypatch.setenv("EMBEDKIT_ZOO", variable)
        assert find_entry("linear-far").location == str(tmp_path / "far" / "linear-far.noise")
    monkeypatch.setattr(resolve, "DEFAULT_ZOO", str(tmp_path / "far"))
    monkeypatch.delenv("EMBEDKIT_ZOO")
    assert seed_of(load_encoder("linear-far"), by_hand) == 1
    assert seed_of(load_encoder("linear-tiny"), by_hand) == 0


def test_the_cache_is_asked_before_a_checkouts_zoo(checkout, tmp_path, monkeypatch, by_hand):
    monkeypatch.setenv("EMBEDKIT_CACHE", str(tmp_path / "cache"))
    bundle(["./zoo/linear-far.noise"], tmp_path / "far.tar", gate=open_only)
    pull([str(tmp_path / "far.tar")], gate=open_only)
    (checkout / "zoo" / "linear-far.noise" / "model.safetensors").write_bytes(b"damaged")
    assert str(tmp_path / "cache") in find_entry("linear-far").location
    assert seed_of(load_encoder("linear-far"), by_hand) == 1


def test_a_checkouts_zoo_serves_while_the_default_zoo_is_down(checkout, monkeypatch, by_hand):
    monkeypatch.setattr(resolve, "DEFAULT_ZOO", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr("embedkit.hub.download.PAUSE", 0.0)
    assert seed_of(load_encoder("linear-far"), by_hand) == 1
    shutil.rmtree(checkout / "zoo")
    with pytest.raises(UnreachableError):
        find_entry("linear-far")


# --- layouts of a folder ----------------------------------------------------------------------------------


def link(path: Path, target: Path) -> None:
    """A relative link, as the Hub's caches have them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(os.path.relpath(target, path.parent))


def test_the_hubs_classic_cache_layout(default_entry, encoder, tmp_path, jpeg_maker):
    """models--org--name/snapshots/<commit>/file -> ../../blobs/<hash>."""
    commit = "c" * 40
    repo = tmp_path / "hub" / "models--org--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "blobs").mkdir()
    for file in default_entry.iterdir():
        blob = repo / "blobs" / sha256_hex(file.read_bytes())
        shutil.copyfile(file, blob)
        link(repo / "snapshots" / commit / file.name, blob)
    found = load_encoder(repo / "snapshots" / commit, device="cpu", threads=1)
    image = jpeg_maker(1)
    np.testing.assert_array_equal(found.encode(image), encoder.encode(image))
    assert found.revision == encoder.revision
    assert found.name == "name", "a commit's digest is no name"


def test_the_hubs_shared_blobs_layout(default_entry, encoder, tmp_path, jpeg_maker):
    """Links to links: snapshot -> the repository's blob -> one store that all repositories share."""
    commit = "d" * 40
    hub = tmp_path / "hub"
    repo = hub / "models--org--name"
    for file in default_entry.iterdir():
        digest = sha256_hex(file.read_bytes())
        shared = hub / "blobs" / digest[:2] / digest
        shared.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, shared)
        link(repo / "blobs" / digest, shared)
        link(repo / "snapshots" / commit / file.name, repo / "blobs" / digest)
    snapshot = repo / "snapshots" / commit
    assert (snapshot / "model.onnx").is_symlink()
    assert os.path.islink(os.path.join(snapshot, os.readlink(snapshot / "model.onnx")))
    found = load_encoder(snapshot, device="cpu", threads=1)
    image = jpeg_maker(1)
    np.testing.assert_array_equal(found.encode(image), encoder.encode(image))
    assert found.card == encoder.card


def test_a_folder_that_is_read_only(by_hand, tmp_path):
    folder = by_hand.TinyEntry().write(tmp_path / "linear-tiny.noise")
    for file in folder.iterdir():
        file.chmod(stat.S_IREAD)
    folder.chmod(stat.S_IREAD | stat.S_IEXEC)
    try:
        before = sorted(os.listdir(folder))
        assert load_encoder(folder).encode(IMAGE).shape == (1, 4)
        assert sorted(os.listdir(folder)) == before
    finally:
        folder.chmod(stat.S_IRWXU)


def test_a_folder_with_an_odd_name(by_hand, tmp_path):
    for name in ("with space@1", "ünï", "a,b", "new\nline", os.fsdecode(b"\xff")):
        folder = by_hand.TinyEntry().write(tmp_path / name)
        assert load_encoder(folder).name == name
        assert load_encoder(f"{tmp_path}/{name}").name == name


def test_a_relative_path_goes_on_working_after_a_change_of_folder(by_hand, tmp_path, monkeypatch):
    by_hand.TinyEntry().write(tmp_path / "a" / "linear-tiny.noise")
    monkeypatch.chdir(tmp_path / "a")
    one, two = load_encoder("./linear-tiny.noise"), load_encoder("../a/linear-tiny.noise")
    monkeypatch.setenv("EMBEDKIT_ZOO", "linear-tiny.noise/..")
    three = load_encoder("linear-tiny")
    monkeypatch.chdir(tmp_path)
    for encoder in (one, two, three):
        assert encoder.card.startswith("---")


# --- the list ---------------------------------------------------------------------------------------------


def test_list_encoders(package, zoo, monkeypatch, tmp_path):
    folder = zoo("folder", "moco-r18.photos", 1)
    monkeypatch.setenv("EMBEDKIT_ZOO", str(folder))
    rows = list_encoders()
    assert [(row.name, row.alias, row.zoo) for row in rows] == [
        ("linear-far.noise", "linear-far", ""),
        ("linear-tiny.noise", "linear-tiny", str(package)),
        ("moco-r18.photos", "moco-r18", str(folder)),
    ]
    assert {(row.dim, row.method, row.data, row.license) for row in rows} == {
        (4, "linear", "noise", "CC0-1.0")
    }
    assert [row.name for row in list_encoders("linear-*")] == ["linear-far.noise", "linear-tiny.noise"]
    assert [row.name for row in list_encoders("*-r18")] == ["moco-r18.photos"]  # by its alias
    assert list_encoders("nothing*") == []
    monkeypatch.setenv("EMBEDKIT_ZOO", f"{folder},{tmp_path / 'far'}")
    assert list_encoders("linear-far*")[0].zoo == str(tmp_path / "far")


def test_a_row_without_its_folder_does_not_hide_one_with_it(package, zoo, monkeypatch):
    hollow = zoo("hollow", "moco-r18.photos", 1)
    full = zoo("full", "moco-r18.photos", 1)
    shutil.rmtree(hollow / "moco-r18.photos")
    monkeypatch.setenv("EMBEDKIT_ZOO", f"{hollow},{full}")
    assert list_encoders("moco-*")[0].zoo == str(full)
    assert find_entry("moco-r18").location == str(full / "moco-r18.photos")


# --- arguments --------------------------------------------------------------------------------------------


def test_threads():
    assert resolve_threads("auto") >= 1
    assert resolve_threads("3") == resolve_threads(3) == 3
    for wrong in (0, -1, "0", "many", "", None, [], float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="threads: expected 'auto' or a whole number above 0"):
            resolve_threads(wrong)


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("EMBEDKIT_CACHE", str(tmp_path / "c"))
    assert default_cache_dir() == str(tmp_path / "c")
    monkeypatch.delenv("EMBEDKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == str(tmp_path / "embedkit")


def test_in_a_checkout_whose_folder_hides_the_package():
    """`import embedkit` there takes the source, beside which the zoo lies, whatever is installed."""
    root = Path(__file__).parents[2]
    if not (root / "embedkit" / "__init__.py").is_file():
        pytest.skip("the tests run away from the checkout")
    code = "import embedkit; print(embedkit.load_encoder().name)"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    blocked = (
        "import sys; sys.meta_path = [one for one in sys.meta_path if 'editable' not in repr(one).lower()];"
        f"sys.path.insert(0, {str(root)!r});"
    )
    done = subprocess.run(
        [sys.executable, "-c", blocked + code], capture_output=True, text=True, env=environment, cwd=root
    )
    assert done.stdout.strip() == "supervised-efficientnet_lite0.in1k", done.stderr
