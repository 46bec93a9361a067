"""The command line over zoos: what it prints, what it asks for, and how it ends."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tarfile
import warnings

from PIL import Image

from embedkit.embeddings.table import Embeddings
from embedkit.encoder import load_encoder
from embedkit.hub.publish.publish import publish
from embedkit.hub.resolve import find_entry

NAME, ALIAS = "linear-tiny.noise", "linear-tiny"


def test_pull_shows_the_license_first(run, site):
    status, out, err = run("zoo", "pull", ALIAS, "--zoo", site.url)
    assert status == 0 and err == f"embedkit: {NAME} from {site.url}: 0.0 MB, license CC0-1.0\n"
    head, line = out.splitlines()
    assert head == "entry\trevision\tMB\tlicense\tfolder"
    name, revision, _, license, location = line.split("\t")
    assert (name, license) == (NAME, "CC0-1.0") and len(revision) == 12 and os.path.isdir(location)
    status, out, err = run("zoo", "pull", "--zoo", site.url, "--json")
    assert status == 0 and err == "" and json.loads(out)[0]["name"] == NAME


def test_pull_of_a_non_commercial_entry(run, site, zoo, by_hand):
    entry = by_hand.TinyEntry()
    entry.config = dataclasses.replace(entry.config, license="CC-BY-NC-4.0")
    entry.write(zoo / NAME)
    by_hand.write_index(zoo)
    status, out, err = run("zoo", "pull", f"{site.url}/{NAME}")
    assert status == 1 and out == "" and "--accept-license" in err and "license CC-BY-NC-4.0" in err
    assert run("zoo", "pull", f"{site.url}/{NAME}", "--accept-license")[0] == 0
    assert load_encoder(f"{site.url}/{NAME}").dim == 4


def test_pull_and_the_lock_file(run, site, zoo, by_hand, tmp_path):
    url = f"{site.url}/{NAME}"
    assert run("zoo", "pull", url, "--lock")[0] == 0
    old = json.loads((tmp_path / "work" / "embedkit.lock").read_text())["entries"][url]["manifest_sha256"]
    by_hand.TinyEntry(seed=1).write(zoo / NAME)
    by_hand.write_index(zoo)
    assert run("zoo", "evict", NAME)[1] == f"entry\n{NAME}@{old[:12]}\n"
    status, _, err = run("zoo", "pull", url)
    assert status == 1 and f"to move the pin: embedkit zoo pull {url}@latest --lock" in err
    assert run("zoo", "pull", f"{url}@latest", "--lock")[0] == 0
    assert run("zoo", "pull", url)[0] == 0


def test_list_filters(run, zoo, by_hand, site):
    entry = by_hand.TinyEntry(dim=7, seed=1)
    entry.config = dataclasses.replace(
        entry.config, method="other", license="MIT", data="Photographs of cats"
    )
    entry.write(zoo / "other-r18.cats")
    by_hand.write_index(zoo)
    both = {NAME, "other-r18.cats"}
    for words, expected in (
        ([], both), (["--method", "oth"], {"other-r18.cats"}), (["--dim", "4"], {NAME}),
        (["--license", "mit"], {"other-r18.cats"}), (["--trained-on", "CATS"], {"other-r18.cats"}),
        (["--architecture", "linear"], both), (["--method", "x"], set()), (["*.noise", "--dim", "7"], set()),
    ):  # fmt: skip
        for uri in (zoo, site.url):
            status, out, _ = run("zoo", "list", "--zoo", uri, "--json", *words)
            assert status == 0 and {row["name"] for row in json.loads(out)} == expected, words


def test_info_and_verify_of_a_zoo(run, site, hub, zoo):
    publish(find_entry(zoo / NAME), "hf://team", token="hf_writer", private=True)
    status, out, _ = run("zoo", "info", ALIAS, "--zoo", site.url)
    assert status == 0 and "# A tiny entry" in out
    assert run("zoo", "info", f"hf://team/{NAME}")[0] == 1
    status, out, _ = run("zoo", "info", f"hf://team/{NAME}", "--token", "hf_reader", "--json")
    assert status == 0 and json.loads(out)["name"] == NAME
    status, out, _ = run("zoo", "verify", "--zoo", site.url)
    assert status == 0 and out.splitlines()[1].startswith(f"ok\t{NAME}\t5\t0.0\t")


def test_a_private_encoder_needs_the_token_in_every_command(run, hub, zoo, tmp_path):
    publish(find_entry(zoo / NAME), "hf://team", token="hf_writer", private=True)
    for name in "abc":
        Image.new("RGB", (8, 8), (ord(name), 9, 0)).save(f"{name}.png")
    private = ("--encoder", f"hf://team/{NAME}")
    for words in (
        ("embed", "a.png", "b.png", "-o", "e.parquet", *private),
        ("verify", "a.png", "b.png", "--threshold", 0.5, *private),
        ("search", "c.png", "e.parquet", *private),
    ):
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        status, out, err = run(*words)
        assert (status, out) == (1, "") and err.endswith("; a private one needs a token\n")
        status, _, err = run(*words, "--token", "hf_reader")
        assert status == 0, err
    assert Embeddings.load("e.parquet").metadata.entry == NAME


def test_publish(run, zoo, tmp_path, hub, monkeypatch):
    status, out, _ = run("publish", zoo / NAME, "--to", tmp_path / "p")
    assert status == 0 and out.startswith(f"zoo\tentry\trevision\tfiles written\n{tmp_path / 'p'}\t{NAME}\t")
    assert "model.safetensors" in out and "index.json" in out
    assert run("publish", zoo / NAME, "--to", tmp_path / "p")[1].endswith("\t\n")  # all was there
    assert run("publish", "--to", tmp_path / "p")[1] == f"zoo\tentries\n{tmp_path / 'p'}\t1\n"
    monkeypatch.setenv("EMBEDKIT_TOKEN", "hf_writer")
    status, out, err = run("publish", zoo / NAME, "--to", "hf://team", "--tag", "v1", "--private", "--json")
    assert status == 0 and json.loads(out)["version"] == hub.repos[f"team/{NAME}"].tags["v1"]
    status, _, err = run("publish", zoo / NAME, "--to", "https://example.org/zoo")
    assert status == 1 and "a web site cannot be written" in err


def test_mirror_unpublish_and_evict(run, site, tmp_path):
    status, out, _ = run("zoo", "mirror", "--to", tmp_path / "copy", "--zoo", site.url)
    assert status == 0 and f"\t{NAME}\t" in out and "model.safetensors" in out
    assert run("zoo", "mirror", "--to", tmp_path / "copy", "--zoo", site.url)[1].endswith("\t\n")
    assert run("zoo", "evict", NAME)[0] == 0
    assert len(json.loads(run("zoo", "list", "--zoo", tmp_path / "copy", "--json")[1])) == 1
    gone = run("zoo", "unpublish", NAME, "--zoo", tmp_path / "copy")[1]
    assert gone == f"entry\n{tmp_path / 'copy'}/{NAME}\n"
    assert run("zoo", "list", "--zoo", tmp_path / "copy", "--json")[1] == "[]\n"
    assert load_encoder(f"{site.url}/{NAME}").dim == 4, "another zoo is not touched"
    status, _, err = run("zoo", "evict", "linear-nothing.noise")
    assert status == 1 and "is not in the cache" in err
    assert run("zoo", "evict", "../x")[0] == 1


def test_evicting_writes_to_no_zoo_and_unpublishing_needs_one(run, zoo, monkeypatch):
    """The one command cannot do the work of the other by a forgotten or a doubled option."""
    monkeypatch.setenv("EMBEDKIT_ZOO", str(zoo))
    assert run("zoo", "unpublish", NAME)[0] == 2 and run("zoo", "evict", NAME, "--zoo", zoo)[0] == 2
    assert run("zoo", "evict", NAME)[0] == 1 and (zoo / NAME / "manifest.json").is_file()


def test_a_bundle_goes_to_a_machine_without_a_network(run, site, python, tmp_path, monkeypatch):
    out = tmp_path / "zoo.tar"
    assert run("zoo", "bundle", "--zoo", site.url, "-o", out)[0] == 0
    first = out.read_bytes()
    run("zoo", "bundle", f"{site.url}/{NAME}", "-o", out)
    assert out.read_bytes() == first, "the same entries give the same bytes"
    with tarfile.open(out) as archive:
        assert "index.json" in archive.getnames() and all(member.mtime == 0 for member in archive)
    site.close()
    monkeypatch.setenv("EMBEDKIT_CACHE", str(tmp_path / "there"))
    assert run("zoo", "pull", out)[0] == 0
    monkeypatch.setenv("EMBEDKIT_ZOO", str(out))
    program = (
        "import embedkit; print(embedkit.load_encoder('linear-tiny', threads=1, local_files_only=True).dim)"
    )
    assert python(program, sockets=False) == "4\n"
    status, _, err = run("zoo", "bundle", "--zoo", out, "-o", tmp_path / "zoo.zip")
    assert status == 2 and "ends in .tar" in err


def test_a_zoo_that_is_down_is_said_on_stderr(run, site):
    run("zoo", "pull", f"{site.url}/{NAME}")
    site.close()
    with warnings.catch_warnings():
        warnings.simplefilter("always")  # pytest makes errors of them
        status, out, err = run("zoo", "info", f"{site.url}/{NAME}")
    assert status == 0 and "# A tiny entry" in out
    assert err.startswith("embedkit: warning: http://127.0.0.1") and "comes from the cache" in err
    status, _, err = run("zoo", "info", f"{site.url}/linear-other.noise")
    assert status == 1 and "no answer (Connection refused)" in err
