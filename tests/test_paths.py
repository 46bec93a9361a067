"""Paths that the system refuses to look at: too long, a loop of links, the home of a user that does not exist."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import embedkit
from embedkit import cli
from embedkit.hub.cache import Cache

PACKAGE = Path(embedkit.__file__).parent
#: A name that no file system takes.
LONG = "a" * 300
#: Where `pathlib` raises what the system says of such a name, `os.path` answers no.
QUESTIONS = ("exists", "is_dir", "is_file", "is_symlink")


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run a command in an empty folder -> its exit status and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["embedkit", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return int(end.value.code or 0), capsys.readouterr().err

    return call


@pytest.mark.parametrize(
    "arguments",
    [
        ("embed", ".", "-o", f"{LONG}.parquet"),
        ("search", "cat.jpg", f"{LONG}.parquet"),
        ("cluster", LONG),
        ("export-onnx", LONG, "-o", "encoder.onnx"),
        ("zoo", "unpublish", "simclr-r10.fmnist", "--zoo", LONG),
    ],
    ids=lambda arguments: " ".join(part for part in arguments if LONG not in part),
)
def test_a_name_that_is_too_long_is_one_sentence(run, arguments):
    status, error = run(*arguments)
    assert status == 1
    assert error.startswith("embedkit: ") and error.count("\n") == 1


def test_a_loop_of_links_is_one_sentence(run, tmp_path):
    Path("images.parquet").touch()
    Path("loop").symlink_to("loop")
    status, error = run("cluster", "images.parquet", "--copy-into", "loop", "-o", "loop/clusters.parquet")
    assert status == 2
    assert error.startswith("embedkit: ") and error.count("\n") == 1


def test_a_cache_in_the_home_of_no_user(tmp_path):
    assert Cache("~no-such-user/cache").revisions("simclr-r10.fmnist") == []


def test_questions_about_paths_go_to_os_path():
    sources = [
        file for folder in (PACKAGE, PACKAGE.parent / "training") for file in sorted(folder.rglob("*.py"))
    ]
    asked = [
        f"{file}:{node.lineno}: {ast.unparse(node)}"
        for file in sources
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in QUESTIONS
        and not node.args
        and ast.unparse(node.func.value) != "entry"  # os.DirEntry
    ]
    assert len(sources) > 100
    assert asked == []
