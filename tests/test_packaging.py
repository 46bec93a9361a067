"""The wheel holds every package of the tree, and no other."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(not (ROOT / "embedkit").is_dir(), reason="the sources are not here")
def test_every_package_is_in_the_wheel():
    with open(ROOT / "pyproject.toml", "rb") as file:
        tool = tomllib.load(file)["tool"]["setuptools"]
    found = {
        ".".join((home, *path.parent.relative_to(ROOT / folder).parts))
        for home, folder in tool["package-dir"].items()
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert tool["packages"] == sorted(found)
