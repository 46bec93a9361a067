"""Every public function, class and method has an example in its docstring, and the examples are true.

They run in a folder of their own, as after `embedkit embed samples/ -o samples.parquet`, with `embedkit` and `np`
imported. `things/` has a folder for each of ten things with four images of it, `things.parquet` their embeddings with
the label column `thing`, and `calibration.json` a calibration on them.
"""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import inspect
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import embedkit
from embedkit.errors import MissingDependencyError

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "zoo").is_dir(), reason="the samples and the zoo are not here")

OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def public() -> dict[str, Any]:
    """Qualified name -> each public function, class, and method that a class has of its own."""
    found: dict[str, Any] = {}
    for package in ("embedkit", "embedkit.analysis", "embedkit.workflows"):
        module = importlib.import_module(package)
        for name in module.__all__:
            value = getattr(module, name)
            if value in found.values():
                continue  # exported by two packages
            found[f"{package}.{name}"] = value
            if inspect.isclass(value):
                methods = {
                    key: getattr(value, key) for key in vars(value) if key == "__getitem__" or key[0] != "_"
                }
                found |= {
                    f"{package}.{name}.{key}": it for key, it in methods.items() if inspect.isroutine(it)
                }
    return found


PUBLIC = public()


class Runner(doctest.DocTestRunner):
    """Stops at a package that an extra would have installed."""

    def report_unexpected_exception(self, out, test, example, exc_info):
        if issubclass(exc_info[0], MissingDependencyError):
            pytest.skip(str(exc_info[1]))
        super().report_unexpected_exception(out, test, example, exc_info)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Iterator[Path]:
    """The files that examples read."""
    folder = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("samples").symlink_to(ROOT / "samples")
        embedkit.embed("samples/", "samples.parquet")
        for path in sorted(Path("samples").glob("*.jpg")):
            image = Image.open(path).convert("RGB").resize((300, 300))
            (folder / "things" / path.stem).mkdir(parents=True)
            for turn in range(4):
                left, top = 10 * (turn % 2), 10 * (turn // 2)
                image.crop((left, top, left + 285, top + 285)).save(f"things/{path.stem}/{turn}.png")
        embedkit.embed("things/", "all.parquet")
        table = embedkit.Embeddings.load("all.parquet")
        things = [name.split("/")[1] for name in table.ids]
        dataclasses.replace(table, labels={"thing": things}).save("things.parquet")
        os.remove("all.parquet")
        pairs = embedkit.analysis.sample_pairs(things)
        embedkit.analysis.calibrate_pairs(table, pairs, 0.1, replicates=50).save("calibration.json")
        yield folder


@pytest.fixture
def here(prepared, tmp_path, monkeypatch) -> None:
    """A working folder with these files, and the checkout's zoo."""
    for path in prepared.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMBEDKIT_ZOO", str(ROOT / "zoo"))
    monkeypatch.setattr("embedkit.hub.download.PAUSE", 0.0)


def test_every_public_name_has_an_example():
    missing = [name for name, value in PUBLIC.items() if ">>>" not in (value.__doc__ or "")]
    assert not missing


@pytest.mark.parametrize("name", PUBLIC)
def test_the_example_is_true(name, here):
    text = inspect.cleandoc(PUBLIC[name].__doc__)
    test = doctest.DocTestParser().get_doctest(
        text, {"embedkit": embedkit, "np": np}, name, inspect.getsourcefile(PUBLIC[name]), 0
    )
    said: list[str] = []
    outcome = Runner(optionflags=OPTIONS).run(test, out=said.append)
    assert outcome.failed == 0, "".join(said)
