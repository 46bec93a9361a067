"""A missing package becomes one sentence with the command that installs it."""

from __future__ import annotations

import importlib
import sys

import pytest

from embedkit._io import optional
from embedkit._io.optional import install_hint, requires
from embedkit.errors import MissingDependencyError


def test_the_sentence_names_package_reason_purpose_and_command():
    with pytest.raises(MissingDependencyError) as caught, requires("a chart", "charts"):
        importlib.import_module("no_such_package.charts")
    assert str(caught.value) == (
        "no_such_package cannot be imported (No module named 'no_such_package'), and a chart needs it: "
        "pip install '.[charts]' in a checkout of embedkit"
    )


def test_a_package_of_no_extra_is_installed_by_its_own_name():
    with pytest.raises(MissingDependencyError, match="needs it: pip install no-such-package, or none$"):
        with requires("a chart", package="no-such-package", note=", or none"):
            importlib.import_module("no_such_package")


def test_the_hint_follows_the_registered_name(monkeypatch):
    assert install_hint("train,cpu") == "pip install '.[train,cpu]' in a checkout of embedkit"
    monkeypatch.setattr(optional, "DISTRIBUTION", "some-name")
    assert install_hint("train,cpu") == "pip install 'some-name[train,cpu]'"


def test_an_installed_package_that_is_broken_says_why(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("raise ImportError('libX.so: cannot open\\nsecond line')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingDependencyError, match=r"\(libX.so: cannot open\), and a chart needs it"):
        with requires("a chart", "charts", package="broken-package"):
            importlib.import_module("broken_package")


def test_a_fault_of_embedkit_itself_is_not_blamed_on_a_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "embedkit.hub.folder", None)
    with pytest.raises(ImportError) as caught, requires("a chart", "charts"):
        importlib.import_module("embedkit.hub.folder")
    assert not isinstance(caught.value, MissingDependencyError)
    first = MissingDependencyError("the inner one")
    with pytest.raises(MissingDependencyError, match="^the inner one$"), requires("a chart", "charts"):
        raise first
