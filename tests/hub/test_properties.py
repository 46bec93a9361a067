"""Properties over any input: names and URLs, manifests and their paths, and the machine that resumes downloads."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from embedkit.errors import ConfigError, EmbedkitError, EntryError, IntegrityError, UnreachableError
from embedkit.hub import download as machine
from embedkit.hub.catalog import Index
from embedkit.hub.limits import check_file_list
from embedkit.hub.urls import parse_entry, parse_zoo
from embedkit.model.layout import MANIFEST, check_file_name, sha256_hex
from embedkit.model.manifest import FileRecord, Manifest

NASTY = st.sampled_from(
    ["..", ".", "/", "\\", "\0", "%2e", "@", "::", "://", "~", "con", "CON.txt", "\u202e", "а", "a" * 300, ":", "?",
     "#", " "]
)  # fmt: skip
TEXT = st.lists(
    st.one_of(st.text(max_size=6), NASTY, st.sampled_from(["hf", "https", "s3", "zoo", "a-b.c"])), max_size=8
)


@given(TEXT.map("".join))
def test_a_file_name_that_passes_stays_in_its_folder(name):
    try:
        check_file_name(name, "x")
    except EntryError:
        return
    folder = Path("/cache/entry")
    assert (folder / name).resolve().parent == folder and (folder / name).name == name
    assert name.isascii() and name.isprintable() and not set(name) & set('/\\:*?"<>| ')


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "C:\\x", "\\\\host\\x", "a\\..\\b", "a/../b", "a\0b", "x" * 130, "con", "NUL.txt",
     "aux.json", "com1.onnx", "a.", ".hidden", "", " ", "a b", "\u202egpj.exe", "modеl.onnx", "a/b", "..", ".",
     "file:x", "a..b"],
)  # fmt: skip
def test_file_names_that_never_pass(name):
    with pytest.raises(EntryError, match="is not a usable file name"):
        check_file_name(name, "x")
    files = {"config.json": 1, "model.onnx": 1, "model.safetensors": 1, name: 1}
    text = json.dumps({"schema": 1, "files": {n: {"size": s, "sha256": "0" * 64} for n, s in files.items()}})
    with pytest.raises(EntryError):
        Manifest.from_json(text.encode())


@given(st.tuples(st.sampled_from(["hf", "https", "http", "s3", "file", "x y", ""]), TEXT.map("".join)))
def test_a_url_is_taken_apart_or_refused(parts):
    url = "://".join(parts)
    for parse in (parse_entry, parse_zoo):
        try:
            address = parse(url)
        except ConfigError as error:
            assert "\n" not in str(error) and "\0" not in str(error)
            continue
        assert parse(str(address)) == address
        if address.scheme != "file":
            inner = f"{address.zoo}/{address.name}".partition("://")[2]
            assert ".." not in inner.split("/") and not set(inner) & set("\\@?#%\0 \n")
        if address.scheme == "http":
            assert re.match(r"http://(localhost|127\.|\[::1\])", address.zoo)


@pytest.mark.parametrize(
    "url",
    ["hf://", "hf://a/b/c", "hf://../x", "hf://a--b/x-y.z", "hf://org/na me", "https:///x/y", "https://u:p@h/x", "https://h/../x",
     "https://h/%2e%2e/x", "https://h:99999/x/y", "https://h/x?y=1/z", "http://example.org/z/x", "s3://b/../x", "s3://b//x",
     "simplecache::s3://b/x", "HTTPS://h/x/y", "s3://b/x@", "s3://b/x@a/b", "hf://org/x@..", "https://h\\@evil/x/y"],
)  # fmt: skip
def test_urls_of_entries_that_never_pass(url):
    with pytest.raises(ConfigError):
        parse_entry(url)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
RECORD = st.fixed_dictionaries(
    {"size": st.integers(-5, 2**70) | JSON, "sha256": st.sampled_from(["0" * 64, "0" * 63, "G" * 64]) | JSON}
)
NAMES = st.sampled_from(
    ["config.json", "model.onnx", "model.safetensors", "a.txt", "A.txt", "run.py", "../x"]
) | st.text(max_size=5)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    st.fixed_dictionaries(
        {"schema": st.just(1) | JSON, "files": st.dictionaries(NAMES, RECORD | JSON, max_size=6) | JSON}
    )
)
def test_a_manifest_is_parsed_or_refused(value):
    text = json.dumps(value).encode()
    try:
        manifest = Manifest.from_json(text)
        check_file_list(manifest, "x")
    except EntryError as error:
        assert "\n" not in str(error)
        return
    assert {"config.json", "model.onnx", "model.safetensors"} <= set(manifest.files)
    assert all(record.size >= 0 and len(record.sha256) == 64 for record in manifest.files.values())
    assert MANIFEST not in manifest.files and "run.py" not in manifest.files


@given(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_a_manifest_and_an_index_or_an_entry_error(text):
    for parse in (Manifest.from_json, lambda text: Index.from_json(text, "x")):
        try:
            parse(text)
        except EntryError:
            pass


# --- the range and resume machine -------------------------------------------------------------------------


class Shaky:
    """A storage that does as it is told, answer by answer."""

    uri = "shaky://"

    def __init__(self, content: bytes):
        self.content, self.plan = content, []

    def stream(self, path, start, size):
        act, number = self.plan.pop(0) if self.plan else ("whole", 0)
        if act == "down":
            raise UnreachableError("down")
        if act == "wrong size":
            raise IntegrityError("another size")
        begin = 0 if act == "no range" else start
        data = bytearray(self.content[begin:])
        if act == "corrupt" and data:
            data[number % len(data)] ^= 1
        if act == "longer":
            data += b"x"
        cut = number % (len(data) + 1) if act == "cut" else len(data)

        def chunks():
            for at in range(0, cut, 7):
                yield bytes(data[at : min(at + 7, cut)])
            if act == "cut":
                raise UnreachableError("cut")

        return begin, chunks()


ACTS = st.tuples(
    st.sampled_from(["down", "wrong size", "no range", "corrupt", "longer", "cut", "whole"]),
    st.integers(0, 99),
)


class Downloads(RuleBasedStateMachine):
    """Whatever the server does and whoever wrote into the partial file: the right bytes, or a typed error."""

    @initialize(content=st.binary(max_size=60))
    def begin(self, content):
        self.folder = tempfile.TemporaryDirectory()
        self.part = Path(self.folder.name) / "x.part"
        self.storage = Shaky(content)
        self.record = FileRecord(size=len(content), sha256=sha256_hex(content))

    @rule(junk=st.binary(max_size=80))
    def somebody_left_a_beginning(self, junk):
        self.part.write_bytes(junk)

    @rule(plan=st.lists(ACTS, max_size=6))
    def pull(self, plan):
        self.storage.plan = list(plan)
        try:
            machine.download(self.storage, "x", self.record, self.part)
        except (UnreachableError, IntegrityError):
            assert plan, "a good server gave an error"
        else:
            assert self.part.read_bytes() == self.storage.content

    @rule()
    def a_good_server_always_brings_it(self):
        self.storage.plan = []
        machine.download(self.storage, "x", self.record, self.part)
        assert self.part.read_bytes() == self.storage.content

    @invariant()
    def it_never_grows_past_the_end(self):
        if hasattr(self, "part") and self.part.exists():
            assert self.part.stat().st_size <= max(80, self.record.size)

    def teardown(self):
        if hasattr(self, "folder"):
            self.folder.cleanup()


Downloads.TestCase.settings = settings(max_examples=60, stateful_step_count=12, deadline=None)


class TestDownloads(Downloads.TestCase):
    @pytest.fixture(autouse=True)
    def quick(self, monkeypatch):
        monkeypatch.setattr(machine, "PAUSE", 0)


@given(st.text(max_size=12))
def test_any_revision_is_refused_or_harmless(revision):
    try:
        assert parse_entry(f"https://h/z/a-b.c@{revision}").revision == revision
    except EmbedkitError:
        return
    assert "/" not in revision and ".." not in revision
