"""Which licenses ask first, and what is said of them."""

from __future__ import annotations

import dataclasses

import pytest

from embedkit.errors import ConfigError
from embedkit.hub.cache import Arrival, open_only
from embedkit.hub.licenses import OPEN_LICENSES, is_open, may_bind, restriction

OPEN = """
mit apache-2.0 bsd-3-clause cc0-1.0 cc-by-4.0 Apache-2.0 BSD-2-Clause CC-BY-SA-4.0 NCSA ISC GPL-3.0-or-later lgpl-2.1+
""".split()


@pytest.mark.parametrize(
    "license",
    [
        *OPEN,
        "MIT OR CC-BY-NC-4.0",
        "Apache-2.0 WITH LLVM-exception",
        "MIT AND BSD-3-Clause",
        "(MIT OR Apache-2.0)",
        " mit ",
    ],
)
def test_open_ones_do_not_ask(license):
    assert is_open(license) and restriction(license) == "" and not may_bind(license)
    open_only(Arrival(name="a", zoo="z", license=license, bytes=1))


@pytest.mark.parametrize(
    ("license", "what"),
    [
        ("apple-amlr", "allows research only"),
        ("seer-license", "forbids commercial use"),
        ("dinov3-license", "has custom terms"),
        ("gemma", "has custom terms"),
        ("llama3.2", "has custom terms"),
        ("creativeml-openrail-m", "has custom terms, which restrict uses"),
        ("nvidia-open-model-license", "has custom terms"),
        ("cc-by-nc-4.0", "forbids commercial use"),
        ("CC-BY-NC-SA-4.0", "forbids commercial use"),
        ("PolyForm-Noncommercial-1.0.0", "forbids commercial use"),
        ("InsightFace, non-commercial research", "forbids commercial use"),
        ("msr-research-license", "allows research only"),
        ("cc-by-nd-4.0", "forbids changed versions"),
        ("other", "names no license"),
        ("unknown", "names no license"),
        ("BSD-3-Clause-No-Nuclear-License", "is not on the list of open licenses"),
        ("mitten", "is not on the list of open licenses"),
        ("my own", "is not on the list of open licenses"),
        ("MIT AND CC-BY-NC-4.0", "forbids commercial use"),
        ("(MIT OR gemma)", "has custom terms"),
        ("MIT AND (gemma)", "has custom terms"),
    ],
)
def test_everything_else_asks_and_is_named(license, what):
    assert not is_open(license) and restriction(license) == what
    arrival = Arrival(name="a-b.c", zoo="hf://team", license=license, bytes=1)
    with pytest.raises(ConfigError) as caught:
        open_only(arrival)
    expected = f"a-b.c of hf://team is under {license}, which {what}: to accept this, pull it with "
    assert str(caught.value) == (f"{expected}`embedkit zoo pull a-b.c --zoo hf://team --accept-license`")
    open_only(dataclasses.replace(arrival, license="MIT"))


def test_a_license_that_names_none_binds_nothing():
    assert not may_bind("other") and not may_bind("Unknown") and may_bind("gemma") and may_bind("my own")


def test_no_open_license_forbids_anything_by_its_name():
    assert all(name == name.casefold() for name in OPEN_LICENSES)
    assert not [name for name in OPEN_LICENSES if {"nc", "nd", "research"} & set(name.split("-"))]
