"""The public surface, and what it may import and when."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import embedkit
from embedkit import errors


def python(code: str, **environment: str) -> str:
    """The output of a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


PACKAGES = ("embedkit", "embedkit.analysis", "embedkit.workflows")


def type_checking_block(path: str) -> dict[str, str]:
    """Name -> module of the imports below `if TYPE_CHECKING` of a file."""
    (block,) = [node for node in ast.parse(Path(path).read_text("utf-8")).body if isinstance(node, ast.If)]
    return {alias.name: node.module for node in block.body for alias in node.names}


@pytest.mark.parametrize("name", PACKAGES)
def test_one_mapping_says_what_is_public(name):
    package = importlib.import_module(name)
    assert package.__all__ == sorted(set(package.__all__))
    assert set(package.__all__) == set(package._MODULES)
    absolute = {public: f"{name}.{module}" for public, module in package._MODULES.items()}
    assert type_checking_block(package.__file__) == absolute
    for public, module in absolute.items():
        value = getattr(package, public)
        assert value is getattr(importlib.import_module(module), public)
        assert value.__module__ == module, f"{public} is defined in another module than the mapping says"
    assert set(dir(package)) - {"__version__"} == set(package.__all__)


def test_a_function_wins_over_the_module_of_its_name():
    """Whichever is imported first: the module, the function, or a module that imports either."""
    for first in ("import embedkit.analysis.lint", "embedkit.analysis.lint", "embedkit.lint"):
        code = f"""
import embedkit, embedkit.analysis
{first}
from embedkit.analysis import lint
import embedkit.analysis.lint
from embedkit.analysis.lint import LintReport
assert lint is embedkit.lint is embedkit.analysis.lint and callable(lint)
"""
        python(code)


def test_every_error_is_public_and_of_one_tree():
    for name in errors.__all__:
        assert issubclass(getattr(embedkit, name), embedkit.EmbedkitError)
    assert set(errors.__all__) <= set(embedkit.__all__)
    assert issubclass(embedkit.ImageError, ValueError)
    assert issubclass(embedkit.EntryNotFoundError, LookupError)
    assert issubclass(embedkit.MissingDependencyError, ImportError)


def test_names_that_do_not_exist():
    for name in PACKAGES:
        with pytest.raises(AttributeError, match=f"module '{name}' has no attribute 'load_model'"):
            importlib.import_module(name).load_model  # noqa: B018


def test_what_is_public_has_a_docstring():
    for name in embedkit.__all__:
        value = getattr(embedkit, name)
        assert inspect.getdoc(value), name
        if inspect.isclass(value):
            for method, function in inspect.getmembers(value, inspect.isfunction):
                assert method.startswith("_") or inspect.getdoc(function), f"{name}.{method}"


HEAVY = "('torch', 'torchvision', 'lightning', 'timm', 'onnx', 'embedkit.training', 'sklearn', 'scipy')"


def test_importing_and_encoding_never_import_torch(default_entry):
    code = f"""
import sys, embedkit, embedkit.analysis, embedkit.workflows
assert not {{'numpy', 'PIL', 'pyarrow', 'onnxruntime'}} & set(sys.modules), 'import embedkit is not light'
for package in (embedkit, embedkit.analysis, embedkit.workflows):
    for name in package.__all__: getattr(package, name)
import numpy
rows = embedkit.load_encoder(threads=1).encode(numpy.zeros((9, 9, 3), numpy.uint8))
assert rows.shape == (1, 1280)
print([name for name in {HEAVY} if name in sys.modules])
"""
    assert python(code) == "[]\n"


def test_the_help_page_imports_nothing_heavy():
    code = f"""
import sys
from embedkit.cli import main
sys.argv = ['embedkit', '--help']
try: main()
except SystemExit as end: assert not end.code
print([n for n in ('numpy', 'pyarrow', 'PIL', 'onnxruntime', 'rich', *{HEAVY}) if n in sys.modules])
"""
    lines = python(code).splitlines()
    assert lines[-1] == "[]"
    assert any("embed" in line for line in lines)


def test_the_help_page_is_quick():
    command = Path(sys.executable).with_name("embedkit")
    if not command.exists():
        pytest.skip("the package is not installed beside this interpreter")
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([command, "--help"], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    # The aim is 0.3 s of wall time. CPU seconds are the same on an idle machine (0.08 measured) and do not wait
    # for others on a busy one; twice the aim leaves room for slow machines.
    assert statistics.median(seconds) < 0.6
