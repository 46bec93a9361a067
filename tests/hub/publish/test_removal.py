"""What is not embedkit's is neither replaced nor deleted, wherever embedkit writes or removes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from embedkit.errors import ConfigError, OutputError
from embedkit.hub.listing import list_encoders
from embedkit.hub.publish.index import TABLE, update_index
from embedkit.hub.publish.publish import publish, refresh, unpublish
from embedkit.hub.resolve import find_entry
from embedkit.model.layout import INDEX, MANIFEST

NAME = "linear-tiny.noise"


@pytest.fixture
def entry(zoo):
    return find_entry(zoo / NAME)


@pytest.fixture
def to(entry, tmp_path):
    """A folder in which the entry was published."""
    publish(entry, str(tmp_path / "to"))
    return tmp_path / "to"


@pytest.mark.parametrize("other", ["notes.txt", "model.onnx.bak", ".git/config", "Card.md"])
def test_an_entry_with_other_files_in_its_folder_is_not_removed(to, other):
    (to / NAME / other).parent.mkdir(exist_ok=True)
    (to / NAME / other).write_text("precious")
    before = sorted(to.rglob("*"))
    with pytest.raises(ConfigError, match="which is not part of the entry: move it away"):
        unpublish(NAME, str(to))
    assert sorted(to.rglob("*")) == before and (to / NAME / other).read_text() == "precious"
    assert [row.name for row in list_encoders(zoo=str(to))] == [NAME]


def test_a_folder_that_is_no_entry_is_not_removed(to):
    (to / "linear-mine.noise").mkdir()
    (to / "linear-mine.noise" / "a.txt").write_text("precious")
    with pytest.raises(ConfigError, match="holds no entry"):
        unpublish("linear-mine.noise", str(to))
    assert (to / "linear-mine.noise" / "a.txt").read_text() == "precious"


def test_of_a_link_the_link_is_removed(to, zoo, entry):
    (to / "linear-link.noise").symlink_to(zoo / NAME)
    update_index(to)
    unpublish("linear-link.noise", str(to))
    assert not (to / "linear-link.noise").is_symlink()
    assert all(entry.read(name) for name in entry.manifest.files)


def test_a_removal_is_whole_or_can_be_repeated(to):
    """Killed between the folder and the index: the next removal ends it."""
    code = (
        "import os, signal, sys, pathlib\nimport embedkit.hub.publish.index as index\n"
        "index.write_file = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "from embedkit.hub.publish.publish import unpublish\nunpublish(sys.argv[1], sys.argv[2])"
    )
    killed = subprocess.run([sys.executable, "-c", code, NAME, str(to)], timeout=60)
    assert killed.returncode == -signal.SIGKILL and not (to / NAME).exists()
    assert [row.name for row in list_encoders(zoo=str(to))] == [NAME]
    unpublish(NAME, str(to))
    assert list_encoders(zoo=str(to)) == [] and sorted(os.listdir(to)) == [TABLE, INDEX]


@pytest.mark.parametrize("name", [TABLE, INDEX, "quality-digits.svg"])
@pytest.mark.parametrize("content", ["# My own words\n", "", '{"mine": 1}', "<svg>mine</svg>"])
def test_a_file_written_by_hand_is_refused_not_replaced(
    to, entry, by_hand, tmp_path, name, content, monkeypatch
):
    monkeypatch.setattr(
        "embedkit.hub.publish.index.pages", lambda index: {TABLE: b"# new", "quality-digits.svg": b"new"}
    )
    (to / name).write_text(content)
    other = by_hand.TinyEntry(seed=4).write(tmp_path / "linear-other.noise")
    for act in (
        lambda: publish(find_entry(other), str(to)),
        lambda: unpublish(NAME, str(to)),
        lambda: refresh(str(to)),
        lambda: update_index(to),
    ):
        with pytest.raises(
            (ConfigError, OutputError), match="would be overwritten|was not written by embedkit"
        ):
            act()
    assert (to / name).read_text() == content
    assert (to / NAME / MANIFEST).is_file() and not (to / "linear-other.noise").exists()


def test_a_table_with_other_line_ends_is_still_ours(to):
    """Git may change them in a checkout."""
    text = (to / TABLE).read_bytes()
    (to / TABLE).write_bytes(text.replace(b"\n", b"\r\n"))
    update_index(to)
    assert (to / TABLE).read_bytes() == text


def test_of_a_bucket_only_what_was_published_is_removed(entry, by_hand, tmp_path, s3):
    publish(entry, s3)
    newer = by_hand.TinyEntry(seed=1).write(tmp_path / "newer" / NAME)
    publish(find_entry(newer), s3)
    fsspec = pytest.importorskip("fsspec")
    store, root = fsspec.url_to_fs(s3, use_listings_cache=False)
    unfinished = f"{root}/{NAME}/0123456789ab/model.onnx"  # of a publisher that was killed
    store.pipe_file(unfinished, b"half")
    store.pipe_file(f"{root}/linear-tiny.noise2/a", b"another folder")
    for other in ("notes.txt", f"{entry.revision[:12]}/notes.doc", "mine/model.onnx"):
        store.pipe_file(f"{root}/{NAME}/{other}", b"precious")
        before = store.find(root)
        with pytest.raises(ConfigError, match="which is not part of the entry: move it away"):
            unpublish(NAME, s3)
        assert store.find(root) == before and len(list_encoders(zoo=s3)) == 1
        store.rm_file(f"{root}/{NAME}/{other}")
    unpublish(NAME, s3)
    assert store.find(root) == [f"{root}/{INDEX}", f"{root}/linear-tiny.noise2/a"]


def test_a_repository_of_another_model_is_not_replaced(entry, hub):
    import servers

    mine = {"README.md": b"my model", "config.json": b"{}"}
    hub.repos[f"team/{NAME}"] = servers.Repo(commits=[("1" * 40, mine)])
    with pytest.raises(ConfigError, match="holds config.json and is not an entry of embedkit"):
        publish(entry, "hf://team", token="hf_writer")
    assert hub.repos[f"team/{NAME}"].commits == [("1" * 40, mine)]
