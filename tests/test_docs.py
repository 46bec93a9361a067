"""Pages that are made from the code are current, and what README says works."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def checkout() -> Path:
    if not (ROOT / "docs" / "cli.md").exists():
        pytest.skip("these tests read files of the checkout")
    return ROOT


def test_the_help_page_is_what_the_commands_print(checkout):
    spec = importlib.util.spec_from_file_location("make_cli", checkout / "docs" / "make_cli.py")
    make_cli = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_cli)
    assert (checkout / "docs" / "cli.md").read_text("utf-8") == make_cli.render(), (
        "run python docs/make_cli.py"
    )


def test_the_python_examples_of_readme_run(checkout, tmp_path, monkeypatch, capsys):
    text = (checkout / "README.md").read_text("utf-8")
    first, second = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "samples").symlink_to(checkout / "samples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMBEDKIT_ZOO", str(checkout / "zoo"))  # the second stands below the line that sets it
    names = {}
    exec(compile(first, "README.md", "exec"), names)
    assert "(3, 1280)" in capsys.readouterr().out
    exec(compile(second, "README.md", "exec"), names)
    assert len(names["labels"]) == 2 and all(0.1 <= p <= 1 for p in names["probabilities"])


def test_every_command_that_readme_names_exists(checkout):
    text = (checkout / "README.md").read_text("utf-8")
    page = (checkout / "docs" / "cli.md").read_text("utf-8")
    for command in re.findall(r"^(?:\.venv/bin/)?embedkit ((?:zoo )?[a-z]+)", text, re.MULTILINE):
        assert f"## embedkit {command}" in page, command
