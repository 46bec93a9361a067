"""Publishing: only what changed goes up, the index last, and a publisher that is killed leaves the old version."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from embedkit._io.atomic import replacing_folder
from embedkit.encoder import load_encoder
from embedkit.errors import AccessError, ConfigError, EntryError, IntegrityError
from embedkit.hub.cache import Cache
from embedkit.hub.catalog import Index
from embedkit.hub.listing import list_encoders
from embedkit.hub.mirror import mirror
from embedkit.hub.publish.index import TABLE, build_index, index_bytes, table_bytes, update_index
from embedkit.hub.publish.publish import publish, refresh, unpublish
from embedkit.hub.resolve import find_entry
from embedkit.hub.urls import is_url
from embedkit.model.layout import INDEX, MANIFEST
from embedkit.model.manifest import Manifest
from embedkit.workflows.check_entry import verify_entry

NAME = "linear-tiny.noise"
ALL = {"config.json", "model.onnx", "model.safetensors", "README.md", "golden.npz", MANIFEST, INDEX}


@pytest.fixture
def entry(zoo):
    return find_entry(zoo / NAME)


@pytest.fixture
def newer(by_hand, tmp_path):
    """The entry with other weights and the same card, golden vectors aside."""
    return find_entry(by_hand.TinyEntry(seed=1).write(tmp_path / "newer" / NAME))


@pytest.fixture(params=["folder", "s3", "hub"])
def to(request, tmp_path):
    """A zoo that can be published to, and its token."""
    if request.param == "hub":
        request.getfixturevalue("hub")
        return "hf://team", "hf_writer"
    return (
        (str(tmp_path / "published"), None)
        if request.param == "folder"
        else (request.getfixturevalue("s3"), None)
    )


def test_publishing_twice_writes_once(entry, to, newer):
    zoo, token = to
    assert set(publish(entry, zoo, token=token).files) == ALL
    assert publish(entry, zoo, token=token).files == ()
    changed = set(publish(newer, zoo, token=token).files)
    assert {"model.safetensors", MANIFEST, INDEX} <= changed
    assert not changed & {"README.md", "config.json"}, "what did not change was written again"
    assert find_entry(NAME, zoo=zoo).revision == newer.revision
    assert publish(newer, zoo, token=token).files == ()


def test_an_index_keeps_the_others(entry, to, by_hand, tmp_path):
    zoo, token = to
    other = find_entry(by_hand.TinyEntry(seed=2).write(tmp_path / "o" / "linear-tiny.hum"))
    for one in (entry, other):
        publish(one, zoo, token=token)
    rows = {row.name: row for row in list_encoders(zoo=zoo)}
    assert set(rows) == {NAME, "linear-tiny.hum"}
    assert (rows[NAME].alias, rows["linear-tiny.hum"].alias) == ("linear-tiny", ""), (
        "the first keeps the alias"
    )
    unpublish(NAME, zoo, token=token)
    assert [(row.name, row.alias) for row in list_encoders(zoo=zoo)] == [("linear-tiny.hum", "linear-tiny")]
    with pytest.raises(ConfigError, match="no entry"):
        unpublish(NAME, zoo, token=token)


def test_an_image_of_the_card_is_published(entry, by_hand, tmp_path, to):
    target, token = to
    tiny = by_hand.TinyEntry()
    drawn = tiny.write(tmp_path / "drawn" / NAME, {**tiny.files(), "pretext.png": b"\x89PNG\r\n"})
    assert "pretext.png" in publish(find_entry(drawn), target, token=token).files


def test_what_is_not_fit_is_not_published(zoo, entry, by_hand, tmp_path, to):
    target, token = to
    tiny = by_hand.TinyEntry()
    bare = tiny.write(tmp_path / "bare" / NAME, {**tiny.files(), "README.md": b"no front matter"})
    with pytest.raises(EntryError, match="expected a card that begins with YAML"):
        publish(find_entry(bare), target, token=token)
    script = tiny.write(tmp_path / "script" / NAME, {**tiny.files(), "run.py": b"print()"})
    with pytest.raises(EntryError, match="run.py is not a file of an entry"):
        publish(find_entry(script), target, token=token)
    odd = tiny.write(tmp_path / "odd" / "Odd Name")
    with pytest.raises(ConfigError, match="expected an entry named"):
        publish(find_entry(odd), target, token=token)
    (zoo / NAME / "golden.npz").write_bytes(b"changed")
    with pytest.raises(IntegrityError):
        publish(entry, target, token=token)
    assert not Path(target).exists() if not is_url(target) else not list_encoders(zoo=target)


def test_zoos_that_cannot_be_written(entry, site, hub):
    with pytest.raises(ConfigError, match="a web site cannot be written"):
        publish(entry, site.url)
    with pytest.raises(ConfigError, match="needs a token with write access"):
        publish(entry, "hf://team")
    with pytest.raises(AccessError, match="access is refused"):
        publish(entry, "hf://team", token="hf_reader")
    with pytest.raises(ConfigError, match="are the Hub's"):
        publish(entry, "somewhere", tag="v1")
    assert hub.repos == {}


# --- folders ----------------------------------------------------------------------------------------------


def test_a_folder_is_refreshed_from_its_entries(zoo, by_hand):
    by_hand.TinyEntry(seed=2).write(zoo / "linear-other.noise")
    (zoo / "notes").mkdir()
    index = refresh(str(zoo))
    assert set(index["entries"]) == {NAME, "linear-other.noise"}
    assert (zoo / INDEX).read_bytes() == index_bytes(build_index(zoo))
    assert (zoo / TABLE).read_bytes() == table_bytes(index)
    before = (zoo / INDEX).stat().st_mtime_ns
    refresh(str(zoo))
    assert (zoo / INDEX).stat().st_mtime_ns == before
    (zoo / NAME / "golden.npz").write_bytes(b"x")
    with pytest.raises(IntegrityError, match="golden.npz"):
        refresh(str(zoo))
    for wrong in ("no-such-folder", "hf://team"):
        with pytest.raises(ConfigError):
            refresh(wrong)


def test_publishing_an_entry_that_lies_there_is_a_refresh(zoo, entry):
    (zoo / INDEX).unlink()
    assert publish(entry, str(zoo)).files == (INDEX,)
    assert Index.from_json((zoo / INDEX).read_bytes(), "x").rows[NAME].manifest_sha256 == entry.revision


def test_a_damaged_copy_is_written_anew(entry, tmp_path):
    publish(entry, str(tmp_path / "p"))
    (tmp_path / "p" / NAME / "model.onnx").write_bytes(b"x")
    publish(entry, str(tmp_path / "p"))
    assert load_encoder(tmp_path / "p" / NAME).dim == 4


def test_what_is_not_a_zoos_stays(entry, tmp_path):
    project = tmp_path / "project"
    (project / NAME).mkdir(parents=True)
    (project / "README.md").write_text("ten years of work")
    for act in (lambda: publish(entry, str(project)), lambda: refresh(str(project))):
        with pytest.raises(ConfigError, match="would be overwritten: give the zoo a folder of its own"):
            act()
    assert (project / "README.md").read_text() == "ten years of work"
    (project / "README.md").unlink()
    (project / NAME / "notes.txt").write_text("precious")
    with pytest.raises(ConfigError, match=r"is not an entry, and holds 'notes\.txt'"):
        publish(entry, str(project))
    assert (project / NAME / "notes.txt").read_text() == "precious"
    with pytest.raises(ConfigError, match="expected a zoo"):
        publish(entry, "")
    with pytest.raises(ConfigError, match="is not a folder"):
        update_index(tmp_path / "gone")
    assert not (tmp_path / "gone").exists()


def test_an_entry_is_no_zoo(entry, newer, tmp_path):
    publish(entry, str(tmp_path / "zoo"))
    with pytest.raises(ConfigError, match="is an entry; name the folder that contains it"):
        publish(newer, str(tmp_path / "zoo" / NAME))
    assert verify_entry(tmp_path / "zoo" / NAME).ok


def test_a_name_says_the_method(by_hand, entry, tmp_path):
    publish(entry, str(tmp_path / "zoo"))
    other = by_hand.TinyEntry().write(tmp_path / "rotnet-r10.fmnist")
    with pytest.raises(ConfigError, match=r"of the method linear is named linear-<arch>\.<data>"):
        publish(find_entry(other), str(tmp_path / "zoo"))


def test_the_later_writer_of_an_index_sees_both_entries(by_hand, tmp_path, monkeypatch):
    by_hand.TinyEntry().write(tmp_path / "linear-tiny.first")
    built, go_on = threading.Event(), threading.Event()

    def slow(zoo, **options):
        found = build_index(zoo, **options)
        if not built.is_set():  # the first writer stops between reading the entries and writing the index
            built.set()
            assert go_on.wait(20)
        return found

    monkeypatch.setattr("embedkit.hub.publish.index.build_index", slow)
    first, second = (threading.Thread(target=update_index, args=(tmp_path,)) for _ in range(2))
    first.start()
    assert built.wait(20)
    by_hand.TinyEntry(seed=1).write(tmp_path / "linear-tiny.second")
    second.start()
    second.join(0.3)
    assert second.is_alive()
    go_on.set()
    first.join(20)
    second.join(20)
    entries = json.loads((tmp_path / INDEX).read_bytes())["entries"]
    assert sorted(entries) == ["linear-tiny.first", "linear-tiny.second"]


def test_two_publishers_of_one_folder(by_hand, tmp_path):
    """Of a zoo of 16 entries, two of 25 such rounds lost one before the index was built under a lock."""
    names = [f"linear-tiny.n{number}" for number in range(6)]
    for number, name in enumerate(names):
        by_hand.TinyEntry(seed=number).write(tmp_path / "from" / name)
    code = (
        "import sys; from embedkit.hub.publish.publish import publish; from embedkit.hub.resolve import find_entry\n"
        "for name in sys.argv[2:]: publish(find_entry(sys.argv[1] + '/from/' + name), sys.argv[1] + '/to')"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), *names[start::2]]) for start in (0, 1)
    ]
    assert [one.wait(60) for one in running] == [0, 0]
    zoo = tmp_path / "to"
    assert (zoo / INDEX).read_bytes() == index_bytes(build_index(zoo))
    assert sorted(json.loads((zoo / INDEX).read_bytes())["entries"]) == names
    assert all(name in (zoo / TABLE).read_text() for name in names)


# --- the hub ----------------------------------------------------------------------------------------------


def test_what_the_hub_is_told(entry, hub):
    publish(entry, "hf://team", token="hf_writer", tag="v1.0", private=True)
    repo = hub.repos[f"team/{NAME}"]
    assert set(repo.commits[-1][1]) == ALL - {INDEX} and len(repo.commits) == 2, "one commit"
    assert repo.tags == dict.fromkeys(("v1.0", entry.revision[:12]), repo.commits[-1][0])
    assert repo.private and hub.repos["team/embedkit-index"].private
    assert "/api/validate-yaml" in hub.paths("POST")
    hub.requests.clear(), hub.cdn.requests.clear()
    publish(entry, "hf://team", token="hf_writer", tag="v1.0")
    assert not hub.cdn.paths("PUT") and not [path for path in hub.paths("POST") if "/commit/" in path]
    assert all("Authorization" not in headers for _, _, headers in hub.cdn.requests)


def test_a_tag_does_not_move(entry, newer, hub):
    publish(entry, "hf://team", token="hf_writer", tag="v1.0")
    with pytest.raises(ConfigError, match="the tag 'v1.0' is on another version"):
        publish(newer, "hf://team", token="hf_writer", tag="v1.0")
    assert find_entry(f"hf://team/{NAME}@v1.0").revision == entry.revision


def test_a_card_that_the_hub_refuses(by_hand, tmp_path, hub):
    tiny = by_hand.TinyEntry()
    card = b"---\nlicense: not-a-license\n---\n# x\n"
    folder = tiny.write(tmp_path / NAME, {**tiny.files(), "README.md": card})
    with pytest.raises(EntryError, match="refuses its YAML"):
        publish(find_entry(folder), "hf://team", token="hf_writer")
    assert hub.repos == {}


def test_files_that_are_gone_are_removed(entry, by_hand, tmp_path, hub):
    tiny = by_hand.TinyEntry()
    more = find_entry(tiny.write(tmp_path / "more" / NAME, {**tiny.files(), "extra.txt": b"x"}))
    publish(more, "hf://team", token="hf_writer")
    publish(entry, "hf://team", token="hf_writer")
    assert set(hub.repos[f"team/{NAME}"].commits[-1][1]) == ALL - {INDEX}


def test_two_publishers_of_one_index(entry, hub, by_hand, tmp_path, monkeypatch):
    """Somebody commits to the index between our reading and our writing: neither entry is lost."""
    from embedkit.hub.publish import hf as hub_publishing

    other = find_entry(by_hand.TinyEntry(seed=2).write(tmp_path / "o" / "linear-other.noise"))
    plain, done = hub_publishing._commit, []

    def late(zoo, name, content, message, parent):
        if name == "embedkit-index" and not done:
            done.append(1)
            publish(other, "hf://team", token="hf_writer")
        return plain(zoo, name, content, message, parent)

    monkeypatch.setattr(hub_publishing, "_commit", late)
    publish(entry, "hf://team", token="hf_writer")
    assert {row.name for row in list_encoders(zoo="hf://team")} == {NAME, "linear-other.noise"}


def test_the_genuine_client_reads_what_was_published(entry, hub, tmp_path):
    hub_library = pytest.importorskip("huggingface_hub")
    publish(entry, "hf://team", token="hf_writer", tag="v1.0")
    api = hub_library.HfApi(endpoint=hub.url, token=False)
    assert api.model_info(f"team/{NAME}").sha == hub.repos[f"team/{NAME}"].commits[-1][0]
    for revision in ("main", "v1.0", entry.revision[:12]):
        folder = hub_library.snapshot_download(
            f"team/{NAME}", revision=revision, endpoint=hub.url, token=False, cache_dir=tmp_path / "hf"
        )
        assert load_encoder(folder).revision == entry.revision


def test_a_real_entry_loads_with_timm_from_the_hub(hub, default_entry, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    timm = pytest.importorskip("timm")
    hub_library = pytest.importorskip("huggingface_hub")
    publish(find_entry(default_entry), "hf://team", token="hf_writer")
    # timm takes the client's own endpoint, which was read when the client was imported.
    monkeypatch.setattr(hub_library.constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(hub_library.constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(hub_library.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(hub_library.file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    network = timm.create_model(f"hf-hub:team/{default_entry.name}", pretrained=True, cache_dir=tmp_path)
    assert network.num_features == 1280
    ours = load_encoder(f"hf://team/{default_entry.name}", threads=1)
    assert ours.dim == 1280


# --- mirrors ----------------------------------------------------------------------------------------------


def test_a_mirror_between_all_kinds(entry, zoo, hub, s3, site, by_hand, tmp_path, monkeypatch):
    by_hand.TinyEntry(seed=2).write(zoo / "linear-tiny.hum")
    refresh(str(zoo))
    chain = [site.url, "hf://team", s3, str(tmp_path / "folder")]
    for source, to in zip(chain, chain[1:], strict=False):
        token = "hf_writer" if to.startswith("hf") else None
        assert {one.name for one in mirror(source, to, token=token)} == {NAME, "linear-tiny.hum"}
        assert all(not one.files for one in mirror(source, to, token=token)), "a second time writes nothing"
    for path in zoo.rglob("*"):
        if path.is_file():
            assert (tmp_path / "folder" / path.relative_to(zoo)).read_bytes() == path.read_bytes(), path
    assert [one.name for one in mirror(str(zoo), str(tmp_path / "some"), pattern="*.hum")] == [
        "linear-tiny.hum"
    ]


def test_a_copy_of_a_bucket_is_a_zoo(entry, newer, s3, tmp_path):
    import fsspec

    publish(entry, s3)
    publish(newer, s3)
    fsspec.filesystem("s3").get(s3, str(tmp_path / "copy"), recursive=True)
    assert find_entry("linear-tiny", zoo=str(tmp_path / "copy")).revision == newer.revision
    old = find_entry(f"linear-tiny@{entry.revision[:12]}", zoo=str(tmp_path / "copy"))
    assert (old.revision, old.name) == (entry.revision, NAME)


# --- killed -----------------------------------------------------------------------------------------------

PUBLISH = """
import sys, time
from embedkit.hub.mirror import mirror
from embedkit.hub.publish.publish import publish
from embedkit.hub.resolve import find_entry
source, zoo, token = sys.argv[1:]
if zoo.startswith('s3:'):  # the drivers come in first, so that a kill falls into the work
    import fsspec
    fsspec.core.url_to_fs(zoo)[0].exists(zoo)
if zoo.startswith('hf:'):
    from embedkit.hub.hf import HubZoo
    HubZoo('team', token).commit('nothing', 'main')
print('on', flush=True)
started = time.perf_counter()
if source.startswith('mirror:'):
    list(mirror(source.removeprefix('mirror:'), zoo, token=token or None))
else:
    publish(find_entry(source), zoo, token=token or None)
print('done', time.perf_counter() - started, flush=True)
"""


def readable(zoo: str, cache: Path) -> str | None:
    """The revision that a fresh reader gets, every byte of it checked; None when there is none yet."""
    shutil.rmtree(cache, ignore_errors=True)
    if not list_encoders(zoo=zoo):
        return None
    entry = find_entry(NAME, zoo=zoo)
    for name in Manifest.from_json(entry.manifest_bytes).files:
        entry.read(name)
    return entry.revision


def kill_publishers(
    python, sources: list[str], zoo: str, token: str | None, cache: Path, times: int, seed: int
):
    """Publish versions in turn and kill at random moments: a reader always finds a whole version."""
    rng = random.Random(seed)
    ends = {"killed": 0, "done": 0}
    seconds = float(python(PUBLISH, sources[-1], zoo, token or "").split()[-1])  # that a publication takes
    for turn in range(times):
        process = python(PUBLISH, sources[turn % len(sources)], zoo, token or "", wait=False)
        process.stdout.readline()
        time.sleep(rng.uniform(0, seconds))
        process.send_signal(signal.SIGKILL)
        out, _ = process.communicate()
        ends["done" if "done" in out else "killed"] += 1
        assert readable(zoo, cache) is not None, "the old version is gone"
    python(PUBLISH, sources[0], zoo, token or "")
    folder = sources[0].removeprefix("mirror:")
    folder = Path(folder) if (Path(folder) / MANIFEST).exists() else Path(folder) / NAME
    assert readable(zoo, cache) == find_entry(folder).revision
    return ends


def test_what_a_killed_publisher_left_is_taken_away_though_nothing_is_to_write(entry, tmp_path):
    """Killed after the new version replaced it: the old one still lies beside it."""
    to = tmp_path / "published"
    publish(entry, str(to))
    dead = to / f".{NAME}.{'0' * 16}.partial"
    dead.mkdir()
    with replacing_folder(to / NAME) as alive:
        assert publish(entry, str(to)).files == ()
        assert alive.exists() and not dead.exists()


def test_publishers_that_are_killed(to, zoo, newer, python, cache):
    times = int(os.environ.get("EMBEDKIT_TEST_KILLS", "2"))
    sources = [str(zoo / NAME), newer.location]
    ends = kill_publishers(python, sources, *to, cache, times, seed=3)
    print(f"{times} publications to {to[0]}: {ends}")
    if not is_url(to[0]):
        assert sorted(os.listdir(to[0])) == sorted([NAME, INDEX, TABLE])


def test_mirrors_that_are_killed(to, zoo, by_hand, python, cache, tmp_path):
    times = int(os.environ.get("EMBEDKIT_TEST_KILLS", "1"))
    by_hand.TinyEntry(seed=1).write(tmp_path / "second" / NAME)
    by_hand.write_index(tmp_path / "second")
    sources = [f"mirror:{zoo}", f"mirror:{tmp_path / 'second'}"]
    ends = kill_publishers(python, sources, *to, cache, times, seed=4)
    print(f"{times} mirrors to {to[0]}: {ends}")


def test_the_cache_is_not_needed_to_publish(entry, tmp_path, cache):
    publish(entry, str(tmp_path / "p"))
    assert not cache.exists() and Cache(cache).revisions() == []
    assert json.loads((tmp_path / "p" / INDEX).read_bytes())["schema"] == 1
