"""The same entry from every kind of zoo: bit-equal, and a second time without a socket."""

from __future__ import annotations

import errno
import json
import logging
import re
import shutil
import sys

import numpy as np
import pytest
import servers
from PIL import Image

from embedkit.encoder import load_encoder
from embedkit.errors import (
    AccessError,
    ConfigError,
    EntryNotFoundError,
    IntegrityError,
    MissingDependencyError,
    UnreachableError,
)
from embedkit.hub.listing import list_encoders
from embedkit.hub.publish.publish import publish
from embedkit.hub.resolve import find_entry
from embedkit.model.layout import MANIFEST

NAME, ALIAS = "linear-tiny.noise", "linear-tiny"
IMAGE = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)

EMBED = """
import sys, numpy, embedkit
encoder = embedkit.load_encoder(sys.argv[1], threads=1)
rows = encoder.encode(numpy.arange(8 * 8 * 3, dtype=numpy.uint8).reshape(8, 8, 3))
print(encoder.revision, rows.tobytes().hex())
"""

#: Loads, and then loads again in three ways with sockets forbidden; no torch at any time.
TWICE = """
import os, sys, numpy, embedkit
image = numpy.arange(20 * 30 * 3).astype(numpy.uint8).reshape(20, 30, 3)
def rows(name, **options):
    encoder = embedkit.load_encoder(name, threads=1, **options)
    return f"{encoder.revision} {encoder.encode(image).tobytes().hex()}"
first = rows(sys.argv[1])
def refuse(event, _):
    if event in ("socket.__new__", "socket.connect", "socket.getaddrinfo"):
        raise RuntimeError(f"a forbidden {event}")
sys.addaudithook(refuse)
again = [rows(sys.argv[1], local_files_only=True), rows(sys.argv[1], revision=first[:12])]
os.environ["HF_HUB_OFFLINE"] = "1"
assert [*again, rows(sys.argv[1])] == [first] * 3
assert 'torch' not in sys.modules
print(first)
"""


@pytest.fixture(scope="module")
def expected():
    """What `TWICE` prints for an entry: reckoned here, from its folder."""

    def reckon(folder) -> str:
        encoder = load_encoder(folder, threads=1)
        image = np.arange(20 * 30 * 3).astype(np.uint8).reshape(20, 30, 3)
        return f"{encoder.revision} {encoder.encode(image).tobytes().hex()}\n"

    return reckon


@pytest.fixture
def uri(request, zoo, tmp_path):
    """The URL of a zoo of a kind, with the entry in it."""
    kind = request.param
    if kind == "folder":
        return str(zoo)
    if kind == "file url":
        return zoo.as_uri()
    if kind == "site":
        return request.getfixturevalue("site").url
    if kind == "archive":
        from embedkit.hub.bundle import write_archive

        write_archive([find_entry(zoo / NAME)], tmp_path / "zoo.tar")
        return str(tmp_path / "zoo.tar")
    to = {"hub": "hf://team", "s3": "", "memory": ""}[kind]
    if kind == "hub":
        request.getfixturevalue("hub")
    elif kind == "s3":
        to = request.getfixturevalue("s3")
    publish(find_entry(zoo / NAME), to, token="hf_writer" if kind == "hub" else None)
    return to


KINDS = pytest.mark.parametrize("uri", ["folder", "file url", "site", "archive", "s3", "hub"], indirect=True)


@KINDS
def test_every_kind_of_zoo_gives_the_same_bits_and_a_second_time_without_a_socket(
    uri, zoo, python, expected, monkeypatch
):
    monkeypatch.setenv("EMBEDKIT_ZOO", uri)
    assert python(TWICE, ALIAS) == expected(zoo / NAME)
    entry = find_entry(ALIAS)
    assert (entry.manifest_bytes, entry.name) == ((zoo / NAME / MANIFEST).read_bytes(), NAME)


def test_another_process_needs_no_socket(site, zoo, hub, python, monkeypatch):
    publish(find_entry(zoo / NAME), "hf://team", token="hf_writer")
    for url in (f"{site.url}/{NAME}", f"hf://team/{NAME}"):
        revision = find_entry(url).revision
        assert revision in python(EMBED, f"{url}@{revision[:12]}", sockets=False)  # pinned: nothing to ask
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert revision in python(EMBED, url, sockets=False)
        monkeypatch.delenv("HF_HUB_OFFLINE")


def test_urls_of_entries(site, zoo, hub):
    publish(find_entry(zoo / NAME), "hf://team", token="hf_writer", tag="v1.0")
    local = find_entry(zoo / NAME)
    revision = local.revision
    commit = hub.repos[f"team/{NAME}"].commits[-1][0]
    for url in (
        f"{site.url}/{NAME}", f"{site.url}/{ALIAS}", f"{site.url}/{NAME}@{revision[:12]}", f"hf://team/{NAME}",
        f"hf://team/{ALIAS}", *(f"hf://team/{NAME}@{r}" for r in ("v1.0", commit, revision[:12], revision, "main")),
    ):  # fmt: skip
        assert load_encoder(url).revision == revision, url
    rows = load_encoder(f"hf://team/{NAME}", revision="v1.0").encode(IMAGE)
    assert (rows == load_encoder(zoo / NAME).encode(IMAGE)).all()


def test_a_name_may_have_a_tag_where_a_zoo_has_tags(zoo, hub, monkeypatch):
    publish(find_entry(zoo / NAME), "hf://team", token="hf_writer", tag="v1.0")
    monkeypatch.setenv("EMBEDKIT_ZOO", "hf://team")
    assert find_entry(f"{ALIAS}@v1.0").name == NAME
    with pytest.raises(EntryNotFoundError, match="has no revision v2.0"):
        find_entry(f"{ALIAS}@v2.0")
    monkeypatch.setenv("EMBEDKIT_ZOO", str(zoo))
    with pytest.raises(ConfigError, match="expected at least 12 hex digits"):
        find_entry(f"{ALIAS}@v1.0")


def test_an_entry_on_a_site_without_an_index(site, zoo):
    (zoo / "index.json").unlink()
    assert find_entry(f"{site.url}/{NAME}").name == NAME
    with pytest.raises(EntryNotFoundError, match="has no entry 'linear-tiny'"):
        find_entry(f"{site.url}/{ALIAS}")


def test_old_revisions_stay_where_zoos_keep_them(zoo, hub, s3, by_hand, tmp_path):
    old = find_entry(zoo / NAME).revision
    by_hand.TinyEntry(seed=1).write(tmp_path / "new" / NAME)
    for to, token in (("hf://team", "hf_writer"), (s3, None)):
        publish(find_entry(zoo / NAME), to, token=token)
        done = publish(find_entry(tmp_path / "new" / NAME), to, token=token)
        assert find_entry(f"{to}/{NAME}").revision == done.manifest_sha256 != old
        assert find_entry(f"{to}/{NAME}@{old[:12]}").revision == old
        with pytest.raises(EntryNotFoundError, match="has no revision " + "0" * 12):
            find_entry(f"{to}/{NAME}@{'0' * 12}")


# --- tokens -----------------------------------------------------------------------------------------------


def tokens_seen(server) -> set[str]:
    return {headers["Authorization"] for _, _, headers in server.requests if "Authorization" in headers}


def test_a_private_repository_needs_the_token(zoo, hub):
    publish(find_entry(zoo / NAME), "hf://team", private=True, token="hf_writer")
    assert hub.repos[f"team/{NAME}"].private
    with pytest.raises(EntryNotFoundError, match="a private one needs a token"):
        find_entry(f"hf://team/{NAME}")
    assert load_encoder(f"hf://team/{NAME}", token="hf_reader").dim == 4
    assert tokens_seen(hub) == {"Bearer hf_writer", "Bearer hf_reader"}
    assert hub.cdn.paths() and tokens_seen(hub.cdn) == set(), "the token went to another origin"


def test_the_environments_token_stays_with_huggingface_co(zoo, hub, monkeypatch):
    publish(find_entry(zoo / NAME), "hf://team", token="hf_writer")
    hub.requests.clear()
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    load_encoder(f"hf://team/{NAME}")
    assert tokens_seen(hub) == set()


def test_a_sites_token_goes_nowhere_else(site, zoo, tmp_path, monkeypatch, capsys):
    site.token = "letmein"
    with pytest.raises(AccessError, match="access is refused \\(401\\)"):
        find_entry(f"{site.url}/{NAME}")
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    other = servers.site(zoo, "localhost")
    try:
        site.moved_to = other.url
        assert load_encoder(f"{site.url}/{NAME}", token="letmein").dim == 4
        assert tokens_seen(site) == {"Bearer letmein"} and other.paths() and tokens_seen(other) == set()
        same_host = servers.site(zoo)  # another port is another origin
        site.moved_to = same_host.url
        shutil.rmtree(tmp_path / "cache")
        load_encoder(f"{site.url}/{NAME}", token="letmein")
        assert same_host.paths() and tokens_seen(same_host) == set()
        same_host.close()
    finally:
        other.close()


def test_a_token_stands_in_no_error_and_no_repr(site):
    from embedkit.hub.access import Access
    from embedkit.storage.http import WebStorage

    site.token = "other"
    with pytest.raises(AccessError) as caught:
        load_encoder(f"{site.url}/{NAME}", token="letmein")
    texts = [
        str(caught.value),
        repr(caught.value),
        repr(Access(token="letmein")),
        repr(WebStorage(site.url, "letmein")),
    ]
    assert not any("letmein" in text for text in texts)
    with pytest.raises(ConfigError, match="the token has characters") as caught:
        load_encoder(f"{site.url}/{NAME}", token="secret\r\nX-Evil: 1")
    assert "secret" not in str(caught.value)


def told(caplog) -> str:
    """The one warning that was logged since the last call."""
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.name.startswith("embedkit.hub.")
    caplog.clear()
    return record.getMessage()


# --- down, offline, lists ---------------------------------------------------------------------------------


def test_a_hub_that_is_down_and_an_entry_in_the_cache(zoo, hub, monkeypatch, caplog):
    publish(find_entry(zoo / NAME), "hf://team", token="hf_writer")
    first = load_encoder(f"hf://team/{NAME}")
    monkeypatch.setenv("EMBEDKIT_ZOO", "hf://team")
    load_encoder(ALIAS)
    list_encoders()
    hub.close()
    again = load_encoder(f"hf://team/{NAME}")
    assert re.search("hf://team is down .* comes from the cache", told(caplog))
    assert (again.encode(IMAGE) == first.encode(IMAGE)).all()
    assert load_encoder(ALIAS).revision == first.revision
    assert "is down" in told(caplog)
    assert NAME in {row.name for row in list_encoders()}
    assert "using its last list from the cache" in told(caplog)
    with pytest.raises(UnreachableError, match="no answer"):
        load_encoder("hf://team/linear-other.noise")


def test_a_site_that_is_down_and_an_entry_in_the_cache(site, caplog):
    revision = load_encoder(f"{site.url}/{NAME}").revision
    site.close()
    assert load_encoder(f"{site.url}/{NAME}").revision == revision
    assert "is down" in told(caplog)


def test_a_zoo_that_is_down_does_not_silently_give_way_to_another(site, by_hand, tmp_path, monkeypatch):
    by_hand.TinyEntry(seed=3).write(tmp_path / "other" / NAME)
    monkeypatch.setenv("EMBEDKIT_ZOO", f"{site.url},{tmp_path / 'other'}")
    site.close()
    with pytest.raises(UnreachableError):
        find_entry(ALIAS)


def test_offline_and_not_in_the_cache_says_so(site, python):
    message = python(
        "import sys, embedkit\ntry: embedkit.load_encoder(sys.argv[1], local_files_only=True)\n"
        "except embedkit.EntryNotFoundError as error: print(error)",
        f"{site.url}/{NAME}",
        sockets=False,
    )
    assert "is not in the cache, and no connection may be opened" in message


def test_a_list_of_a_remote_zoo(site, hub, zoo, monkeypatch):
    publish(find_entry(zoo / NAME), "hf://team", token="hf_writer")
    for uri in (site.url, "hf://team"):
        (row,) = list_encoders(zoo=uri)
        # The second zoo has the same bytes as the first, and so they are at hand already.
        assert (row.name, row.alias, row.zoo, row.at_hand) == (NAME, ALIAS, uri, uri != site.url)
        find_entry(ALIAS, zoo=uri)
        assert list_encoders(zoo=uri)[0].at_hand
        monkeypatch.setenv("EMBEDKIT_ZOO", uri)
        assert uri in {row.zoo for row in list_encoders()}


def test_the_default_encoder_asks_no_zoo(site, monkeypatch, python):
    monkeypatch.setenv("EMBEDKIT_ZOO", site.url)
    assert "1280" in python("import embedkit; print(embedkit.load_encoder(threads=1).dim)", sockets=False)


def test_cache_dir(site, tmp_path):
    load_encoder(f"{site.url}/{NAME}", cache_dir=tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / "zoo" / "entries").is_dir() and not (tmp_path / "cache").exists()


def test_an_encoder_from_a_site_can_be_pickled(site, python):
    import pickle

    encoder = load_encoder(f"{site.url}/{NAME}")
    site.close()
    assert (pickle.loads(pickle.dumps(encoder)).encode(IMAGE) == encoder.encode(IMAGE)).all()


def test_a_missing_extra_gives_the_line_that_installs_it(monkeypatch):
    for module, url in (("huggingface_hub", "hf://team/a-b.c"), ("fsspec.core", "s3://bucket/zoo/a-b.c")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(MissingDependencyError, match=r"pip install '\.\[hub\]'"):
            find_entry(url)


def test_a_protocol_that_nobody_knows():
    pytest.importorskip("fsspec")
    with pytest.raises(ConfigError, match="fsspec has no file system for nosuch://"):
        find_entry("nosuch://bucket/zoo/a-b.c")


# --- the lock file ----------------------------------------------------------------------------------------


def test_the_lock_file(site, zoo, by_hand, tmp_path):
    lock = tmp_path / "work" / "embedkit.lock"
    url = f"{site.url}/{NAME}"
    revision = find_entry(url).revision
    assert not lock.exists(), "nobody asked for one"
    find_entry(url, lock=True)
    assert json.loads(lock.read_text())["entries"] == {
        url: {"zoo": site.url, "revision": revision, "manifest_sha256": revision}
    }
    by_hand.TinyEntry(seed=1).write(zoo / NAME)
    by_hand.write_index(zoo)
    assert find_entry(url).revision == revision, "the pinned version is in the cache"
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(IntegrityError, match=f"embedkit.lock pins {revision[:12]}"):
        find_entry(url)
    new = find_entry(f"{url}@latest").revision
    assert new != revision
    with pytest.raises(IntegrityError, match="to move the pin: embedkit zoo pull"):
        find_entry(f"{url}@{new}")
    assert find_entry(f"{url}@latest", lock=True).revision == new
    assert find_entry(url).revision == new
    assert json.loads(lock.read_text())["entries"][url]["manifest_sha256"] == new
    lock.write_text("{")
    with pytest.raises(ConfigError, match="fix or remove it"):
        find_entry(url)


def test_the_lock_file_is_written_only_when_asked(site, tmp_path, monkeypatch, run):
    """Also where `EMBEDKIT_LOCK` names one that is not there, and by no command without --lock."""
    url = f"{site.url}/{NAME}"
    empty = '{"schema": 1, "entries": {}}'
    lock, other = tmp_path / "work" / "embedkit.lock", tmp_path / "other.lock"
    lock.write_text(empty)
    Image.new("RGB", (8, 8)).save("a.png")

    def load():
        load_encoder(url)
        assert run("embed", "a.png", "--encoder", url, "-o", "a.parquet", "--overwrite")[0] == 0
        assert run("zoo", "pull", url)[0] == run("zoo", "info", url)[0] == 0

    load()
    assert lock.read_text() == empty
    monkeypatch.setenv("EMBEDKIT_LOCK", str(other))
    load()
    assert not other.exists()
    assert run("embed", "a.png", "--encoder", url, "-o", "b.parquet", "--lock")[0] == 0
    assert set(json.loads(other.read_text())["entries"]) == {url}
    assert lock.read_text() == empty


def test_a_lock_file_that_cannot_be_written_is_still_read(site, tmp_path, run, monkeypatch):
    """As in a folder that is mounted read-only: what is pinned is held, what is not loads, and --lock says why not."""
    url = f"{site.url}/{NAME}"
    (tmp_path / "work" / "embedkit.lock").write_text('{"schema": 1, "entries": {}}')
    Image.new("RGB", (8, 8)).save("a.png")

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("embedkit.hub.lockfile.locked", refuse)
    monkeypatch.setattr("embedkit.hub.lockfile.write_file", refuse)
    words = ("embed", "a.png", "--encoder", url, "-o", "a.parquet")
    assert run(*words)[0] == 0
    status, _, err = run(*words, "--lock")
    assert status == 1 and "embedkit.lock cannot be written (Read-only file system)" in err


def test_the_lock_file_brings_an_old_version_from_a_zoo_that_keeps_it(
    hub, zoo, by_hand, tmp_path, monkeypatch
):
    publish(find_entry(zoo / NAME), "hf://team", token="hf_writer")
    monkeypatch.setenv("EMBEDKIT_LOCK", str(tmp_path / "pins.lock"))
    old = find_entry(f"hf://team/{NAME}", lock=True)
    pin = json.loads((tmp_path / "pins.lock").read_text())["entries"][f"hf://team/{NAME}"]
    assert pin["revision"] == hub.repos[f"team/{NAME}"].commits[-1][0]
    by_hand.TinyEntry(seed=1).write(tmp_path / "new" / NAME)
    publish(find_entry(tmp_path / "new" / NAME), "hf://team", token="hf_writer")
    shutil.rmtree(tmp_path / "cache")
    assert find_entry(f"hf://team/{NAME}").revision == old.revision


def test_the_packages_entry_from_everywhere(default_entry, hub, s3, python, expected, tmp_path, monkeypatch):
    """The entry that the wheel carries, published to the four other kinds of zoo and read without torch."""
    rows = expected(default_entry)
    folder = str(tmp_path / "published")
    for to, token in ((folder, None), (s3, None), ("hf://team", "hf_writer")):
        publish(find_entry(default_entry), to, token=token)
    server = servers.site(tmp_path / "published")
    try:
        for uri in (folder, server.url, s3, "hf://team"):
            monkeypatch.setenv("EMBEDKIT_CACHE", str(tmp_path / f"cache of {uri[:2]}"))
            assert python(TWICE, f"{uri}/{default_entry.name}") == rows, uri
    finally:
        server.close()


def test_what_huggingface_hubs_own_cache_holds_serves_offline(zoo, hub, tmp_path, python, monkeypatch):
    client = pytest.importorskip("huggingface_hub")
    publish(find_entry(zoo / NAME), "hf://team", token="hf_writer")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf home"))
    client.snapshot_download(
        f"team/{NAME}", endpoint=hub.url, token=False, cache_dir=tmp_path / "hf home" / "hub"
    )
    offline = EMBED.replace("threads=1", "threads=1, local_files_only=True")
    assert find_entry(zoo / NAME).revision in python(offline, f"hf://team/{NAME}", sockets=False)
