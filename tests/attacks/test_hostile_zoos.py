"""Zoos that lie: manifests, lists, archives and hubs that would lead a reader out of its cache or its senses.

Each attack has to end in a typed error of one line, with no file outside the cache, no entry that a reader can see,
and no token in an error, in a log or in a request to another origin.
"""

from __future__ import annotations

import io
import json
import logging
import tarfile
from pathlib import Path

import numpy as np
import pytest
import servers

from embedkit.encoder import load_encoder
from embedkit.errors import (
    AccessError,
    EmbedkitError,
    EntryError,
    EntryNotFoundError,
    IntegrityError,
    UnreachableError,
    ZooError,
)
from embedkit.hub.bulk import pull
from embedkit.hub.cache import open_only
from embedkit.hub.publish.publish import publish
from embedkit.hub.resolve import find_entry
from embedkit.model.manifest import Manifest
from embedkit.workflows.check_entry import verify_entry

# huggingface_hub 2.x passes a file to its HTTP library by the older of two argument names.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

NAME = "linear-tiny.noise"
TOKEN = "hf_secretsecretsecret"


@pytest.fixture
def attacked(tmp_path, cache, caplog, capfd):
    """`attacked(url, kinds, server)`: loading `url` has to fail safely; the error's text."""
    caplog.set_level(logging.DEBUG)

    def attack(url: str, kinds: type[Exception] | tuple[type[Exception], ...] = EmbedkitError) -> str:
        def outside() -> dict[Path, int]:
            return {
                p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file() and cache not in p.parents
            }

        before = outside()
        with pytest.raises(kinds) as caught:
            load_encoder(url, token=TOKEN)
        message = str(caught.value)
        assert isinstance(caught.value, EmbedkitError) and "\n" not in message and len(message) < 2000
        assert outside() == before, "something was written outside of the cache"
        seen = [p for p in (cache / "zoo" / "entries").glob("*") if not p.name.startswith(".")]
        assert seen == [], "an entry can be seen"
        captured = capfd.readouterr()
        said = [message, repr(caught.value), caplog.text, captured.out, captured.err]
        assert not any(TOKEN in text for text in said)
        return message

    return attack


def records(**changes) -> dict:
    """The files of a manifest: three that every entry has, and changes."""
    good = {"size": 1, "sha256": "0" * 64}
    names = dict.fromkeys(("config.json", "model.onnx", "model.safetensors"), good)
    return {name: value for name, value in {**names, **changes}.items() if value is not None}


def manifest(files: object, **changes) -> bytes:
    return json.dumps({"schema": 1, "files": files, **changes}).encode()


GOOD = {"size": 1, "sha256": "0" * 64}
MANIFESTS = {
    "not JSON": b"\x89PNG",
    "HTML": b"<html>sign in</html>",
    "empty": b"",
    "10 MB": b'{"schema": 1, "files": {' + b" " * 10_000_000 + b"}}",
    "deep nesting": b"[" * 200_000,
    "deep objects": b'{"a":' * 100_000,
    "duplicate keys": b'{"schema": 1, "schema": 1, "files": {}}',
    "duplicate files": b'{"schema":1,"files":{"config.json":{"size":1,"sha256":"%s"},"config.json":{}}}'
    % (b"0" * 64),
    "no files": b'{"schema": 1}',
    "a list": b"[]",
    "missing fields": manifest(records(**{"config.json": {"size": 1}})),
    "wrong types": manifest(records(**{"config.json": {"size": "1", "sha256": "0" * 64}})),
    "a size that is true": manifest(records(**{"config.json": {"size": True, "sha256": "0" * 64}})),
    "NaN": manifest(records()).replace(b'"size": 1', b'"size": NaN', 1),
    "infinity": manifest(records()).replace(b'"size": 1', b'"size": 1e999', 1),
    "a size below zero": manifest(records(**{"config.json": {"size": -1, "sha256": "0" * 64}})),
    "a short sha": manifest(records(**{"config.json": {"size": 1, "sha256": "0" * 63}})),
    "an upper-case sha": manifest(records(**{"config.json": {"size": 1, "sha256": "A" * 64}})),
    "an unknown schema": manifest(records(), schema=99),
    "a schema that is true": manifest(records(), schema=True),
    "colliding names": manifest(records(**{"Config.json": GOOD})),
    "itself": manifest(records(**{"manifest.json": GOOD})),
    "no graph": manifest(records(**{"model.onnx": None})),
    "a program": manifest(records(**{"setup.py": GOOD})),
    "a pickle": manifest(records(**{"pytorch_model.bin": GOOD})),
    "a library": manifest(records(**{"custom_ops.so": GOOD})),
    "1000 files": manifest(records(**{f"f{i}.txt": GOOD for i in range(1000)})),
    "an exabyte": manifest(records(**{"big.npz": {"size": 10**18, "sha256": "0" * 64}})),
    "more than any disk": manifest(records(**{"big.npz": {"size": 10**40, "sha256": "0" * 64}})),
    "a lone surrogate": b'{"schema": 1, "files": {"\\ud800": {}}}',
    "UTF-16": manifest(records()).decode().encode("utf-16"),
}
TRAVERSALS = [
    "../evil.txt", "../../evil.txt", "/tmp/evil.txt", "a/../../evil.txt", "..\\evil.txt", "C:\\evil.txt",
    "C:evil.txt",
    "\\\\host\\share\\evil.txt", "\\\\?\\C:\\evil.txt", "a\0.txt", "evil.txt\0", "con.txt", "NUL.json", "LPT1.md",
    "aux",
    "x" * 300 + ".txt", "\u202etxt.exe", "mоdel.onnx", "model.onnx\u200b", "model.onnx ", "model.onnx.", ".ssh",
    "~root.txt",
    "a/b.txt", "file:x.txt", "a\nb.txt", "%2e%2e%2fevil.txt", "", ".", "..", "config.json/x.txt", "a..txt",
    "cafe\u0301.txt",
]  # fmt: skip


@pytest.mark.parametrize("what", sorted(MANIFESTS))
def test_manifests(site, zoo, attacked, what):
    (zoo / "index.json").unlink()  # which pins the manifest, and would refuse each of these at once
    (zoo / NAME / "manifest.json").write_bytes(MANIFESTS[what])
    attacked(f"{site.url}/{NAME}", (EntryError, ZooError))
    assert not [path for path in site.paths() if path.endswith((".onnx", ".safetensors", ".npz"))], (
        "a byte was asked for"
    )


@pytest.mark.parametrize("name", TRAVERSALS)
def test_paths_of_a_manifest(site, zoo, attacked, name):
    (zoo / "index.json").unlink()
    (zoo / NAME / "manifest.json").write_bytes(manifest(records(**{name: GOOD})))
    attacked(f"{site.url}/{NAME}", EntryError)
    assert not [path for path in site.paths() if "config.json" in path]


@pytest.mark.parametrize(
    "change",
    [
        {"path": "../../evil"}, {"path": "/etc"}, {"path": f"{NAME}/../.."}, {"path": "linear-other.noise"},
        {"path": 5},
        {"path": f"{NAME}/000000000000"}, {"manifest_sha256": "../" * 21 + "x"}, {"manifest_sha256": "0" * 63},
        {"manifest_sha256": "0" * 64}, {"dim": 1e999}, {"license": ["MIT"]},
    ],
)  # fmt: skip
def test_rows_of_an_index(site, zoo, attacked, change):
    index = json.loads((zoo / "index.json").read_bytes())
    index["entries"][NAME].update(change)
    (zoo / "index.json").write_text(json.dumps(index))
    attacked(f"{site.url}/{NAME}", (EntryError, IntegrityError))


@pytest.mark.parametrize("alias", ["../../evil", "linear-x", "", "/", "\0", "a" * 1000])
def test_aliases_of_an_index_lead_to_its_rows_alone(site, zoo, attacked, alias):
    index = json.loads((zoo / "index.json").read_bytes())
    index["aliases"] = {alias: "../../../etc", "linear-x": "../../../etc"}
    (zoo / "index.json").write_text(json.dumps(index))
    attacked(f"{site.url}/linear-x", EntryNotFoundError)


def test_indexes_that_are_no_index(site, zoo, attacked):
    for text in (
        b"",
        b"[]",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"schema": 2}',
        b'{"schema":1,"entries":{"../x":{}}}',
    ):
        (zoo / "index.json").write_bytes(text)
        attacked(f"{site.url}/{NAME}", (EntryError, UnreachableError))


def test_a_moved_manifest_beside_a_pin(site, zoo, by_hand, attacked, tmp_path):
    """The same name, other bytes, and an index that says so: only the lock file knows better."""
    url = f"{site.url}/{NAME}"
    entry = find_entry(url, lock=True)
    from embedkit.hub.bulk import evict

    evict(NAME)
    by_hand.TinyEntry(seed=1).write(zoo / NAME)
    by_hand.write_index(zoo)
    assert f"pins {entry.revision[:12]}" in attacked(url, IntegrityError)


# --- redirects --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "location",
    ["file:///etc/passwd", "ftp://127.0.0.1/x", "http://example.org/x", "http://169.254.169.254/latest", "gopher://x",
     "http://[::1", "//", "javascript:1", "http://127.0.0.1:99999/x", "http://0x7f.1.example/x", "data:,x",
     "http://u:p@"],
)  # fmt: skip
def test_redirects_that_are_not_followed(site, attacked, location):
    site.moved_to = location
    message = attacked(f"{site.url}/{NAME}", ZooError)
    assert len(site.requests) <= 40 and "passwd" not in message


def test_a_redirect_does_not_take_the_token_along(site, zoo):
    other = servers.site(zoo, "localhost")
    try:
        site.moved_to = other.url
        load_encoder(f"{site.url}/{NAME}", token=TOKEN)
        assert other.requests and not [1 for *_, headers in other.requests if "Authorization" in headers]
    finally:
        other.close()


def test_a_token_is_not_sent_unencrypted(attacked):
    from embedkit.errors import ConfigError

    assert "is not encrypted" in attacked("http://example.org/zoo/linear-x.y", ConfigError)


def test_an_unencrypted_endpoint_of_the_hub_is_refused(attacked, monkeypatch):
    from embedkit.errors import ConfigError

    monkeypatch.setenv("HF_ENDPOINT", "http://hub.example.org")
    assert "is not encrypted" in attacked(f"hf://team/{NAME}", ConfigError)


# --- the hub ----------------------------------------------------------------------------------------------


@pytest.fixture
def published(hub, zoo):
    hub.tokens[TOKEN] = "read"
    publish(find_entry(zoo / NAME), "hf://team", token="hf_writer")
    hub.requests.clear()
    return hub


@pytest.mark.parametrize(
    "sha", ["../../evil", "main", "x" * 40, "A" * 40, 5, None, ["a"], "0" * 39, "0" * 40 + "\n"]
)
def test_a_hub_that_gives_no_commit(published, attacked, sha):
    published.hostile_sha = sha if sha is not None else " "
    attacked(f"hf://team/{NAME}", ZooError)


def test_hostile_paths_in_a_repository_are_not_looked_at(published, tmp_path, cache):
    published.hostile_paths = ["../../evil", "/etc/passwd", "con.txt", "a\\b", "a\0b"]
    assert load_encoder(f"hf://team/{NAME}", token=TOKEN).dim == 4
    files = {path.name for path in cache.rglob("*") if path.is_file()}
    assert "evil" not in files and "con.txt" not in files


def test_a_hub_whose_large_files_are_others(published, attacked):
    """The second origin gives other bytes of the same length under the right name."""
    for oid, data in list(published.objects.items()):
        published.objects[oid] = bytes(len(data))
    for _, files in published.repos[f"team/{NAME}"].commits:
        for path in files:
            if path.endswith((".onnx", ".safetensors")):
                files[path] = bytes(len(files[path]))
    attacked(f"hf://team/{NAME}", IntegrityError)


def test_a_commit_between_the_manifest_and_its_files(published, zoo, by_hand, tmp_path, monkeypatch):
    """A branch that moves while it is read: all files come from the commit that it was on."""
    newer = find_entry(by_hand.TinyEntry(seed=1).write(tmp_path / "newer" / NAME))
    old = find_entry(zoo / NAME).revision
    from embedkit.hub.hf import HubZoo

    plain, moved = HubZoo.commit, []

    def moving(self, name, revision):
        commit = plain(self, name, revision)
        if not moved:
            moved.append(1)
            publish(newer, "hf://team", token="hf_writer")
        return commit

    monkeypatch.setattr(HubZoo, "commit", moving)
    assert load_encoder(f"hf://team/{NAME}").revision == old


def test_a_gated_or_disabled_hub(published, attacked):
    for status, kind in (("403", AccessError), ("429", UnreachableError), ("503", UnreachableError)):
        published.api_faults = [status] * 100
        attacked(f"hf://team/{NAME}", kind)


def test_a_hub_whose_api_leads_elsewhere(published, zoo, attacked):
    for host in ("localhost", "127.0.0.1"):  # another host, and the same one at another port
        other = servers.site(zoo, host)
        try:
            published.moved_to = other.url
            attacked(f"hf://team/{NAME}", EmbedkitError)
            assert other.requests and not [
                1 for *_, headers in other.requests if "Authorization" in headers
            ], host
        finally:
            other.close()


# --- archives ---------------------------------------------------------------------------------------------


def tar(path: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> str:
    with tarfile.open(path, "w") as archive:
        for member, data in members:
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return str(path)


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def good_members(zoo: Path) -> list[tuple[tarfile.TarInfo, bytes]]:
    files = [zoo / "index.json", *sorted((zoo / NAME).iterdir())]
    return [(member(str(path.relative_to(zoo))), path.read_bytes()) for path in files]


@pytest.mark.parametrize(
    "evil",
    [
        member("link", tarfile.SYMTYPE, "/etc/passwd"), member(f"{NAME}/model.onnx", tarfile.LNKTYPE, "/etc/passwd"),
        member("pipe", tarfile.FIFOTYPE), member("device", tarfile.CHRTYPE), member(f"{NAME}/config.json"),
        member("index.json"), member("folder", tarfile.DIRTYPE),
    ],
    ids=lambda info: f"{info.name} {info.type!r}",
)  # fmt: skip
def test_members_of_an_archive_that_are_no_plain_files(zoo, tmp_path, attacked, monkeypatch, evil):
    path = tar(tmp_path / "zoo.tar", [*good_members(zoo), (evil, b"")])
    monkeypatch.setenv("EMBEDKIT_ZOO", path)
    assert "plain file" in (message := attacked("linear-tiny", EntryError)) or "occurs twice" in message


def test_members_that_would_leave_the_folder_are_never_written(zoo, tmp_path, monkeypatch, cache):
    evil = [
        (member(name), b"evil")
        for name in ("../evil", "/tmp/embedkit-evil", f"{NAME}/../../evil", "a\\..\\evil")
    ]
    monkeypatch.setenv("EMBEDKIT_ZOO", tar(tmp_path / "zoo.tar", [*good_members(zoo), *evil]))
    assert load_encoder("linear-tiny").dim == 4
    assert not list(tmp_path.rglob("*evil*")) and not Path("/tmp/embedkit-evil").exists()


def test_archives_that_are_none(tmp_path, zoo, attacked, monkeypatch):
    whole = Path(tar(tmp_path / "zoo.tar", good_members(zoo))).read_bytes()
    import gzip

    for data in (
        b"",
        b"x" * 5000,
        whole[:1000],
        gzip.compress(whole),
        b"\0" * 10240,
        b"PK\x03\x04" + bytes(600),
    ):
        (tmp_path / "bad.tar").write_bytes(data)
        monkeypatch.setenv("EMBEDKIT_ZOO", str(tmp_path / "bad.tar"))
        attacked("linear-tiny", (EntryError, EntryNotFoundError, ZooError))


def test_a_changed_member_of_an_archive(tmp_path, zoo, attacked, monkeypatch):
    members = good_members(zoo)
    for index, (info, data) in enumerate(members):
        if info.name.endswith((".onnx", ".safetensors", "config.json")):
            changed = [*members[:index], (info, data[:-1] + b"?"), *members[index + 1 :]]
            monkeypatch.setenv("EMBEDKIT_ZOO", tar(tmp_path / "zoo.tar", changed))
            attacked("linear-tiny", IntegrityError)


# --- entries whose manifest is true -----------------------------------------------------------------------


def test_graphs_of_another_age(by_hand, site, zoo):
    """An opset and an IR version that no runtime of our time reads, however new the installed one is."""
    entry = by_hand.TinyEntry()
    good = entry.graph
    assert good[:2] == b"\x08\x0a"  # ir_version 10
    for graph in (entry.make_graph(opsets={"": 1000}), b"\x08\x7f" + good[2:]):
        entry.graph = graph
        folder = entry.write(zoo / NAME)
        with pytest.raises(EntryError, match="model.onnx"):
            load_encoder(folder)


def test_a_graph_that_asks_for_terabytes(by_hand, zoo):
    """Four terabytes of zeros on the way to the output: an error, not the end of the process."""
    entry = by_hand.TinyEntry()
    shape = by_hand.tensor_proto("shape", (2,), 7, raw=np.array([10**6, 10**6], "<i8").tobytes())
    zeros = by_hand.field(1, by_hand.node("ConstantOfShape", ["shape"], ["zeros"]))
    total = by_hand.field(
        1, by_hand.node("ReduceSum", ["zeros"], ["nothing"], by_hand.attribute("keepdims", 0, 2))
    )
    plus = by_hand.field(1, by_hand.node("Add", ["sum", "nothing"], ["embedding"]))
    graph = entry.make_graph(nodes=zeros + total + plus, initializers=by_hand.field(5, shape))
    entry.graph = graph.replace(
        by_hand.node("Add", ["product", "bias"], ["embedding"]),
        by_hand.node("Add", ["product", "bias"], ["sum"]),
    )
    if len(entry.graph) != len(graph):  # the lengths around it have to fit
        entry.graph = rebuilt(by_hand, entry, zeros + total + plus, by_hand.field(5, shape))
    folder = entry.write(zoo / NAME)
    with pytest.raises(EmbedkitError):
        load_encoder(folder).encode(np.zeros((8, 8, 3), np.uint8))


def rebuilt(by_hand, entry, nodes: bytes, initializers: bytes) -> bytes:
    """The graph with `sum` in the place of `embedding` as the last Add's output, and further nodes."""
    f, node = by_hand.field, by_hand.node
    at = entry.start + entry.weight.nbytes
    bias = {"location": "model.safetensors", "offset": at, "length": entry.bias.nbytes}
    parts = [
        f(1, node("Cast", ["pixels"], ["float"], by_hand.attribute("to", 1, 2))),
        f(1, node("Cast", ["weight"], ["wide"], by_hand.attribute("to", 1, 2))),
        f(1, node("Flatten", ["float"], ["flat"], by_hand.attribute("axis", 1, 2))),
        f(1, node("MatMul", ["flat", "wide"], ["product"])),
        f(1, node("Add", ["product", "bias"], ["sum"])),
        nodes,
        f(2, "tiny"),
        f(5, by_hand.tensor_proto("weight", entry.weight.shape, 10, external=entry.external())),
        f(5, by_hand.tensor_proto("bias", entry.bias.shape, 1, external=bias)),
        initializers,
        f(11, by_hand.value_info("pixels", 2, ["N", 3, 8, 8])),
        f(12, by_hand.value_info("embedding", 1, ["N", 4])),
    ]
    return by_hand.model_proto(b"".join(parts))


@pytest.mark.filterwarnings(
    "ignore:invalid value encountered:RuntimeWarning"
)  # rows of NaN, as they should be
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers_do_not_verify(by_hand, zoo, value):
    entry = by_hand.TinyEntry()
    entry.weight[0, 0] = value
    entry.weights = by_hand.safetensors_bytes({"weight": entry.weight, "bias": entry.bias})
    good = by_hand.TinyEntry().files()
    folder = entry.write(zoo / NAME, {**good, "model.safetensors": entry.weights})
    assert not verify_entry(folder).ok


def test_missing_and_extra_tensors(by_hand, zoo):
    entry = by_hand.TinyEntry()
    for tensors in (
        {"weight": entry.weight},
        {"bias": entry.bias},
        {"weight": entry.weight.T, "bias": entry.bias},
    ):
        files = {**by_hand.TinyEntry().files(), "model.safetensors": by_hand.safetensors_bytes(tensors)}
        with pytest.raises(EntryError, match="model.safetensors|model.onnx"):
            load_encoder(entry.write(zoo / NAME, files))
    more = {"weight": entry.weight, "bias": entry.bias, "head": np.zeros(3, np.float32)}
    entry.weights = by_hand.safetensors_bytes(more)
    entry.start = len(entry.weights) - sum(array.nbytes for array in more.values())
    entry.graph = entry.make_graph()
    assert load_encoder(entry.write(zoo / NAME)).dim == 4  # unused, and harmless


def test_an_entry_is_verified_at_each_pull(site, zoo):
    (one,) = pull([f"{site.url}/{NAME}"], gate=open_only)
    assert Manifest.from_json((Path(one.location) / "manifest.json").read_bytes()).sha256 == one.revision
