"""Text from elsewhere: nothing in it drives a terminal, and it stays one line."""

from __future__ import annotations

import sys

import pytest

from embedkit._io.text import did_you_mean, one_line, safe_for_terminal


def test_safe_for_terminal():
    assert safe_for_terminal("a\n\t\x1b\u202eé\udcff") == "a\\n\\t\\x1b\\u202eé\udcff"
    assert safe_for_terminal("a\r\nb\t\x9b", lines=True) == "a\nb\t\\x9b"


@pytest.mark.parametrize("lines", [False, True])
def test_no_control_character_and_no_turn_of_direction_is_left(lines):
    import unicodedata

    turns = {"LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI"}
    for code in range(sys.maxunicode + 1):
        letter = chr(code)
        if unicodedata.category(letter) == "Cc" or unicodedata.bidirectional(letter) in turns:
            assert (safe_for_terminal(letter, lines=lines) != letter) or (lines and letter in "\n\t")


def test_one_line():
    assert one_line(OSError(28, "No space left on device", "x")) == "No space left on device"
    assert one_line(ValueError("a\x1b[31m\nb")) == "a\\x1b[31m"
    assert one_line(ValueError()) == "ValueError"
    assert len(one_line(ValueError("x" * 1000))) == 200


def test_did_you_mean():
    assert did_you_mean("hous", ["house", "mouse"]) == "did you mean 'house'?"
    assert did_you_mean("xyz", ["house"], otherwise="check the path") == "check the path"
