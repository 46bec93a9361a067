"""SECURITY.md names the tests of its promises; they are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "SECURITY.md"


@pytest.mark.skipif(not PAGE.is_file(), reason="not in a checkout")
def test_every_promise_names_tests_that_exist():
    text = PAGE.read_text()
    paths = re.findall(r"`(tests/[^` ]+)`", text)
    assert len(paths) > 15
    assert [path for path in paths if not (ROOT / path).is_file()] == []
    for section in re.split(r"^## \d\. ", text, flags=re.MULTILINE)[1:]:
        assert "\nTests: `tests/" in section, section.partition("\n")[0]
