"""Configuration, contract and manifest: what is refused, in which words, and what an entry's identity is made of."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedkit._io.json import canonical_json
from embedkit.errors import EntryError
from embedkit.model.config import EntryConfig
from embedkit.model.layout import check_file_name, parse_json, sha256_hex
from embedkit.model.manifest import FileRecord, Manifest, space_fingerprint
from embedkit.model.preprocess import Preprocess

CONTRACT = {
    "color": "rgb",
    "size": [224, 200],
    "resize": "shortest",
    "resize_size": 256,
    "interpolation": "bicubic",
    "crop": "center",
    "pad": 0,
    "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.25, 1],
    "reduced_decoding": True,
}
CONFIG = {
    "architecture": "resnet50",
    "num_classes": 0,
    "pretrained_cfg": {"mean": [0.5, 0.4, 0.3]},
    "embedkit": {
        "schema": 1,
        "kind": "encoder",
        "outputs": {"embedding": [16]},
        "method": "simclr",
        "dim": 16,
        "preprocess": CONTRACT,
        "data": "photographs",
        "license": "Apache-2.0",
        "provenance": {"commit": "abc"},
        "metrics": {},
        "card": {},
    },
}
DIGEST = "0123456789abcdef" * 4
MANIFEST = {
    "schema": 1,
    "files": {
        name: {"size": 10 + i, "sha256": DIGEST}
        for i, name in enumerate(("config.json", "model.onnx", "model.safetensors", "README.md"))
    },
}

REMOVED = object()


def changed(tree: dict, path: str, value: object) -> dict:
    """A copy of `tree` with the value at `a/b/c` replaced, or removed."""
    tree = copy.deepcopy(tree)
    *above, key = path.split("/")
    inner = tree
    for step in above:
        inner = inner[step]
    if value is REMOVED:
        del inner[key]
    else:
        inner[key] = value
    return tree


def refused(parse, text: object) -> str:
    with pytest.raises(EntryError) as caught:
        parse(text)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    return message


# --- the contract -----------------------------------------------------------------------------------------


def test_the_contract_round_trips():
    contract = Preprocess.from_json(CONTRACT)
    assert contract.to_json() == CONTRACT
    assert Preprocess.from_json(json.loads(json.dumps(contract.to_json()))) == contract
    assert (contract.size, contract.mean, contract.channels) == ((224, 200), (0.5, 0.4, 0.3), 3)
    assert {type(number) for number in contract.mean + contract.std} == {float}
    short = Preprocess.from_json(
        {"size": [8, 8], "resize_size": 8, "mean": [0], "std": [1], "color": "lab_l"}
    )
    assert short.channels == 1 and short.interpolation == "bicubic" and short.reduced_decoding


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("color", "bgr"),
        ("color", 3),
        ("color", None),
        ("color", ["rgb"]),
        ("color", "gray"),  # three means for one channel
        ("size", 224),
        ("size", [224]),
        ("size", [224, 224, 3]),
        ("size", [0, 224]),
        ("size", [-1, 224]),
        ("size", [4097, 224]),
        ("size", [224.0, 224]),
        ("size", ["224", "224"]),
        ("size", [True, 224]),
        ("size", {"0": 1}),
        ("size", None),
        ("resize", "shortest_edge"),
        ("resize", None),
        ("resize_size", 0),
        ("resize_size", -256),
        ("resize_size", 10**9),
        ("resize_size", 256.5),
        ("resize_size", "256"),
        ("resize_size", True),
        ("resize_size", [256, 256]),
        ("interpolation", "cubic"),
        ("interpolation", 3),
        ("crop", "random"),
        ("crop", True),
        ("pad", -1),
        ("pad", 256),
        ("pad", 0.5),
        ("pad", None),
        ("mean", []),
        ("mean", [0.5]),
        ("mean", [0.5, 0.5, "0.5"]),
        ("mean", 0.5),
        ("mean", [0.5, 0.5, None]),
        ("mean", [0.5, 0.5, 10**400]),
        ("mean", [0.5, 0.5, float("inf")]),
        ("std", [0, 1, 1]),
        ("std", [-1, 1, 1]),
        ("std", [1, 1, float("inf")]),
        ("std", [1, 1, 1, 1]),
        ("reduced_decoding", 1),
        ("reduced_decoding", "yes"),
        ("reduced_decoding", None),
    ],
)
def test_every_wrong_field_of_the_contract_is_named(key, value):
    wrong = changed(CONTRACT, key, value)
    message = refused(Preprocess.from_json, wrong)
    assert f"preprocess.{'mean' if value == 'gray' else key}: expected " in message
    config = changed(CONFIG, "embedkit/preprocess", wrong)
    message = refused(EntryConfig.from_json, json.dumps(config).replace("Infinity", "1e999"))
    assert "preprocess." in message or "1e999 is beyond any float" in message


def test_unknown_and_missing_keys_of_the_contract():
    """An unknown key would change pixels that this version does not change."""
    message = refused(Preprocess.from_json, {**CONTRACT, "gamma": 2.2})
    assert "unknown key 'gamma'" in message and "interpolation" in message
    for key in ("size", "mean", "std"):
        assert f"the key {key!r} is missing" in refused(Preprocess.from_json, changed(CONTRACT, key, REMOVED))
    for value in (None, [], "rgb", 5):
        assert "expected an object" in refused(Preprocess.from_json, value)


def test_squash_needs_no_resize_size_and_the_others_do():
    assert Preprocess.from_json({**CONTRACT, "resize": "squash", "resize_size": 0})
    for resize in ("shortest", "longest"):
        message = refused(Preprocess.from_json, {**CONTRACT, "resize": resize, "resize_size": 0})
        assert "preprocess.resize_size: expected 1..4096 pixels, found 0" in message


# --- config.json ------------------------------------------------------------------------------------------


def test_the_configuration_round_trips():
    config = EntryConfig.from_json(json.dumps(CONFIG))
    assert config.to_json() == CONFIG
    assert EntryConfig.from_json(json.dumps(config.to_json()).encode()) == config
    assert config.outputs == {"embedding": (16,)}
    assert config.timm == {"num_classes": 0, "pretrained_cfg": {"mean": [0.5, 0.4, 0.3]}}


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("architecture", REMOVED, "architecture"),
        ("architecture", "", "architecture"),
        ("architecture", 50, "architecture"),
        ("embedkit", REMOVED, "embedkit"),
        ("embedkit", [], "embedkit"),
        ("embedkit", None, "embedkit"),
        ("embedkit/schema", REMOVED, "schema"),
        ("embedkit/schema", 0, "schema"),
        ("embedkit/schema", True, "schema"),
        ("embedkit/schema", "1", "schema"),
        ("embedkit/schema", 1.0, "schema"),
        ("embedkit/kind", REMOVED, "kind"),
        ("embedkit/kind", "decoder", "kind"),
        ("embedkit/kind", ["encoder"], "kind"),
        ("embedkit/outputs", REMOVED, "outputs"),
        ("embedkit/outputs", [16], "outputs"),
        ("embedkit/outputs", {}, "outputs.embedding"),
        ("embedkit/outputs", {"features": [16]}, "outputs.embedding"),
        ("embedkit/outputs/embedding", 16, "outputs.embedding"),
        ("embedkit/outputs/embedding", [17], "outputs.embedding"),
        ("embedkit/outputs/embedding", [16, 1], "outputs.embedding"),
        ("embedkit/outputs/embedding", [16.0], "outputs.embedding"),
        ("embedkit/outputs/embedding", [-16], "outputs.embedding"),
        ("embedkit/outputs/embedding", [True], "outputs.embedding"),
        ("embedkit/method", REMOVED, "method"),
        ("embedkit/method", None, "method"),
        ("embedkit/dim", REMOVED, "dim"),
        ("embedkit/dim", 0, "dim"),
        ("embedkit/dim", "16", "dim"),
        ("embedkit/dim", 16.0, "dim"),
        ("embedkit/dim", True, "dim"),
        ("embedkit/dim", 10**40, "dim"),
        ("embedkit/preprocess", REMOVED, "preprocess"),
        ("embedkit/preprocess", [], "preprocess"),
        ("embedkit/data", REMOVED, "data"),
        ("embedkit/data", 7, "data"),
        ("embedkit/license", REMOVED, "license"),
        ("embedkit/provenance", "git", "provenance"),
        ("embedkit/metrics", [1], "metrics"),
    ],
)
def test_every_wrong_field_of_the_configuration_is_named(path, value, named):
    message = refused(
        lambda t: EntryConfig.from_json(t, "x/config.json"), json.dumps(changed(CONFIG, path, value))
    )
    assert message.startswith("x/config.json: ") and named in message


def test_a_newer_schema_says_upgrade_and_an_older_one_export():
    newer = refused(EntryConfig.from_json, json.dumps(changed(CONFIG, "embedkit/schema", 2)))
    assert newer == "config.json: schema: expected 1, found 2; upgrade embedkit"
    older = refused(EntryConfig.from_json, json.dumps(changed(CONFIG, "embedkit/schema", 0)))
    assert older.endswith("found 0; export the entry again")
    assert "schema: expected 1, found 9" in refused(
        Manifest.from_json, json.dumps({**MANIFEST, "schema": 9}).encode()
    )


# --- JSON -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"{} {}", "Extra data"),
        (b'{"a": 1, "a": 1}', "occurs twice"),
        (b'{"a": {"b": 1, "b": 2}}', "occurs twice"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": [-Infinity]}', "-Infinity is not JSON"),
        (b"[" * 100_000, "deeper than 64 levels"),
        (b'{"a":' * 100_000, "deeper than 64 levels"),
        (b'{"a": "\xff\xfe"}', "decode"),
        (b"\xff\xfe\x00\x01", "decode"),
        (b'{"a": ' + b"9" * 5000 + b"}", "4300 digits"),
        (b"{'a': 1}", "Expecting property name"),
        (b'{"a": "\n"}', "control character"),
    ],
)
def test_what_is_not_json(text, why):
    message = refused(lambda t: parse_json(t, "x.json"), text)
    assert message.startswith("x.json is not JSON (") and why in message


LEAVES = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text()
TREES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(TREES)
@settings(max_examples=60)
def test_any_json_gives_an_entry_or_an_entry_error(value):
    text = json.dumps({**CONFIG, "embedkit": value})
    for parse in (EntryConfig.from_json, lambda t: Manifest.from_json(t.encode())):
        with pytest.raises(EntryError):
            parse(text)
    with pytest.raises(EntryError):
        Preprocess.from_json(value)


SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
)


@given(st.sampled_from(sorted(CONFIG["embedkit"])), SCALARS | st.lists(st.integers()))
def test_any_value_of_any_key_gives_a_configuration_or_an_entry_error(key, value):
    try:
        config = EntryConfig.from_json(json.dumps(changed(CONFIG, f"embedkit/{key}", value)))
    except EntryError:
        return
    assert config.to_json()["embedkit"][key] == value


def test_canonical_json_is_one_text_for_equal_values():
    assert canonical_json({"b": [1, "é"], "a": None}) == b'{"a":null,"b":[1,"\\u00e9"]}'
    assert sha256_hex(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


# --- the manifest -----------------------------------------------------------------------------------------


def test_the_manifest_round_trips():
    files = {"model.onnx": b"graph", "config.json": b"{}", "model.safetensors": b"weights"}
    text = Manifest.encode(files)
    assert text == Manifest.encode(dict(reversed(files.items())))
    manifest = Manifest.from_json(text)
    assert manifest.sha256 == sha256_hex(text)
    assert manifest.files["model.onnx"] == FileRecord(size=5, sha256=sha256_hex(b"graph"))
    assert list(manifest.files) == sorted(files)


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("files", REMOVED, "files"),
        ("files", [], "files"),
        ("files/config.json", REMOVED, "needs config.json"),
        ("files/model.onnx", REMOVED, "needs model.onnx"),
        ("files/model.safetensors", REMOVED, "needs model.safetensors"),
        ("files/config.json", 5, "config.json"),
        ("files/config.json/size", REMOVED, "config.json.size"),
        ("files/config.json/size", -1, "config.json.size"),
        ("files/config.json/size", True, "config.json.size"),
        ("files/config.json/size", 10.0, "config.json.size"),
        ("files/config.json/size", "10", "config.json.size"),
        ("files/config.json/sha256", REMOVED, "config.json.sha256"),
        ("files/config.json/sha256", None, "config.json.sha256"),
        ("files/config.json/sha256", DIGEST.upper(), "config.json.sha256"),
        ("files/config.json/sha256", DIGEST[:-1], "config.json.sha256"),
        ("files/config.json/sha256", DIGEST + "\n", "config.json.sha256"),
        ("files/manifest.json", {"size": 1, "sha256": DIGEST}, "cannot list itself"),
        ("files/Config.JSON", {"size": 1, "sha256": DIGEST}, "differ only in case"),
        ("schema", REMOVED, "schema"),
        ("schema", True, "schema"),
        ("schema", 2, "upgrade embedkit"),
    ],
)
def test_every_wrong_field_of_the_manifest_is_named(path, value, named):
    message = refused(Manifest.from_json, json.dumps(changed(MANIFEST, path, value)).encode())
    assert message.startswith("manifest.json: ") and named in message


def test_a_manifest_of_more_than_a_megabyte_is_refused():
    text = json.dumps(MANIFEST).encode() + b" " * 1_000_000
    assert "less than 1 MB" in refused(Manifest.from_json, text)


HOSTILE = [
    *(
        "",
        ".",
        "..",
        "../x",
        "a/../b",
        "a/b",
        "a\\b",
        "/etc/passwd",
        "C:\\x",
        "C:x",
        "~/x",
        "a..b",
        "a.",
        " a",
    ),
    *(
        "a ",
        "a\n",
        "a\0b",
        "\x7f",
        "-rf",
        ".hidden",
        "_x",
        "é.json",
        "a:b",
        "a*",
        "a?b",
        "a|b",
        "$HOME",
        "a;b",
    ),
    *(
        "con",
        "CON.json",
        "nul.txt",
        "Com1.x",
        "lpt9",
        "aux.tar.gz",
        "x" * 121,
        "ａ.json",
        "a\u202eb",
        "file:x",
    ),
    *("%2e%2e", "a%2fb", "a\u2215b", "\udcff"),
]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_names_are_refused_everywhere(name):
    message = refused(lambda n: check_file_name(n, "manifest.json"), name)
    assert "not a usable file name" in message and message.isprintable()
    text = json.dumps(changed(MANIFEST, "files/README.md", REMOVED))
    text = text.replace(
        '"files": {', '"files": {' + json.dumps(name) + f': {{"size": 1, "sha256": "{DIGEST}"}}, '
    )
    message = refused(Manifest.from_json, text.encode())
    assert "not a usable file name" in message or "a text holds a lone surrogate" in message


PLAIN = ["config.json", "model.int8.onnx", "a", "README.md", "A-b_c.1", "console.txt", "x" * 120]


@pytest.mark.parametrize("name", PLAIN)
def test_plain_file_names_are_taken(name):
    check_file_name(name, "manifest.json")


ODD = st.text(alphabet=st.sampled_from(string.printable + "\\/.\0:é\u202e～ＡⅠ"), max_size=130)
PARTS = st.lists(
    st.sampled_from(["..", ".", "/", "\\", "a", "con", "COM1", "nul", "\n", "\0", ":", "x.onnx", "-"])
)


@given(st.text() | ODD | PARTS.map("".join))
def test_no_accepted_name_can_leave_the_folder_or_confuse_a_file_system(name):
    try:
        check_file_name(name, "manifest.json")
    except EntryError:
        return
    assert not set(name) & set('/\\:\0 ~*?"<>|$%') and name.isascii() and name.isprintable()
    assert ".." not in name and not name.startswith((".", "-")) and not name.endswith(".")
    assert re.split(r"\.", name)[0].upper() not in {
        "CON", "PRN", "AUX", "NUL", *(f"COM{i}" for i in range(10)), *(f"LPT{i}" for i in range(10))
    }  # fmt: skip
    assert 0 < len(name) <= 120


# --- the space fingerprint --------------------------------------------------------------------------------


def identity(config: dict = CONFIG, manifest: dict = MANIFEST, **options) -> str:
    return space_fingerprint(
        Manifest.from_json(json.dumps(manifest).encode()),
        EntryConfig.from_json(json.dumps(config)),
        **{"normalized": True, **options},
    )


OTHER_CONTRACT = {
    "color": "lab_l",
    "size": [200, 224],
    "resize": "longest",
    "resize_size": 255,
    "interpolation": "bilinear",
    "crop": "none",
    "pad": 1,
    "mean": [0.5, 0.4, 0.31],
    "std": [0.2, 0.25, 1.01],
    "reduced_decoding": False,
}


def test_the_fingerprint_changes_with_every_ingredient():
    with_int8 = changed(MANIFEST, "files/model.int8.onnx", {"size": 3, "sha256": "b" * 64})
    same_bytes = changed(MANIFEST, "files/model.int8.onnx", MANIFEST["files"]["model.onnx"])
    variants = [
        identity(),
        identity(manifest=same_bytes, variant="int8"),
        identity(normalized=False),
        identity(manifest=with_int8, variant="int8"),
        identity(manifest=changed(MANIFEST, "files/model.onnx/sha256", "a" * 64)),
        identity(manifest=changed(MANIFEST, "files/model.safetensors/sha256", "a" * 64)),
        identity(changed(changed(CONFIG, "embedkit/dim", 8), "embedkit/outputs/embedding", [8])),
    ]
    assert set(OTHER_CONTRACT) == {field.name for field in dataclasses.fields(Preprocess)}
    for key, value in OTHER_CONTRACT.items():
        contract = {**CONTRACT, key: value}
        if key == "color":
            contract |= {"mean": [0.5], "std": [1]}
        variants.append(identity(changed(CONFIG, "embedkit/preprocess", contract)))
    assert len(set(variants)) == len(variants)
    assert all(re.fullmatch("[0-9a-f]{64}", variant) for variant in variants)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("architecture", "other"),
        ("num_classes", 10),
        ("embedkit/method", "dino"),
        ("embedkit/data", "other images"),
        ("embedkit/license", "MIT"),
        ("embedkit/provenance", {}),
        ("embedkit/metrics", {"knn_top1": 0.9}),
    ],
)
def test_the_fingerprint_changes_with_nothing_else(path, value):
    assert identity(changed(CONFIG, path, value)) == identity()
    manifest = changed(MANIFEST, "files/README.md/sha256", "f" * 64)
    manifest = changed(manifest, "files/config.json/sha256", "e" * 64)
    assert identity(manifest=manifest) == identity()


def test_the_fingerprint_does_not_depend_on_how_the_json_was_written():
    contract = {key: CONTRACT[key] for key in reversed(CONTRACT)} | {"std": [0.2, 0.25, 1.0]}
    assert identity(changed(CONFIG, "embedkit/preprocess", contract)) == identity()
    shorter = {
        key: CONTRACT[key] for key in ("size", "resize_size", "mean", "std")
    }  # the rest are the defaults
    assert identity(changed(CONFIG, "embedkit/preprocess", shorter)) == identity()
