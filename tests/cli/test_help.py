"""Every help has examples, and each of them does what it says on files of this test."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer.main
from PIL import Image, ImageOps
from servers import Hub

from embedkit import cli
from embedkit.cli.app import STATUSES, examples_of
from tests.cli.test_options import ALL

ROOT = Path(__file__).parents[2]
ENTRIES = ("simclr-r10.fmnist", "supervised-r10.fmnist", "vae-r10.fmnist")
#: Examples that need hours, a network, a run or what was made of one: the command's own parser reads them.
PARSED = ("train", "evaluate", "classify", "export runs/", "import", "publish runs/")
#: What must be there before others read it.
FIRST = (
    "embed",
    "calibrate people.parquet",
    "cluster photos.parquet -n",
    "publish",
    "zoo bundle simclr",
    "zoo pull",
)
#: Examples that find something on these files: two images do not match, photographs leak, and some are near-duplicates.
FIND = (
    "verify cat.jpg coffee.jpg",
    "leaks train.parquet test.parquet --threshold 0.97 --fail",
    "lint photos.parquet --fail",
)
SHELL = re.compile(r"[|<>&]| [^' ]*\*")


GROUPS = {"": typer.main.get_command(cli.app)}
GROUPS["zoo"] = GROUPS[""].commands["zoo"]


def all_examples() -> list[str]:
    found = dict.fromkeys(
        one for command in (*ALL.values(), *GROUPS.values()) for one in examples_of(command)
    )
    rank = {
        example: next((at for at, start in enumerate(FIRST) if example.startswith(f"embedkit {start}")), 99)
        for example in found
    }
    return sorted(found, key=rank.__getitem__)


def is_only_parsed(example: str) -> bool:
    return example.removeprefix("embedkit ").startswith(PARSED) and "--list" not in example


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    """Photographs, people, a zoo, a hub, and a shell that finds `embedkit`."""
    if not (ROOT / "samples").is_dir():
        pytest.skip("the examples run on the samples and the zoo of the checkout")
    pytest.importorskip("scipy", reason="pip install '.[analysis]'")
    pytest.importorskip("sklearn", reason="pip install '.[analysis]'")
    pytest.importorskip("huggingface_hub", reason="pip install '.[hub]'")
    folder = tmp_path_factory.mktemp("examples")
    rng = np.random.default_rng(0)
    for name in ("photos", "holiday", "bin"):
        (folder / name).mkdir()
    for path in sorted((ROOT / "samples").glob("*.jpg")):
        image = Image.open(path).convert("RGB").resize((160, 120))
        for number, variant in enumerate((image, ImageOps.mirror(image), image.crop((20, 10, 140, 110)))):
            variant.save(folder / "photos" / f"{path.stem}-{number}.jpg")
        image.save(folder / "holiday" / path.name)
    for name in ("cat.jpg", "cat-closer.jpg", "coffee.jpg"):
        shutil.copy(ROOT / "samples" / name, folder)
    for person in range(40):
        (folder / "people" / f"p{person:02}").mkdir(parents=True)
        face = rng.integers(0, 256, (4, 4, 3))
        for shot in range(3):
            pixels = np.clip(face + rng.normal(0, 20, face.shape), 0, 255).astype(np.uint8)
            image = Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC)
            image.save(folder / "people" / f"p{person:02}" / f"{shot}.png")
    for name in ENTRIES:
        shutil.copytree(ROOT / "zoo" / name, folder / "zoo" / name)
    script = folder / "bin" / "embedkit"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -c "from embedkit.cli import main; main()" "$@"\n')
    script.chmod(0o755)
    hub = Hub()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
        patch.setenv("EMBEDKIT_CACHE", str(folder / "cache"))
        patch.setenv("EMBEDKIT_ZOO", str(folder / "zoo"))
        patch.setenv("EMBEDKIT_TOKEN", "hf_writer")
        patch.setenv("HF_ENDPOINT", hub.url)
        patch.setenv("HF_HOME", str(folder / "hf"))
        run("publish", "--to", "zoo")
        run("embed", "photos", "-o", "train.parquet")
        run("embed", "holiday", "-o", "test.parquet")
        run("embed", "people", "-o", "people.parquet")
        table = pq.read_table("train.parquet").replace_schema_metadata()
        pq.write_table(table.filter(pa.array([True, False] * (len(table) // 2))), "filtered.parquet")
        yield folder
    hub.close()


def run(*arguments: str) -> int:
    """The command line in this process: its exit status."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(sys, "argv", ["embedkit", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
    return int(end.value.code or 0)


@pytest.mark.parametrize("name", ALL)
def test_every_help_has_one_to_three_examples_of_itself(name):
    examples = examples_of(ALL[name])
    assert 1 <= len(examples) <= 3
    for example in examples:
        assert re.search(rf"(^|\| )embedkit {name} ?", example) and len(example) <= 90, example


@pytest.mark.parametrize("name", GROUPS)
def test_groups_have_examples_too(name, capsys):
    examples = examples_of(GROUPS[name])
    assert examples and run(*name.split(), "--help") == 0
    shown = capsys.readouterr().out
    assert all(f"    {example}\n" in shown and example.startswith("embedkit ") for example in examples)


@pytest.mark.parametrize("example", all_examples())
def test_an_example_runs(folder, example, capfd):
    if is_only_parsed(example):
        name, *words = shlex.split(example)[1:]
        with ALL[name].make_context(name, words) as parsed:
            assert parsed.params["quiet"] is False
        return
    if example.startswith("embedkit train"):
        pytest.importorskip("torch")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    if SHELL.search(example):
        status = subprocess.run(["sh", "-c", example], timeout=120).returncode
    else:
        status = run(*shlex.split(example)[1:])
    out, err = capfd.readouterr()
    assert status == (3 if example.removeprefix("embedkit ").startswith(FIND) else 0), err
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert out or after != before, "it prints something, or writes a file"
    for path in re.findall(r"(?:-o|>|--write-\S+|--draw-\S+|--copy-into|--to) (\S+)", example):
        assert path.startswith("hf://") or (folder / path).exists(), path


def test_most_examples_run():
    examples = all_examples()
    parsed = [example for example in examples if is_only_parsed(example)]
    assert len(examples) >= 40 and len(parsed) <= 12, parsed


def test_commands_end_with_these_statuses_alone():
    used = {
        node.args[0].value
        for file in Path(cli.__file__).parent.glob("*.py")
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "Exit" and node.args
    }
    assert used == {1, 3} <= STATUSES.keys()


def test_the_exit_statuses_stand_in_the_help(capsys):
    assert run("--help") == 0
    text = capsys.readouterr().out
    for status, words in STATUSES.items():
        assert re.search(rf"^ +{status} +{re.escape(words)}$", text, re.MULTILINE)
    assert set(STATUSES) == {0, 1, 2, 3, 130}
