"""Shell completion, as the scripts that `embedkit --show-completion` prints ask for it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from zoos import NO_SOCKETS

from embedkit.analysis.clustering.cluster import ALGORITHMS
from embedkit.images.transform import DECODE_MODES
from embedkit.model.providers import PRECISIONS
from embedkit.pipeline.options import DTYPES, ON_ERROR
from embedkit.workflows.visual.atlas import MAPS
from tests.cli.test_options import ALL

COMMAND = [sys.executable, "-c", NO_SOCKETS + "from embedkit.cli import main; main()"]


@pytest.fixture
def local_zoo(by_hand, tmp_path, monkeypatch) -> Path:
    """A zoo of two entries, which the environment names."""
    for name in ("linear-tiny.noise", "linear-far.noise"):
        by_hand.TinyEntry().write(tmp_path / "zoo" / name)
    by_hand.write_index(tmp_path / "zoo")
    monkeypatch.setenv("EMBEDKIT_ZOO", str(tmp_path / "zoo"))
    return tmp_path / "zoo"


def complete(line: str, **environment: str) -> list[str]:
    """What bash is offered for the last word of a line."""
    words = line.split(" ")
    asked = {"_EMBEDKIT_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    done = subprocess.run(COMMAND, capture_output=True, text=True, env={**os.environ, **asked, **environment})
    assert done.stderr == ""
    return done.stdout.split()


def test_commands_and_options(local_zoo):
    assert complete("embedkit zoo ver") == ["verify"]
    assert complete("embedkit dupl") == ["duplicates"]
    assert complete("embedkit search a.jpg e.parquet --dr") == ["--draw-sheet"]


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("embedkit cluster e.parquet --algorithm ", ALGORITHMS),
        ("embedkit embed p --on-error ", ON_ERROR),
        ("embedkit embed p --dtype ", DTYPES),
        ("embedkit embed p --precision ", PRECISIONS),
        ("embedkit embed p --decode ", DECODE_MODES),
        ("embedkit atlas e.parquet --map ", MAPS),
    ],
)
def test_values_of_an_option(line, values):
    """Those that the library takes, all of them."""
    command, option = line.split()[1], line.split()[-1]
    [parameter] = [one for one in ALL[command].params if option in one.opts]
    assert sorted(parameter.metavar.split("|")) == sorted(values)
    [first] = [one for one in complete(f"{line}{values[0]}") if one == values[0]]
    assert first in complete(line)


@pytest.mark.parametrize(
    "line", ["embedkit embed p --encoder linear-", "embedkit zoo info linear-", "embedkit zoo pull x linear-"]
)
def test_names_of_entries_without_a_connection(local_zoo, line):
    names = ["linear-far", "linear-far.noise", "linear-tiny", "linear-tiny.noise"]
    assert complete(line) == names
    assert complete(line.replace(" linear-", " supervised-eff")) == [  # of the package itself
        "supervised-efficientnet_lite0",
        "supervised-efficientnet_lite0.in1k",
    ]
    remote = f"https://127.0.0.1:9/zoo,{local_zoo}"  # it is not asked, and hides no other zoo
    assert complete(line, EMBEDKIT_ZOO=remote) == names


def test_names_of_the_zoo_that_the_line_names(local_zoo, tmp_path):
    shutil.copytree(local_zoo, tmp_path / "other")
    names = complete(f"embedkit zoo info --zoo {tmp_path / 'other'} linear-f", EMBEDKIT_ZOO="")
    assert names == ["linear-far", "linear-far.noise"]
    assert complete("embedkit zoo info --zoo /no/such linear-f") == []


def test_a_completion_takes_less_than_half_a_second(local_zoo):
    """CPU seconds, which do not count the wait for a busy machine; the least of three."""
    spent = []
    for _ in range(3):
        before = os.times()
        assert complete("embedkit embed p --encoder linear-t")
        after = os.times()
        spent.append(
            after.children_user + after.children_system - before.children_user - before.children_system
        )
    assert min(spent) < 0.5


def script_of(shell: str) -> str:
    environment = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    return subprocess.run(
        [*COMMAND, "--show-completion", shell], capture_output=True, text=True, env=environment, check=True
    ).stdout


@pytest.mark.parametrize(
    ("shell", "words"),
    [("bash", "complete -o default -F"), ("zsh", "#compdef embedkit"), ("fish", "complete")],
)
def test_the_script_of_a_shell(shell, words):
    script = script_of(shell)
    assert words in script and "_EMBEDKIT_COMPLETE" in script


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_a_real_bash_completes(local_zoo, tmp_path):
    (tmp_path / "completion.sh").write_text(script_of("bash"))
    program = tmp_path / "bin" / "embedkit"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\n{COMMAND[-1]}")
    program.chmod(0o755)
    script = f"""
    PATH={program.parent}:$PATH
    source {tmp_path / "completion.sh"}
    COMP_WORDS=(embedkit zoo info linear-t); COMP_CWORD=3
    _embedkit_completion embedkit
    echo "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "--norc", "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["linear-tiny", "linear-tiny.noise"], done.stderr
