"""The decoder of our JSON: what is written comes back, and any bytes are a value or one sentence of one class."""

import json
import math
import os
import sys
import time
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedkit._io.json import Fields, JsonFormat, canonical_json, indented_json
from embedkit.errors import ConfigError, OutputError

FORM = JsonFormat(error=OutputError, step="write it again", limit=1 << 20)

TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=20,
)


def refused(act, *arguments):
    with pytest.raises(OutputError) as caught:
        act(*arguments)
    message = str(caught.value)
    assert message.endswith("; write it again") and "\n" not in message and len(message) < 500
    return message


@given(VALUES)
def test_what_is_written_comes_back_equal_and_of_the_same_types(value):
    for write in (canonical_json, indented_json):
        found = FORM.parse(write(value), "x.json")
        assert found == value and canonical_json(found) == canonical_json(value)


@given(VALUES)
def test_canonical_means_one_form_for_equal_values(value):
    shuffled = json.loads(json.dumps(value), object_pairs_hook=lambda pairs: dict(reversed(pairs)))
    assert canonical_json(shuffled) == canonical_json(value)
    assert canonical_json({"b": 1, "a": [0.1, "é"]}) == b'{"a":[0.1,"\\u00e9"],"b":1}'


@pytest.mark.parametrize(
    "value", [math.nan, [math.inf], {"a": -math.inf}, "\ud800", {"\udfff": 1}, ["a\udc80b"]]
)
def test_what_no_strict_reader_takes_back_is_not_written(value):
    for write in (canonical_json, indented_json):
        with pytest.raises(ValueError):
            write(value)


def test_characters_beyond_the_first_plane_are_written():
    """Their escape is a pair of surrogates, which is a character."""
    assert FORM.parse(canonical_json({"a": "\U0001f600"}), "x") == {"a": "\U0001f600"}


@given(st.binary(max_size=200) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_a_value_or_one_sentence(data):
    try:
        value = FORM.parse(data, "x.json")
    except OutputError as error:
        message = str(error)
        assert message.startswith("x.json is not JSON (") and "\n" not in message
    else:
        assert canonical_json(FORM.parse(canonical_json(value), "y.json")) == canonical_json(value)


@given(VALUES, st.data())
@settings(max_examples=200)
def test_a_changed_text_is_a_value_or_one_sentence(value, data):
    text = bytearray(canonical_json({"a": value}))
    at = data.draw(st.integers(0, len(text) - 1))
    text[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    try:
        FORM.fields(FORM.parse(bytes(text), "x.json"), "x.json")
    except OutputError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"", "Expecting value"),
        (b"{} {}", "Extra data"),
        (b'{"a": 1, "a": 1}', "occurs twice"),
        (b'{"x": [{"a": {}, "a": 2}]}', "occurs twice"),
        (b'{"a": 1, "\\u0061": 1}', "occurs twice"),
        (b"NaN", "NaN is not JSON"),
        (b"[-Infinity]", "-Infinity is not JSON"),
        (b"[1e999]", "1e999 is beyond any float"),
        (b"[-1e999]", "-1e999 is beyond any float"),
        (b"9" * 5000, "4300 digits"),
        (b"0." + b"9" * 5000, "beyond any float"),
        (b'"\\ud800"', "lone surrogate"),
        (b'{"\\udc00x": 1}', "lone surrogate"),
        (b'["\\ude00\\ud83d"]', "lone surrogate"),
        (b'"\xed\xa0\x80"', "decode"),
        (b"\xef\xbb\xbf{}", "Expecting value"),
        ('{"a": 1}'.encode("utf-16"), "decode"),
        (b'{"a": "\n"}', "control character"),
        (b"[1,]", "JSON"),
        (b"[" * 65 + b"]" * 65, "deeper than 64 levels"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "deeper than 64 levels"),
        (b"[" * 400_000, "deeper than 64 levels"),
        (b"[" * 400_000 + b"]" * 400_000, "deeper than 64 levels"),
        (b'{"a":' * 200_000, "deeper than 64 levels"),
    ],
)
def test_what_is_not_strict_json(text, why):
    message = refused(FORM.parse, text, "x.json")
    assert message.startswith("x.json is not JSON (") and why in message


def test_the_depth_does_not_depend_on_the_stack():
    deepest = b"[" * 63 + b"{}" + b"]" * 63

    def below(frames):
        return FORM.parse(deepest, "x") if frames == 0 else below(frames - 1)

    assert below(0) == below(300)
    refused(FORM.parse, b"[" + deepest + b"]", "x")
    room = sys.getrecursionlimit()
    flat = b"[" + b"[[]]," * 1000 + b"0]"
    assert len(FORM.parse(flat, "x")) == 1001 and sys.getrecursionlimit() == room


def test_larger_than_the_limit_is_not_parsed():
    assert FORM.parse(b" " * (FORM.limit - 1) + b"1", "x") == 1
    assert "at most 1048576 bytes" in refused(FORM.parse, b" " * FORM.limit + b"1", "x")


@pytest.mark.parametrize(
    "text",
    [
        b"[" + b"[]," * 300_000 + b"0]",
        b"[" + b"{}," * 300_000 + b"0]",
        b'["' + b"\\u0041" * 170_000 + b'"]',
        b"[" + b"1," * 500_000 + b"0]",
        b"{" + b",".join(b'"%d":0' % n for n in range(90_000)) + b"}",
        b'"' + b"\\" * 1_000_001,
        b"-" * 1_000_000,
        b"[" + b"9" * 4300 + (b"," + b"9" * 4300) * 230 + b"]",
    ],
    ids=["lists", "objects", "escapes", "numbers", "keys", "backslashes", "minuses", "digits"],
)
def test_memory_and_time_are_bounded_by_the_size(text):
    """A megabyte of whatever is worst: no more than some seventy bytes each, and nothing quadratic."""
    tracemalloc.start()
    began = time.process_time()
    try:
        FORM.parse(text, "x")
    except OutputError:
        pass
    seconds, (_, most) = time.process_time() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 70 * len(text) and seconds < 30  # a quadratic scan would take hours


# --- fields -----------------------------------------------------------------------------------------------


def fields(**values):
    return FORM.fields(values, "x.json")


def test_values_of_their_types_are_given_as_they_are():
    data = fields(
        t="a", e="", n=3, f=0.5, b=True, l=[1, 2.5], w=[1, 2], o={"k": 1}, s=[{"k": 2}], r=[[1], []], z=None
    )
    assert (
        data.text("t") == "a"
        and data.text("e", empty=True) == ""
        and data.text("t", choices=("a", "b")) == "a"
    )
    assert data.whole("n", 3, 3) == 3 and data.number("f", 0, 1) == 0.5 and data.number("n") == 3
    assert (
        data.flag("b") is True and data.numbers("l") == [1, 2.5] and data.numbers("l", length=2) == [1, 2.5]
    )
    assert (
        data.wholes("w") == [1, 2] and data.fields("o").whole("k") == 1 and data.each("s")[0].whole("k") == 2
    )
    assert (
        data.rows("r", count=2) == [[1], []]
        and data.items("s") == [{"k": 2}]
        and data.mapping("o") == {"k": 1}
    )
    assert data.optional("z", data.text) is None and data.optional("t", data.text) == "a"
    assert "t" in data and "z" not in data and "y" not in data
    data.version("n", 3)
    data.only("t", "e", "n", "f", "b", "l", "w", "o", "s", "r", "z")


WRONG = {
    "text": ([None, 1, True, [], {}, ""], lambda data: data.text("k")),
    "one of a, b": (["c", "", 1, None, []], lambda data: data.text("k", choices=("a", "b"))),
    "text of the form": (["x", "00 "], lambda data: data.text("k", pattern="[0-9]+")),
    "a whole number from 1 to 5": (
        [0, 6, 1.0, True, "1", None, 10**400, -(10**400)],
        lambda data: data.whole("k", 1, 5),
    ),
    "a number from 0 to 1": (
        [-0.1, 1.1, "0", True, None, 10**400, math.nan, math.inf],
        lambda data: data.number("k", 0, 1),
    ),
    "true or false": ([0, 1, "true", None], lambda data: data.flag("k")),
    "a list of 2 numbers": (
        [[1], [1, 2, 3], [1, None], [1, True], "ab", None, {}],
        lambda data: data.numbers("k", length=2),
    ),
    "a list of whole numbers": ([[1.0], [-1], [True], 3, None], lambda data: data.wholes("k")),
    "an object": ([[], 1, None, "x"], lambda data: data.fields("k")),
    "a list of objects": ([[1], [{}, None]], lambda data: data.each("k")),
    "2 lists of numbers": (
        [[[1]], [1, 2], [[1], ["x"]], None, [[1], [True]]],
        lambda data: data.rows("k", count=2),
    ),
    "a list": ([{}, "x", None], lambda data: data.items("k")),
}


@pytest.mark.parametrize("expected", sorted(WRONG))
def test_every_wrong_value_names_file_key_expected_and_found(expected):
    values, take = WRONG[expected]
    for value in values:
        message = refused(take, fields(k=value))
        assert message.startswith(f"x.json: k: expected {expected}") and ", found " in message
    assert ", found nothing; " in refused(take, fields())


@given(VALUES, st.sampled_from([take for _, take in WRONG.values()]))
@settings(max_examples=300)
def test_any_value_is_taken_or_refused_with_one_sentence(value, take):
    try:
        take(fields(k=value))
    except OutputError as error:
        assert "\n" not in str(error) and str(error).isprintable() and len(str(error)) < 500


def test_inner_keys_are_named_from_the_top():
    data = fields(a={"b": [{"c": 1}, {"c": "x"}]})
    assert "x.json: a.b[1].c: expected a whole number" in refused(data.fields("a").each("b")[1].whole, "c")


def test_versions_and_unknown_keys():
    with pytest.raises(OutputError, match=r"^x.json: v: expected version 1, found 2; upgrade embedkit$"):
        fields(v=2).version("v", 1)
    assert "expected version 1, found 0" in refused(fields(v=0).version, "v", 1)
    refused(fields(v=True).version, "v", 1)
    refused(fields().version, "v", 1)
    assert "'more\\n': expected no such key" in refused(fields(**{"a": 1, "more\n": 2}).only, "a")


def test_files(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b'{"a": 1}')
    assert isinstance(FORM.read(path), Fields) and FORM.read(str(path)).whole("a") == 1
    path.write_bytes(b"[1]")
    assert "expected an object, found [1]" in refused(FORM.read, path)
    refused(FORM.read, tmp_path)
    refused(FORM.read, "a\0b")
    refused(FORM.read, os.devnull)
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    assert "larger than" in refused(FORM.read, path)
    with pytest.raises(OutputError, match="does not exist"):
        FORM.read(tmp_path / "gone.json")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "fifo")
        refused(FORM.read, tmp_path / "fifo")
    with pytest.raises(ConfigError):
        JsonFormat(error=ConfigError, step="").parse(b"", "x")
